"""Pictures and the one-page summary of a run, built from its folder alone."""
