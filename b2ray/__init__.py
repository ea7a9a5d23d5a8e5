"""b2ray: B²-DiffuRL fine-tuning of text-to-image diffusion models on Ray."""

__version__ = "0.1.0"
