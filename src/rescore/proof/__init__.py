"""Exact gradients on worlds small enough to enumerate."""
