"""What a fleet costs by itself (docs/evidence/scaling.md)."""
