"""Prompts, rewards, splits and metrics, one file per task."""
