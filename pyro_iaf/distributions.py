r"""The normal distribution over vectors whose coordinates are independent.

.. math::
    \log p(y) = -\sum_{i=1}^{D} \left[ \tfrac{1}{2} \left( \frac{y_i - \mu_i}{\sigma_i} \right)^2
                + \log \sigma_i + \tfrac{1}{2} \log 2\pi \right]

Its log density is one number per vector, as the log-determinant of a flow is, so it serves as a
flow's base distribution. Everything costs O(D).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from pyro.distributions import constraints
from pyro.distributions.torch_distribution import TorchDistribution
from pyro.distributions.util import broadcast_shape
from torch import Tensor
from torch.distributions import (
    Distribution,
    Independent,
    LowRankMultivariateNormal,
    MultivariateNormal,
    Normal,
)
from torch.distributions.utils import broadcast_all
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.types import _size

__all__ = ["DiagonalNormal"]

_HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)


class DiagonalNormal(TorchDistribution):
    r"""A multivariate normal with diagonal covariance, :math:`N(\mu, \mathrm{diag}(\sigma^2))`.

    Equal to ``Normal(loc, scale).to_event(1)`` up to rounding. The event is a vector;
    ``log_prob`` and ``entropy`` are one number per vector, in nats. Sampling, scoring and the
    divergence from another diagonal normal cost O(D). The matrices, of size O(D²), are built on
    access.

    ``kl_divergence(p, q)`` has closed forms between this class and itself, ``MultivariateNormal``,
    ``LowRankMultivariateNormal`` and ``Normal(...).to_event(1)``, both ways.

    Args:
        loc: Mean, of shape ``batch_shape + (D,)``.
        scale: Standard deviation, positive, broadcastable with ``loc``; may be a number.
        validate_args: Whether to check the arguments and the scored values; by default Pyro's
            global setting.

    Raises:
        ValueError: If ``loc`` is no vector, if the shapes don't broadcast, or, under validation,
            if ``loc`` is not finite, or ``scale`` not positive and finite.

    Example:
        >>> d = DiagonalNormal(torch.zeros(5, 3), torch.tensor([1.0, 2.0, 4.0]))
        >>> d.batch_shape, d.event_shape
        (torch.Size([5]), torch.Size([3]))
        >>> d.log_prob(torch.zeros(3))[0]  # -(3/2) log 2 pi - log 8
        tensor(-4.8363)
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {
        "loc": constraints.real_vector,
        "scale": constraints.independent(constraints.positive, 1),
    }
    support = constraints.real_vector
    has_rsample = True

    loc: Tensor
    scale: Tensor

    def __init__(
        self, loc: Tensor, scale: Tensor | float, validate_args: bool | None = None
    ) -> None:
        if not isinstance(loc, Tensor) or loc.dim() == 0:
            raise ValueError(
                "DiagonalNormal expects loc to be a tensor of shape batch_shape + (D,), with at "
                f"least one dimension; got {_described(loc)}. For one coordinate use "
                "loc.unsqueeze(-1); for a univariate normal use Normal."
            )
        # The scale without the batch dimensions of loc, so that its logarithms are summed once.
        own_scale = scale
        if not isinstance(scale, Tensor) or loc.shape != scale.shape:
            try:
                loc, scale = broadcast_all(loc, scale)
            except (RuntimeError, ValueError) as error:
                raise ValueError(
                    "DiagonalNormal expects loc and scale to broadcast to batch_shape + (D,); got "
                    f"loc {_described(loc)} and scale {_described(scale)}."
                ) from error
        if loc.dtype != scale.dtype or not loc.is_floating_point():
            dtype = torch.promote_types(loc.dtype, scale.dtype)
            if not dtype.is_floating_point:
                raise ValueError(
                    "DiagonalNormal expects a floating-point loc or scale; got "
                    f"{loc.dtype} and {scale.dtype}. Convert one of them with .float()."
                )
            loc, scale = loc.to(dtype), scale.to(dtype)
        if not isinstance(own_scale, Tensor) or own_scale.shape[-1:] != loc.shape[-1:]:
            own_scale = scale
        self.loc, self.scale, self._own_scale = loc, scale, own_scale.to(scale.dtype)
        # As Distribution.__init__ does, except for its checks, which accept infinities.
        self._batch_shape, self._event_shape = loc.shape[:-1], loc.shape[-1:]
        if validate_args is not None:  # by default Pyro's setting at the time of each call
            self._validate_args = validate_args
        if self._validate_args and not _is_traced():
            _check_values(loc, self._own_scale)

    def expand(self, batch_shape: _size, _instance: DiagonalNormal | None = None) -> DiagonalNormal:
        new: DiagonalNormal = self._get_checked_instance(DiagonalNormal, _instance)
        batch_shape = torch.Size(batch_shape)
        new.loc = self.loc.expand(batch_shape + self.event_shape)
        new.scale = self.scale.expand(batch_shape + self.event_shape)
        new._own_scale = self._own_scale
        super(DiagonalNormal, new).__init__(batch_shape, self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    @staticmethod
    def infer_shapes(  # type: ignore[override]  # as Pyro's own distributions do
        loc: torch.Size, scale: torch.Size
    ) -> tuple[torch.Size, torch.Size]:
        """``batch_shape`` and ``event_shape`` for arguments of these shapes."""
        shape = torch.Size(broadcast_shape(loc, scale))
        return shape[:-1], shape[-1:]

    def rsample(self, sample_shape: _size = ()) -> Tensor:
        """Draws ``loc + scale * noise``, differentiable in both parameters."""
        shape = self._extended_shape(torch.Size(sample_shape))
        noise = torch.randn(shape, dtype=self.loc.dtype, device=self.loc.device)
        return torch.addcmul(self.loc, noise, self.scale)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density at ``value``, in nats, one number per vector."""
        if self._validate_args and not _is_traced():
            self._validate_sample(value)
        z = (value - self.loc) / self.scale
        exponent = torch.add(self._log_scale_sum(), z.square().sum(-1), alpha=0.5)
        return -self.event_shape[0] * _HALF_LOG_2PI - exponent

    def entropy(self) -> Tensor:
        """Differential entropy in nats, of shape ``batch_shape``."""
        entropy = self._log_scale_sum() + self.event_shape[0] * (0.5 + _HALF_LOG_2PI)
        return entropy if entropy.shape == self.batch_shape else entropy.expand(self.batch_shape)

    def _log_scale_sum(self) -> Tensor:
        """The sum over the event, of a shape that broadcasts to ``batch_shape``."""
        return self._own_scale.log().sum(-1)

    @property
    def mean(self) -> Tensor:
        return self.loc

    @property
    def mode(self) -> Tensor:
        return self.loc

    @property
    def stddev(self) -> Tensor:
        return self.scale

    @property
    def variance(self) -> Tensor:
        return self.scale.square()

    @property
    def scale_tril(self) -> Tensor:
        """Cholesky factor of the covariance, of shape ``batch_shape + (D, D)``."""
        return torch.diag_embed(self.scale)

    @property
    def covariance_matrix(self) -> Tensor:
        """Covariance, of shape ``batch_shape + (D, D)``."""
        return torch.diag_embed(self.scale.square())

    @property
    def precision_matrix(self) -> Tensor:
        """Inverse covariance, of shape ``batch_shape + (D, D)``."""
        return torch.diag_embed(self.scale.square().reciprocal())


def _is_traced() -> bool:
    """Whether a graph is being traced, which can't hold checks of values."""
    return torch.compiler.is_compiling() or get_proxy_mode() is not None


def _check_values(loc: Tensor, scale: Tensor) -> None:
    if not torch._is_all_true(loc.isfinite()):
        raise ValueError(
            f"DiagonalNormal expects a finite loc; got {_described(loc)} with "
            f"{int((~loc.isfinite()).sum())} entries that are infinite or NaN. Check the code that "
            "computes it."
        )
    if not (torch._is_all_true(scale > 0) and torch._is_all_true(scale < math.inf)):
        wrong = ~((scale > 0) & scale.isfinite())
        raise ValueError(
            f"DiagonalNormal expects a positive, finite scale; got {_described(scale)} with "
            f"{int(wrong.sum())} entries that are not, as {float(scale[wrong][0])}. Compute the "
            "scale by exp or softplus of a number that is not too large."
        )


def _described(value: object) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    return repr(value)


# Kullback-Leibler divergences KL(p | q) in nats. Each is half of
#     tr(C_q^-1 C_p) + (m_q - m_p)' C_q^-1 (m_q - m_p) - D + log det C_q - log det C_p.
# They take scales, not variances, which may over- or underflow.


def _kl_diagonal_diagonal(p: DiagonalNormal, q: DiagonalNormal) -> Tensor:
    ratio = (p.scale / q.scale).square()
    shift = ((p.loc - q.loc) / q.scale).square()
    return 0.5 * (ratio + shift - 1 - ratio.log()).sum(-1)


def _as_diagonal(d: Independent[Distribution]) -> DiagonalNormal:
    if d.reinterpreted_batch_ndims != 1 or not isinstance(d.base_dist, Normal):
        raise NotImplementedError(
            "The KL divergence between DiagonalNormal and an Independent is known for "
            "Normal(...).to_event(1) only; got "
            f"{type(d.base_dist).__name__}(...).to_event({d.reinterpreted_batch_ndims})."
        )
    return DiagonalNormal(d.base_dist.loc, d.base_dist.scale, validate_args=False)


def _kl_diagonal_multivariate(p: DiagonalNormal, q: MultivariateNormal) -> Tensor:
    shift = (q.loc - p.loc).unsqueeze(-1)
    quadratic = _whitened(q.scale_tril, p.scale_tril) + _whitened(q.scale_tril, shift)
    return _half_gap(quadratic, 2 * _log_det(q.scale_tril), p)


def _kl_multivariate_diagonal(p: MultivariateNormal, q: DiagonalNormal) -> Tensor:
    variance = p.scale_tril.square().sum(-1)
    return _half_quadratic(p.loc, variance, q) - _log_det(p.scale_tril)


def _kl_diagonal_low_rank(p: DiagonalNormal, q: LowRankMultivariateNormal) -> Tensor:
    # Woodbury: C_q^-1 = E^-1 - E^-1 W K^-1 W' E^-1, with E diagonal and K the capacitance.
    factor, diagonal = q._unbroadcasted_cov_factor, q._unbroadcasted_cov_diag
    shift = q.loc - p.loc
    weighted = (factor / diagonal.unsqueeze(-1)).mT
    quadratic = ((p.scale.square() + shift.square()) / diagonal).sum(-1)
    shrunk_spread = _whitened(q._capacitance_tril, weighted * p.scale.unsqueeze(-2))
    shrunk_shift = _whitened(q._capacitance_tril, weighted @ shift.unsqueeze(-1))
    return _half_gap(quadratic - shrunk_spread - shrunk_shift, _low_rank_log_det(q), p)


def _kl_low_rank_diagonal(p: LowRankMultivariateNormal, q: DiagonalNormal) -> Tensor:
    return _half_quadratic(p.loc, p.variance, q) - 0.5 * _low_rank_log_det(p)


def _log_det(tril: Tensor) -> Tensor:
    return tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)


def _low_rank_log_det(d: LowRankMultivariateNormal) -> Tensor:
    diagonal: Tensor = d._unbroadcasted_cov_diag
    return 2 * _log_det(d._capacitance_tril) + diagonal.log().sum(-1)


def _whitened(tril: Tensor, columns: Tensor) -> Tensor:
    """The sum of squares of ``tril^-1 columns``."""
    white: Tensor = torch.linalg.solve_triangular(tril, columns, upper=False)
    return white.square().sum((-2, -1))


def _half_gap(quadratic: Tensor, log_det_q: Tensor, p: DiagonalNormal) -> Tensor:
    gap: Tensor = 0.5 * (quadratic - p.event_shape[0] + log_det_q)
    return gap - p.scale.log().sum(-1)


def _half_quadratic(loc: Tensor, variance: Tensor, q: DiagonalNormal) -> Tensor:
    """KL(p | q) without p's log-determinant, for a p with these moments."""
    quadratic = (variance + (loc - q.loc).square()) / q.scale.square()
    return 0.5 * (quadratic - 1).sum(-1) + q.scale.log().sum(-1)


def _with_shape_check(divergence: Callable[[Any, Any], Tensor]) -> Callable[[Any, Any], Tensor]:
    def checked(p: Distribution, q: Distribution) -> Tensor:
        if p.event_shape != q.event_shape:
            raise ValueError(
                "KL(p | q) needs distributions of equal event_shape; got event shapes "
                f"{tuple(p.event_shape)} and {tuple(q.event_shape)}."
            )
        return divergence(p, q)

    return checked


KL_DIVERGENCES = {
    pair: _with_shape_check(divergence)
    for pair, divergence in [
        ((DiagonalNormal, DiagonalNormal), _kl_diagonal_diagonal),
        ((DiagonalNormal, MultivariateNormal), _kl_diagonal_multivariate),
        ((MultivariateNormal, DiagonalNormal), _kl_multivariate_diagonal),
        ((DiagonalNormal, LowRankMultivariateNormal), _kl_diagonal_low_rank),
        ((LowRankMultivariateNormal, DiagonalNormal), _kl_low_rank_diagonal),
        ((DiagonalNormal, Independent), lambda p, q: _kl_diagonal_diagonal(p, _as_diagonal(q))),
        ((Independent, DiagonalNormal), lambda p, q: _kl_diagonal_diagonal(_as_diagonal(p), q)),
    ]
}
