"""Warnings that point at the user's line, however deep in the package they are given."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path

import pyro
import torch

__all__ = ["warn"]

LIBRARIES = tuple(
    f"{Path(module).parent}{os.sep}" for module in (torch.__file__, pyro.__file__, __file__)
)


def warn(message: str) -> None:
    """Gives a UserWarning at the line that called into the package."""
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_code.co_filename.startswith(LIBRARIES):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, UserWarning, stacklevel=level)
