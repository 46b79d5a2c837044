"""The page of a run, and one picture, built from its folder or its bundle alone."""
