"""The commands except `run`: one file each, with a `main(argv)` that returns an exit code."""
