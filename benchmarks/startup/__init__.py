"""How long a run takes until its first rollout (docs/evidence/performance.md)."""
