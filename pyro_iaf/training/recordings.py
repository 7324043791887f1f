"""When a run's steps are compiled, and by what.

A recording costs seconds and saves some part of a millisecond a step: so it is made where the
steps that are left repay it, for arguments of a kind that comes often, and given up where the
model, or the guide, is of the sort that can't be recorded.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from tqdm.auto import tqdm

from .._validation import warn
from ..compiler.capture import Refused
from ..compiler.lowering import has_compiler, warm_up
from ..compiler.recorder import MAX_BUILDS, MAX_GRAPHS, kind_of
from ..elbo.objectives import LatentLoss
from ..solvers.score_kernel import MAX_WRITTEN_OUT
from .compiled_step import Built, CompiledSteps
from .digests import digest

__all__ = ["Recordings"]

# Runs of fewer steps are not worth a graph. For each of its operations a replay saves so many
# seconds a step and a compiled graph twice that, which takes so many seconds to compile.
FEWEST_STEPS, SAVED, COMPILING, COMPILING_EACH = 500, 2.5e-6, 3.0, 0.008

# How often arguments of a further kind have to come to be worth compiling for.
RARE = 20

# More latents than this are not replayed.
MAX_REPLAYED = 200


class Recordings:
    """Finds the compiled steps of a run, and has those built that are worth it.

    Args:
        steps: The steps.
        compile: As for :func:`~pyro_iaf.fit`.
        num_steps: Of the run.
        before: The :meth:`state` of a run that goes on from a checkpoint.
        change: Whether arguments change from step to step.
    """

    def __init__(
        self,
        steps: CompiledSteps,
        *,
        compile: bool | str,  # noqa: A002
        num_steps: int,
        before: dict[str, Any] | None,
        change: bool,
    ) -> None:
        self.steps, self.compile, self.num_steps = steps, compile, num_steps
        self.change = change
        device = next(iter(steps.params.values()), torch.zeros(())).device
        replays = compile == "graph" or not has_compiler(device)
        self.best = "graph" if replays else "inductor"
        self.wanted = (self.best,) if compile != "auto" else ("inductor", "graph")
        before = before or {"kinds": {}, "left_out": [], "backends": {}, "is_off": False}
        if before["is_off"] and compile == "auto":
            self.compile = False
        self.num_found, self.next_check = 0, 1
        self.live: list[str] = []
        # By kinds of arguments, in letters that a checkpoint can hold.
        self.kinds: Counter[str] = Counter(before["kinds"])
        self.left_out: set[str] = set(before["left_out"])
        self.builds: Counter[str] = Counter()
        # What took steps of each kind, and goes on to, so that a run goes on in the same numbers.
        self.backends: dict[str, str] = dict(before["backends"])
        self._last: Built | None = None

    def find(
        self, step: int, args: tuple[Any, ...], kwargs: dict[str, Any], bar: tqdm[Any]
    ) -> Built | None:
        """The compiled step for these arguments, built if need be; None if there is to be none.

        Raises:
            Refused: If there is none, and ``compile`` asks for one.

        Warns:
            UserWarning: Once, if there is none and ``compile="auto"``.
        """
        if self.compile is False:
            return None
        try:
            built = self.steps.find(args, kwargs, self.wanted)
            if built is None:
                built = self._build(step, args, kwargs, bar)
            else:
                self.num_found += 1
                # What nobody can watch is looked at the first time, and ever more rarely.
                if self.num_found == self.next_check:
                    self.next_check *= 4
                    self.steps.check(built, args, kwargs)
            if built is not None and built is not self._last:
                self.backends[_kind(args, kwargs)] = built.backend
                self._last = built
            return built
        except Refused as why:
            if self.compile != "auto":
                raise
            self.compile = False
            warn(f"fit takes its steps uncompiled: {why}")
            return None

    def is_for(self, built: Built, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether a step takes these arguments too."""
        try:
            return self.steps.find(args, kwargs, (built.wanted,)) is built
        except Refused:  # they are of no kind that a graph can take
            return False

    def state(self) -> dict[str, Any]:
        """What decides on the steps to come, for a run that goes on from here."""
        return {
            "kinds": dict(self.kinds),
            "left_out": sorted(self.left_out),
            "backends": dict(self.backends),
            "is_off": self.compile is False,
        }

    def _build(
        self, step: int, args: tuple[Any, ...], kwargs: dict[str, Any], bar: tqdm[Any]
    ) -> Built | None:
        """Builds the step for arguments of this kind, if it comes often enough."""
        kind = _kind(args, kwargs)
        best = self.backends.get(kind, "")
        goes_on = best in self.wanted
        if not goes_on and not self._is_worth_it(step, kind):
            return None
        self.builds[kind] += 1
        if self.builds[kind] > MAX_BUILDS:
            raise Refused(
                "A number, a module or a parameter that the compiled step relies on keeps changing."
            )
        if not goes_on:
            best = self.best
        if best == "inductor" and self.compile != "auto":
            warm_up()
        graph, live = self.steps.record(args, kwargs)
        self.live = self.live or live
        if live != self.live:  # a graph has Adam's averages of one set of parameters
            self.left_out.add(kind)
            return None
        if self.compile == "auto" and not goes_on:
            if best == "inductor":
                best = backend_for(self.num_steps - step, len(graph.module.graph.nodes))
            if best == "graph" and self._is_slower_replayed:
                self.compile = False
                return None
        if best == "inductor":
            bar.set_postfix_str("compiling the step, once")
        return self.steps.build(args, kwargs, graph, live, best)

    def _is_worth_it(self, step: int, kind: str) -> bool:
        """Whether arguments of this kind, which came once more, come often enough to compile."""
        if self.compile == "auto" and self.num_steps - step < FEWEST_STEPS:
            return False
        if len(self.kinds) > MAX_GRAPHS:
            return False
        self.kinds[kind] += 1
        # The last minibatch of a walk may be smaller, or each is of a kind of its own: not worth
        # compiling for what comes rarely.
        is_rare = self.kinds[kind] < (RARE if len(self.kinds) > 1 else 1 + self.change)
        return not is_rare and len(self.kinds) <= MAX_GRAPHS and kind not in self.left_out

    @property
    def _is_slower_replayed(self) -> bool:
        """Whether flows are so wide that a replay, which writes Adam out, is slower than code."""
        loss = self.steps.loss
        most = MAX_REPLAYED if has_compiler(torch.device("cpu")) else MAX_WRITTEN_OUT
        return isinstance(loss, LatentLoss) and loss.guide.latent_dim > most


def _kind(args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    return digest(kind_of(None, None, args, kwargs))


def backend_for(num_steps: int, num_operations: int) -> str:
    """What so many steps of a graph of so many operations repay.

    Example:
        >>> backend_for(500, 1000), backend_for(50_000, 1000)
        ('graph', 'inductor')
    """
    saved = SAVED * num_operations * num_steps
    cost = COMPILING + COMPILING_EACH * num_operations
    return "inductor" if 2 * saved - cost > saved else "graph"
