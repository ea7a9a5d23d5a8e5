"""A diffusers pipeline as a policy: its steps, their densities, its LoRA."""
