"""All minibatches of a data set, as parts of it."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from pyro import poutine
from torch import Tensor
from torch.utils._pytree import tree_flatten

from .arguments import Batch, Program, flatten_tensors, num_rows
from .rows import Part, are_parts, are_same, log_density
from .traces import full_size, latent_sites, quietly

__all__ = ["Epoch", "epoch_of"]

# Minibatches become one until they have so many rows, where the model allows that; and they are
# kept if all of them hold at most so many numbers. A guide starts at so many rows.
MOST_ROWS, MOST_KEPT, MOST_AT_START = 2**16, 2**26, 2**18

# Of more minibatches nobody waits for the end; nor of more than the second number, if the data
# don't tell their length.
MOST_MINIBATCHES, MOST_UNKNOWN = 2**16, 2**12


class Epoch(Sequence[Part]):
    """The minibatches of one epoch, each time anew, or kept if they are small.

    Args:
        each: Iterates over all minibatches.
        usual: How many rows a minibatch has.
        is_joined: Whether several of them become one.
        most: The most minibatches; others are left out.

    Attributes:
        is_complete: Whether these are all; data may have no end.
    """

    def __init__(
        self, each: Callable[..., Iterator[Batch]], usual: int, is_joined: bool, most: int
    ) -> None:
        self.each, self.usual, self.is_joined, self.most = each, usual, is_joined, most
        self._kept: list[Batch] | None = []
        self.sizes: list[int] = []
        self.is_complete = True
        num_numbers = 0
        for batch in self._joined():
            self.sizes.append(num_rows(batch))
            num_numbers += sum(tensor.numel() for tensor in flatten_tensors(*batch)[0])
            if self._kept is not None:
                self._kept.append(batch)
            if num_numbers > MOST_KEPT:
                self._kept = None

    @property
    def times(self) -> list[float]:
        """How many times as many rows as a minibatch each part has."""
        return [size / self.usual for size in self.sizes]

    def __len__(self) -> int:
        return len(self.sizes)

    def __iter__(self) -> Iterator[Part]:
        total = sum(self.sizes)
        for batch in self._joined() if self._kept is None else self._kept:
            size = num_rows(batch)
            yield Part(size / total, {}, batch, size / self.usual)

    def __getitem__(self, index: Any) -> Any:
        return next(itertools.islice(self, index, None))

    def some(self, most: int) -> list[Part]:
        """Parts of at most about so many rows, evenly spread over all."""
        chosen = list(itertools.islice(self, 0, None, -(-sum(self.sizes) // most)))
        total = sum(part.share for part in chosen)
        return [part._replace(share=part.share / total) for part in chosen]

    def _joined(self) -> Iterator[Batch]:
        """Minibatches, or several as one."""
        waiting: list[Batch] = []
        for k, batch in enumerate(self.each()):
            if k >= self.most:
                self.is_complete = False
                return
            if waiting and not _are_alike(waiting[0], batch):
                yield _joined(waiting)
                waiting = []
            waiting.append(_copied(batch))
            if not self.is_joined or sum(map(num_rows, waiting)) >= MOST_ROWS:
                yield _joined(waiting)
                waiting = []
        if waiting:
            yield _joined(waiting)


def epoch_of(model: Program, data: Any, each: Callable[..., Iterator[Batch]]) -> Epoch | None:
    """All minibatches of a data set.

    None if the density of a minibatch is random, if latents belong to its rows, if the minibatches
    of one epoch are other data than those of another, or if they have no end.

    Args:
        model: A model, which scales what a minibatch says as if it were all data.
        data: The data, of which only the length matters, if it is known.
        each: Iterates over all minibatches; with ``anew=True`` in another order, if it is random.
    """
    try:
        most = len(data) if len(data) <= MOST_MINIBATCHES else 0
    except Exception:  # a stream
        most = MOST_UNKNOWN
    with torch.random.fork_rng(), torch.no_grad(), quietly(), poutine.block():
        both = [*itertools.islice(each(), 2)] if most else []
        try:
            values = _latents_of_no_row(model, both[0])
        except Exception:  # there is none, or whatever a model raises at a draw of its prior
            return None
        if values is None:
            return None
        sizes = [*map(num_rows, both)]
        parts = [Part(n / sum(sizes), {}, b) for n, b in zip(sizes, both, strict=True)]
        is_joined = len(both) == 2 and _are_alike(*both)
        if is_joined:
            first, second = parts
            is_joined = are_parts(model, values, first, second, Part(1.0, {}, _joined(both)))
        epoch = Epoch(each, sizes[0], is_joined, most)
        try:
            is_usable = epoch.is_complete and _is_the_same_again(model, values, epoch)
        except Exception:  # a model may raise anything at other minibatches
            return None
    return epoch if is_usable else None


def _latents_of_no_row(model: Program, batch: Batch) -> dict[str, Any] | None:
    """Values of the latents, if none is of a row and the density there is the same again."""
    args, kwargs = batch
    trace = poutine.trace(model).get_trace(*args, **kwargs)
    latents = latent_sites(trace)
    frames = [frame for site in latents.values() for frame in site["cond_indep_stack"]]
    if any(full_size(f) != f.size or f.size == num_rows(batch) for f in frames):
        return None
    values = {name: site["value"] for name, site in latents.items()}
    part = Part(1.0, {}, batch)
    is_fixed = log_density(model, values, part) == log_density(model, values, part)
    return values if is_fixed else None


def _is_the_same_again(model: Program, values: dict[str, Any], epoch: Epoch) -> bool:
    """Whether the minibatches of another epoch are the same data."""
    other = Epoch(
        functools.partial(epoch.each, anew=True), epoch.usual, epoch.is_joined, epoch.most
    )
    if sum(other.sizes) != sum(epoch.sizes):
        return False
    one, again = (
        math.fsum(part.share * log_density(model, values, part) for part in parts)
        for parts in (epoch, other)
    )
    return are_same(values, one, again, abs(one))


def _are_alike(some: Batch, other: Batch) -> bool:
    """Whether two minibatches differ only in the values and the number of their rows."""
    (ours, spec), (theirs, other_spec) = tree_flatten(some), tree_flatten(other)
    if spec != other_spec:
        return False
    for a, b in zip(ours, theirs, strict=True):
        if isinstance(a, Tensor) and isinstance(b, Tensor) and a.dim() and b.dim():
            if (a.shape[1:], a.dtype, a.device) != (b.shape[1:], b.dtype, b.device):
                return False
        elif a is not b and not (type(a) is type(b) and bool(a == b)):
            return False
    return True


def _copied(batch: Batch) -> Batch:
    """A minibatch of its own, where the data use one buffer for all."""
    tensors, rebuild = flatten_tensors(*batch)
    copied: Batch = rebuild([tensor.clone() for tensor in tensors])
    return copied


def _joined(batches: Sequence[Batch]) -> Batch:
    """Minibatches that are alike as one."""
    if len(batches) == 1:
        return batches[0]
    _, rebuild = flatten_tensors(*batches[0])
    columns = zip(*(flatten_tensors(*batch)[0] for batch in batches), strict=True)
    joined: Batch = rebuild([torch.cat(c) if c[0].dim() else c[0] for c in columns])
    return joined
