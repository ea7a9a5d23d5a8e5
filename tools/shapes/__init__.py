"""Training of the embedded model and its rewards from scratch, and writing of its prompt files."""
