"""Metrics, plots and reports of runs."""
