r"""A whole step of training as one call: the loss, its gradient, clipping and Adam.

.. math::
    m \leftarrow \beta_1 m + (1 - \beta_1) g, \quad
    v \leftarrow \beta_2 v + (1 - \beta_2) g^2, \quad
    \phi \leftarrow \phi - \eta \, \frac{m / (1 - \beta_1^t)}{\sqrt{v / (1 - \beta_2^t)} + \epsilon}

with all parameters in one flat tensor while it runs. They are written back by ``copy_``, so that
whoever watches them sees it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from threading import Thread
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from ..compiler.capture import Graph, Refused, record
from ..compiler.lowering import Lowered, lower
from ..compiler.recorder import agree, by_hash, kind_of, opened
from ..elbo.objectives import Loss
from ..models.traces import quietly
from ..solvers.score_kernel import load_kernel
from .optimizers import BETA_1, BETA_2, EPS, Adam

__all__ = ["CompiledSteps"]


class Built(NamedTuple):
    """A step that was recorded and made fast, for arguments of one kind."""

    graph: Graph
    live: list[str]  # the parameters that have gradients
    backend: str
    wanted: str  # the backend that was asked for
    run: Lowered


# What was built, by guide, so that another fit finds it.
_built: Any = WeakIdKeyDictionary()


class CompiledSteps:
    """The compiled steps of one training run.

    Args:
        loss: What is minimised.
        params: All parameters by name.
        optimizer: Whose state it takes over.
        factors: See :class:`Adam`.
        weighted: Whether the weight of the KL divergence changes.
        settings: What else makes one run's steps other than another's.
    """

    def __init__(
        self,
        loss: Loss,
        params: dict[str, Tensor],
        optimizer: torch.optim.Adam,
        factors: Sequence[float],
        weighted: bool,
        settings: tuple[Any, ...],
    ) -> None:
        self.loss, self.params, self.optimizer = loss, params, optimizer
        self._factors = factors
        known = _built.setdefault(loss.guide, {}) if isinstance(loss.guide, nn.Module) else {}
        self._known: dict[Any, Built] = known
        self._weighted, self._settings = weighted, settings
        self._adam: Adam | None = None

    def find(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], backends: Sequence[str]
    ) -> Built | None:
        """The step for such arguments by one of these backends, if it was built."""
        key = self._key(args, kwargs)
        for backend in backends:
            built = self._known.get((key, backend))
            if built is not None and built.graph.is_current:
                held = {id(tensor) for tensor in built.graph.tensors}
                if all(id(self.params.get(name)) in held for name in built.live):
                    return built
        return None

    def record(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Graph, list[str]]:
        """The graph of the loss and its gradient, and the parameters that have one."""
        loss, kept = self.loss, (self.loss.covers, self.loss.health)
        with torch.random.fork_rng(), quietly():
            self._by_code(args, kwargs)
            live = [name for name, param in self.params.items() if param.grad is not None]
        tensors, rebuild = opened(args, kwargs)
        if not live:
            raise Refused("Nothing has a gradient, so there is nothing to compile: compile=False.")
        lead = [self.params[live[0]].detach().new_ones(()) for _ in range(2)]

        def run(weight: Tensor, covers: Tensor, health: Tensor, *given: Tensor) -> list[Tensor]:
            self._forget()
            loss.covers, loss.health = covers, health
            args, kwargs = rebuild(list(given))
            value = loss.recordable(args, kwargs, weight if self._weighted else 1.0)
            slopes = [self.params[name].grad for name in live]
            return [value, loss.health, *slopes]  # type: ignore[list-item]

        try:
            with torch.random.fork_rng(), quietly():
                graph = record(run, [*lead, loss.health, *[t.detach() for t in tensors]])
        finally:
            self._forget()
            loss.covers, loss.health = kept
        return graph, live

    def build(
        self,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        graph: Graph,
        live: list[str],
        backend: str,
    ) -> Built:
        """Makes a graph fast, and compares it with the code.

        Raises:
            Refused: If they don't agree.
        """
        adam = self._adam_of(live)
        wanted = backend
        with torch.random.fork_rng(), torch.no_grad():
            numbers = torch.ones(4, dtype=torch.float64, device=adam.values.device)
            example = _arguments(adam, graph, args, kwargs)(numbers)
            whole = _whole_step(graph, adam, len(opened(args, kwargs)[0]))
            kernel = Thread(target=load_kernel)
            kernel.start()
            run, backend = lower(whole, example, backend)
            kernel.join()
        built = Built(graph, live, backend, wanted, run)
        self.check(built, args, kwargs)
        self._known[self._key(args, kwargs), wanted] = built
        return built

    def start(self, built: Built) -> None:
        """Takes over parameters and state, if that was not done."""
        if self._adam is not None and self._adam.params != self._of(built.live):
            self.stop()
        if self._adam is None:
            self._adam = self._adam_of(built.live)
            self._adam.state[0] = self.loss.health

    def write(self) -> None:
        """Writes the parameters."""
        assert self._adam is not None
        self._adam.store()

    def stop(self) -> None:
        """Gives parameters and state back, if it had them."""
        if self._adam is not None:
            self._adam.store()
            self._adam.store_state()
            self.loss.health = self._adam.state[0].clone()
            self._adam = None

    @property
    def views(self) -> list[Tensor]:
        """The parameters as they are now."""
        assert self._adam is not None
        return self._adam.views

    def bind(
        self, built: Built, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Callable[[Tensor], Tensor]:
        """The step on these arguments.

        It takes a row of numbers in float64, the rate, the weight of the KL divergence, whether to
        cover and the largest norm, and returns the loss and the norm of its gradient.
        """
        assert self._adam is not None
        arguments = _arguments(self._adam, built.graph, args, kwargs)
        run = built.run

        def step(numbers: Tensor) -> Tensor:
            return run(arguments(numbers))[0]

        return step

    def _adam_of(self, live: list[str]) -> Adam:
        return Adam(self._of(live), self.optimizer, self._factors)

    def _of(self, names: list[str]) -> list[Tensor]:
        return [self.params[name] for name in names]

    def check(self, built: Built, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Compares a step with the code that it was made of.

        Raises:
            Refused: If they don't agree.
        """
        with torch.random.fork_rng(), quietly():
            value = self._by_code(args, kwargs)
            slopes = [param.grad for param in self._of(built.live)]
            self._forget()
        expected = [slope for slope in slopes if slope is not None]
        if len(expected) < len(slopes):
            raise _disagreement("other parameters have gradients than before")
        adam = self._adam_of(built.live)  # of its own, which is at no matter what
        adam.first.zero_()
        adam.second.zero_()
        adam.state.copy_(adam.state.new_tensor([self.loss.health.item(), 0.0]))
        with torch.random.fork_rng(), torch.no_grad():
            numbers = adam.state.new_tensor([0.0, 1.0, 0.0, torch.inf])
            found, _ = built.run(_arguments(adam, built.graph, args, kwargs)(numbers))[0]
        slopes_are_finite = all(slope.isfinite().all() for slope in expected)
        if not (value.isfinite() and slopes_are_finite):
            return  # a step that would be skipped
        again = adam.in_shape(adam.first / (1 - BETA_1))
        if not agree([found.to(value), *again], [value, *expected]):
            raise _disagreement(
                f"under one seed its loss is {value.item():.6g}, and that of its graph "
                f"{found.item():.6g}; or else their gradients differ"
            )

    def _by_code(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """The loss, and its gradient in the parameters."""
        self._forget()
        covers, self.loss.covers = self.loss.covers, False
        kept = self.loss.health
        try:
            return self.loss(args, kwargs, 1.0)
        finally:
            self.loss.covers, self.loss.health = covers, kept

    def _forget(self) -> None:
        for param in self.params.values():
            param.grad = None

    def _key(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        kind = kind_of(self.loss.model, self.loss.guide, args, kwargs)
        settings = type(self.loss), self._settings, self._weighted, tuple(self.params)
        return by_hash(self.loss.model), settings, kind


def _disagreement(how: str) -> Refused:
    return Refused(
        f"The step and its graph don't agree: {how}. The model or the guide may hang on something "
        "else than tensors that changes from run to run, as a counter, a number, or the random "
        "numbers of Python. Give such numbers as tensors, or compile=False."
    )


def _arguments(
    adam: Adam, graph: Graph, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Callable[[Tensor], list[Tensor]]:
    """What a whole step takes, by its row of numbers; with fresh noise at each call."""
    inputs = [tensor.detach() for tensor in opened(args, kwargs)[0]]
    views = dict(zip(map(id, adam.params), adam.views, strict=True))
    held = [views.get(id(tensor), tensor) for tensor in graph.tensors]
    others = [tensor for tensor in graph.tensors if id(tensor) not in views]
    own = [adam.values, adam.first, adam.second, adam.state, adam.rates]
    sources = [*3 * [adam.state], *inputs, *held]
    draw = graph.draw.forward
    return lambda numbers: [*own, numbers, *inputs, *others, *draw(*sources)]


def _whole_step(graph: Graph, adam: Adam, num_inputs: int) -> Callable[..., tuple[Tensor]]:
    """A function of the state, which it changes, of scalars, and of what the graph takes."""
    own = {id(param): k for k, param in enumerate(adam.params)}
    held = [own.get(id(tensor)) for tensor in graph.tensors]
    num_others = held.count(None)

    def step(
        values: Tensor,
        first: Tensor,
        second: Tensor,
        state: Tensor,
        rates: Tensor,
        scalars: Tensor,
        *given: Tensor,
    ) -> tuple[Tensor]:
        inputs, rest = given[:num_inputs], given[num_inputs:]
        others, noise = iter(rest[:num_others]), rest[num_others:]
        views = adam.in_shape(values)
        tensors = [next(others) if k is None else views[k] for k in held]
        rate, weight, covers, largest_norm = scalars.unbind()
        dtype = values.dtype
        lead = [weight.to(dtype), covers.to(dtype), state[0]]
        value, health, *slopes = graph.module(*lead, *inputs, *tensors, *noise)
        slope = torch.cat([part.reshape(-1) for part in slopes])
        norm = slope.norm().to(state.dtype)
        fine = value.isfinite() & norm.isfinite()
        # A step that is not finite changes nothing. Numbers that are the same for all parameters
        # stand in one tensor, or else each parameter would compute them by itself.
        go = fine.to(state.dtype)
        taken = state[1] + 1  # what the averages began with, zeros, is so much of them still:
        left_1, left_2 = BETA_1**taken, BETA_2**taken
        root = (1 - left_2).sqrt()
        clip = torch.where(fine, (largest_norm / (norm + 1e-6)).clamp(max=1), 0)
        size = go * rate * root / (1 - left_1)
        keep_1, keep_2 = 1 - go * (1 - BETA_1), 1 - go * (1 - BETA_2)
        common = torch.stack([clip, size, EPS * root, keep_1, 1 - keep_1, keep_2, 1 - keep_2])
        clip, size, eps, keep_1, new_1, keep_2, new_2 = common.to(dtype).unbind()
        slope = torch.where(fine, slope, 0) * clip
        m = first * keep_1 + slope * new_1
        v = second * keep_2 + slope.square() * new_2
        values.copy_(values - size * rates * m / (v.sqrt() + eps))
        first.copy_(m)
        second.copy_(v)
        state.copy_(torch.stack([health.to(state.dtype), state[1] + go]))
        return (torch.stack([value.to(norm.dtype), norm]),)

    return step
