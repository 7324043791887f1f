"""Objectives and their gradients."""
