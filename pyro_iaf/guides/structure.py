r"""What depends on what among the latents of a model, as its second derivatives tell.

A few latents, the globals, touch very many others. Given them the others form a sparse graph: the
rows of a plate, a chain, a map. It may be sparse only in other coordinates: a random walk written
by its steps is a chain in their cumulative sums.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..models.log_joint import LogJoint
from ..solvers.sparse import Elimination, eliminated
from .probing import holds, pattern_of
from .runs import SHORTEST_RUN, axes, before_along, blocks

__all__ = ["Structure", "find_structure", "has_all_edges"]

# Structure is looked for among so many latents.
FEWEST, MOST = 8, 20_000

# Among up to so many, by all second derivatives, if these take runs of at most so many numbers.
MOST_DENSE, MOST_NUMBERS = 1200, 2**25

# Second derivatives below this share of the root of both diagonals count as zero.
SMALL = 1e-6

# A latent that touches more than this share of all, and more than so many, is a global, or one that
# touches more than so many times as many as usual; there are at most so many globals.
MANY, MANY_AT_LEAST, MANY_TIMES, MOST_GLOBALS = 0.25, 4, 8, 64

# Up to so many latents that edges join are told as a row.
MOST_IN_A_ROW = 16

# A sparse factor has at most this share of a dense one's entries.
MOST_SHARE = 0.25

# So far from a point second derivatives are looked at.
AWAY = 0.3, 1.0


@dataclass
class Structure:
    """Globals, and the sparse graph of the others given them.

    Attributes:
        globals: The latents that touch very many others, of shape ``(G,)``.
        others: The others in the order of drawing, of shape ``(n,)``.
        before: Of each latent the latent before it in a run of sums, or D; of shape ``(D,)``.
        edges: Pairs of others, by their places in the model, of shape ``(m, 2)``.
        elimination: The order of elimination of the others.
    """

    globals: Tensor
    others: Tensor
    before: Tensor
    edges: Tensor
    elimination: Elimination

    @classmethod
    def of(cls, is_global: Tensor, before: Tensor, edges: Tensor) -> Structure:
        """That with these globals, runs and edges, all on the CPU."""
        rest = (~is_global).nonzero().squeeze(-1)
        number = torch.full_like(before, -1)
        number[rest] = torch.arange(len(rest))
        elimination = eliminated(len(rest), number[edges].tolist())
        others = rest[elimination.order]
        first = is_global.nonzero().squeeze(-1)
        return cls(first, others, before, edges, elimination)

    @property
    def place(self) -> Tensor:
        """Of each latent its place among globals and others."""
        return torch.cat([self.globals, self.others]).argsort()

    def __str__(self) -> str:
        G, n, D = len(self.globals), len(self.others), len(self.before)
        num_runs = int((self.before < D).sum())
        rounds = len(self.elimination.rounds)
        width = max(each.parents.shape[1] for each in self.elimination.rounds)
        largest = _largest_part(self.edges.tolist())
        if largest == 1:
            how = "independent of each other"
        elif largest <= MOST_IN_A_ROW:
            how = f"in rows of at most {largest}"
        elif width == 2 and len(self.edges) < n:
            how = "in chains"
        else:
            how = f"in a graph, each given at most {width}"
        sums = ", in cumulative sums" if num_runs else ""
        return (
            f"{G} global{'' if G == 1 else 's'}; {n} latents {how}{sums}, drawn in {rounds} "
            f"round{'' if rounds == 1 else 's'}"
        )


def _largest_part(edges: Sequence[Sequence[int]]) -> int:
    """The most latents that edges join."""
    near: dict[int, list[int]] = {}
    for i, j in edges:
        near.setdefault(i, []).append(j)
        near.setdefault(j, []).append(i)
    largest, seen = 1, set[int]()
    for first in near:
        part = [] if first in seen else [first]
        seen.add(first)
        for i in part:  # grows
            new = [j for j in near[i] if j not in seen]
            seen.update(new)
            part += new
        largest = max(largest, len(part))
    return largest


@torch.no_grad()
def find_structure(
    joint: LogJoint, loc: Tensor, shapes: Sequence[torch.Size], draws: Sequence[Tensor] = ()
) -> Structure | None:
    """The structure of a log joint density; None if it has none that helps.

    Args:
        joint: The log density.
        loc: A point near which it is looked at.
        shapes: The shapes of the sites in unconstrained space, in order.
        draws: Further points where it is looked at, each of shape ``(D,)``.
    """
    if not FEWEST <= len(loc) <= MOST:
        return None
    with torch.random.fork_rng():  # the same for a model at each time
        torch.manual_seed(0)
        return _found(joint, loc, shapes, draws)


def has_all_edges(joint: LogJoint, structure: Structure, draws: Tensor) -> bool:
    """Whether no latents touch each other at these points that the structure holds apart.

    A rectifier may hide what depends on what where the structure was looked for.
    """
    with torch.random.fork_rng():
        torch.manual_seed(0)
        is_global = torch.zeros(len(structure.before), dtype=torch.bool, device="cpu")
        is_global[structure.globals] = True
        return holds(joint, draws, structure.before, is_global, structure.edges)


def _found(
    joint: LogJoint, loc: Tensor, shapes: Sequence[torch.Size], draws: Sequence[Tensor]
) -> Structure | None:
    D = len(loc)
    points = torch.stack([loc, *(loc + torch.randn(6, D).to(loc))])
    if joint.check(points) is not None or not joint.at_once:
        return None
    if D > MOST_DENSE or D * joint.work > MOST_NUMBERS:
        near = loc + AWAY[0] * torch.randn(D).to(loc)
        pattern = pattern_of(joint, [near, *draws], shapes)
        return None if pattern is None else _sparse(*pattern)
    curvature = _curvature(joint, loc, draws)
    with torch.device("cpu"):  # where indices are made, whatever the default
        return None if curvature is None else _sparsest(curvature.cpu(), shapes)


def _sparsest(curvature: Tensor, shapes: Sequence[torch.Size]) -> Structure | None:
    """The structure with the fewest coefficients, as written or in sums; None if it is dense."""
    D = curvature.shape[-1]
    tried = []
    for before in (torch.full((D,), D), _summed(curvature, shapes)):
        touches = _touches(_in_sums(curvature, before))
        degree = touches.sum(1)
        is_typical = degree <= MANY_TIMES * degree.median()
        is_global = (degree > max(MANY * D, MANY_AT_LEAST)) | (
            ~is_typical & (degree >= SHORTEST_RUN)
        )
        touches &= ~is_global & ~is_global.unsqueeze(1)
        tried.append(_sparse(is_global, before, touches.triu(1).nonzero()))
    found = [structure for structure in tried if structure is not None]
    return min(found, key=lambda s: s.elimination.num_coefficients, default=None)


def _sparse(is_global: Tensor, before: Tensor, edges: Tensor) -> Structure | None:
    """That with these globals, runs and edges, if it is sparse."""
    D = len(before)
    if int(is_global.sum()) > min(MOST_GLOBALS, D // 4):
        return None
    if bool((is_global & (before < D)).any()):  # a sum of a global is none
        return None
    found = Structure.of(is_global, before, edges)
    n = len(found.others)
    if found.elimination.num_coefficients > MOST_SHARE * n * (n - 1) / 2:
        return None
    return found


def _curvature(joint: LogJoint, loc: Tensor, draws: Sequence[Tensor]) -> Tensor | None:
    """Second derivatives at a few points, of shape ``(P, D, D)``."""
    near = [loc + away * torch.randn(len(loc)).to(loc) for away in AWAY]
    rows = []
    for point in (*near, *draws):
        value, hessian = joint(point.unsqueeze(0)), joint.hessian(point.unsqueeze(0))[0]
        if value.isfinite().all() and hessian.isfinite().all():
            rows.append(hessian)
    return torch.stack(rows) if rows else None


def _touches(curvature: Tensor) -> Tensor:
    """Which pairs have a second derivative that is not small."""
    size = curvature.abs()
    diagonal = size.diagonal(dim1=-2, dim2=-1)
    largest = diagonal.amax(-1, keepdim=True)
    root = torch.maximum(diagonal, 1e-12 * largest).sqrt()
    return (size > SMALL * root.unsqueeze(-1) * root.unsqueeze(-2)).any(0)


def _in_sums(curvature: Tensor, before: Tensor) -> Tensor:
    """Second derivatives in sums along runs, of which latents are the differences."""
    D = len(before)
    after = torch.full((D + 1,), D)
    after[before] = torch.arange(D)
    after = after[:D].to(curvature.device)  # a sum is in a latent, and in the one after it

    def apply(matrix: Tensor) -> Tensor:
        padded = torch.cat([matrix, torch.zeros_like(matrix[:, :1])], 1)
        return matrix - padded[:, after]

    return apply(apply(curvature).mT)


def _summed(curvature: Tensor, shapes: Sequence[torch.Size]) -> Tensor:
    """Runs along an axis of each site, where its own second derivatives are sparser in sums."""
    D = curvature.shape[-1]
    before = torch.full((D,), D)
    for start, shape in blocks(shapes):
        size = shape.numel()
        own = curvature[:, start : start + size, start : start + size]
        best = int(_touches(own).sum())
        for run in axes(shape):
            local = before_along(torch.full((size,), size), 0, shape, run)
            found = int(_touches(_in_sums(own, local)).sum())
            if found < best / 2:
                best, before = found, before_along(before, start, shape, run)
    return before
