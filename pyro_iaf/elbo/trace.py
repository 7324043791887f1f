"""What is recorded of Pyro's trace ELBO."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pyro
import torch
from pyro import poutine
from pyro.distributions.util import is_identically_zero
from pyro.infer import Trace_ELBO
from pyro.poutine.runtime import _PYRO_STACK
from pyro.poutine.trace_messenger import TraceMessenger
from torch import Tensor

from .._validation import warn
from ..compiler.capture import Graph, Refused, record
from ..compiler.lowering import Replay, choose_backend, lower
from ..compiler.recorder import Recorder, by_hash, compare, disagreement, kind_of, opened
from ..models import param_store
from ..models.traces import quietly, samples
from ..solvers.implicit import leaves_of

__all__ = ["Call", "Step", "TraceRecorder", "recordable_loss", "run_particles"]


class Call(NamedTuple):
    """What a loss is called with."""

    model: Callable[..., Any]
    guide: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def trace_loss(model_trace: poutine.Trace, guide_trace: poutine.Trace) -> Tensor:
    """The negative ELBO of a run; its gradient is Trace_ELBO's if all draws are reparameterised."""
    elbo: Any = 0.0
    for sign, trace in ((1, model_trace), (-1, guide_trace)):
        for site in trace.nodes.values():
            if site["type"] == "sample":
                elbo = elbo + sign * site["log_prob_sum"]
    return -torch.as_tensor(elbo)


def recordable_loss(
    elbo: Trace_ELBO,
    model: Callable[..., Any],
    guide: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Tensor:
    """What ``elbo`` is of these, in operations that a graph can hold.

    An ELBO with gradients of its own says in ``recordable_particle`` what they are.

    Raises:
        Refused: If a site is enumerated, or not reparameterised.
    """
    total: Any = 0.0
    for model_trace, guide_trace in elbo._get_traces(model, guide, args, kwargs):
        if site := not_reparameterised(model_trace, guide_trace):
            raise Refused(
                f"The guide's draws at site '{site}' are not reparameterised, which takes a "
                "gradient of another kind than a graph has: compile=False."
            )
        of_traces = getattr(elbo, "recordable_particle", trace_loss)
        total = total + of_traces(model_trace, guide_trace) / elbo.num_particles
    return torch.as_tensor(total)


def not_reparameterised(model_trace: poutine.Trace, guide_trace: poutine.Trace) -> str | None:
    """A site of the guide whose gradient takes its score, if there is one.

    Raises:
        Refused: If a site is enumerated.
    """
    guide = samples(guide_trace)
    for name, site in [*guide.items(), *samples(model_trace).items()]:
        if site["infer"].get("enumerate"):
            raise Refused(
                f"Site '{name}' is enumerated, which is for TraceEnum_ELBO; CompiledTrace_ELBO "
                "draws at each site."
            )
    # The site's own word, as wrappers and has_rsample_() change that of the class.
    for name, site in guide.items():
        if "score_parts" in site and not is_identically_zero(site["score_parts"][1]):
            return name
    return None


class ParticleRun(NamedTuple):
    """What Trace_ELBO makes of a call.

    Attributes:
        loss: A number or a tensor, also where it is infinite.
        surrogate: What has its gradient.
        not_reparameterised: A site of the guide whose gradient takes its score, if there is one.
        structures: The sites of the runs of guide and model, but for the numbers in them.
    """

    loss: Any
    surrogate: Tensor
    not_reparameterised: str | None
    structures: set[Any]


def run_particles(elbo: Trace_ELBO, call: Call) -> ParticleRun:
    """Runs model and guide as Trace_ELBO does."""
    loss: Any = 0.0
    surrogate: Any = 0.0
    structures = set()
    for traces in elbo._get_traces(*call):
        value, free = elbo._differentiable_loss_particle(*traces)
        loss += value / elbo.num_particles
        surrogate += free / elbo.num_particles
        site = not_reparameterised(*traces)
        structures.add(tuple(tuple(map(_structure, samples(t).values())) for t in traces))
    return ParticleRun(loss, torch.as_tensor(surrogate), site, structures)


def _structure(site: Any) -> tuple[Any, ...]:
    shape = torch.as_tensor(site["value"]).shape
    return site["name"], type(site["fn"]), shape, site["is_observed"]


class TraceRecorder(Recorder[Call, "Step"]):
    """The graphs of a Trace_ELBO, for its calls.

    Args:
        elbo: The loss; its ``backend`` becomes what graphs are run by.
    """

    def __init__(self, elbo: Any) -> None:
        super().__init__()
        self.elbo = elbo
        self._warned: set[str] = set()

    def kind(self, call: Call) -> Any:
        if not all(type(h) is TraceMessenger and h.param_only for h in _PYRO_STACK):
            raise Refused("A graph has no handlers from around the call. Handle the model instead.")
        return by_hash(call.model), by_hash(call.guide), kind_of(*call)

    def leave_to_code(self, why: str) -> None:
        if why not in self._warned:
            self._warned.add(why)
            warn(f"CompiledTrace_ELBO takes steps as Trace_ELBO does, uncompiled: {why}")

    def is_current(self, recording: Step) -> bool:
        if any(leaf._backward_hooks for leaf in recording.leaves):
            raise Refused("A parameter has a hook, which graphs don't call.")
        return recording.is_current()

    def make(self, call: Call) -> Step | None:
        elbo = self.elbo
        with torch.random.fork_rng(), poutine.block(), poutine.trace(param_only=True) as capture:
            expected, leaves, site = self._by_code(call)
            backend = choose_backend(elbo.backend, expected[0].device)
            backend.warm_up()
            elbo.backend = backend.name
            if site is not None:
                self.leave_to_code(
                    f"The guide's draws at site '{site}' are not reparameterised, which takes a "
                    "gradient of another kind."
                )
                return None
            tensors, rebuild = opened(call.args, call.kwargs)
            positions = [k for k, t in enumerate(tensors) if t.requires_grad]

            def run(*tensors: Tensor) -> list[Tensor]:
                given = list(tensors)
                for k in positions:
                    given[k] = given[k].detach().requires_grad_()
                loss = trace_loss(*next(elbo._get_traces(call.model, call.guide, *rebuild(given))))
                loss = loss / elbo.num_particles if elbo.vectorize_particles else loss
                wanted = [*leaves, *(given[k] for k in positions)]
                return [loss.detach(), *_gradients(loss, wanted)]

            with quietly():
                graph = record(run, [tensor.detach() for tensor in tensors])
        names = param_store.stated(capture.trace)
        num_runs = 1 if elbo.vectorize_particles else elbo.num_particles
        step = Step(graph, leaves, names, positions, num_runs, tensors, backend.name)
        try:
            _compare(step, call, expected)
        except Refused:
            if step.backend == Replay.name:
                raise
            step = Step(graph, leaves, names, positions, num_runs, tensors, Replay.name)
            _compare(step, call, expected)
            warn(
                "The compiled step does not agree with the code that it was made of, so steps are "
                "replayed operation by operation."
            )
        elbo.backend = step.backend
        return step

    def check(self, recording: Step, call: Call) -> None:
        with torch.random.fork_rng(), poutine.block():
            expected, leaves, _ = self._by_code(call)
        if [id(leaf) for leaf in leaves] != [id(leaf) for leaf in recording.leaves]:
            raise disagreement("it uses other parameters than before")
        _compare(recording, call, expected)

    def _by_code(self, call: Call) -> tuple[list[Tensor], list[Tensor], str | None]:
        """The loss and its gradients, as Trace_ELBO has them, and the leaves of its graph.

        And a site that is not reparameterised.
        """
        tensors, rebuild = opened(call.args, call.kwargs)
        given = [t.detach().requires_grad_(t.requires_grad) for t in tensors]
        call = Call(call.model, call.guide, *rebuild(given))
        run, again = run_particles(self.elbo, call), run_particles(self.elbo, call)
        if len(run.structures | again.structures) > 1:
            raise disagreement("its sites are not the same in two runs")
        # A leaf that each run makes anew is nobody's.
        lasting = {id(leaf) for leaf in leaves_of(again.surrogate)} - {id(t) for t in given}
        loss = run.surrogate
        leaves = [leaf for leaf in leaves_of(loss) if id(leaf) in lasting]
        wanted = [*leaves, *(t for t in given if t.requires_grad)]
        return [loss.detach(), *_gradients(loss, wanted)], leaves, run.not_reparameterised


class Step:
    """A graph of one run, made fast: from the arguments of a call to the loss and gradients."""

    def __init__(
        self,
        graph: Graph,
        leaves: list[Tensor],
        names: dict[str, Tensor],
        positions: list[int],
        num_runs: int,
        inputs: list[Tensor],
        backend: str,
    ) -> None:
        self.graph, self.leaves, self.names = graph, leaves, names
        self.positions, self.num_runs = positions, num_runs
        entries = pyro.get_param_store()._params
        self.stored = {name for name, leaf in names.items() if entries.get(name) is leaf}
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

    def __call__(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Tensor, Sequence[Tensor]]:
        """The loss and its gradients, in the mean over all runs."""
        self._declare()
        with torch.no_grad():
            given = [*opened(args, kwargs)[0], *self.graph.tensors]
            found = self.run([*given, *self.graph.draw(*given)])
            for _ in range(1, self.num_runs):
                more = self.run([*given, *self.graph.draw(*given)])
                found = [a + b for a, b in zip(found, more, strict=True)]
            if self.num_runs > 1:
                found = [a / self.num_runs for a in found]
        return found[0], found[1:]

    def differentiable(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
        """The arguments that want gradients."""
        tensors = opened(args, kwargs)[0] if self.positions else []
        return [tensors[k] for k in self.positions]

    def _declare(self) -> None:
        """Makes the statements of parameters that the code would make."""
        if _PYRO_STACK:
            for name, leaf in self.names.items():
                if name in self.stored:
                    pyro.param(name)
                else:
                    param_store.state(name, leaf)


def _compare(step: Step, call: Call, expected: Sequence[Tensor]) -> None:
    with torch.random.fork_rng():
        loss, gradients = step(call.args, call.kwargs)
    compare([loss, *gradients], expected)


def _gradients(loss: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    if not leaves or not loss.requires_grad:
        return [torch.zeros_like(leaf) for leaf in leaves]
    return list(torch.autograd.grad(loss, leaves, materialize_grads=True))
