"""Triangular mathematics: inverses, implicit gradients, scores along a pass."""
