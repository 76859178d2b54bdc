"""Averages of what is trained, kept beside it."""
