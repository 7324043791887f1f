r"""Sparse symmetric matrices: orders of elimination with few steps, factors, and solves.

A normal with precision :math:`Q` is a chain of conditionals. Eliminated one after the other,

.. math::
    x_i = \sum_{p} a_{ip} x_p + s_i \varepsilon_i ,

where the parents :math:`p` are the neighbours of :math:`i` when it is eliminated. Variables without
an edge between them are eliminated together, in one round. So a chain of n takes about
:math:`\log_2 n` rounds, and rows of a plate as many as a row has variables.

The usual orders, minimum degree or nested dissection, aim at few non-zeros. Here rounds count too,
since each is a few operations on all its variables, and no loop over variables is left.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["Elimination", "Factor", "Round", "coloured", "eliminated"]


# Pivots that are not positive are replaced by this share of the diagonal, if they are not larger.
SMALLEST_PIVOT = 0.05


class Round(NamedTuple):
    """Variables that are eliminated together, by their places in the order of drawing.

    Attributes:
        first: The first of their places, which are consecutive.
        parents: The places of their parents, of shape ``(n, P)``; where one has fewer, 0.
        slots: Where their coefficients are among all, likewise; the last of all where it has fewer.
        pairs: Of each pair of parents the coefficient's place, of shape ``(n, P (P - 1) / 2)``.
    """

    first: int
    parents: Tensor
    slots: Tensor
    pairs: Tensor

    @property
    def last(self) -> int:
        """The place after them."""
        return self.first + len(self.parents)

    def near(self, x: Tensor) -> Tensor:
        """The values of the parents in those of earlier places, of shape ``(..., n, P)``."""
        found: Tensor = x[..., self.parents.flatten()].unflatten(-1, self.parents.shape)
        return found


@dataclass
class Elimination:
    """An order of elimination and its non-zeros.

    Attributes:
        order: The variable at each place of the order of drawing: the last eliminated is first.
        rounds: The rounds in the order of drawing.
        children, parents: The places of both ends of each coefficient.
        edges: Pairs of variables with a non-zero, which it was made for, of shape ``(m, 2)``.
        all_parents, all_slots: Those of all rounds, one after the other.
    """

    order: Tensor
    rounds: Sequence[Round]
    children: Tensor
    parents: Tensor
    edges: Tensor

    def __post_init__(self) -> None:
        self.all_parents = torch.cat([each.parents.flatten() for each in self.rounds])
        self.all_slots = torch.cat([each.slots.flatten() for each in self.rounds])

    @property
    def num_coefficients(self) -> int:
        """How many coefficients there are."""
        return len(self.children)

    def mapped(self, fn: Callable[[Tensor], Tensor]) -> Elimination:
        """The same with all tensors mapped, as to another device."""
        rounds = [Round(first, *map(fn, tensors)) for first, *tensors in self.rounds]
        return Elimination(
            fn(self.order), rounds, fn(self.children), fn(self.parents), fn(self.edges)
        )

    def by_round(self, of_slots: Tensor) -> Sequence[Tensor]:
        """The part of each round in what ``all_slots`` indexed, of shape ``(..., n, P)``."""
        parts = of_slots.split([each.parents.numel() for each in self.rounds], -1)
        pairs = zip(parts, self.rounds, strict=True)
        return [part.unflatten(-1, each.parents.shape) for part, each in pairs]

    def draw(self, coefficients: Tensor, scaled: Tensor) -> Tensor:
        """The ``x`` with ``x - A x = scaled``, round by round.

        Args:
            coefficients: Of shape ``(..., E + 1)``, with a last one of zero.
            scaled: Of shape ``(..., n)``, in the order of drawing.
        """
        x = scaled[..., :0]
        by_round = self.by_round(coefficients[..., self.all_slots])
        for each, by in zip(self.rounds, by_round, strict=True):
            known = (by * each.near(x)).sum(-1)
            x = torch.cat([x, scaled[..., each.first : each.last] + known], -1)
        return x

    def factor(self, diagonal: Tensor, edges: Tensor) -> Factor:
        """Factors of matrices.

        Args:
            diagonal: The diagonals, of shape ``(K, n)``, in the order of drawing.
            edges: The entries where there are coefficients, of shape ``(K, E)``.
        """
        none = diagonal.new_zeros(len(diagonal), 1)
        # Of a matrix that is not definite, pivots of a size that its diagonal allows.
        least = SMALLEST_PIVOT * diagonal.abs() + torch.finfo(diagonal.dtype).tiny
        diagonal, edges = diagonal.clone(), torch.cat([edges, none], 1)
        for each in reversed(self.rounds):
            pivots = diagonal[:, each.first : each.last]
            floor = least[:, each.first : each.last]
            pivots = torch.where(pivots > 0, pivots, torch.maximum(pivots.abs(), floor))
            diagonal[:, each.first : each.last] = pivots
            n, num_parents = each.parents.shape
            if not num_parents:
                continue
            slots = each.slots.flatten()
            column = edges[:, slots].unflatten(1, (n, num_parents))
            scaled = column / pivots.unsqueeze(-1)
            diagonal.index_add_(1, each.parents.flatten(), -(column * scaled).flatten(1))
            p, q = torch.triu_indices(num_parents, num_parents, 1, device=edges.device)
            between = -(column[..., p] * scaled[..., q]).flatten(1)
            edges.index_add_(1, each.pairs.flatten(), between)
            edges[:, slots] = -scaled.flatten(1)
            edges[:, -1] = 0.0
        return Factor(self, edges, diagonal)


class Factor(NamedTuple):
    """Factors of matrices Q, as coefficients and conditional precisions.

    Attributes:
        elimination: The order.
        coefficients: Of shape ``(K, E + 1)``, with a last one of zero.
        precisions: Of each variable given its parents, of shape ``(K, n)``.
    """

    elimination: Elimination
    coefficients: Tensor
    precisions: Tensor

    def log_det(self) -> Tensor:
        """The logarithms of the determinants of Q."""
        return self.precisions.log().sum(-1)

    def solve(self, v: Tensor) -> Tensor:
        """The ``x`` with ``Q x = v``, for vectors of shape ``(K, n)`` in the order of drawing."""
        v = v.clone()
        for each in reversed(self.elimination.rounds):
            here = v[:, each.first : each.last].unsqueeze(-1)
            by = self.coefficients[:, each.slots.flatten()].unflatten(1, each.slots.shape)
            v.index_add_(1, each.parents.flatten(), (by * here).flatten(1))
        return self.elimination.draw(self.coefficients, v / self.precisions)


def eliminated(num: int, edges: Iterable[tuple[int, int]]) -> Elimination:
    """An order of elimination for a matrix with non-zeros at these pairs and on the diagonal."""
    edges = [(i, j) for i, j in edges if i != j]
    near: list[set[int]] = [set() for _ in range(num)]
    for i, j in edges:
        near[i].add(j)
        near[j].add(i)
    rounds, left = [], set(range(num))
    parents: dict[int, list[int]] = {}
    while left:
        # Those with the fewest neighbours leave the fewest non-zeros; half of all leave few rounds.
        candidates = sorted(left, key=lambda i: (len(near[i]), i))
        most = len(near[candidates[len(left) // 2]])
        chosen: list[int] = []
        barred: set[int] = set()
        for i in candidates:
            if len(near[i]) <= most and i not in barred:
                chosen.append(i)
                barred |= near[i]
        for i in chosen:
            parents[i] = sorted(near[i])
            for p in near[i]:
                near[p] |= near[i]
                near[p] -= {i, p}
        left -= set(chosen)
        rounds.append(sorted(chosen))
    return _laid_out(rounds[::-1], parents, _index(edges).view(-1, 2))


def _laid_out(rounds: list[list[int]], parents: dict[int, list[int]], edges: Tensor) -> Elimination:
    order = [i for chosen in rounds for i in chosen]
    place = {i: k for k, i in enumerate(order)}
    slot: dict[tuple[int, int], int] = {}
    for i in order:
        for p in parents[i]:
            slot[place[i], place[p]] = len(slot)
    none, found, first = len(slot), [], 0
    for chosen in rounds:
        width = max(len(parents[i]) for i in chosen)
        above, slots, pairs = [], [], []
        for i in chosen:
            # The later a parent is drawn, the earlier it is eliminated: it is the child in a pair.
            own = sorted((place[p] for p in parents[i]), reverse=True)
            missing = width - len(own)
            above.append(own + missing * [0])
            slots.append([slot[place[i], p] for p in own] + missing * [none])
            every = own + missing * [-1]
            pairs.append(
                [slot.get((p, q), none) for k, p in enumerate(every) for q in every[k + 1 :]]
            )
        n = len(chosen)
        tensors = [_index(rows).view(n, -1) for rows in (above, slots)]
        num_pairs = width * (width - 1) // 2
        tensors.append(_index(pairs).view(n, num_pairs))
        found.append(Round(first, *tensors))
        first += n
    ends = _index(list(slot)).view(-1, 2)
    return Elimination(_index(order), found, ends[:, 0], ends[:, 1], edges)


def coloured(num: int, edges: Iterable[tuple[int, int]]) -> Tensor:
    """Colours of columns, of which those of one colour have no row in common.

    So one product of the matrix with a sum of columns of unit vectors has the entries of all
    columns of a colour.
    """
    near: list[set[int]] = [{i} for i in range(num)]
    for i, j in edges:
        near[i].add(j)
        near[j].add(i)
    colours = [-1] * num
    for i in range(num):
        taken = {colours[k] for j in near[i] for k in near[j]}
        colours[i] = next(c for c in range(num + 1) if c not in taken)
    return _index(colours)


def _index(numbers: Any) -> Tensor:
    """Indices on the CPU, whatever the default device is; a module moves them."""
    return torch.tensor(numbers, dtype=torch.long, device="cpu")
