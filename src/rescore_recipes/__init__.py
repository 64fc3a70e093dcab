"""Recipes: functions that return a run; they import everything and own nothing."""
