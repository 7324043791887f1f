r"""The score of a flow's density at its own draws, for "sticking the landing" gradients.

Each flow :math:`x \mapsto y` on the way from noise to value carries the score along,

.. math::
    \nabla_y \log q(y) = J^{-\mathsf T} \bigl( \nabla_x \log q(x) - \nabla_x \log |\det J| \bigr).

The gradient of an ELBO through the draws alone, with this score held constant, is unbiased, and has
no variance where the guide is the posterior (Roeder et al. 2017, https://arxiv.org/abs/1703.09194;
for flows, Vaitl et al. 2022, https://arxiv.org/abs/2207.08219).
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, Protocol, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.weak import WeakIdKeyDictionary

from ..nn.made import product
from ..nn.univariate import Derivatives
from .blockwise import Autoregressive, can_be_cut
from .fused import NetworkPass, ScoredPass, network_pass, takes_network
from .kernels import has_kernels
from .score_kernel import MAX_JACOBIAN_DIM, MAX_TENSORS, Carrier, carry, carry_by_jacobian

__all__ = [
    "Carrier",
    "Drawn",
    "Scored",
    "Solver",
    "draw_scored",
    "draw_with_score",
    "goes_by_kernel",
    "has_explicit_jacobian",
    "noise_of_draw",
    "pass_with_carrier",
]


class Scored(Protocol):
    """The methods of a bijection that :func:`draw_with_score` needs."""

    def forward_shape(self, shape: torch.Size) -> torch.Size: ...

    def pass_with_score(self, x: Tensor, by_kernel: bool) -> tuple[Tensor, Tensor, Step]:
        """The value of ``x``, the log slopes, and the step that carries the score."""

    def pass_at_once(self, x: Tensor, log_prob: Tensor, score: Tensor) -> ScoredPass | None:
        """The value of ``x``, and density and score there, as one operation if there is one."""

    def remember(self, x: Tensor, y: Tensor, log_slope: Tensor) -> None:
        """Keeps the pass from ``x`` until ``y`` is scored."""

    def solve_transposed(self, x: Tensor, v: Tensor) -> Tensor:
        """The ``u`` with ``J^T u = v``, where J is the Jacobian at ``x``."""


class Solver(NamedTuple):
    """The step of a flow with its own :meth:`Scored.solve_transposed`."""

    part: Scored
    x: Tensor
    slope: Tensor  # the gradient of the log-determinant at x


class Within(NamedTuple):
    """The step of a flow that acts on the first coordinates only."""

    step: Carrier | Solver
    num_leading: int


Step: TypeAlias = Carrier | Solver | Within


class Drawn(NamedTuple):
    """A value that flows produced, its log density, and its score.

    Value and log density have their graphs; the score has none. There is one step for each flow.
    """

    value: Tensor
    log_prob: Tensor
    score: Tensor
    noise: Tensor
    parts: Sequence[Scored]
    steps: Sequence[Step]
    by_kernel: bool

    def solve_transposed(self, v: Tensor) -> Tensor:
        """The ``u`` with ``J^T u = v``, where J is the Jacobian of all the flows."""
        steps = [_without_log_det(step) for step in self.steps]
        return _carry_through(v.expand_as(self.value), steps, self.by_kernel)

    def lend_noise(self, leaf: Tensor) -> Tensor | None:
        """A leaf with the noise, which :func:`noise_of_draw` returns for ``leaf``, or None.

        ``leaf`` is the value without its graph. A density whose parameters depend on the noise
        depends on the value through it. Its gradient in the noise, solved with the transposed
        Jacobian once, is that in the value. None if the noise has a gradient of its own.
        """
        if self.noise.requires_grad or self.noise.shape != leaf.shape:
            return None
        noise = self.noise.detach().requires_grad_()
        _lent[leaf] = self.parts, noise
        return noise


def _without_log_det(step: Any) -> Any:
    if isinstance(step, Within):
        return step._replace(step=_without_log_det(step.step))
    if isinstance(step, Solver):
        return step._replace(slope=torch.zeros_like(step.slope))
    by_x, by_params, *_ = step.slopes
    return step._replace(slopes=Derivatives(by_x, by_params, None, [None] * len(by_params)))


_lent = WeakIdKeyDictionary()  # a draw without its graph: the flows that produced it, and its noise


def noise_of_draw(stack: Any, value: Tensor) -> Tensor:
    """The noise of a value under a stack of flows, lent or by the inverse."""
    parts, noise = _lent.get(value, ((), None))
    if len(parts) == len(stack.parts) and all(map(operator.is_, parts, stack.parts)):
        return noise  # type: ignore[no-any-return]
    return stack.noise_and_log_det(value)[0]  # type: ignore[no-any-return]


def draw_with_score(
    parts: Iterable[Scored],
    x: Tensor,
    log_q: Tensor | None = None,
    score: Tensor | None = None,
    remember: bool = False,
) -> Drawn:
    """Carries noise through flows, with its log density and its score.

    Args:
        parts: The flows, the first acts on the noise.
        x: Noise, of shape ``batch_shape + (D,)``.
        log_q: Its log density, by default that of the standard normal.
        score: The gradient of ``log_q`` in ``x``.
        remember: Whether the flows remember their passes, for code that runs step by step.
    """
    if log_q is None or score is None:
        log_q, score = _standard_normal(x)
    noise, parts, by_kernel = x, list(parts), goes_by_kernel(x)
    steps: list[Step] = []
    for part in parts:
        shape = part.forward_shape(x.shape)
        # Where nothing is to be expanded, the same tensor: flows remember it by identity.
        before = x if x.shape == shape else x.expand(shape)
        x, log_slope, step = part.pass_with_score(before, by_kernel)
        steps.append(step)
        log_q = log_q - log_slope.sum(-1)
        if remember:
            part.remember(before, x, log_slope)
    score = _carry_through(score.expand_as(x), steps, by_kernel)
    return Drawn(x, log_q, score, noise, parts, steps, by_kernel)


def draw_scored(parts: Iterable[Scored], x: Tensor) -> ScoredPass:
    """Carries standard normal noise of shape ``(K, D)`` through flows, with density and score.

    The same as :func:`draw_with_score` in fewer operations: only the value has a graph.
    """
    found, by_kernel = ScoredPass(x, *_standard_normal(x)), goes_by_kernel(x)
    for part in parts:
        known = part.pass_at_once(*found) if by_kernel else None
        if known is None:
            value, log_slope, step = part.pass_with_score(found.value, by_kernel)
            score = _carry_through(found.score, [step], by_kernel)
            known = ScoredPass(value, found.log_prob - log_slope.detach().sum(-1), score)
        found = known
    return found


def _standard_normal(x: Tensor) -> tuple[Tensor, Tensor]:
    """The log density and the score of standard normal noise."""
    return -0.5 * (x.square() + math.log(2 * math.pi)).sum(-1), -x


def goes_by_kernel(x: Tensor) -> bool:
    """Whether operations of ours are used."""
    is_traced = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
    is_known = x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64)
    return is_known and not is_traced and has_kernels()


@torch.no_grad()
def _carry_through(score: Tensor, steps: Sequence[Step], by_kernel: bool) -> Tensor:
    for _, alike in itertools.groupby(
        steps, lambda step: isinstance(step, Carrier) and step.layout
    ):
        run = list(alike)
        flows = [step for step in run if isinstance(step, Carrier)]
        if flows and by_kernel and flows[0].num_tensors <= MAX_TENSORS:
            score = carry(score, flows)
            continue
        for step in run:
            if isinstance(step, Within):
                leading, rest = score.tensor_split([step.num_leading], -1)
                leading = _carry_through(leading, [step.step], by_kernel)
                score = torch.cat([leading, rest], -1)
            elif isinstance(step, Solver):
                score = step.part.solve_transposed(step.x, score - step.slope)
            else:
                slopes, activation_slopes, weights, network = step
                score = carry_by_jacobian(score, slopes, activation_slopes, weights, network.order)
    return score


def has_explicit_jacobian(flow: Autoregressive, by_kernel: bool) -> bool:
    """Whether the network's weights give the Jacobian, and it is small or left to the kernel."""
    return (by_kernel or len(flow.order) <= MAX_JACOBIAN_DIM) and can_be_cut(flow)


def pass_with_carrier(
    flow: Autoregressive, x: Tensor, by_kernel: bool
) -> tuple[Tensor, Tensor, Carrier]:
    """The value and the log slopes, and the factors of the Jacobian."""
    network = flow.network
    if by_kernel and takes_network(network, x, flow.context):
        found = network_pass(network, x.reshape(-1, x.shape[-1]))
        outputs, weights, activation_slopes = found
        outputs = outputs.reshape(*x.shape[:-1], -1)
    else:
        outputs, weights, activation_slopes = _run_network(flow, x)
    params = outputs.chunk(flow.univariate.num_params, -1)
    y, log_slope = flow.univariate.forward(x, *params)
    with torch.no_grad():
        derivatives = flow.univariate.derivatives(x, *params)
    return y, log_slope, Carrier(derivatives, activation_slopes, weights, network)


def _run_network(flow: Autoregressive, x: Tensor) -> NetworkPass:
    """A pass of any network of ours, in operations of PyTorch."""
    network = flow.network
    *hidden, output, offsets = map(product, network.factors())
    *shifts, last_shift = network.shifts(offsets, flow.context)
    h: Tensor = x
    activation_slopes = []
    for weight, shift in zip(hidden, shifts, strict=True):
        h, slope = _activation_and_slope(network.activation, _linear(h, weight, shift))
        activation_slopes.append(slope)
    inputs = torch.cat([h.expand(*x.shape[:-1], h.shape[-1]), x], -1)
    weights = [weight.detach() for weight in (*hidden, output)]
    return NetworkPass(_linear(inputs, output, last_shift), weights, activation_slopes)


def _linear(h: Tensor, weight: Tensor, shift: Tensor) -> Tensor:
    if shift.dim() == 1:
        return functional.linear(h, weight, shift)
    return functional.linear(h, weight) + shift


def _activation_and_slope(activation: nn.Module, z: Tensor) -> tuple[Tensor, Tensor]:
    """The activation at ``z``, and its slope there without a graph."""
    if type(activation) is nn.ELU and activation.alpha == 1 and not activation.inplace:
        h = functional.elu(z)
        return h, h.detach().clamp(max=0).add_(1)
    with torch.enable_grad():
        leaf = z.detach().requires_grad_()
        (slope,) = torch.autograd.grad(activation(leaf.clone()).sum(), leaf)
    return activation(z), slope
