"""The transform of a guide that has found structure: flows over the globals, then the others.

Its parts are flows that act on the globals' noise alone, a bend, loc and scale of theirs, the
others given them (:mod:`pyro_iaf.flows.sparse_step`), and the order of the model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from ..flows.sparse_step import Coordinates, Leading, SparseStep
from ..models.log_joint import LogJoint
from ..nn.made import MaskedAutoregressiveNetwork
from ..nn.univariate import UnivariateMap
from ..solvers.sparse import eliminated
from .nested_laplace import NestedStart, nested_laplace
from .pathfinder import Start
from .structure import Structure
from .transform import (
    GuideTransform,
    Transform,
    entries_below,
    fresh_transform,
    settings_of,
)

__all__ = [
    "SMALL_SPREAD",
    "StructuredTransform",
    "elbo_of",
    "has_structure",
    "settings_like",
    "structured_parts",
    "structured_start",
    "structured_transform",
    "transform_from_state",
]

# Starts are compared by so many draws.
NUM_COMPARED = 200

# A start whose log weights spread by less, in nats, is near the posterior, or all but there.
SMALL_SPREAD, TINY_SPREAD = 2.0, 0.3


class StructuredTransform(GuideTransform):
    """Flows over a few globals, and sparse conditionals of all other latents.

    Args:
        of_globals: The transform of the globals; None if there are none.
        last: The others given them.
        coordinates: The order of the model.
    """

    def __init__(
        self, of_globals: GuideTransform | None, last: SparseStep, coordinates: Coordinates
    ) -> None:
        D = last.input_dim
        leading = [] if of_globals is None else [Leading(part, D) for part in of_globals.parts]
        super().__init__([*leading, last], coordinates)

    @property
    def networks(self) -> list[MaskedAutoregressiveNetwork]:
        return [part.flow.network for part in self.parts[:-3]]

    @property
    def context_dim(self) -> int:
        return 0

    @property
    def num_units(self) -> int:
        widths = [max(network.hidden_dims) for network in self.networks]
        return max([*widths, self.sparse.start_frame.shape[1]])

    @property
    def is_dense(self) -> bool:
        return False

    @property
    def sparse(self) -> SparseStep:
        """The others given the globals."""
        step: SparseStep = self.parts[-2]
        return step

    @property
    def structure(self) -> Structure:
        """The globals and the graph of the others."""
        coordinates: Any = self.parts[-1]
        first, others = coordinates.place_frame.argsort().tensor_split([self.sparse.num_globals])
        numbers = others.sort().values
        edges = numbers[self.sparse.edges_frame]
        return Structure(first, others, coordinates.before_frame, edges, self.sparse.elimination)

    @property
    def origin(self) -> Tensor:
        sparse, coordinates = self.sparse, cast(Coordinates, self.parts[-1])
        others = sparse.start_frame[0, : sparse.num_others]
        origin: Tensor = coordinates(torch.cat([sparse.loc, others]))
        return origin

    @torch.no_grad()
    def widen_tails(self, by: float) -> Callable[[], None]:
        tails = [self.sparse.bend[1]]
        if self.sparse.num_globals:
            of_globals: Any = self.parts[-3]
            tails.append(of_globals.flow.coefficients[3])
        before = [tail.clone() for tail in tails]
        for tail in tails:
            tail.add_(by)

        def undo() -> None:
            with torch.no_grad():
                for tail, was in zip(tails, before, strict=True):
                    tail.copy_(was)

        return undo


def structured_transform(
    start: NestedStart,
    structure: Structure,
    *,
    num_flows: int,
    hidden_dims: Sequence[int] | None,
    univariate: UnivariateMap,
) -> StructuredTransform:
    """A fresh transform, close to its start."""
    G = len(start.loc)
    last = SparseStep(structure.elimination, *start)
    of_globals: Any = None
    if G:
        standard = Start(torch.zeros_like(start.loc), torch.ones_like(start.loc))
        settings: Any = {
            "num_flows": num_flows,
            "hidden_dims": hidden_dims,
            "univariate": univariate,
        }
        of_globals = fresh_transform(standard, 0.0, dense=True, **settings)
    coordinates = Coordinates(structure.place, structure.before)
    return StructuredTransform(of_globals, last, coordinates).to(start.loc)


@torch.no_grad()
def structured_start(
    joint: LogJoint, structure: Structure, loc: Tensor, like: Any
) -> StructuredTransform | None:
    """A fresh transform near a point, with the settings of a guide; None if none is found."""
    best, best_elbo = None, -math.inf
    for start in nested_laplace(joint, structure, loc):
        fresh = structured_transform(start, structure, **settings_like(like))
        elbo, spread = elbo_of(joint, fresh.posterior())
        if elbo > best_elbo:
            best, best_elbo = fresh, elbo
        if spread < TINY_SPREAD:
            break
    return best


def settings_like(guide: Any) -> dict[str, Any]:
    """What a guide says of its flows."""
    return {key: getattr(guide, key) for key in ("num_flows", "hidden_dims", "univariate")}


@torch.no_grad()
def elbo_of(joint: LogJoint, posterior: Any) -> tuple[float, float]:
    """The ELBO of a distribution by a few draws, and the deviation of log weights.

    They are ``-inf`` and ``inf`` where they are not finite.
    """
    z = posterior.sample((NUM_COMPARED,))
    log_weights: Tensor = joint(z) - posterior.log_prob(z)
    elbo, spread = log_weights.mean().item(), log_weights.std().item()
    return (elbo, spread) if math.isfinite(elbo) else (-math.inf, math.inf)


def transform_from_state(
    state: Mapping[str, Tensor], univariate: UnivariateMap | None
) -> Transform | None:
    """A transform that fits a state; None if there is none in it."""
    if univariate is None:
        return None
    if has_structure(state):
        sizes = [v for k, v in state.items() if k.endswith(".network._extra_state")]
        widths = sizes[0].tolist()[3:] if sizes else None
        settings: Any = {"num_flows": len(sizes), "hidden_dims": widths, "univariate": univariate}
        return structured_transform(*structured_parts(state), **settings)
    known = settings_of(state)
    if known is None:
        return None
    return fresh_transform(**known, log_scale=0.0, univariate=univariate)


def has_structure(state: Mapping[str, Tensor]) -> bool:
    """Whether a state is of a transform with structure."""
    return any(name.endswith(".edges_frame") for name in state)


class StructuredParts(NamedTuple):
    """What a transform with structure is made of, besides its settings."""

    start: NestedStart
    structure: Structure


def structured_parts(state: Mapping[str, Tensor]) -> StructuredParts:
    """The start and the structure in a state."""
    name = next(name for name in state if name.endswith(".edges_frame"))
    sparse = entries_below(state, name.removesuffix("edges_frame"))
    step = int(name.split(".")[1])
    coordinates = entries_below(state, f"parts.{step + 1}.")
    loc, *rows = sparse["globals_frame"].clone()
    G = len(loc)
    place, before, edges = (
        index.to("cpu", torch.long)  # a parameter store has them in floating point
        for index in (
            coordinates["place_frame"],
            coordinates["before_frame"],
            sparse["edges_frame"],
        )
    )
    first, others = place.argsort().tensor_split([G])
    elimination = eliminated(len(others), edges.tolist())
    structure = Structure(first, others, before, others.sort().values[edges], elimination)
    scale_tril = torch.stack(rows) if rows else loc.new_zeros(0, 0)
    start = NestedStart(loc, scale_tril, sparse["start_frame"].clone())
    return StructuredParts(start, structure)
