r"""A whole step of training as one call: the loss, its gradient, clipping and Adam.

While compiled steps run, all parameters are in one flat tensor. They are written back by ``copy_``,
which increases their version counters.

A recording costs seconds and saves up to some milliseconds a step. So it is made only if enough
steps are left, for arguments of a kind that comes often.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary
from tqdm.auto import tqdm

from .._validation import warn
from ..compiler import lowering
from ..compiler.capture import Graph, Refused, record
from ..compiler.lowering import Lowered, Replay
from ..compiler.recorder import (
    KEEPS_CHANGING,
    MAX_GRAPHS,
    Recorder,
    by_hash,
    compare,
    disagreement,
    kind_of,
)
from ..elbo.objectives import Loss
from ..models.arguments import Args, Kwargs, flatten_tensors
from ..models.traces import quietly
from .digests import digest
from .optimizers import BETAS, Adam, FlatAdam

__all__ = ["Built", "CompiledSteps"]

# How often arguments of a second or later kind come before a step is compiled for them.
RARE = 20

# The inputs of a graph before the data: the weight of the KL divergence, whether the gradient is
# mass-covering, and the relative effective sample size.
NUM_SCALARS = 3

# The largest number of latents for which replayed steps are faster than eager ones: with a C++
# compiler for the flows' scores, and without.
MAX_REPLAYED, MAX_REPLAYED_UNCOMPILED = 200, 64

# In place of a backend where steps stay eager.
EAGER = "eager"

# How many numbers a step of Adam returns for each parameter.
NUMBERS_OF_ADAM = 12


class StepCall(NamedTuple):
    """The number of a step, its arguments, and the bar that says when it is compiled."""

    step: int
    args: Args
    kwargs: Kwargs
    bar: tqdm[Any] | None = None


class Built(NamedTuple):
    """A recorded and lowered step, for arguments of one kind."""

    graph: Graph
    live: list[str]  # the parameters that have gradients
    backend: str
    run: Lowered | None  # None until its constants come again
    counts: list[int]  # of its operations and numbers
    own: list[Tensor]  # the tensors of the loss


# By guide, so that another fit finds the steps of an earlier one.
_built: Any = WeakIdKeyDictionary()


class CompiledSteps(Recorder[StepCall, Built]):
    """The compiled steps of one training run.

    Args:
        loss: The loss.
        params: All parameters by name.
        optimizer: The optimiser of eager steps, whose state compiled steps take over.
        factors: As for :class:`~pyro_iaf.training.optimizers.FlatAdam`.
        weighted: Whether the weight of the KL divergence changes.
        settings: Other settings that the steps depend on.
        compile: As for :func:`~pyro_iaf.fit`.
        num_left: From a step to the number of those still to come, as far as one can say.
        change: Whether arguments change from step to step.
        before: The :meth:`state` in the checkpoint from which the run resumes, or None.
    """

    check_growth = 4  # a use is hundreds of steps, and a check costs as much as a hundred

    def __init__(
        self,
        loss: Loss,
        params: dict[str, Tensor],
        optimizer: Adam,
        factors: Sequence[float],
        weighted: bool,
        settings: tuple[Any, ...],
        *,
        compile: bool | str,  # noqa: A002
        num_left: Callable[[int], int],
        change: bool,
        before: dict[str, Any] | None,
    ) -> None:
        super().__init__()
        self.loss, self.params, self.optimizer = loss, params, optimizer
        self.compile, self.num_left, self.change = compile, num_left, change
        if change:  # each set of constants is recorded twice, see _come_again
            self.most_builds = 2 * (MAX_GRAPHS + 1)
        self._factors, self._weighted, self._settings = factors, weighted, settings
        known = _built.setdefault(loss.guide, {}) if isinstance(loss.guide, nn.Module) else {}
        self._known: dict[Any, Built] = known
        self._adam: FlatAdam | None = None
        self._last: Built | None = None
        self._live: list[str] = []
        self.device = next(iter(params.values()), torch.zeros(())).device
        self.best = Replay() if compile == "graph" else lowering.available_backends(self.device)[0]
        # An earlier step is used only if it has one of these backends.
        self.wanted = [b.name for b in (lowering.BACKENDS if compile == "auto" else [self.best])]
        # By hashes of kinds of arguments, which a checkpoint can hold. A kind keeps its backend, so
        # that a resumed run gives the same numbers.
        before = before or dict(
            kinds={}, left_out=[], backends={}, counts={}, failed=[], is_off=False
        )
        self._times, self._left_out = Counter(before["kinds"]), set(before["left_out"])
        self._backends: dict[str, str] = dict(before["backends"])
        # The operations and numbers of a step, likewise.
        self._counts: dict[str, list[int]] = dict(before["counts"])
        # Where the compiler failed, likewise.
        self._failed = set(before["failed"])
        # How often a step with such constants was recorded, by hashes.
        self._constants: dict[str, Counter[str]] = {
            name: Counter(seen) for name, seen in before.get("constants", {}).items()
        }
        if before["is_off"] and compile == "auto":
            self.compile = False

    # When to build

    def step_for(self, step: int, args: Args, kwargs: Kwargs, bar: tqdm[Any]) -> Built | None:
        """The compiled step for these arguments, built if need be; None for an eager step.

        Raises:
            Refused: If it can't be built and ``compile`` is True or ``"graph"``.

        Warns:
            UserWarning: Once, if it can't be built and ``compile="auto"``.
        """
        if self.compile is False:
            return None
        call = StepCall(step, args, kwargs, bar)
        try:
            built, is_due = self.find(call)
            if is_due:
                built = self.record(call)
                if built is not None and built.run is None:
                    return None
        except Refused as why:
            if self.compile != "auto":
                raise
            self.compile = False
            warn(f"fit takes its steps uncompiled: {why}")
            return None
        if built is not None and built is not self._last:
            name = _name(call)
            self._backends[name], self._counts[name] = built.backend, built.counts
            self._last = built
        return built

    def expect(self, num_steps: int) -> None:
        """Has steps compiled that were not worth it before, if these many more make them so."""
        for name, backend in list(self._backends.items()):
            slow = self.compile == "auto" and backend in (Replay.name, EAGER)
            if not slow or name in self._failed:
                continue
            if self._worthwhile(num_steps, name) != Replay.name:
                del self._backends[name]
                for key in [k for k, built in self._known.items() if built.backend == Replay.name]:
                    del self._known[key]
                self.recordings.clear()

    def _worthwhile(self, num_steps: int, name: str) -> str:
        return lowering.worthwhile_backend(self.device, num_steps, *self._counts[name]).name

    def is_for(self, built: Built, args: Args, kwargs: Kwargs) -> bool:
        """Whether a step takes these arguments."""
        return self.holds(built, StepCall(0, args, kwargs))

    def state(self) -> dict[str, Any]:
        """The state for a checkpoint, on which the backends of later steps depend."""
        return {
            "kinds": dict(self._times),
            "left_out": sorted(self._left_out),
            "backends": dict(self._backends),
            "counts": dict(self._counts),
            "failed": sorted(self._failed),
            "constants": {name: dict(seen) for name, seen in self._constants.items()},
            "is_off": self.compile is False,
        }

    def kind(self, call: StepCall) -> Hashable:
        kind = kind_of(self.loss.model, self.loss.guide, call.args, call.kwargs)
        settings = type(self.loss), self._settings, self._weighted, tuple(self.params)
        return by_hash(self.loss.model), settings, kind

    def leave_to_code(self, why: str) -> None:
        raise Refused(why)

    def made_before(self, kind: Hashable) -> Built | None:
        built = (self._known.get((kind, backend)) for backend in self.wanted)
        return next((b for b in built if b is not None and self.is_current(b)), None)

    def is_current(self, recording: Built) -> bool:
        if recording.run is None or not recording.graph.is_current:
            return False
        own = self.loss.tensors  # another fit of the guide has others
        if [*map(id, own)] != [*map(id, recording.own)]:
            return False
        held = {id(tensor) for tensor in recording.graph.tensors}
        return all(id(self.params.get(name)) in held for name in recording.live)

    def fits(self, recording: Built, call: StepCall) -> bool:
        if recording.graph.fits_all:
            return True
        given = flatten_tensors(call.args, call.kwargs)[0]
        return recording.graph.fits([*NUM_SCALARS * [self.loss.relative_ess], *given])

    def is_due(self, call: StepCall, kind: Hashable) -> bool:
        name = _name(call)
        if (backend := self._backends.get(name)) in self.wanted or backend == EAGER:
            return backend != EAGER
        is_short = self.num_left(call.step) < self.best.fewest_steps
        if (is_short and self.compile == "auto") or len(self._times) > MAX_GRAPHS:
            return False
        self._times[name] += 1
        # Rare kinds are not worth compiling: the last minibatch may be smaller, or each may have a
        # shape of its own.
        is_rare = self._times[name] < (RARE if len(self._times) > 1 else 1 + self.change)
        return not is_rare and len(self._times) <= MAX_GRAPHS and name not in self._left_out

    # Building

    def make(self, call: StepCall) -> Built | None:
        name = _name(call)
        backend = self._backends.get(name, "")
        is_undecided = backend not in self.wanted  # a resumed run keeps its backend
        if is_undecided:
            backend = self.best.name
        if self.compile != "auto":
            self.best.warm_up()
        graph, live = self._graph_of(call)
        counts = _counts_of(graph, self._params_of(live))
        if self.change and not graph.fits_all and not self._come_again(name, graph):
            return Built(graph, live, "", None, counts, self.loss.tensors)
        self._live = self._live or live
        if live != self._live:  # FlatAdam has the state of one set of parameters
            self._left_out.add(name)
            return None
        self._counts[name] = counts
        if self.compile == "auto" and is_undecided:
            backend = self._worthwhile(self.num_left(call.step), name)
            has_one = lowering.has_compiler(torch.device("cpu"))
            largest = MAX_REPLAYED if has_one else MAX_REPLAYED_UNCOMPILED
            if backend == Replay.name and self.loss.flow_dim > largest:
                self._backends[name] = EAGER
                return None
        if backend != Replay.name and call.bar is not None:
            call.bar.set_postfix_str("compiling the step, once")
        adam = self._adam_of(live)
        with torch.random.fork_rng(), torch.no_grad():
            numbers = torch.ones(4, dtype=torch.float64, device=adam.values.device)
            example = _arguments(adam, graph, call)(numbers)
            whole = _whole_step(graph, adam, len(flatten_tensors(call.args, call.kwargs)[0]))
            run, found = lowering.lower(whole, example, backend)
        if found != backend:
            self._failed.add(name)
        built = Built(graph, live, found, run, counts, self.loss.tensors)
        self.check(built, call)
        self._known[self.kind(call), backend] = built
        return built

    def _come_again(self, name: str, graph: Graph) -> bool:
        """Whether a graph's constants were seen before; raises Refused if they keep changing.

        Minibatches with ever new constants are not worth compiling.
        """
        seen = self._constants.setdefault(name, Counter())
        constants = digest(graph.constants.values)
        if seen[constants] < 2:  # as a resumed run records anew, further ones don't count
            seen[constants] += 1
            if len(seen) > MAX_GRAPHS:
                raise Refused(KEEPS_CHANGING)
        return seen[constants] > 1

    def _graph_of(self, call: StepCall) -> tuple[Graph, list[str]]:
        """The graph of the loss and its gradient, and the names of parameters that have one."""
        loss, before = self.loss, (self.loss.mass_covering, self.loss.relative_ess)
        with torch.random.fork_rng(), quietly():
            self._eager_loss(call)
            live = [name for name, param in self.params.items() if param.grad is not None]
        tensors, rebuild = flatten_tensors(call.args, call.kwargs)
        if not live:
            raise Refused(
                "No parameter has a gradient, so there is nothing to compile. Give compile=False."
            )
        one = self.params[live[0]].detach().new_ones(())
        inputs = [one, one.clone(), loss.relative_ess, *(t.detach() for t in tensors)]
        data = [NUM_SCALARS + k for k, t in enumerate(tensors) if not t.requires_grad]

        def run(weight: Tensor, mass_covering: Tensor, ess: Tensor, *given: Tensor) -> list[Tensor]:
            self._clear_gradients()
            loss.mass_covering, loss.relative_ess = mass_covering, ess
            args, kwargs = rebuild(list(given))
            value = loss.recordable(args, kwargs, weight if self._weighted else 1.0)
            gradients = [self.params[name].grad for name in live]
            return [value, loss.relative_ess, *gradients]  # type: ignore[list-item]

        try:
            with torch.random.fork_rng(), quietly():
                graph = record(run, inputs, data)
        finally:
            self._clear_gradients()
            loss.mass_covering, loss.relative_ess = before
        return graph, live

    def check(self, recording: Built, call: StepCall) -> None:
        with torch.random.fork_rng(), quietly():
            value = self._eager_loss(call)
            gradients = [param.grad for param in self._params_of(recording.live)]
            self._clear_gradients()
        expected = [gradient for gradient in gradients if gradient is not None]
        if len(expected) < len(gradients):
            raise disagreement("other parameters have gradients than before")
        adam = self._adam_of(recording.live)  # a copy that nothing else uses
        adam.first.zero_()
        adam.second.zero_()
        adam.state.copy_(adam.state.new_tensor([self.loss.relative_ess.item(), 0.0]))
        with torch.random.fork_rng(), torch.no_grad():
            numbers = adam.state.new_tensor([0.0, 1.0, 0.0, torch.inf])
            assert recording.run is not None
            found, _ = recording.run(_arguments(adam, recording.graph, call)(numbers))[0]
        # A step that is not finite is skipped.
        if all(number.isfinite().all() for number in (value, *expected)):
            again = adam.in_shape(adam.first / (1 - BETAS[0]))
            compare([found.to(value), *again], [value, *expected])

    def _eager_loss(self, call: StepCall) -> Tensor:
        """The loss by the code itself, which sets the parameters' gradients."""
        self._clear_gradients()
        before = self.loss.mass_covering, self.loss.relative_ess
        self.loss.mass_covering = False
        try:
            return self.loss(call.args, call.kwargs, 1.0)
        finally:
            self.loss.mass_covering, self.loss.relative_ess = before

    def _clear_gradients(self) -> None:
        for param in self.params.values():
            param.grad = None

    # Running

    def start(self, built: Built) -> FlatAdam:
        """Moves parameters and Adam's state to flat tensors, if they are not there."""
        if self._adam is not None and self._adam.params != self._params_of(built.live):
            self.stop()
        if self._adam is None:
            self._adam = self._adam_of(built.live)
            self._adam.state[0] = self.loss.relative_ess
        return self._adam

    def stop(self) -> None:
        """Writes parameters and Adam's state back, if they are in flat tensors."""
        if self._adam is not None:
            self._adam.store()
            self._adam.store_state()
            self.loss.relative_ess = self._adam.state[0].clone()
            self._adam = None

    def bind(self, built: Built, args: Args, kwargs: Kwargs) -> Callable[[Tensor], Tensor]:
        """The step at these arguments, as a function.

        It takes a float64 tensor of four numbers (the learning rate, the weight of the KL
        divergence, 1 for a mass-covering gradient, and the largest norm), and returns the loss and
        the norm of its gradient.
        """
        assert self._adam is not None
        arguments = _arguments(self._adam, built.graph, StepCall(0, args, kwargs))
        run = built.run
        assert run is not None
        return lambda numbers: run(arguments(numbers))[0]

    def _adam_of(self, live: list[str]) -> FlatAdam:
        return FlatAdam(self._params_of(live), self.optimizer, self._factors)

    def _params_of(self, names: list[str]) -> list[Tensor]:
        return [self.params[name] for name in names]


def _counts_of(graph: Graph, params: Sequence[Tensor]) -> list[int]:
    """The operations of a step, and the numbers that they return."""
    nodes = list(graph.module.graph.nodes)
    found = [node.meta.get("val") for node in nodes]
    numbers = sum(value.numel() for value in found if isinstance(value, Tensor))
    return [len(nodes), numbers + NUMBERS_OF_ADAM * sum(param.numel() for param in params)]


def _name(call: StepCall) -> str:
    """A hash of the kind of a call's arguments, which a checkpoint can hold."""
    return digest(kind_of(None, None, call.args, call.kwargs))


def _arguments(adam: FlatAdam, graph: Graph, call: StepCall) -> Callable[[Tensor], list[Tensor]]:
    """A function from a step's numbers to all its arguments, with new noise at each call."""
    inputs = [tensor.detach() for tensor in flatten_tensors(call.args, call.kwargs)[0]]
    views = dict(zip(map(id, adam.params), adam.views, strict=True))
    others = [tensor for tensor in graph.tensors if id(tensor) not in views]
    held = [views.get(id(tensor), tensor) for tensor in graph.tensors]
    sources = [*NUM_SCALARS * [adam.state], *inputs, *held]
    own, draw = adam.tensors, graph.draw.forward
    return lambda numbers: [*own, numbers, *inputs, *others, *draw(*sources)]


def _whole_step(graph: Graph, adam: FlatAdam, num_inputs: int) -> Callable[..., tuple[Tensor]]:
    """The step as a function of Adam's tensors, which it changes, of scalars and graph inputs."""
    places = {id(param): k for k, param in enumerate(adam.params)}
    held = [places.get(id(tensor)) for tensor in graph.tensors]
    num_others = held.count(None)

    def step(*given: Tensor) -> tuple[Tensor]:
        own, numbers, given = given[:5], given[5], given[6:]
        values, _, _, state, _ = own
        inputs, rest = given[:num_inputs], given[num_inputs:]
        others, noise = iter(rest[:num_others]), rest[num_others:]
        views = adam.in_shape(values)
        tensors = [next(others) if k is None else views[k] for k in held]
        rate, weight, mass_covering, largest_norm = numbers.unbind()
        scalars = [weight.to(values.dtype), mass_covering.to(values.dtype), state[0]]
        value, ess, *gradients = graph.module(*scalars, *inputs, *tensors, *noise)
        gradient = torch.cat([part.reshape(-1) for part in gradients])
        norm = FlatAdam.step(own, value, ess, gradient, rate, largest_norm)
        return (torch.stack([value.to(norm.dtype), norm]),)

    return step
