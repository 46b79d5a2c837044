"""One training step of every role of a large layout, traced on one machine without its memory."""
