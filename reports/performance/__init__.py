"""How long planning takes: `python -m reports.performance.measure` writes the record, `reports.render` the page."""
