"""Graphs of Pyro's trace ELBO and its gradient."""

from __future__ import annotations

from collections.abc import Sequence
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
from ..compiler.recorder import Recorder, by_hash, compare, disagreement, kind_of
from ..models import param_store
from ..models.arguments import Args, Kwargs, Program, flatten_tensors
from ..models.traces import quietly, samples
from ..solvers.implicit import leaves_of

__all__ = ["Call", "Step", "TraceRecorder", "recordable_loss", "run_particles"]


class Call(NamedTuple):
    """The arguments of a call of a loss."""

    model: Program
    guide: Program
    args: Args
    kwargs: Kwargs


def trace_loss(model_trace: poutine.Trace, guide_trace: poutine.Trace) -> Tensor:
    """The negative ELBO of a run, with Trace_ELBO's gradient if all draws are reparameterised."""
    elbo: Any = 0.0
    for sign, trace in ((1, model_trace), (-1, guide_trace)):
        for site in trace.nodes.values():
            if site["type"] == "sample":
                elbo = elbo + sign * site["log_prob_sum"]
    return -torch.as_tensor(elbo)


def recordable_loss(elbo: Trace_ELBO, call: Call) -> Tensor:
    """The loss by ``elbo``, in operations that a graph can hold.

    An ELBO with gradients of its own defines ``recordable_particle`` in place of ``trace_loss``.

    Raises:
        Refused: If a site is enumerated, or not reparameterised.
    """
    total: Any = 0.0
    of_traces = getattr(elbo, "recordable_particle", trace_loss)
    for model_trace, guide_trace in elbo._get_traces(*call):
        if site := not_reparameterised(model_trace, guide_trace):
            raise Refused(
                f"The guide's draws at site '{site}' are not reparameterised, and a graph has no "
                "score-function gradient. Use compile=False."
            )
        total = total + of_traces(model_trace, guide_trace) / elbo.num_particles
    return torch.as_tensor(total)


def not_reparameterised(model_trace: poutine.Trace, guide_trace: poutine.Trace) -> str | None:
    """A site of the guide with a score-function gradient, if there is one.

    Raises:
        Refused: If a site is enumerated.
    """
    guide = samples(guide_trace)
    for name, site in [*guide.items(), *samples(model_trace).items()]:
        if site["infer"].get("enumerate"):
            raise Refused(
                f"Site '{name}' is enumerated, which needs TraceEnum_ELBO; CompiledTrace_ELBO "
                "draws at each site."
            )
    # From score_parts, since wrappers and has_rsample_() may differ from the class's has_rsample.
    for name, site in guide.items():
        if "score_parts" in site and not is_identically_zero(site["score_parts"][1]):
            return name
    return None


class ParticleRun(NamedTuple):
    """The result of Trace_ELBO on a call.

    Attributes:
        loss: A number or a tensor, which may be infinite.
        surrogate: A tensor whose gradient is that of the loss.
        not_reparameterised: A site of the guide with a score-function gradient, if there is one.
        structures: The sites of each run of model and guide, without their values.
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
        value, differentiable = elbo._differentiable_loss_particle(*traces)
        loss += value / elbo.num_particles
        surrogate += differentiable / elbo.num_particles
        site = not_reparameterised(*traces)
        structures.add(tuple(tuple(map(_structure, samples(t).values())) for t in traces))
    return ParticleRun(loss, torch.as_tensor(surrogate), site, structures)


def _structure(site: Any) -> tuple[Any, ...]:
    shape = torch.as_tensor(site["value"]).shape
    return site["name"], type(site["fn"]), shape, site["is_observed"]


class TraceRecorder(Recorder[Call, "Step"]):
    """The graphs of a Trace_ELBO, whose ``backend`` is set to the one that runs them."""

    def __init__(self, elbo: Any) -> None:
        super().__init__()
        self.elbo = elbo
        self._warned: set[str] = set()

    def kind(self, call: Call) -> Any:
        if not all(type(h) is TraceMessenger and h.param_only for h in _PYRO_STACK):
            raise Refused("A graph ignores handlers around the call. Handle the model instead.")
        num_vectorized = self.elbo.vectorize_particles and self.elbo.num_particles
        return by_hash(call.model), by_hash(call.guide), num_vectorized, kind_of(*call)

    def leave_to_code(self, why: str) -> None:
        if why not in self._warned:
            self._warned.add(why)
            warn(f"CompiledTrace_ELBO takes steps as Trace_ELBO does, uncompiled: {why}")

    def is_current(self, recording: Step) -> bool:
        if any(leaf._backward_hooks for leaf in recording.leaves):
            raise Refused("A parameter has a hook, and graphs don't call hooks.")
        return recording.is_current()

    def fits(self, recording: Step, call: Call) -> bool:
        graph = recording.graph
        return graph.fits_all or graph.fits(flatten_tensors(call.args, call.kwargs)[0])

    def make(self, call: Call) -> Step | None:
        elbo = self.elbo
        with torch.random.fork_rng(), poutine.block(), poutine.trace(param_only=True) as capture:
            expected, leaves, site = self._by_code(call)
            backend = choose_backend(elbo.backend, expected[0].device)
            backend.warm_up()
            elbo.backend = backend.name
            if site is not None:
                self.leave_to_code(
                    f"The guide's draws at site '{site}' are not reparameterised, and a graph has "
                    "no score-function gradient."
                )
                return None
            tensors, rebuild = flatten_tensors(call.args, call.kwargs)
            positions = [k for k, t in enumerate(tensors) if t.requires_grad]

            def run(*tensors: Tensor) -> list[Tensor]:
                inputs = list(tensors)
                for k in positions:
                    inputs[k] = inputs[k].detach().requires_grad_()
                loss = trace_loss(*next(elbo._get_traces(call.model, call.guide, *rebuild(inputs))))
                loss = loss / elbo.num_particles if elbo.vectorize_particles else loss
                return _loss_and_gradients(loss, [*leaves, *(inputs[k] for k in positions)])

            data = [k for k, t in enumerate(tensors) if not t.requires_grad]
            with quietly():
                graph = record(run, [tensor.detach() for tensor in tensors], data)
        names = param_store.unconstrained_params(capture.trace)
        step = Step(elbo, graph, leaves, names, positions, tensors, backend.name)
        try:
            _compare(step, call, expected)
        except Refused:
            if step.backend == Replay.name:
                raise
            step = Step(elbo, graph, leaves, names, positions, tensors, Replay.name)
            _compare(step, call, expected)
            warn(
                "The compiled step does not agree with the code, so steps are replayed operation "
                "by operation."
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
        """Trace_ELBO's loss and gradients, the parameters, and a site not reparameterised."""
        tensors, rebuild = flatten_tensors(call.args, call.kwargs)
        inputs = [t.detach().requires_grad_(t.requires_grad) for t in tensors]
        call = Call(call.model, call.guide, *rebuild(inputs))
        run, again = run_particles(self.elbo, call), run_particles(self.elbo, call)
        if len(run.structures | again.structures) > 1:
            raise disagreement("its sites are not the same in two runs")
        # Leaves that each run creates anew are no parameters.
        lasting = {id(leaf) for leaf in leaves_of(again.surrogate)} - {id(t) for t in inputs}
        loss = run.surrogate
        leaves = [leaf for leaf in leaves_of(loss) if id(leaf) in lasting]
        wanted = [*leaves, *(t for t in inputs if t.requires_grad)]
        return _loss_and_gradients(loss, wanted), leaves, run.not_reparameterised


class Step:
    """A compiled graph of one run, from a call to its loss and gradients.

    The gradients are those of ``leaves``, then of the tensors among the arguments at ``positions``.
    ``names`` are the parameters that the code states, and ``inputs`` are example arguments.
    """

    def __init__(
        self,
        elbo: Trace_ELBO,
        graph: Graph,
        leaves: list[Tensor],
        names: dict[str, Tensor],
        positions: list[int],
        inputs: list[Tensor],
        backend: str,
    ) -> None:
        self.elbo, self.graph = elbo, graph
        self.leaves, self.names, self.positions = leaves, names, positions
        entries = pyro.get_param_store()._params
        self.stored = {name for name, leaf in names.items() if entries.get(name) is leaf}
        with torch.random.fork_rng(), torch.no_grad():
            example = [*inputs, *graph.tensors]
            example += graph.draw(*example)
            self.run, self.backend = lower(graph.module, example, backend)

    def is_current(self) -> bool:
        """Whether the parameters and all that was read are unchanged."""
        entries = pyro.get_param_store()._params
        return (
            all((entries.get(n) is leaf) == (n in self.stored) for n, leaf in self.names.items())
            and self.graph.is_current
        )

    def __call__(self, call: Call) -> tuple[Tensor, Sequence[Tensor]]:
        """The loss and its gradients, averaged over all runs."""
        self._state_parameters()
        # A vectorised graph has all particles.
        num_runs = 1 if self.elbo.vectorize_particles else self.elbo.num_particles
        with torch.no_grad():
            given = [*flatten_tensors(call.args, call.kwargs)[0], *self.graph.tensors]
            found = self.run([*given, *self.graph.draw(*given)])
            for _ in range(1, num_runs):
                more = self.run([*given, *self.graph.draw(*given)])
                found = [a + b for a, b in zip(found, more, strict=True)]
            if num_runs > 1:
                found = [a / num_runs for a in found]
        return found[0], found[1:]

    def differentiable(self, call: Call) -> list[Tensor]:
        """The tensors among the arguments that require gradients."""
        tensors = flatten_tensors(call.args, call.kwargs)[0] if self.positions else []
        return [tensors[k] for k in self.positions]

    def _state_parameters(self) -> None:
        """States the parameters to handlers, as the code would."""
        if _PYRO_STACK:
            for name, leaf in self.names.items():
                if name in self.stored:
                    pyro.param(name)
                else:
                    param_store.declare_local(name, leaf)


def _compare(step: Step, call: Call, expected: Sequence[Tensor]) -> None:
    with torch.random.fork_rng():
        loss, gradients = step(call)
    compare([loss, *gradients], expected)


def _loss_and_gradients(loss: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    if not leaves or not loss.requires_grad:
        return [loss.detach(), *map(torch.zeros_like, leaves)]
    return [loss.detach(), *torch.autograd.grad(loss, leaves, materialize_grads=True)]
