r"""Bijections from real vectors to supports of covariances and mixtures, which PyTorch lacks.

.. math::
    \Sigma = L L^\top, \qquad
    \log \left| \det \frac{\partial \Sigma}{\partial x} \right|
    = D \log 2 + \sum_{i=1}^D (D - i + 2) \log L_{ii}
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.distributions import MixtureSameFamily, Normal, Transform, biject_to, constraints

from .constraints import map_tensors

__all__ = ["CovarianceTransform", "register_bijections"]


class CovarianceTransform(Transform):
    r"""The bijection from vectors to positive definite matrices, through their Cholesky factor.

    The vector of :math:`D (D + 1) / 2` numbers holds the lower triangle of :math:`L`, row by row,
    with logarithms on the diagonal. The matrix is :math:`L L^\top`.

    Example:
        >>> CovarianceTransform()(torch.tensor([0.0, 1.0, 0.0]))
        tensor([[1., 1.],
                [1., 2.]])
        >>> CovarianceTransform().inv(torch.eye(3))
        tensor([0., 0., 0., 0., 0., 0.])
    """

    domain = constraints.real_vector
    codomain = constraints.positive_definite
    bijective = True

    def __eq__(self, other: object) -> bool:
        return isinstance(other, CovarianceTransform)

    __hash__ = Transform.__hash__

    def forward_shape(self, shape: Any) -> torch.Size:
        size = (math.isqrt(8 * shape[-1] + 1) - 1) // 2
        if size * (size + 1) // 2 != shape[-1]:
            raise ValueError(
                "A lower triangle has 1, 3, 6, 10, ... numbers, and so has the vector of a "
                f"covariance; got {shape[-1]}."
            )
        return torch.Size([*shape[:-1], size, size])

    def inverse_shape(self, shape: Any) -> torch.Size:
        return torch.Size([*shape[:-2], shape[-1] * (shape[-1] + 1) // 2])

    def _call(self, x: Tensor) -> Tensor:
        size = self.forward_shape(x.shape)[-1]
        rows, columns = torch.tril_indices(size, size, device=x.device)
        places = torch.full((size, size), x.shape[-1], device=x.device)  # where a zero is
        places[rows, columns] = torch.arange(x.shape[-1], device=x.device)
        factor = torch.cat([x, torch.zeros_like(x[..., :1])], -1)[..., places]
        factor = factor.tril(-1) + factor.diagonal(dim1=-2, dim2=-1).exp().diag_embed()
        return factor @ factor.mT

    def _inverse(self, y: Tensor) -> Tensor:
        factor: Tensor = torch.linalg.cholesky(y)
        logs = factor.diagonal(dim1=-2, dim2=-1).log().diag_embed()
        rows, columns = torch.tril_indices(y.shape[-1], y.shape[-1], device=y.device)
        return (factor.tril(-1) + logs)[..., rows, columns]

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        size = y.shape[-1]
        place = torch.arange(1, size + 1, device=x.device)
        logs = x[..., place * (place + 1) // 2 - 1]
        return size * math.log(2) + (logs * (size + 2 - place)).sum(-1)


def _of_mixture(support: Any) -> Any:
    """The bijection to the support of a mixture, which is that of each component."""

    def of_one(bound: Tensor) -> Tensor:
        if bound.dim() <= support.event_dim:
            return bound
        first = bound.narrow(-1 - support.event_dim, 0, 1)
        if not bool((bound == first).all()):
            raise NotImplementedError(
                "the components of the mixture have different supports. Draw the component as a "
                "site of its own, or give all of them one support"
            )
        return first.squeeze(-1 - support.event_dim)

    return biject_to(map_tensors(support.base_constraint, of_one))


def register_bijections() -> None:
    """Registers the bijections in ``biject_to``, where it has none."""
    probs = torch.distributions.Categorical(torch.ones(2))
    mixture = MixtureSameFamily(probs, Normal(torch.zeros(2), 1.0)).support
    for support, factory in (
        (constraints.positive_definite, lambda _: CovarianceTransform()),
        (mixture, _of_mixture),
    ):
        try:
            biject_to(support)
        except NotImplementedError:
            biject_to.register(type(support), factory)
