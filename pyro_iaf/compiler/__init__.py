"""PyTorch alone: record a function, lower it, keep it."""
