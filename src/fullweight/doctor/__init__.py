"""Whether a machine, and every machine of a job, is ready to train: facts, checks of them, short self-tests."""
