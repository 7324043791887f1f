"""Run a fit to its end."""
