"""Measurements behind the documentation's figures: one folder for each claim.

Each is started from the repository's root, as `python -m benchmarks.FOLDER` or
`python -m benchmarks.FOLDER.SCRIPT`, and says with `--help` what it measures.
"""
