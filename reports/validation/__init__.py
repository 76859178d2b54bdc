"""One JSON for each measured run, the plans they were predicted by, and the tools that make both."""
