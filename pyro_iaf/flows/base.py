r"""Bijections on vectors that carry noise ``x`` to a value ``y`` in one pass, and remember it.

A pass is kept as long as its value is alive. The log density of that value then costs no network
pass. The inverse is computed only for values that the flow did not produce.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from pyro.distributions import constraints
from pyro.distributions.torch_transform import TransformModule
from torch import Tensor, nn

from .._validation import check_tensors
from ..solvers.fused import ScoredPass
from ..solvers.path_score import Solver, Step
from . import pass_cache

__all__ = ["Flow", "SinglePass"]


class Flow(TransformModule):
    """A bijection on vectors that is a module, and so is its inverse.

    ``_call`` and ``_inverse`` compute anew, whatever is remembered; ``__call__`` and ``_inv_call``
    look up remembered passes first.
    """

    domain = constraints.real_vector
    codomain = constraints.real_vector
    bijective = True
    sign = +1
    _inverse_flow: weakref.ref[_InverseFlow] | None = None

    # These have types here; those of PyTorch's transforms have none.
    _inv_call: Callable[[Tensor], Tensor]
    _call: Callable[[Tensor], Tensor]
    _inverse: Callable[[Tensor], Tensor]
    log_abs_det_jacobian: Callable[[Tensor, Tensor], Tensor]
    forward_shape: Callable[[torch.Size], torch.Size]

    def __call__(self, x: Tensor) -> Tensor:
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
        return self  # every pass is remembered anyway

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compiles the networks in place by :func:`torch.compile`, with its arguments.

        The flow stays a transform of the same parameters. Its draws come from compiled passes, and
        are scored as before.
        """
        for module in list(self.modules()):
            if isinstance(network := getattr(module, "network", None), nn.Module):
                network.compile(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_inverse_flow": None}

    def __repr__(self) -> str:
        return nn.Module.__repr__(self)


class _InverseFlow(Flow):
    """The inverse of a flow; its input is the flow's output."""

    flow: Flow

    def __init__(self, flow: Flow) -> None:
        super().__init__()
        self._modules["flow"] = flow  # at every log_prob: half the time of an assignment

    @property
    def inv(self) -> Flow:
        self.flow._inverse_flow = weakref.ref(self)  # a copied flow does not refer to its inverse
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
    """A flow that carries noise to a value in one pass, and remembers the pass.

    A subclass defines ``_sources``, ``_compute``, ``_undo`` and ``solve_transposed``.
    """

    input_dim: int

    @property
    def _sources(self) -> tuple[object, ...]:
        """What a pass depends on besides the noise."""
        raise NotImplementedError

    def _compute(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The value of ``x``, and the log slope of each coordinate."""
        raise NotImplementedError

    def _undo(self, y: Tensor, method: str = "auto") -> tuple[Tensor, Tensor]:
        """The noise of ``y``, and the log slopes; both with their gradients."""
        raise NotImplementedError

    def _undo_known(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """The same where the noise of ``y`` is known to be ``x``, without its gradients."""
        return self._undo(y)

    def single_passes(self) -> Sequence[SinglePass]:
        """The passes that it consists of, the first acts on the noise."""
        return [self]

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

    def pass_at_once(self, x: Tensor, log_prob: Tensor, score: Tensor) -> ScoredPass | None:
        """The pass by one operation, with density and score; None if there is no such operation."""
        return None

    def undo_at_once(self, y: Tensor, by_kernel: bool) -> Tensor:
        """The noise of ``y`` without a graph, by one operation if there is one."""
        return self._undo(y)[0]

    def remember(self, x: Tensor, y: Tensor, log_slope: Tensor) -> None:
        """Keeps a pass for as long as ``y`` is alive."""
        pass_cache.keep(self._sources, x, y, log_slope, x)

    def __call__(self, x: Tensor) -> Tensor:
        """Carries noise to a latent, in one network pass."""
        check_tensors(x=x)
        y = pass_cache.linked_value(self._sources, x)
        return self._pass(x)[0] if y is None else y

    def _inv_call(self, y: Tensor) -> Tensor:
        return self._recall_or_invert(y)[0]

    def _call(self, x: Tensor) -> Tensor:
        check_tensors(x=x)
        return self._compute(x.expand(self.forward_shape(x.shape)))[0]

    def _inverse(self, y: Tensor) -> Tensor:
        check_tensors(y=y)
        return self._undo(y.expand(self.inverse_shape(y.shape)))[0]

    def _recall_or_invert(self, y: Tensor) -> tuple[Tensor, bool]:
        """The noise of ``y``, and whether it was remembered."""
        check_tensors(y=y)
        known = pass_cache.pass_to(self._sources, y)
        if known is not None:
            pass_cache.link(known.partner, y)
            return known.partner, True
        noise = pass_cache.noise_of(self._sources, y)
        if noise is None:
            x, log_slope = self._undo(y.expand(self.inverse_shape(y.shape)))
            pass_cache.keep_inverse(self._sources, x, y, log_slope)
            return x, False
        if not torch.is_grad_enabled():
            return noise, True
        # The noise is known, but not its dependence on y and on the parameters.
        x, log_slope = self._undo_known(noise, y)
        pass_cache.keep_inverse(self._sources, x, y, log_slope, noise)
        return x, True

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """Log-determinant of the Jacobian at ``x``, in nats, of shape ``batch_shape``.

        Free where the flow made ``y`` from ``x``; one network pass otherwise, from ``x`` alone.
        """
        check_tensors(x=x, y=y)
        pass_cache.unlink(x)
        self.forward_shape(y.shape)
        known = pass_cache.pass_between(self._sources, x, y)
        return self._pass(x)[1].sum(-1) if known is None else known.log_det()

    def _pass(self, x: Tensor) -> tuple[Tensor, Tensor]:
        shape = self.forward_shape(x.shape)
        # Where nothing is to be expanded, the same tensor: the cache compares by identity.
        expanded = x if x.shape == shape else x.expand(shape)
        y, log_slope = self._compute(expanded)
        log_slope = log_slope.to(y.dtype)  # autocast computes it in half precision
        log_slope = log_slope if log_slope.shape == y.shape else log_slope.expand_as(y)
        pass_cache.keep(self._sources, expanded, y, log_slope, x)
        return y, log_slope

    def forward_shape(self, shape: torch.Size) -> torch.Size:
        if not shape or shape[-1] != self.input_dim:
            raise ValueError(
                f"This flow acts on vectors of {self.input_dim} coordinates; got shape "
                f"{tuple(shape)}. The last dimension is the event, those before it are the batch."
            )
        return shape
