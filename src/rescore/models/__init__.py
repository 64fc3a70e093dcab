"""From weights to a denoiser."""
