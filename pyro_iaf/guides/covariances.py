"""Covariances that the curvature of a density tells, or the steps of a climb."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

__all__ = ["Dense", "LowRank", "Spread"]

# Directions of less curvature than this share of the largest have none.
FLAT = 1e-8


class Spread(Protocol):
    """A covariance."""

    @property
    def scale(self) -> Tensor:
        """The scales of the best normals without correlations: of each latent given the others."""

    @property
    def log_det_root(self) -> Tensor: ...

    def shrunk(self, factor: float) -> Spread:
        """The same with smaller scales."""

    def stretch(self, noise: Tensor) -> Tensor:
        """Noise of shape ``(..., D)``, with this covariance."""

    def times(self, v: Tensor) -> Tensor:
        """The covariance times a vector."""


class Dense(NamedTuple):
    """A covariance ``L L^T`` with a lower-triangular ``L``."""

    root: Tensor

    @classmethod
    def of_precision(cls, precision: Tensor, reach: Callable[[Tensor], Tensor]) -> Dense:
        """The covariance of a precision, whose negative directions count as positive ones.

        That is settled for latents in units of their own, so that units make no difference.

        Args:
            precision: Of shape ``(D, D)``.
            reach: The scales along directions of shape ``(J, D)`` in which there is no precision.
        """
        biggest = precision.abs().amax(-1)
        biggest = torch.where(biggest > 0, biggest, 1.0)
        unit = precision.diagonal().abs()
        unit = torch.where(unit > 1e-14 * biggest, unit, biggest).sqrt()
        scaled, axes = torch.linalg.eigh(precision / unit / unit.unsqueeze(-1))
        scaled = scaled.abs()
        flat = scaled <= FLAT * scaled.max()
        if flat.any():
            ways = axes.mT[flat] / unit
            scaled[flat] = torch.maximum(scaled[flat], reach(ways) ** -2)
        root = torch.linalg.qr((axes * scaled.rsqrt() / unit.unsqueeze(-1)).mT, mode="r")[1].mT
        return cls(root * root.diagonal().sign())

    @property
    def scale(self) -> Tensor:
        return torch.cholesky_inverse(self.root).diagonal().rsqrt()

    @property
    def log_det_root(self) -> Tensor:
        return self.root.diagonal().log().sum()

    def shrunk(self, factor: float) -> Dense:
        return Dense(factor * self.root)

    def stretch(self, noise: Tensor) -> Tensor:
        return noise @ self.root.mT

    def times(self, v: Tensor) -> Tensor:
        return self.root @ (self.root.mT @ v)


class LowRank:
    r"""The inverse Hessian that a path's last steps tell, by L-BFGS.

    It is ``A (I + Q (B - I) Q^T) A`` with a diagonal ``A``, orthonormal axes ``Q`` and a diagonal
    ``B``, of which there are twice as many as steps.
    """

    def __init__(self, squares: Tensor, steps: list[tuple[Tensor, Tensor]]) -> None:
        self.squares, self.steps = squares, steps  # the squares of A; changes of point and slope

    @functools.cached_property
    def _factors(self) -> tuple[Tensor, Tensor, Tensor]:
        """``A``, ``Q`` and the diagonal of ``B``."""
        root = self.squares.sqrt()
        if not self.steps:
            return root, root.new_zeros(len(root), 0), root.new_zeros(0)
        # Byrd, Nocedal and Schnabel (1994), theorem 2.2, in units of A.
        S = torch.stack([s for s, _ in self.steps], -1) / root.unsqueeze(-1)
        Y = torch.stack([y for _, y in self.steps], -1) * root.unsqueeze(-1)
        R = (S.mT @ Y).triu()
        basis, _ = torch.linalg.qr(torch.cat([S, Y], -1))
        W = torch.linalg.solve_triangular(R, S.mT @ basis, upper=True)
        cross = W.mT @ (Y.mT @ basis)
        middle = W.mT @ (R.diagonal().diag() + Y.mT @ Y) @ W - cross - cross.mT
        values, vectors = torch.linalg.eigh(middle)
        return root, basis @ vectors, (1 + values).clamp(min=1e-12)

    @property
    def scale(self) -> Tensor:
        root, axes, values = self._factors
        return root * (1 + (axes.square() * (1 / values - 1)).sum(-1)).rsqrt()

    @property
    def log_det_root(self) -> Tensor:
        root, _, values = self._factors
        return root.log().sum() + values.log().sum() / 2

    def shrunk(self, factor: float) -> LowRank:
        steps = [(s * factor, y / factor) for s, y in self.steps]
        return self if factor == 1 else LowRank(self.squares * factor**2, steps)

    def stretch(self, noise: Tensor) -> Tensor:
        root, axes, values = self._factors
        return (noise + noise @ axes * (values.sqrt() - 1) @ axes.mT) * root

    def times(self, v: Tensor) -> Tensor:
        # The two loops of L-BFGS (Nocedal and Wright 2006, algorithm 7.4), without the factors.
        shares = []
        for s, y in reversed(self.steps):
            shares.append((s @ v) / (s @ y))
            v = v - shares[-1] * y
        v = v * self.squares
        for (s, y), share in zip(self.steps, reversed(shares), strict=True):
            v = v + (share - (y @ v) / (s @ y)) * s
        return v
