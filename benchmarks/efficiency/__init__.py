"""What B²-DiffuRL is worth beside other algorithms (docs/evidence/comparison.md)."""
