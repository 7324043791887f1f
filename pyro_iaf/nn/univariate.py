r"""Univariate maps from a number ``x`` to ``y``, with parameters that a network computes.

.. math::
    y = f(x; p_1, \dots, p_P), \qquad
    \log \left| \det \frac{\partial y}{\partial x} \right| = \sum_{i=1}^{D} \log f'(x_i; p(x_{<i}))

A flow applies one such map to all its coordinates. Affine, gated and other flows differ only in
their map.
"""

from __future__ import annotations

import ast
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from .._validation import check_number, check_size

__all__ = ["Affine", "Derivatives", "Gated", "UnivariateMap", "map_of_repr", "univariate_map"]

# Scales stay between e^-10 and e^10. The bound is smooth, so gradients are exact.
LOG_SCALE_BOUND = 10.0


class Derivatives(NamedTuple):
    """The elementwise derivatives of a map; None for one that is zero everywhere.

    Attributes:
        by_x: Of the value with respect to ``x``: the slope.
        by_params: Of the value with respect to each parameter.
        log_slope_by_x: Of the log slope with respect to ``x``.
        log_slope_by_params: Of the log slope with respect to each parameter.
    """

    by_x: Tensor
    by_params: Sequence[Tensor]
    log_slope_by_x: Tensor | None
    log_slope_by_params: Sequence[Tensor | None]


class UnivariateMap:
    r"""An increasing map of the real line onto itself, under parameters from a network.

    A flow calls it with one tensor for each parameter, of a shape that broadcasts with that of
    ``x``. A subclass defines:

    - ``num_params``: the number of parameters;
    - ``forward(x, *params)``: the value ``y``, and the log slope,
      :math:`\log \partial y / \partial x`;
    - ``inverse(y, *params)``: the noise ``x``, and the same log slope, at ``x``.

    Both act elementwise on any shape, don't branch on values, and are differentiable in all
    arguments; ``forward`` twice. A fresh network returns parameters near zero. With these the map
    should be near the identity, or at least carry 0 to 0. A subclass may override
    :meth:`derivatives` too, which uses autograd by default and is then slower.

    Maps of one class with equal attributes are equal. The attributes are numbers, strings or
    tuples, are arguments of ``__init__`` by the same name, and never change.

    Example:
        >>> class Bent(UnivariateMap):  # y = m + e^s sinh(x)
        ...     num_params = 2
        ...     def forward(self, x, m, s):
        ...         return m + s.exp() * x.sinh(), s + x.cosh().log()
        ...     def inverse(self, y, m, s):
        ...         x = ((y - m) / s.exp()).asinh()
        ...         return x, s + x.cosh().log()
        >>> flow = inverse_autoregressive_flow(3, univariate=Bent())
        >>> x = torch.randn(5, 3)
        >>> torch.allclose(flow.inv(flow(x).clone()), x, atol=1e-5)
        True
    """

    num_params: int

    def forward(self, x: Tensor, *params: Any) -> tuple[Tensor, Tensor]:
        """The value of ``x``, and the log slope there."""
        raise NotImplementedError

    def inverse(self, y: Tensor, *params: Any) -> tuple[Tensor, Tensor]:
        """The noise of ``y``, and the log slope of ``forward`` there."""
        raise NotImplementedError

    def derivatives(self, x: Tensor, *params: Any) -> Derivatives:
        """The derivatives of ``forward`` at ``x``, without a graph."""
        with torch.enable_grad():
            leaves = [t.detach().requires_grad_() for t in torch.broadcast_tensors(x, *params)]
            y, log_slope = (output.sum() for output in self.forward(*leaves))
            grad = partial(torch.autograd.grad, retain_graph=True, materialize_grads=True)
            by_x, *by_params = grad(y, leaves)
            of_log_slope: Sequence[Tensor | None] = [None] * len(leaves)
            if log_slope.requires_grad:
                of_log_slope = grad(log_slope, leaves)
        return Derivatives(by_x, by_params, of_log_slope[0], of_log_slope[1:])

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and vars(self) == vars(other)

    def __hash__(self) -> int:
        return hash((type(self), *sorted(vars(self).items())))

    def __repr__(self) -> str:
        settings = ", ".join(f"{name}={value!r}" for name, value in vars(self).items())
        return f"{type(self).__name__}({settings})"


class _Scaling(UnivariateMap):
    """A shift and a scale, which a subclass computes from the network's two outputs."""

    num_params = 2

    def coefficients(self, shift: Tensor, log_scale: Tensor) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def forward(self, x: Tensor, *params: Tensor) -> tuple[Tensor, Tensor]:
        shift, log_scale = self.coefficients(*params)
        return torch.addcmul(shift, log_scale.exp(), x), log_scale

    def inverse(self, y: Tensor, *params: Tensor) -> tuple[Tensor, Tensor]:
        shift, log_scale = self.coefficients(*params)
        return (y - shift) / log_scale.exp(), log_scale


class Affine(_Scaling):
    r"""Shift and scale: :math:`y = m + e^s x`, with :math:`s` bounded by :math:`10 \tanh(s / 10)`.

    A fresh flow is nearly the identity.

    Example:
        >>> y, _ = Affine().forward(torch.ones(3), torch.zeros(3), torch.zeros(3))
        >>> y
        tensor([1., 1., 1.])
    """

    def coefficients(self, shift: Tensor, log_scale: Tensor) -> tuple[Tensor, Tensor]:
        return shift, _bounded(log_scale)

    def derivatives(self, x: Tensor, *params: Tensor) -> Derivatives:
        shift, log_scale = params
        log_scale = _bounded(log_scale)
        scale, slope = log_scale.exp(), _slope_of_bounded(log_scale)
        return Derivatives(scale, (torch.ones_like(shift), scale * x * slope), None, (None, slope))


@dataclass(frozen=True, eq=False, repr=False)
class Gated(_Scaling):
    r"""A gate between noise and shift, whose slope is below one.

    .. math::
        y = \sigma x + (1 - \sigma) m, \qquad \sigma = \mathrm{sigmoid}(s + \mathrm{bias})

    with :math:`s` bounded by :math:`10 \tanh(s / 10)`. A fresh flow is nearly
    ``x * sigmoid(bias)``.

    Args:
        bias: Added to the gate; at 2 a fresh flow keeps 88 % of the noise.

    Raises:
        ValueError: If ``bias`` is not a finite number.

    References:
        Kingma et al. (2016), equations 13 and 14, https://arxiv.org/abs/1606.04934

    Example:
        >>> flow = inverse_autoregressive_flow(3, univariate=Gated(bias=1.0))
        >>> flow.univariate
        Gated(bias=1.0)
    """

    bias: float = 2.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "bias", check_number("bias", self.bias))

    def coefficients(self, shift: Tensor, log_scale: Tensor) -> tuple[Tensor, Tensor]:
        gate = _bounded(log_scale) + self.bias
        return torch.sigmoid(-gate) * shift, functional.logsigmoid(gate)

    def derivatives(self, x: Tensor, *params: Tensor) -> Derivatives:
        shift, log_scale = params
        log_scale = _bounded(log_scale)
        scale = torch.sigmoid(log_scale + self.bias)
        rest = 1 - scale
        slope = rest * _slope_of_bounded(log_scale)
        return Derivatives(scale, (rest, scale * slope * (x - shift)), None, (None, slope))


KINDS: dict[str, type[UnivariateMap]] = {"affine": Affine, "gated": Gated}


def univariate_map(univariate: str | UnivariateMap) -> UnivariateMap:
    """The map of this name, or the given map; raises a ValueError for anything else."""
    if isinstance(univariate, str) and univariate in KINDS:
        return KINDS[univariate]()
    if not isinstance(univariate, UnivariateMap):
        names = ", ".join(f'"{name}"' for name in KINDS)
        raise ValueError(
            f"univariate should be {names} or a UnivariateMap, such as Gated(bias=1.0); got "
            f"{univariate!r}."
        )
    check_size(f"{type(univariate).__name__}.num_params", getattr(univariate, "num_params", None))
    return univariate


def map_of_repr(words: str) -> UnivariateMap | None:
    """The map of this package with this ``repr``; None for a user's own map."""
    kinds = {kind.__name__: kind for kind in KINDS.values()}
    try:
        call: Any = ast.parse(words, mode="eval").body
        return kinds[call.func.id](**{k.arg: ast.literal_eval(k.value) for k in call.keywords})
    except (AttributeError, KeyError, SyntaxError, TypeError, ValueError):
        return None


def _bounded(log_scale: Tensor) -> Tensor:
    return LOG_SCALE_BOUND * torch.tanh(log_scale / LOG_SCALE_BOUND)


def _slope_of_bounded(bounded: Tensor) -> Tensor:
    return 1 - (bounded / LOG_SCALE_BOUND).square()
