"""A diffusers pipeline as a policy: its denoising steps, their log-densities, and its LoRA."""
