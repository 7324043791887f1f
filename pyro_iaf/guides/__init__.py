"""Guides that write themselves from a model."""
