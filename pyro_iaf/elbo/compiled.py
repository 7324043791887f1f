r"""Losses: the negative ELBO, and gradients of it that are worth their time.

.. math::
    -\mathrm{ELBO} = \mathbb{E}_{z \sim q} \bigl[ \log q(z) - \log p(x, z) \bigr]
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from pyro.infer import Trace_ELBO
from pyro.util import warn_if_nan
from torch import Tensor
from torch.autograd.function import once_differentiable

from .._validation import check_size
from ..compiler.lowering import BACKENDS
from .trace import Call, Step, TraceRecorder, run_particles

__all__ = ["CompiledTrace_ELBO"]


class CompiledTrace_ELBO(Trace_ELBO):  # noqa: N801  # as Pyro's
    r"""Pyro's ``Trace_ELBO``, with the Python of a step run once instead of at each step.

    The first call runs model, guide and autograd under Pyro's handlers, writes down the tensor
    operations, and compiles them; later calls replay them, on fresh random numbers. Loss and
    gradients are those of :class:`pyro.infer.Trace_ELBO` under the same seed. Use it as ``loss`` of
    :class:`pyro.infer.SVI`, or as a module with ``torch.optim``.

    For models of static structure and guides whose draws are reparameterised. Tensors among the
    arguments are inputs of the graph: the same shapes replay, new ones are recorded anew. Numbers
    and strings among them are part of it. Tensors that the model reads from elsewhere are held as
    they are: a change in place is seen, another tensor under the same name is not; nor is a change
    of a number or an object that is no argument. So a graph is compared with the code itself when
    it is built and at calls 1, 2, 4, 8 and so on, and an error says if they differ. Where a loss is
    not finite, the code takes the step. Values are checked by Pyro's validation where the code
    runs, and not in between. A step costs what its arithmetic does, and some tens of microseconds.

    Args:
        num_particles: How many draws the gradient is taken from.
        vectorize_particles: Whether to draw them at once. If not, the graph holds one.
        max_plate_nesting: How many plates are nested at most; found by a run if left out.
        backend: ``"inductor"`` compiles, in some seconds, faster when compiled before;
            ``"graph"`` replays operation by operation and needs no compiler; ``"auto"`` compiles
            where there is a C++ compiler, or CUDA. The attribute ``backend`` says which it is.
        settings: What else ``Trace_ELBO`` takes.

    Raises:
        ValueError: If ``num_particles`` is no positive int, or ``backend`` none of these. At a
            call, if the model branches on a number (names the line), has enumerated
            sites, or changes from call to call.

    Warns:
        UserWarning: If a site of the guide is not reparameterised, handlers are active around the
            call, a parameter has hooks, or arguments are of ever new kinds or of a kind that a
            graph can't watch; such steps are Trace_ELBO's.

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

    def loss_and_grads(
        self, model: Callable[..., Any], guide: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> float:
        """An estimate of the loss; its gradient is added to that of the parameters."""
        call = Call(model, guide, args, kwargs)
        step, is_due = self.recorder.find(call)
        if is_due:  # the code goes first, and is refused before it leaves a trace
            run = run_particles(self, call)
            self.recorder.record(call)
            if run.surrogate.requires_grad:
                run.surrogate.backward(retain_graph=self.retain_graph)
            warn_if_nan(run.loss, "loss")
            return float(run.loss)
        found = self._run(step, args, kwargs)
        if step is None or found is None:
            return super().loss_and_grads(model, guide, *args, **kwargs)  # type: ignore[no-any-return]
        loss, gradients = found
        with torch.no_grad():
            for leaf, gradient in zip(step.leaves, gradients, strict=False):
                if leaf.grad is None:  # two gradients may be one tensor
                    leaf.grad = gradient.clone(memory_format=torch.contiguous_format)
                else:
                    leaf.grad.add_(gradient)
        given, theirs = step.differentiable(args, kwargs), gradients[len(step.leaves) :]
        if given:
            torch.autograd.backward(given, theirs)
        return loss.item()

    def differentiable_loss(
        self, model: Callable[..., Any], guide: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Tensor:
        """An estimate of the loss, differentiable once."""
        call = Call(model, guide, args, kwargs)
        step, is_due = self.recorder.find(call)
        found = self._run(step, args, kwargs)
        if step is None or found is None:
            eager = super().differentiable_loss(model, guide, *args, **kwargs)
            if is_due:
                self.recorder.record(call)
            return torch.as_tensor(eager)  # a number, where there are no sites
        loss, gradients = found
        leaves = [*step.leaves, *step.differentiable(args, kwargs)]
        return _WithGradient.apply(loss, gradients, *leaves)  # type: ignore[no-any-return]

    def _run(
        self, step: Step | None, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Tensor, Sequence[Tensor]] | None:
        """What a step gives; None if that is not finite, as the code itself says what is wrong."""
        if step is None:
            return None
        before = torch.get_rng_state()
        loss, gradients = step(args, kwargs)
        if math.isfinite(loss.item()):
            return loss, gradients
        torch.set_rng_state(before)
        return None


class _WithGradient(torch.autograd.Function):
    """A loss whose gradients are known."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, gradients: Sequence[Tensor], *_: Tensor) -> Tensor:
        ctx.gradients = gradients
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        return (None, None, *(slope * gradient for gradient in ctx.gradients))
