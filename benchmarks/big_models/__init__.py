"""What a stage reaches on models of Stable Diffusion's shapes (docs/howto/models.md)."""
