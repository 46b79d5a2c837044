"""Training state on disk (`store`) and models under the published names (`hf`)."""
