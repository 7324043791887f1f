r"""A bijection on vectors that is one pass, from noise ``x`` to value ``y``, and remembers it.

Every pass is kept as long as the value that it made is alive. Scoring that value then needs no pass
at all; the inverse is there for values from elsewhere.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from pyro.distributions import constraints
from pyro.distributions.torch_transform import TransformModule
from torch import Tensor, nn

from .._validation import check_tensors
from ..solvers.path_score import Solver, Step
from . import pass_cache

__all__ = ["Flow", "SinglePass"]


class Flow(TransformModule):
    """A bijection on vectors that is a module, and so is its inverse."""

    domain = constraints.real_vector
    codomain = constraints.real_vector
    bijective = True
    sign = +1
    _inverse_flow: weakref.ref[_InverseFlow] | None = None

    def __call__(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def _inv_call(self, y: Tensor) -> Tensor:
        raise NotImplementedError

    def _call(self, x: Tensor) -> Tensor:
        """The value of ``x``, computed whatever is remembered: a name of PyTorch's transforms."""
        raise NotImplementedError

    def _inverse(self, y: Tensor) -> Tensor:
        """The noise of ``y``, likewise."""
        raise NotImplementedError

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        raise NotImplementedError

    def forward_shape(self, shape: torch.Size) -> torch.Size:
        raise NotImplementedError

    def inverse_shape(self, shape: torch.Size) -> torch.Size:
        return self.forward_shape(shape)

    @property
    def inv(self) -> Flow:
        """The inverse, a module with the same parameters; ``flow.inv.inv is flow``."""
        # Held weakly: a cycle would keep a conditioned flow, and its context's graph, until gc.
        inverse = None if self._inverse_flow is None else self._inverse_flow()
        if inverse is None:
            inverse = _InverseFlow(self)
            self._inverse_flow = weakref.ref(inverse)
        return inverse

    def with_cache(self, cache_size: int = 1) -> Flow:
        return self  # every pass is remembered as it is

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compiles the networks by :func:`torch.compile`, with its arguments; in place.

        The flow stays a transform of the same parameters: its draws are made by compiled passes,
        and scored as before.
        """
        for module in list(self.modules()):
            if isinstance(network := getattr(module, "network", None), nn.Module):
                network.compile(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_inverse_flow": None}

    def __repr__(self) -> str:
        return nn.Module.__repr__(self)


class _InverseFlow(Flow):
    """A flow walked backwards; its input is the flow's output."""

    flow: Flow

    def __init__(self, flow: Flow) -> None:
        super().__init__()
        self._modules["flow"] = flow  # half the price of an assignment, at every log_prob

    @property
    def inv(self) -> Flow:
        self.flow._inverse_flow = weakref.ref(self)  # a copy has yet to be told
        return self.flow

    def __call__(self, x: Tensor) -> Tensor:
        return self.flow._inv_call(x)

    def _inv_call(self, y: Tensor) -> Tensor:
        return self.flow(y)

    def _call(self, x: Tensor) -> Tensor:
        return self.flow._inverse(x)

    def _inverse(self, y: Tensor) -> Tensor:
        return self.flow._call(y)

    def __repr__(self) -> str:
        return f"{self.flow!r}.inv"

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        return -self.flow.log_abs_det_jacobian(y, x)

    def forward_shape(self, shape: torch.Size) -> torch.Size:
        return self.flow.inverse_shape(shape)

    def inverse_shape(self, shape: torch.Size) -> torch.Size:
        return self.flow.forward_shape(shape)


class SinglePass(Flow):
    """A flow that is one pass from noise to value, and remembers it.

    Whoever inherits says what a pass computes and how to undo it.
    """

    input_dim: int

    @property
    def _sources(self) -> tuple[object, ...]:
        """What a pass depends on besides the noise."""
        raise NotImplementedError

    def _compute(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The value that ``x`` becomes, and the log-slope of each coordinate."""
        raise NotImplementedError

    def _undo(self, y: Tensor, method: str = "auto") -> tuple[Tensor, Tensor]:
        """The noise of a value from elsewhere, and the log-slopes; both with their gradients."""
        raise NotImplementedError

    def _undo_known(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """The noise of ``y``, known to be ``x``, and the log-slopes; both with their gradients."""
        raise NotImplementedError

    def solve_transposed(self, x: Tensor, v: Tensor) -> Tensor:
        """The ``u`` with ``J^T u = v``, where J is the Jacobian at ``x``."""
        raise NotImplementedError

    def pass_with_score(self, x: Tensor, by_kernel: bool) -> tuple[Tensor, Tensor, Step]:
        """A pass, and what carries a score along it; see :func:`~.path_score.draw_with_score`."""
        with torch.enable_grad():
            x = x if x.requires_grad else x.detach().requires_grad_()
            y, log_slope = self._compute(x)
            slope = torch.zeros_like(x)
            if log_slope.requires_grad:  # not where the slope is the same everywhere
                total = log_slope.sum()
                (slope,) = torch.autograd.grad(total, x, retain_graph=True, materialize_grads=True)
        return y, log_slope, Solver(self, x.detach(), slope.detach())

    def remember(self, x: Tensor, y: Tensor, log_slope: Tensor) -> None:
        """Keeps a pass for as long as ``y`` is alive."""
        pass_cache.keep(self._sources, x, y, log_slope, x)

    def __call__(self, x: Tensor) -> Tensor:
        """Carries noise to a latent, in one network pass."""
        check_tensors(x=x)
        y = pass_cache.expected(self._sources, x)
        return self._pass(x)[0] if y is None else y

    def _inv_call(self, y: Tensor) -> Tensor:
        return self._walk_back(y)[0]

    def _call(self, x: Tensor) -> Tensor:
        check_tensors(x=x)
        return self._compute(x.expand(self.forward_shape(x.shape)))[0]

    def _inverse(self, y: Tensor) -> Tensor:
        check_tensors(y=y)
        return self._undo(y.expand(self.inverse_shape(y.shape)))[0]

    def _walk_back(self, y: Tensor) -> tuple[Tensor, bool]:
        """The noise of ``y``, and whether it was remembered."""
        check_tensors(y=y)
        known = pass_cache.pass_to(self._sources, y)
        if known is not None:
            pass_cache.expect(known.partner, y)
            return known.partner, True
        noise = pass_cache.noise_of(self._sources, y)
        if noise is None:
            x, log_slope = self._undo(y.expand(self.inverse_shape(y.shape)))
            pass_cache.keep_gradient(self._sources, x, y, log_slope)
            return x, False
        if not torch.is_grad_enabled():
            return noise, True
        # The noise is known. What it lacks is its dependence on y and on the parameters.
        x, log_slope = self._undo_known(noise, y)
        pass_cache.keep_gradient(self._sources, x, y, log_slope, noise)
        return x, True

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """Log-determinant of the Jacobian at ``x``, in nats, of shape ``batch_shape``.

        Free where the flow made ``y`` from ``x``; one network pass otherwise, from ``x`` alone.
        """
        check_tensors(x=x, y=y)
        pass_cache.settle(x)
        self.forward_shape(y.shape)
        known = pass_cache.pass_between(self._sources, x, y)
        return self._pass(x)[1].sum(-1) if known is None else known.log_det()

    def _pass(self, x: Tensor) -> tuple[Tensor, Tensor]:
        shape = self.forward_shape(x.shape)
        wide = x if x.shape == shape else x.expand(shape)  # the very tensor where it can be
        y, log_slope = self._compute(wide)
        log_slope = log_slope.to(y.dtype)  # autocast computes it in half precision
        log_slope = log_slope if log_slope.shape == y.shape else log_slope.expand_as(y)
        pass_cache.keep(self._sources, wide, y, log_slope, x)
        return y, log_slope

    def forward_shape(self, shape: torch.Size) -> torch.Size:
        if not shape or shape[-1] != self.input_dim:
            raise ValueError(
                f"This flow acts on vectors of {self.input_dim} coordinates; got shape "
                f"{tuple(shape)}. The last dimension is the event, those before it are the batch."
            )
        return shape
