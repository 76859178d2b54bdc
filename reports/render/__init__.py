"""Writes what the documentation takes from code and records: `python -m reports.render`."""
