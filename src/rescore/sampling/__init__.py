"""Denoiser and process to trajectory."""
