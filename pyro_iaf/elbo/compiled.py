r"""Pyro's trace ELBO, compiled.

.. math::
    -\mathrm{ELBO} = \mathbb{E}_{z \sim q} \bigl[ \log q(z) - \log p(x, z) \bigr]
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from pyro.util import warn_if_nan
from torch import Tensor
from torch.autograd.function import once_differentiable

from .._validation import check_size
from ..compiler.lowering import BACKENDS
from ..models.arguments import Program
from .marginal import MarginalELBO
from .trace import Call, Step, TraceRecorder, run_particles

__all__ = ["CompiledTrace_ELBO"]


class CompiledTrace_ELBO(MarginalELBO):  # noqa: N801  # as Pyro's
    r"""Pyro's ``Trace_ELBO``, with steps that are recorded once and then run without Python.

    The first call runs model, guide and autograd under Pyro's handlers, records the tensor
    operations, and compiles them. Later calls run them on fresh random numbers. Loss and gradients
    are those of :class:`pyro.infer.Trace_ELBO` under the same seed. Use it as ``loss`` of
    :class:`pyro.infer.SVI`, or as a module with ``torch.optim``.

    The model needs a static structure, and the guide reparameterised draws. Tensors among the
    arguments are inputs of the graph, and numbers and strings are constants; new shapes and new
    constants are recorded anew. Constants are also the numbers and shapes that the model computes
    in Python from data alone, as ``int(group.max()) + 1``, ``if y.sum() > 0:`` or ``x[mask]``: data
    with other such numbers are recorded too, up to four times, and then left to ``Trace_ELBO``. Of
    outside tensors that the model reads, changes in place are seen. Not seen are another tensor
    under the same name, and changes of numbers and objects that are no arguments. So a graph is
    compared with the code when it is built and at calls 1, 2, 4, 8 and so on, with an error if they
    differ. If a loss is not finite, the code takes the step. Pyro's validation checks values only
    where the code runs. A step costs its arithmetic and some tens of microseconds.

    Args:
        num_particles: Number of draws for each gradient.
        vectorize_particles: Whether to draw them at once. If not, the graph holds one.
        max_plate_nesting: The largest number of nested plates; found by a run if left out.
        backend: ``"inductor"`` compiles, which takes some seconds, and less the second time.
            ``"graph"`` replays operation by operation and needs no compiler. ``"auto"`` compiles
            where there is a C++ compiler, or CUDA. The attribute ``backend`` is the one in use.
        settings: Further arguments of ``Trace_ELBO``.

    Raises:
        ValueError: If ``num_particles`` is no positive int, or ``backend`` none of these. At a
            call, if the model branches on a latent, a parameter or a random number, or takes
            another number out of them (the error names the line), has enumerated sites, or changes
            from call to call.

    Warns:
        UserWarning: If a site of the guide is not reparameterised, handlers are active around the
            call, a parameter has hooks, or arguments are of ever new kinds or of a type that a
            graph can't see change. ``Trace_ELBO`` takes such steps.

    Example:
        >>> def model(y):
        ...     z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...     pyro.sample("y", dist.Normal(z, 0.5), obs=y)
        >>> loss = CompiledTrace_ELBO(backend="graph")
        >>> svi = pyro.infer.SVI(model, AutoIAF(model), pyro.optim.Adam({"lr": 0.01}), loss)
        >>> losses = [svi.step(torch.tensor(1.0)) for _ in range(10)]
    """

    def __init__(
        self,
        num_particles: int = 1,
        vectorize_particles: bool = False,
        max_plate_nesting: float = float("inf"),
        *,
        backend: str = "auto",
        **settings: Any,
    ) -> None:
        super().__init__(
            num_particles=check_size("num_particles", num_particles),
            vectorize_particles=vectorize_particles,
            max_plate_nesting=max_plate_nesting,
            **settings,
        )
        names = dict.fromkeys(["auto", *(known.name for known in BACKENDS)])
        if backend not in names:
            raise ValueError(f"backend should be one of {', '.join(names)}; got {backend!r}.")
        self.backend = backend
        self.recorder = TraceRecorder(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.recorder = TraceRecorder(self)  # a copy's own

    def loss_and_grads(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> float:
        """An estimate of the loss. Its gradient is added to that of the parameters."""
        call = Call(model, guide, args, kwargs)
        step, is_due = self.recorder.find(call)
        if is_due:  # the code runs first, and a refusal comes before it changes gradients
            run = run_particles(self, call)
            self.recorder.record(call)
            if run.surrogate.requires_grad:
                run.surrogate.backward(retain_graph=self.retain_graph)
            warn_if_nan(run.loss, "loss")
            return float(run.loss)
        if step is None or (found := self._run(step, call)) is None:
            return super().loss_and_grads(model, guide, *args, **kwargs)  # type: ignore[no-any-return]
        loss, gradients = found
        with torch.no_grad():
            for leaf, gradient in zip(step.leaves, gradients, strict=False):
                if leaf.grad is None:  # two gradients may be one tensor
                    leaf.grad = gradient.clone(memory_format=torch.contiguous_format)
                else:
                    leaf.grad.add_(gradient)
        if inputs := step.differentiable(call):
            torch.autograd.backward(inputs, gradients[len(step.leaves) :])
        return loss.item()

    def differentiable_loss(
        self, model: Program, guide: Program, *args: Any, **kwargs: Any
    ) -> Tensor:
        """An estimate of the loss, differentiable once."""
        call = Call(model, guide, args, kwargs)
        step, is_due = self.recorder.find(call)
        if step is None or (found := self._run(step, call)) is None:
            eager = super().differentiable_loss(model, guide, *args, **kwargs)
            if is_due:
                self.recorder.record(call)
            return torch.as_tensor(eager)  # a number, if there are no sites
        leaves = [*step.leaves, *step.differentiable(call)]
        return _WithGradient.apply(*found, *leaves)  # type: ignore[no-any-return]

    def _run(self, step: Step, call: Call) -> tuple[Tensor, Sequence[Tensor]] | None:
        """Loss and gradients by a graph; None if not finite, since the code names the cause."""
        before = torch.get_rng_state()
        loss, gradients = step(call)
        if math.isfinite(loss.item()):
            return loss, gradients
        torch.set_rng_state(before)
        return None


class _WithGradient(torch.autograd.Function):
    """A loss with known gradients."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, gradients: Sequence[Tensor], *_: Tensor) -> Tensor:
        ctx.gradients = gradients
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        return (None, None, *(slope * gradient for gradient in ctx.gradients))
