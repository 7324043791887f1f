"""Sums of tables over discrete latents, by Pyro's tensor variable elimination."""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pyro.ops import packed
from pyro.ops.contract import contract_tensor_tree
from pyro.ops.rings import LogRing
from torch import Tensor

from . import log_einsum
from .packed import Table
from .vectorized_markov import Chain, scanned

__all__ = ["common_scale", "contracted"]


def contracted(
    tables: Sequence[Table], chains: Sequence[Chain] = (), scaled: bool = True
) -> dict[frozenset[Any], Tensor]:
    """The log density of several sites without their discrete latents, in parts by sets of plates.

    Args:
        tables: The tables of the sites.
        chains: Discrete latents of all time steps at once, by the symbols of their dimensions.
        scaled: Whether to multiply each part by the scale of its sites, which should be the same.
    """
    frames = {symbol: frame for table in tables for symbol, frame in table.plates.items()}
    dims = {symbol: frame.dim for symbol, frame in frames.items()}
    found: dict[frozenset[Any], Any] = defaultdict(float)
    for part in _connected(tables, chains):
        scale = common_scale([table.scale for table in part]) if scaled else 1.0
        for symbols, log_probs in _summed(part, chains).items():
            plates = frozenset(map(frames.get, symbols))
            for log_prob in log_probs:
                unpacked = log_einsum.with_zeros(packed.unpack(log_prob, dims))
                found[plates] = found[plates] + scale * unpacked
    return dict(found)


def _connected(tables: Iterable[Table], chains: Sequence[Chain]) -> list[list[Table]]:
    """Groups of tables that share discrete latents, or have those of one chain."""
    parts: list[tuple[set[str], list[Table]]] = []
    for table in tables:
        dims, group, others = table.dims, [table], []
        dims = dims.union(*(chain.latents for chain in chains if dims & {*chain.latents}))
        for part in parts:
            if part[0] & dims:
                dims, group = dims | part[0], part[1] + group
            else:
                others.append(part)
        parts = [*others, (dims, group)]
    return [group for _, group in parts]


def common_scale(scales: Sequence[Any], hint: str = "") -> Any:
    """The one scale of sites that hang together; raises a ValueError if there are several."""
    first = scales[0]
    for scale in scales:
        if isinstance(scale, Tensor) and scale.dim():
            raise ValueError(
                "poutine.scale around a discrete latent, or what depends on it, should be one "
                f"number; got a tensor of shape {tuple(scale.shape)}."
            )
        if scale is not first and float(scale) != float(first):
            raise ValueError(
                "A discrete latent and all that depends on it should have one scale, since a sum "
                f"over its values can't be scaled in parts; got {float(first):g} and "
                f"{float(scale):g}.{hint} In a subsampled plate, draw the latent within it too."
            )
    return first


class _Ring(LogRing):
    _backend = log_einsum.__name__


def _summed(part: Sequence[Table], chains: Sequence[Chain]) -> Mapping[Any, Sequence[Tensor]]:
    """The sum over all discrete latents of tables, as packed log densities by sets of symbols."""
    dims = set().union(*(table.dims for table in part))
    chains = [chain for chain in chains if dims & {*chain.latents}]
    try:
        if chains:
            return scanned(part, chains)
        tree: Any = OrderedDict()
        for table in part:
            tree.setdefault(frozenset(table.plates), []).append(table.log_prob)
        found: Mapping[Any, Sequence[Tensor]] = contract_tensor_tree(tree, dims, ring=_Ring())
    except NotImplementedError as error:
        raise ValueError(
            "Discrete latents should be summed out plate by plate, and here rows of one plate "
            "depend on each other through another, so the sum would have a term for each "
            "combination of their values. Sum them out by hand, or change the model."
        ) from error
    return found
