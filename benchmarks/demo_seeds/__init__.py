"""What the demo reaches with several seeds (docs/tutorials/laptop.md)."""
