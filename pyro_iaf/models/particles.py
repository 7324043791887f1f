"""Many draws in few runs: at once where a model takes them, and one by one where it doesn't."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pyro
import torch
from pyro import poutine
from torch import Tensor

from .arguments import Program
from .matching import Mismatch
from .traces import quietly, samples

__all__ = ["MAX_NUMBERS", "NUM_TRIED", "Particles", "numbers_in"]

# Numbers that the sites of a run hold at most, and the graph of a Hessian's rows.
MAX_NUMBERS = 2**24

# Whether draws go at once is tried on so many: a number that few plates have.
NUM_TRIED = 7


class Particles:
    """How a function with Pyro's statements is run for many draws.

    Whoever runs a model or a guide for many draws is such an object, or has one. At once, the draws
    stand left of all plates; :meth:`placed` puts them there and :meth:`freed` takes them back.
    :meth:`sizes` says how many go into one run, which :meth:`in_plate` makes one of so many draws.

    A user hands in how deep plates nest and how many numbers a draw holds. One that runs code of
    somebody else hands :meth:`probe` the densities of a few draws too, which tell whether draws go
    at once.

    Args:
        nesting: How many dimensions plates take, counted from the right.
        num_numbers: How many numbers one draw holds.

    Attributes:
        at_once: Whether draws go at once.
    """

    def __init__(self, nesting: int, num_numbers: int) -> None:
        self.nesting, self.num_numbers = nesting, num_numbers
        self.at_once = True

    @property
    def num_at_once(self) -> int:
        """How many draws a run holds at most."""
        return max(1, MAX_NUMBERS // self.num_numbers) if self.at_once else 1

    def sizes(self, num_draws: int) -> list[int]:
        """How many of so many draws go into each run."""
        size = self.num_at_once
        return [min(size, num_draws - start) for start in range(0, num_draws, size)]

    def in_plate(self, fn: Program, num_draws: int | None) -> Program:
        """A function that is run for so many draws, if they go at once; None is one draw."""
        if num_draws is None or not self.at_once:
            return fn
        plate = pyro.plate("num_particles_vectorized", num_draws, dim=-self.nesting - 1)
        in_plate: Callable[..., Any] = plate(fn)
        return in_plate

    def placed(self, shape: Sequence[int], num_batch: int) -> list[int]:
        """The shape behind the draws of a value that has this one in a single run.

        Args:
            shape: Of a single run.
            num_batch: How many of its dimensions are batch.
        """
        return [1] * (self.nesting - num_batch) + list(shape)

    def freed(self, value: Tensor, shape: torch.Size, num_draws: int) -> Tensor:
        """A value of a run at once as draws of what a single run has in this shape."""
        if value.numel() == shape.numel():  # the same for all draws
            return value.reshape(shape).expand(num_draws, *shape)
        return value.reshape(num_draws, *shape)

    def probe(
        self, num_draws: int, log_probs: Callable[[Sequence[int], bool], dict[str, Tensor]]
    ) -> str | None:
        """What speaks against these densities, if anything; finds out whether draws go at once.

        Args:
            num_draws: How many draws there are, one at least.
            log_probs: The log density of each site at the draws of these numbers, of shape
                ``(len(numbers),)``; by a run at once, or by a single run at the only one.

        Raises:
            Mismatch: If sites are missing, or have other shapes.
        """
        alone, fine, failure = [], [], None
        self.at_once = False
        with quietly():
            for k in range(num_draws):
                try:
                    alone.append(log_probs([k], False))
                    fine.append(k)
                except Mismatch:
                    raise
                except Exception as error:  # there, but perhaps not elsewhere
                    failure = error
            if not fine:
                return f"the model fails there, {type(failure).__name__}: {failure}"
            if not _same(alone[0], log_probs(fine[:1], False)):
                return "its log density changes from one run to the next"
            if len(fine) == 1:
                alone, fine = 2 * alone, 2 * fine
            self.at_once = True
            try:
                joined = {name: torch.cat([run[name] for run in alone]) for name in alone[0]}
                self.at_once = _same(log_probs(fine, True), joined)
            except Exception:  # whatever a model that isn't made for it may raise
                self.at_once = False
        return None


def _same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Whether two runs have the same densities, site by site, to rounding."""
    return a.keys() == b.keys() and all(
        torch.allclose(
            a[n],
            b[n],
            rtol=1e-8 if a[n].dtype == torch.float64 else 1e-3,
            atol=1e-5,
            equal_nan=True,
        )
        for n in a
    )


def numbers_in(trace: poutine.Trace) -> int:
    """How many numbers the sites of a run hold."""
    shapes = [torch.Size(site["fn"].shape()) for site in samples(trace).values()]
    return sum(max(1, shape.numel()) for shape in shapes)
