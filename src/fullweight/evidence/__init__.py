"""What a run proves about itself, and how it is checked."""
