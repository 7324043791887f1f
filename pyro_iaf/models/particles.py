"""Runs of a model for many draws: at once if it broadcasts or can be mapped, else one by one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pyro
import torch
from pyro import poutine
from torch import Tensor

from .arguments import Program
from .matching import Mismatch
from .traces import quietly, samples

__all__ = ["MAX_NUMBERS", "NUM_PROBED", "Particles", "mapped", "numbers_in", "threads_for"]

# The most numbers in the sites of one run, and in the graph of a Hessian's rows.
MAX_NUMBERS = 2**21

# Where operations take fewer numbers, they run in one thread. Others gain nothing there, and each
# operation waits for them if their cores are busy.
NUMBERS_OF_THREADS = 2**20

# How many draws are probed at once. Few plates have this size, by which an error could go unseen.
NUM_PROBED = 7


@contextmanager
def threads_for(num_numbers: float) -> Iterator[None]:
    """Sets PyTorch's threads for operations on so many numbers, and restores the user's setting."""
    before = torch.get_num_threads()
    if num_numbers >= NUMBERS_OF_THREADS or before == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Particles:
    """Runs a function with Pyro's statements for many draws, at once or one by one.

    At once, the dimension of the draws is left of all plates: :meth:`padded_shape` puts it there,
    and :meth:`unpadded` undoes that. :meth:`sizes` splits draws into runs, and :meth:`in_plate`
    makes a function draw several at once.

    A subclass passes both arguments to ``super().__init__`` and uses these methods in its runs. If
    it runs code that may not broadcast, it calls :meth:`probe` first, which compares log densities
    and sets ``at_once``.

    Args:
        nesting: How many dimensions plates take, counted from the right.
        num_numbers: How many numbers the sites of one draw hold.

    Attributes:
        at_once: Whether draws go at once.
        mapped: Whether they do so by ``torch.vmap`` of a run for one, since the model does not
            broadcast: where it indexes by ``x[z]``, for example, or has no plates.
    """

    def __init__(self, nesting: int, num_numbers: int) -> None:
        self.nesting, self.num_numbers = nesting, num_numbers
        self.at_once, self.mapped = True, False

    @property
    def work(self) -> int:
        """How many numbers are computed for one draw, if necessary in several runs."""
        return self.num_numbers

    @property
    def broadcasts(self) -> bool:
        """Whether the model itself takes draws in a dimension left of its plates."""
        return self.at_once and not self.mapped

    @property
    def num_at_once(self) -> int:
        """The most draws in one run."""
        return max(1, MAX_NUMBERS // self.num_numbers) if self.at_once else 1

    def sizes(self, num_draws: int) -> list[int]:
        """The number of draws in each run."""
        size = self.num_at_once
        return [min(size, num_draws - start) for start in range(0, num_draws, size)]

    def in_plate(self, fn: Program, num_draws: int | None) -> Program:
        """The function in a plate for so many draws, if they go at once; None means one draw."""
        if num_draws is None or not self.at_once:
            return fn
        plate = pyro.plate("num_particles_vectorized", num_draws, dim=-self.nesting - 1)
        in_plate: Callable[..., Any] = plate(fn)
        return in_plate

    def padded_shape(self, shape: Sequence[int], num_batch: int) -> list[int]:
        """The shape of one draw of a site, with ones for the plates that the site is not in.

        Args:
            shape: The value's shape in a run for one draw.
            num_batch: How many of its dimensions are batch dimensions.
        """
        return [1] * (self.nesting - num_batch) + list(shape)

    def padded(self, draws: Tensor, event_dim: int) -> Tensor:
        """Draws of a site, with ones between the draws and the plates that the site is in."""
        shape = self.padded_shape(draws.shape[1:], draws.dim() - 1 - event_dim)
        return draws.reshape(len(draws), *shape)

    def unpadded(self, value: Tensor, shape: torch.Size, num_draws: int) -> Tensor:
        """The draws in a value of a run at once; ``shape`` is that of a run for one draw."""
        if value.numel() == shape.numel():  # the same for all draws
            return value.reshape(shape).expand(num_draws, *shape)
        return value.reshape(num_draws, *shape)

    def probe(
        self, num_draws: int, log_probs: Callable[[Sequence[int], bool], dict[str, Tensor]]
    ) -> str | None:
        """Why these log densities can't be used, or None; sets ``at_once`` and ``mapped``.

        Args:
            num_draws: How many draws there are, one at least.
            log_probs: Returns the log density of each site at the draws with these indices, of
                shape ``(len(indices),)``: in one run at once if its second argument is True, else
                in a run for the only index. It is called with ``mapped`` set, too.

        Raises:
            Mismatch: If sites are missing, or have other shapes.
        """
        separate, indices, failure = [], [], None
        self.at_once = self.mapped = False
        with quietly():
            for k in range(num_draws):
                try:
                    separate.append(log_probs([k], False))
                    indices.append(k)
                except Mismatch:
                    raise
                except Exception as error:  # perhaps at this draw only
                    failure = error
            if not indices:
                return f"the model raises {type(failure).__name__}: {failure}"
            if not _same(separate[0], log_probs(indices[:1], False)):
                return "its log density changes from one run to the next"
            if len(indices) == 1:
                separate, indices = 2 * separate, 2 * indices
            joined = {name: torch.cat([run[name] for run in separate]) for name in separate[0]}
            for self.mapped in (False, True):
                self.at_once = True
                try:
                    if _same(log_probs(indices, True), joined):
                        return None
                except Exception:  # any error of a model that doesn't broadcast, or map
                    pass
            self.at_once = self.mapped = False
        return None


def _same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Whether the log densities of all sites are equal up to rounding."""

    def is_close(x: Tensor, y: Tensor) -> bool:
        rtol = 1e-8 if x.dtype == torch.float64 else 1e-3
        return torch.allclose(x, y, rtol=rtol, atol=1e-5, equal_nan=True)

    return a.keys() == b.keys() and all(is_close(a[n], b[n]) for n in a)


def mapped(fn: Callable[[Any], Any], draws: Any) -> Any:
    """A function of one draw, for many at once by ``torch.vmap``, with random numbers for each."""
    return torch.vmap(fn, randomness="different")(draws)


def numbers_in(trace: poutine.Trace) -> int:
    """How many numbers the sample sites of a run hold."""
    total = 0
    for site in samples(trace).values():
        summed_out = site["infer"].get("num_numbers", 1)  # as a factor tells of itself
        total += max(summed_out, torch.Size(site["fn"].shape()).numel())
    return total
