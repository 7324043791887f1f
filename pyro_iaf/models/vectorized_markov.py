"""Chains of discrete latents by ``pyro.contrib.funsor.vectorized_markov``, summed out by funsor.

Such a chain runs its code for each of its first steps, and then once for all others, at times that
are shifted by 0, 1, ...: sites whose names end in slices. Those of the last shift count; the others
are there as what they depend on. Funsor sums all of them out by a parallel scan.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .packed import Table

__all__ = ["WITHOUT_NAMES", "Chain", "chains_among", "is_past", "scanned"]

# What a chain asks of a site: on which names of funsor's its density depends.
WITHOUT_NAMES = {"log_prob": SimpleNamespace(inputs=())}


class Chain(NamedTuple):
    """A discrete latent of each time step.

    Attributes:
        time: The plate of all steps after the first.
        latents: The latent at each of the first steps, then at all others with shifts 0, 1, ....
    """

    time: str
    latents: tuple[str, ...]


def is_past(site: Any) -> bool:
    """Whether a site is there for what depends on it alone, and should not count."""
    return bool(site["infer"].get("_do_not_score"))


def chains_among(symbols: Mapping[str, str], time: str, suffixes: Sequence[Any]) -> list[Chain]:
    """The chains of latents whose names end in these suffixes; ``symbols`` has those of each."""
    last = str(suffixes[-1])
    stems = [name.removesuffix(last) for name in symbols if name.endswith(last)]
    members = [[symbols.get(f"{stem}{suffix}", "") for suffix in suffixes] for stem in stems]
    return [Chain(time, tuple(found)) for found in members if all(found)]


def scanned(part: Sequence[Table], chains: Sequence[Chain]) -> dict[Any, list[Tensor]]:
    """The sum over all discrete latents of tables, as packed log densities by sets of symbols.

    Raises:
        NotImplementedError: If rows of plates depend on each other through other plates.
    """
    import funsor
    from funsor.sum_product import dynamic_partial_sum_product

    funsor.set_backend("torch")
    plates = {symbol: frame for table in part for symbol, frame in table.plates.items()}
    kept = set(plates).intersection(*(table.plates for table in part))
    # A latent on which nothing in the next step depends is one of a plate.
    past = {symbol for chain in chains for symbol in chain.latents[len(chain.latents) // 2 : -1]}
    latents = set().union(*(table.dims for table in part))
    steps: dict[str, Any] = {symbol: set() for symbol in plates if symbol not in kept}
    for chain in chains:
        if latents & past & {*chain.latents}:
            steps[chain.time].add(chain.latents)
    num_terms = len(part) * max(plates[chain.time].size for chain in chains)
    lowest = torch.finfo(part[0].log_prob.dtype).min / 16 / num_terms
    factors = []
    for table in part:
        symbols, values = table.log_prob._pyro_dims, table.log_prob.clamp(min=lowest)
        for symbol in table.plates.keys() - set(symbols) - kept:
            symbols, values = symbol + symbols, values.expand(plates[symbol].size, *values.shape)
        inputs = [(s, funsor.Bint[size]) for s, size in zip(symbols, values.shape, strict=True)]
        factors.append(funsor.Tensor(values, OrderedDict(inputs)))
    try:
        terms = dynamic_partial_sum_product(
            funsor.ops.logaddexp,
            funsor.ops.add,
            factors,
            frozenset(latents) | frozenset(steps),
            {symbol: frozenset(found) for symbol, found in steps.items()},
        )
    except ValueError as error:
        raise NotImplementedError(str(error)) from error
    found: dict[Any, list[Tensor]] = {}
    for term in terms:
        log_prob = torch.where(term.data < lowest / 2, -torch.inf, term.data)
        log_prob._pyro_dims = "".join(term.inputs)  # type: ignore[attr-defined]
        found.setdefault(frozenset(term.inputs), []).append(log_prob)
    return found
