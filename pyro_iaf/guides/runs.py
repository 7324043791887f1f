"""Runs of latents along the axes of their sites, of which sums may be better coordinates."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

__all__ = ["SHORTEST_RUN", "axes", "before_along", "blocks"]

# Along an axis of so many numbers sums are tried as coordinates.
SHORTEST_RUN = 10


def blocks(shapes: Sequence[torch.Size]) -> Iterator[tuple[int, torch.Size]]:
    """The first place and the shape of each site."""
    ends = itertools.accumulate(shape.numel() for shape in shapes)
    for shape, end in zip(shapes, ends, strict=True):
        yield end - shape.numel(), shape


def axes(shape: torch.Size) -> Iterator[Tensor]:
    """Runs along each long axis of a site, as rows of a matrix of places."""
    places = torch.arange(shape.numel()).view(shape)
    for dim, length in enumerate(shape):
        if length >= SHORTEST_RUN:
            yield places.movedim(dim, -1).reshape(-1, length)


def before_along(before: Tensor, start: int, shape: torch.Size, run: Tensor) -> Tensor:
    """Of each latent the one before it in a run, or D; with these runs of a site."""
    found = before.clone()
    found[start : start + shape.numel()] = len(before)
    found[start + run[:, 1:]] = start + run[:, :-1]
    return found
