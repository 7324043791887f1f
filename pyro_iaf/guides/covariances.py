"""Covariances from the curvature of a log density, or from the steps of a path uphill."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Covariance", "Dense", "LowRank", "unit_reach"]

# A direction counts as flat if its curvature is below this share of the largest.
FLAT = 1e-8


def unit_reach(axes: Tensor) -> Tensor:
    """A reach of one along all directions, for :meth:`Dense.of_precision`."""
    return axes.new_ones(len(axes))


class Dense(NamedTuple):
    """A covariance ``L L^T`` with a lower-triangular ``L``."""

    root: Tensor

    @classmethod
    def of_precision(cls, precision: Tensor, reach: Callable[[Tensor], Tensor]) -> Dense:
        """The inverse of a precision, whose negative eigenvalues count as positive ones.

        Eigenvalues are taken after each latent is scaled, so the units of latents don't matter.

        Args:
            precision: Of shape ``(D, D)``.
            reach: Gives the scales along directions of shape ``(J, D)`` that are flat.
        """
        biggest = precision.abs().amax(-1)
        biggest = torch.where(biggest > 0, biggest, 1.0)
        unit = precision.diagonal().abs()
        unit = torch.where(unit > 1e-14 * biggest, unit, biggest).sqrt()
        values, axes = torch.linalg.eigh(precision / unit / unit.unsqueeze(-1))
        values = values.abs()
        flat = values <= FLAT * values.max()
        if flat.any():
            values[flat] = torch.maximum(values[flat], reach(axes.mT[flat] / unit) ** -2)
        root = torch.linalg.qr((axes * values.rsqrt() / unit.unsqueeze(-1)).mT, mode="r")[1].mT
        return cls(root * root.diagonal().sign())

    @property
    def scale(self) -> Tensor:
        """The standard deviation of each latent given the others."""
        return torch.cholesky_inverse(self.root).diagonal().rsqrt()

    @property
    def log_det_root(self) -> Tensor:
        """Half the log-determinant of the covariance."""
        return self.root.diagonal().log().sum()

    def shrunk(self, factor: float) -> Dense:
        """The same with scales times ``factor``."""
        return Dense(factor * self.root)

    def stretch(self, noise: Tensor) -> Tensor:
        """Noise of shape ``(..., D)``, with this covariance."""
        return noise @ self.root.mT

    def times(self, v: Tensor) -> Tensor:
        """The covariance times a vector."""
        return self.root @ (self.root.mT @ v)


class LowRank:
    r"""The inverse Hessian that L-BFGS makes from a path's last steps, with methods as above.

    It is ``A (I + Q (B - I) Q^T) A`` with a diagonal ``A``, two orthonormal axes in ``Q`` for each
    step, and a diagonal ``B``.

    Args:
        variances: The diagonal of ``A^2``, of shape ``(D,)``.
        steps: The changes of point and of slope in each step, the last one at the end.
    """

    def __init__(self, variances: Tensor, steps: list[tuple[Tensor, Tensor]]) -> None:
        self.variances, self.steps = variances, steps

    @functools.cached_property
    def _factors(self) -> tuple[Tensor, Tensor, Tensor]:
        """``A``, ``Q`` and the diagonal of ``B``."""
        root = self.variances.sqrt()
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
        return self if factor == 1 else LowRank(self.variances * factor**2, steps)

    def stretch(self, noise: Tensor) -> Tensor:
        root, axes, values = self._factors
        return (noise + noise @ axes * (values.sqrt() - 1) @ axes.mT) * root

    def times(self, v: Tensor) -> Tensor:
        # The two loops of L-BFGS (Nocedal and Wright 2006, algorithm 7.4), without the factors.
        shares = []
        for s, y in reversed(self.steps):
            shares.append((s @ v) / (s @ y))
            v = v - shares[-1] * y
        v = v * self.variances
        for (s, y), share in zip(self.steps, reversed(shares), strict=True):
            v = v + (share - (y @ v) / (s @ y)) * s
        return v


Covariance = Dense | LowRank
