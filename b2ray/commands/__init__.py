"""The commands beside `run`: a file each, with `main(argv)` that returns an exit code."""
