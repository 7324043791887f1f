r"""Models that see some of their rows at a time, by the subsamples of their plates, on all of them.

.. math::
    \log p(z, y) = \log p(z) + \sum_i \log p(y_i \mid z)

A plate of N rows that takes B of them multiplies their log densities by N / B. So what the model
says of all rows is the mean of what it says of parts of them, each weighted by its share.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from pyro.poutine.subsample_messenger import SubsampleMessenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from .arguments import Args, Batch, Kwargs, Program
from .matching import FixedLatents
from .particles import MAX_NUMBERS
from .traces import (
    compute_log_prob,
    full_size,
    latent_sites,
    log_prob_of_particles,
    quietly,
    subsamples,
)

__all__ = [
    "FirstRows",
    "Part",
    "RowsInTurn",
    "all_rows",
    "are_parts",
    "are_same",
    "chosen_rows",
    "log_density",
    "parts_of",
    "rows_of",
    "some_rows",
    "times_of",
]

# The mean of the densities of two parts is that of both together, up to so many machine epsilons of
# the sum of their sizes.
NUM_EPS = 1e3


@contextmanager
def chosen_rows(rows: Mapping[str, Tensor]) -> Iterator[None]:
    """Has plates take these rows in a ``with`` block, whatever their ``subsample_size``.

    Pyro lets handlers give a plate other rows, but not another number of them.

    Args:
        rows: Indices of rows by the name of the plate. Other plates stay as they are.
    """
    if not rows:
        yield
        return
    usual = SubsampleMessenger._subsample

    def chosen(
        name: str,
        size: int | None = None,
        subsample_size: int | None = None,
        subsample: Tensor | None = None,
        *rest: Any,
        **settings: Any,
    ) -> Any:
        if name in rows and subsample is None:
            subsample_size, subsample = None, rows[name]
        return usual(name, size, subsample_size, subsample, *rest, **settings)

    SubsampleMessenger._subsample = staticmethod(chosen)  # type: ignore[method-assign]
    try:
        yield
    finally:
        SubsampleMessenger._subsample = staticmethod(usual)  # type: ignore[method-assign]


class Part(NamedTuple):
    """A part of a model's data.

    Attributes:
        share: Its share of all rows.
        rows: The rows of plates that subsample, by name.
        batch: The model's arguments; None for the usual ones.
        times: How many times as many rows as usual it has.
    """

    share: float
    rows: Mapping[str, Tensor]
    batch: Batch | None = None
    times: float = 1.0


def times_of(parts: Sequence[Part]) -> list[float]:
    """How many times as many rows as usual each part has."""
    known: list[float] | None = getattr(parts, "times", None)  # of parts that are read anew
    return [part.times for part in parts] if known is None else known


def parts_of(rows: Mapping[str, Tensor], num_numbers: int) -> list[Part]:
    """Parts of chosen rows that hold at most ``MAX_NUMBERS`` numbers each, if all hold so many."""
    name = max(rows, key=lambda name: len(rows[name]))
    pieces = rows[name].tensor_split(-(-num_numbers // MAX_NUMBERS))
    return [Part(len(piece) / len(rows[name]), {**rows, name: piece}) for piece in pieces]


def rows_of(trace: poutine.Trace) -> dict[str, tuple[int, int]]:
    """The plates of a run that draw fewer rows than they have: how many they draw, and have."""
    fns = {name: site["fn"] for name, site in subsamples(trace).items()}
    return {
        name: (fn.subsample_size, fn.size)
        for name, fn in fns.items()
        if fn.subsample_size not in (None, fn.size)
    }


@torch.no_grad()
def all_rows(model: Program, trace: poutine.Trace, args: Args, kwargs: Kwargs) -> dict[str, Tensor]:
    """All rows of the plates that subsample.

    There are none if there are no such plates, if latents are in one, or if the model does not say
    of rows together what it says of parts of them, as where its arguments are a minibatch.

    Args:
        model: A Pyro model.
        trace: A run of it.
        args: Its positional arguments in that run.
        kwargs: Its keyword arguments there.
    """
    plates, latents = rows_of(trace), latent_sites(trace)
    frames = [frame for site in latents.values() for frame in site["cond_indep_stack"]]
    if not plates or any(frame.size != full_size(frame) for frame in frames):
        return {}
    values = {name: site["value"] for name, site in latents.items()}
    given = {name: subsamples(trace)[name]["value"] for name in plates}

    with torch.random.fork_rng():
        torch.manual_seed(0)
        for name, (drawn, size) in plates.items():
            both = torch.randperm(size, device=given[name].device)[: 2 * drawn]
            parts = [
                Part(len(rows) / len(both), {**given, name: rows}, (args, kwargs))
                for rows in (*both.tensor_split(2), both)
            ]
            if not are_parts(model, values, *parts):
                return {}
    return {n: torch.arange(size, device=given[n].device) for n, (_, size) in plates.items()}


def log_density(model: Program, latents: Mapping[str, Tensor], part: Part) -> float:
    """What a model says of all data after a look at a part of them that has arguments."""
    args, kwargs = part.batch or ((), {})
    with quietly(), poutine.block(), FixedLatents(latents, {}), chosen_rows(part.rows):
        found = poutine.trace(model).get_trace(*args, **kwargs)
    compute_log_prob(found, in_double=True)
    return log_prob_of_particles(found, 1, None).sum().item()


def are_parts(
    model: Program, latents: Mapping[str, Tensor], first: Part, second: Part, both: Part
) -> bool:
    """Whether a model says of the rows of two parts together what it says of each.

    Args:
        model: A Pyro model.
        latents: Values of its latents.
        first: A part; shares are those of both.
        second: Another part, of other rows.
        both: The rows of both.
    """
    try:
        one, other, together = (log_density(model, latents, part) for part in (first, second, both))
    except Exception:  # whatever a model raises for rows that it does not have
        return False
    mean = first.share * one + second.share * other
    return one != other and are_same(latents, mean, together, abs(one))


def are_same(latents: Mapping[str, Tensor], some: float, other: float, size: float) -> bool:
    """Whether two log densities of about this size are the same up to rounding.

    That is of the precision of the latents; discrete ones have none.
    """
    floats = [value.dtype for value in latents.values() if value.is_floating_point()]
    eps = max(torch.finfo(dtype).eps for dtype in floats or [torch.get_default_dtype()])
    return abs(some - other) <= NUM_EPS * eps * (1 + size)


def some_rows(rows: Mapping[str, Tensor], most: int) -> dict[str, Tensor]:
    """These rows, or so many random ones of a plate that has more."""
    chosen = {}
    for name, each in rows.items():
        few = torch.randperm(len(each), device=each.device)[:most]
        chosen[name] = each if len(each) <= most else each[few]
    return chosen


class FirstRows(Messenger):
    """Gives plates that subsample their first rows, which a model with its rows in a batch ignores.

    Pyro would shuffle all of them.
    """

    def _pyro_sample(self, msg: Any) -> None:
        fn = msg["fn"]
        if site_is_subsample(msg) and msg["value"] is None and fn.subsample_size is not None:
            msg["value"] = torch.arange(fn.subsample_size, device=fn.device)


class RowsInTurn(Messenger):
    """Has plates that subsample go through all their rows, in an order that is new each time."""

    def __init__(self) -> None:
        super().__init__()
        self._plates: dict[str, _Shuffled] = {}

    @property
    def tensors(self) -> list[Tensor]:
        """Those that hold the rows of the present step, which stay the same."""
        return [plate.rows for plate in self._plates.values()]

    def step(self) -> None:
        """Goes to the rows of another step."""
        for plate in self._plates.values():
            plate.step()

    def meet(self, trace: poutine.Trace) -> None:
        """Takes the plates of a run."""
        for name in rows_of(trace):
            fn: Any = trace.nodes[name]["fn"]
            self._plates[name] = _Shuffled(fn.size, fn.subsample_size, fn.device)

    def _pyro_sample(self, msg: Any) -> None:
        if not site_is_subsample(msg) or msg["value"] is not None:
            return
        plate, drawn = self._plates.get(msg["name"]), msg["fn"].subsample_size
        if plate is None or drawn is None or drawn > len(plate.rows):
            return
        if plate.size != msg["fn"].size:  # that of a minibatch of another size
            return
        # The last minibatch may be shorter.
        msg["value"] = plate.rows if drawn == len(plate.rows) else plate.rows[:drawn]

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds of it."""
        return {name: plate.state for name, plate in self._plates.items()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes on from a state."""
        for name, saved in state.items():
            device = self._plates[name].rows.device if name in self._plates else None
            plate = self._plates[name] = _Shuffled.__new__(_Shuffled)
            plate.restore(*saved)
            plate.rows = plate.rows.to(device)


class _Shuffled:
    """The rows of one plate in random order, so many at a time.

    Attributes:
        rows: Those of the present step.
    """

    def __init__(self, size: int, drawn: int, device: Any) -> None:
        self.size = size
        self.rows = torch.zeros(drawn, dtype=torch.long, device=device)
        self._order, self._num_taken = torch.zeros(0, dtype=torch.long, device="cpu"), 0
        self.step()

    def step(self) -> None:
        chosen = self._order[self._num_taken : self._num_taken + len(self.rows)]
        self._num_taken += len(chosen)
        while len(chosen) < len(self.rows):
            self._before = torch.get_rng_state()
            self._order = torch.randperm(self.size, device="cpu")
            self._num_taken = len(self.rows) - len(chosen)
            chosen = torch.cat([chosen, self._order[: self._num_taken]])
        self.rows.copy_(chosen)

    @property
    def state(self) -> tuple[int, Tensor, Tensor, int]:
        """Its size, its rows, the generator's state before the order, and the rows taken of it."""
        return self.size, self.rows.clone(), self._before, self._num_taken

    def restore(self, size: int, rows: Tensor, before: Tensor, num_taken: int) -> None:
        """Goes on from a state."""
        self.size, self.rows, self._before, self._num_taken = size, rows, before, num_taken
        now = torch.get_rng_state()
        torch.set_rng_state(before)
        self._order = torch.randperm(size, device="cpu")
        torch.set_rng_state(now)
