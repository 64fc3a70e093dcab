"""What an output is worth."""
