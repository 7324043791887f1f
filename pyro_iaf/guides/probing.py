r"""The sparse second derivatives of a density over thousands of latents, by a few of their columns.

A column costs one product. Long axes of a site are taken to be alike all along: what one of its
numbers touches, so many places on, the others touch too. A random product then tells whether that
holds.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from ..models.log_joint import LogJoint
from ..solvers.sparse import coloured
from .runs import axes, before_along, blocks

__all__ = ["holds", "pattern_of"]

# So many columns of each large site are taken, a few of them to choose its coordinates.
NUM_COLUMNS, NUM_COMPARED = 12, 3

# A site of more numbers is large; there are at most so many numbers in small ones.
LARGE, MOST_SMALL = 64, 64

# A row of at most so many others is sparse.
MOST_TOUCHED = 24

# An axis of at least so many numbers is long.
LONG = 10

# The largest error of a random product, relative to its largest entry.
TOLERANCE = 1e-3


class _SecondDerivatives:
    """Products with the second derivatives at a point, in sums along runs."""

    def __init__(self, joint: LogJoint, point: Tensor) -> None:
        with torch.enable_grad():
            self.z = point.detach().requires_grad_()
            value = joint(self.z.unsqueeze(0)).sum()
            (self.slope,) = torch.autograd.grad(value, self.z, create_graph=True)
        is_finite = bool(value.isfinite() and self.slope.isfinite().all())
        self.is_usable = is_finite and self.slope.requires_grad

    def times(self, v: Tensor, before: Tensor) -> Tensor:
        """Their product with a vector of sums; both are on the CPU."""
        D = len(before)
        padded = torch.cat([v, v.new_zeros(1)])
        sums = (v - padded[before]).to(self.z)
        (w,) = torch.autograd.grad(self.slope, self.z, sums, retain_graph=True)
        w = w.cpu()
        return w.index_add(0, before[before < D], -w[before < D])


def pattern_of(
    joint: LogJoint, points: Sequence[Tensor], shapes: Sequence[torch.Size]
) -> tuple[Tensor, Tensor, Tensor] | None:
    """Which latents are global, the runs of sums, and the edges of the others; None if dense.

    Args:
        joint: The log density.
        points: Where it is looked at, each of shape ``(D,)``; the first tells the runs.
        shapes: The shapes of the sites in unconstrained space.
    """
    D, where = len(points[0]), list(blocks(shapes))
    is_global = torch.zeros(D, dtype=torch.bool)
    for start, shape in where:
        is_global[start : start + shape.numel()] = shape.numel() <= LARGE
    if int(is_global.sum()) > MOST_SMALL or is_global.all():
        return None
    found = [_SecondDerivatives(joint, point) for point in points]
    if not found[0].is_usable:
        return None
    found = [second for second in found if second.is_usable]
    with torch.device("cpu"):  # where indices are made, whatever the default
        return _sparse_pattern(found, where, is_global.cpu())


def _sparse_pattern(
    found: Sequence[_SecondDerivatives],
    where: Sequence[tuple[int, torch.Size]],
    is_global: Tensor,
) -> tuple[Tensor, Tensor, Tensor] | None:
    D = len(is_global)
    large = [(start, shape) for start, shape in where if shape.numel() > LARGE]
    before = torch.full((D,), D)
    for start, shape in large:
        before = _sparser(found[0], before, start, shape, is_global)
    rules: set[tuple[int, ...]] = set()
    for second, (start, shape) in itertools.product(found, large):
        for place in _some(start, shape, NUM_COLUMNS):
            touched = _touched(second, before, place, is_global)
            if len(touched) > MOST_TOUCHED:
                return None
            for other in touched:
                rule = _rule(place, other, large)
                if rule is None:
                    return None
                rules.add(rule)
    edges = _edges(rules, large)
    return (is_global, before, edges) if _all_told(found, before, is_global, edges) else None


def _touched(
    second: _SecondDerivatives, before: Tensor, place: int, is_global: Tensor
) -> list[int]:
    v = torch.zeros(len(before), dtype=second.z.dtype)
    v[place] = 1.0
    column = second.times(v, before).detach().abs()
    touched = column > 1e4 * torch.finfo(column.dtype).eps * column.max()  # the size of rounding
    found: list[int] = (touched & ~is_global).nonzero().squeeze(-1).tolist()
    return found


def _some(start: int, shape: torch.Size, num: int) -> list[int]:
    found: list[int] = (start + torch.randperm(shape.numel())[:num]).tolist()
    return found


def _sparser(
    second: _SecondDerivatives, before: Tensor, start: int, shape: torch.Size, is_global: Tensor
) -> Tensor:
    """Runs, with those of a site along the axis in which it is sparsest, if in any."""
    places = _some(start, shape, NUM_COMPARED)

    def count(before: Tensor) -> int:
        return sum(len(_touched(second, before, place, is_global)) for place in places)

    best, fewest = before, count(before)
    for run in axes(shape):
        tried = before_along(before, start, shape, run)
        if (found := count(tried)) < fewest / 2:
            best, fewest = tried, found
    return best


def _split(place: int, shape: torch.Size) -> tuple[list[int], list[int], list[int]]:
    """The indices of a place along long axes and along short ones, and the long lengths."""
    index: list[int] = []
    for size in reversed(shape):
        place, here = divmod(place, size)
        index.insert(0, here)
    pairs = list(zip(index, shape, strict=True))
    long = [i for i, size in pairs if size >= LONG]
    return long, [i for i, size in pairs if size < LONG], [s for s in shape if s >= LONG]


def _rule(
    place: int, other: int, large: Sequence[tuple[int, torch.Size]]
) -> tuple[int, ...] | None:
    """What of one site touches what of another, and how many places on; None if not alike."""

    def found(place: int) -> tuple[int, list[int], list[int], list[int]]:
        k, (start, shape) = next(
            (k, site)
            for k, site in enumerate(large)
            if site[0] <= place < site[0] + site[1].numel()
        )
        return k, *_split(place - start, shape)

    a, long_a, short_a, sizes_a = found(place)
    b, long_b, short_b, sizes_b = found(other)
    if sizes_a != sizes_b:
        return None
    away = [j - i for i, j in zip(long_a, long_b, strict=True)]
    return (a, b, len(short_a), *short_a, *short_b, *away)


def _edges(rules: set[tuple[int, ...]], large: Sequence[tuple[int, torch.Size]]) -> Tensor:
    """All pairs that the rules tell, the smaller place first."""
    found = []
    for a, b, num_short, *rest in sorted(rules):
        (start_a, shape_a), (start_b, shape_b) = large[a], large[b]
        num_short_b = sum(size < LONG for size in shape_b)
        short_a, short_b = rest[:num_short], rest[num_short : num_short + num_short_b]
        away = rest[num_short + num_short_b :]
        from_a, to_b = _slices(shape_a, short_a, away, True), _slices(shape_b, short_b, away, False)
        one = (start_a + torch.arange(shape_a.numel()).view(shape_a))[from_a].flatten()
        two = (start_b + torch.arange(shape_b.numel()).view(shape_b))[to_b].flatten()
        found.append(torch.stack([torch.minimum(one, two), torch.maximum(one, two)], 1))
    pairs = torch.cat(found) if found else torch.zeros(0, 2, dtype=torch.long)
    kept: Tensor = pairs[pairs[:, 0] < pairs[:, 1]].unique(dim=0)
    return kept


def _slices(
    shape: torch.Size, short: Sequence[int], away: Sequence[int], is_first: bool
) -> tuple[int | slice, ...]:
    shorts, aways = iter(short), iter(away)
    found: list[int | slice] = []
    for size in shape:
        if size < LONG:
            found.append(next(shorts))
            continue
        by = next(aways) if is_first else -next(aways)
        found.append(slice(max(0, -by), size - max(0, by)))
    return tuple(found)


def holds(
    joint: LogJoint, points: Iterable[Tensor], before: Tensor, is_global: Tensor, edges: Tensor
) -> bool:
    """Whether these edges are all there are at these points.

    Where second derivatives are not finite, they tell nothing.
    """
    found = [_SecondDerivatives(joint, point) for point in points]
    with torch.device("cpu"):
        usable = [second for second in found if second.is_usable]
        return _all_told(usable, before, is_global, edges)


def _all_told(
    found: Iterable[_SecondDerivatives], before: Tensor, is_global: Tensor, edges: Tensor
) -> bool:
    """Whether random products have no more than the edges tell."""
    colours = coloured(len(before), edges.tolist())
    return all(_told(second, before, is_global, edges, colours) for second in found)


def _told(
    second: _SecondDerivatives, before: Tensor, is_global: Tensor, edges: Tensor, colours: Tensor
) -> bool:
    others = ~is_global
    v = torch.randn(len(before), dtype=second.z.dtype) * others
    whole = second.times(v, before) * others
    told = torch.zeros_like(whole)
    for colour in range(int(colours.max()) + 1):
        is_here = (colours == colour) & others
        column = second.times(is_here.to(v), before)
        told += column * v * is_here
        for i, j in (edges.T, edges.flip(1).T):
            own = is_here[j]
            told.index_add_(0, i[own], column[i[own]] * v[j[own]])
    told *= others
    if not (whole.isfinite().all() and told.isfinite().all()):
        return True
    return bool((told - whole).abs().max() <= TOLERANCE * whole.abs().max())
