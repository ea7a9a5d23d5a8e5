"""What a stage costs beside its UNet evaluations (docs/evidence/performance.md)."""
