"""What noise does: schedules, noising, reverse steps and their log-probabilities."""
