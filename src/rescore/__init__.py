"""RL fine-tuning of diffusion models, with gradients you can trust."""

__version__ = "0.1.0"
