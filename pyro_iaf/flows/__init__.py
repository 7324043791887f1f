"""Bijections on vectors, and what remembers their passes."""
