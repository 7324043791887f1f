r"""Losses: the negative ELBO, and gradients of it that are worth their time.

.. math::
    -\mathrm{ELBO} = \mathbb{E}_{z \sim q} \bigl[ \log q(z) - \log p(x, z) \bigr]
"""

from __future__ import annotations

import math
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO
from pyro.poutine.runtime import _PYRO_STACK
from pyro.poutine.trace_messenger import TraceMessenger
from pyro.util import warn_if_nan
from torch import Tensor
from torch.autograd.function import once_differentiable

from .._validation import check_size, warn
from ..compiler.capture import Graph, Refused, record
from ..compiler.lowering import BACKENDS, Lowered, choose_backend, lower, warm_up
from ..compiler.recorder import MAX_BUILDS, MAX_GRAPHS, MAX_KINDS, agree, by_hash, kind_of, opened
from ..models import param_store
from ..models.traces import quietly
from ..solvers.implicit import leaves_of
from .trace import ScoredSite, not_reparameterised, structure_of, trace_loss

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
        if backend not in BACKENDS:
            raise ValueError(f"backend should be one of {', '.join(BACKENDS)}; got {backend!r}.")
        self.backend = backend
        self._steps: OrderedDict[Any, _Step | None] = OrderedDict()
        self._kinds: OrderedDict[Any, None] = OrderedDict()
        self._builds: Counter[Any] = Counter()
        self._warned: set[str] = set()
        self._structures: list[tuple[list[ScoredSite], list[ScoredSite]]] = []

    def loss_and_grads(
        self, model: Callable[..., Any], guide: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> float:
        """An estimate of the loss; its gradient is added to that of the parameters."""
        step, kind = self._step_for(model, guide, args, kwargs)
        if kind is not None:  # the first of its kind, also to be refused before it leaves a trace
            first, surrogate = self._by_particles(model, guide, args, kwargs)
            self._build(kind, model, guide, args, kwargs)
            if surrogate.requires_grad:
                surrogate.backward(retain_graph=self.retain_graph)
            warn_if_nan(first, "loss")
            return float(first)
        if step is None:
            return super().loss_and_grads(model, guide, *args, **kwargs)  # type: ignore[no-any-return]
        before = torch.get_rng_state()
        loss, gradients = self._averaged(step, args, kwargs)
        if not math.isfinite(value := loss.item()):  # the code itself says what is wrong
            torch.set_rng_state(before)
            return super().loss_and_grads(model, guide, *args, **kwargs)  # type: ignore[no-any-return]
        with torch.no_grad():
            for leaf, gradient in zip(step.leaves, gradients, strict=False):
                if leaf.grad is None:  # two gradients may be one tensor
                    leaf.grad = gradient.clone(memory_format=torch.contiguous_format)
                else:
                    leaf.grad.add_(gradient)
        given, theirs = step.differentiable(args, kwargs), gradients[len(step.leaves) :]
        if given:
            torch.autograd.backward(given, theirs)
        return value

    def differentiable_loss(
        self, model: Callable[..., Any], guide: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Tensor:
        """An estimate of the loss, differentiable once."""
        step, kind = self._step_for(model, guide, args, kwargs)
        if step is None:
            eager = super().differentiable_loss(model, guide, *args, **kwargs)
            self._build(kind, model, guide, args, kwargs)
            return torch.as_tensor(eager)  # a number, where there are no sites
        before = torch.get_rng_state()
        loss, gradients = self._averaged(step, args, kwargs)
        if not loss.isfinite():
            torch.set_rng_state(before)
            return super().differentiable_loss(model, guide, *args, **kwargs)  # type: ignore[no-any-return]
        leaves = [*step.leaves, *step.differentiable(args, kwargs)]
        return _WithGradient.apply(loss, gradients, *leaves)  # type: ignore[no-any-return]

    def _by_particles(
        self,
        model: Callable[..., Any],
        guide: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> tuple[Any, Tensor]:
        """The loss of Trace_ELBO, also where it is infinite, and what has its gradient."""
        loss: Any = 0.0
        surrogate: Any = 0.0
        for traces in self._get_traces(model, guide, args, kwargs):
            value, free = self._differentiable_loss_particle(*traces)
            loss += value / self.num_particles
            surrogate += free / self.num_particles
        return loss, torch.as_tensor(surrogate)

    def _averaged(
        self, step: _Step, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Tensor, Sequence[Tensor]]:
        step.declare()
        loss, *gradients = step(args, kwargs)
        for _ in range(1, self._num_runs):
            more, *others = step(args, kwargs)
            loss = loss + more
            gradients = [a + b for a, b in zip(gradients, others, strict=True)]
        if self._num_runs > 1:
            loss = loss / self._num_runs
            gradients = [gradient / self._num_runs for gradient in gradients]
        return loss, gradients

    @property
    def _num_runs(self) -> int:
        return 1 if self.vectorize_particles else self.num_particles

    # Finding the graph for a call

    def _step_for(
        self,
        model: Callable[..., Any],
        guide: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> tuple[_Step | None, Any]:
        """The graph for a call, if there is one; and of which kind one should be built."""
        if not all(type(h) is TraceMessenger and h.param_only for h in _PYRO_STACK):
            self._warn("handlers around the call are not in its graph. Put them around the model")
            return None, None
        try:
            kind = (by_hash(model), by_hash(guide), kind_of(model, guide, args, kwargs))
        except Refused as why:
            self._warn(str(why))
            return None, None
        if kind not in self._steps:
            return None, kind if self._has_room(kind) else None
        self._steps.move_to_end(kind)
        step = self._steps[kind]
        if step is None:
            return None, None
        if not step.is_current():
            del self._steps[kind]
            if self._builds[kind] < MAX_BUILDS:
                return None, kind
            self._steps[kind] = None
            self._warn("a number, a module or a parameter that its graph relies on keeps changing")
            return None, None
        if any(leaf._backward_hooks for leaf in step.leaves):
            self._warn("a parameter has a hook, which graphs don't call")
            return None, None
        step.calls += 1
        if step.calls & (step.calls - 1) == 0:  # at calls 1, 2, 4, 8, ...
            self._check(step, model, guide, args, kwargs)
        return step, None

    def _has_room(self, kind: Any) -> bool:
        """Whether to build a graph for this kind of call: if there are few, or it came before."""
        again = kind in self._kinds
        self._kinds[kind] = None
        if len(self._kinds) > MAX_KINDS:
            self._kinds.popitem(last=False)
        if len(self._steps) < MAX_GRAPHS:
            return True
        self._warn(
            f"arguments are of ever new kinds, and {MAX_GRAPHS} graphs are kept; one more is built "
            "where a kind comes again. Pad tensors to one shape, and give numbers that change as "
            "tensors"
        )
        return again

    def _warn(self, why: str) -> None:
        if why not in self._warned:
            self._warned.add(why)
            warn(f"CompiledTrace_ELBO takes steps as Trace_ELBO does, uncompiled: {why}.")

    # Building it

    def _build(
        self,
        kind: Any,
        model: Callable[..., Any],
        guide: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:
        """Builds the graph for a kind of call, which stays with Trace_ELBO if there can be none."""
        if kind is not None:
            # Taken anew: at its first call a guide may have grown modules.
            kind = (*kind[:2], kind_of(model, guide, args, kwargs))
            self._builds[kind] += 1
            self._steps[kind] = self._recorded(model, guide, args, kwargs)
            if len(self._steps) > MAX_GRAPHS:
                self._steps.popitem(last=False)

    def _recorded(
        self,
        model: Callable[..., Any],
        guide: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> _Step | None:
        with torch.random.fork_rng(), poutine.block(), poutine.trace(param_only=True) as capture:
            loss, leaves, gradients = self._by_code(model, guide, args, kwargs)
            self.backend = choose_backend(self.backend, loss.device)
            if self.backend == "inductor":
                warm_up()
            structure = self._structures[0]
            if site := not_reparameterised(*structure):
                self._warn(
                    f"the guide's draws at site '{site}' are not reparameterised, which takes a "
                    "gradient of another kind"
                )
                return None
            tensors, rebuild = opened(args, kwargs)
            positions = [k for k, t in enumerate(tensors) if t.requires_grad]

            def run(*tensors: Tensor) -> list[Tensor]:
                given = list(tensors)
                for k in positions:
                    given[k] = given[k].detach().requires_grad_()
                args, kwargs = rebuild(given)
                loss = self._one_run(model, guide, args, kwargs)
                wanted = [*leaves, *(given[k] for k in positions)]
                return [loss.detach(), *_gradients(loss, wanted)]

            with quietly():
                graph = record(run, [tensor.detach() for tensor in tensors])
            if any(other != structure for other in self._structures):
                raise _changes("its sites are not the same in two runs")
        names = param_store.stated(capture.trace)
        step = _Step(graph, leaves, names, positions, self.backend, tensors)
        try:
            self._compare(step, args, kwargs, [loss, *gradients])
        except Refused:
            if step.backend == "graph":
                raise
            step = _Step(graph, leaves, names, positions, "graph", tensors)
            self._compare(step, args, kwargs, [loss, *gradients])
            warn(
                "The compiled step does not agree with the code that it was made of, so steps are "
                "replayed operation by operation."
            )
        self.backend = step.backend
        return step

    def _by_code(
        self,
        model: Callable[..., Any],
        guide: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """The loss, the leaves of its graph and its gradients, as Trace_ELBO has them."""
        self._structures.clear()
        tensors, rebuild = opened(args, kwargs)
        given = [t.detach().requires_grad_(t.requires_grad) for t in tensors]
        args, kwargs = rebuild(given)
        _, loss = self._by_particles(model, guide, args, kwargs)
        _, again = self._by_particles(model, guide, args, kwargs)
        # A leaf that each run makes anew is nobody's.
        lasting = {id(leaf) for leaf in leaves_of(again)} - {id(t) for t in given}
        leaves = [leaf for leaf in leaves_of(loss) if id(leaf) in lasting]
        wanted = [*leaves, *(t for t in given if t.requires_grad)]
        return loss.detach(), leaves, _gradients(loss, wanted)

    def _one_run(
        self,
        model: Callable[..., Any],
        guide: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Tensor:
        loss = trace_loss(*next(self._get_traces(model, guide, args, kwargs)))
        return loss / self.num_particles if self.vectorize_particles else loss

    def _get_trace(self, *args: Any) -> Any:
        model_trace, guide_trace = super()._get_trace(*args)
        self._structures.append((list(structure_of(guide_trace)), list(structure_of(model_trace))))
        return model_trace, guide_trace

    def _check(
        self,
        step: _Step,
        model: Callable[..., Any],
        guide: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:
        """Compares a graph with the code once more, on other numbers."""
        with torch.random.fork_rng(), poutine.block():
            loss, leaves, gradients = self._by_code(model, guide, args, kwargs)
        if [id(leaf) for leaf in leaves] != [id(leaf) for leaf in step.leaves]:
            raise _changes("it uses other parameters than before")
        self._compare(step, args, kwargs, [loss, *gradients])

    def _compare(
        self,
        step: _Step,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        expected: Sequence[Tensor],
    ) -> None:
        with torch.random.fork_rng():
            loss, gradients = self._averaged(step, args, kwargs)
        if not agree([loss, *gradients], expected):
            raise _changes(
                f"under one seed its loss is {expected[0].item():.6g}, and that of a graph of it "
                f"{loss.item():.6g}; or else their gradients differ"
            )

    def __getstate__(self) -> dict[str, Any]:
        # Graphs are of this process.
        fresh: dict[str, Any] = {
            "_steps": OrderedDict(),
            "_kinds": OrderedDict(),
            "_builds": Counter(),
        }
        return {**self.__dict__, **fresh}


class _Step:
    """A graph of one run, made fast: from the arguments of a call to the loss and gradients."""

    def __init__(
        self,
        graph: Graph,
        leaves: list[Tensor],
        names: dict[str, Tensor],
        positions: list[int],
        backend: str,
        inputs: list[Tensor],
    ) -> None:
        self.graph, self.leaves, self.names, self.positions = graph, leaves, names, positions
        entries = pyro.get_param_store()._params
        self.stored = {name for name, leaf in names.items() if entries.get(name) is leaf}
        self.calls = 0
        self.run: Lowered
        with torch.random.fork_rng(), torch.no_grad():
            example = [*inputs, *graph.tensors]
            example += graph.draw(*example)
            self.run, self.backend = lower(graph.module, example, backend)

    def is_current(self) -> bool:
        """Whether the parameters and all that was read are still what they were."""
        entries = pyro.get_param_store()._params
        return (
            all((entries.get(n) is leaf) == (n in self.stored) for n, leaf in self.names.items())
            and self.graph.is_current
        )

    def __call__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Sequence[Tensor]:
        with torch.no_grad():
            given = [*opened(args, kwargs)[0], *self.graph.tensors]
            return self.run([*given, *self.graph.draw(*given)])

    def differentiable(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
        """The arguments that want gradients."""
        tensors = opened(args, kwargs)[0] if self.positions else []
        return [tensors[k] for k in self.positions]

    def declare(self) -> None:
        """Makes the statements of parameters that the code would make."""
        if _PYRO_STACK:
            for name, leaf in self.names.items():
                if name in self.stored:
                    pyro.param(name)
                else:
                    param_store.state(name, leaf)


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


def _gradients(loss: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    if not leaves or not loss.requires_grad:
        return [torch.zeros_like(leaf) for leaf in leaves]
    return list(torch.autograd.grad(loss, leaves, materialize_grads=True))


def _changes(how: str) -> Refused:
    return Refused(
        f"The model or the guide can't be run as a graph: {how}. It may hang on something else "
        "than tensors that changes from run to run, as a counter, the random numbers of Python or "
        "NumPy, or a module that changes itself in training (.eval() ends that). Train by "
        "Trace_ELBO, or fit(..., compile=False)."
    )
