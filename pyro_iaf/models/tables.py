"""A check that a model's tables over discrete latents are what the model says for single values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from pyro import poutine
from pyro.ops import packed
from torch import Tensor

from .arguments import Args, Kwargs, Program
from .discrete import Discrete, values_of
from .enumerated import Enumerated
from .matching import FixedValues
from .packed import Table
from .traces import log_prob_of_each, quietly, samples, subsamples

__all__ = ["check_tables"]

# How often other values are tried.
NUM_TRIED = 3


@torch.no_grad()
def check_tables(
    model: Program, discrete: Discrete, latents: Mapping[str, Any], args: Args, kwargs: Kwargs
) -> None:
    """Compares the tables of a run with runs at random values of the discrete latents.

    Where code combines the values of several rows, as ``z.sum()`` does, it combines entries of a
    table instead, and the sum over them means nothing.

    Args:
        model: A Pyro model.
        discrete: Its discrete latents.
        latents: Values of the others.
        args: Arguments of the model.
        kwargs: Likewise.

    Raises:
        ValueError: If they differ; names the first site where they do.
    """
    if discrete.sequential:  # such a model runs for single values anyway
        return

    def run(values: Mapping[str, Any]) -> poutine.Trace:
        with FixedValues(values):
            return poutine.trace(model).get_trace(*args, **kwargs)

    with torch.random.fork_rng(), quietly(), poutine.block():
        first = run(latents)
        fixed = {**latents, **{name: site["value"] for name, site in subsamples(first).items()}}
        with FixedValues(fixed), poutine.trace() as visible, Enumerated(discrete) as hidden:
            model(*args, **kwargs)
        tables = {table.name: table for table in hidden.tables()}
        for _ in range(NUM_TRIED):
            index, chosen = {}, {}
            for name in discrete.names & samples(first).keys():
                fn: Any = first.nodes[name]["fn"]
                values = values_of(fn)
                index[name] = torch.randint(len(values), fn.batch_shape, device=values.device)
                chosen[name] = values[index[name]]
            try:
                single = samples(run({**fixed, **chosen}))
            except Exception:  # perhaps at these values only
                continue
            for name, site in single.items():
                if name in tables:
                    found = _entry(tables[name], index)
                elif name in visible.trace.nodes:
                    found = _total(visible.trace.nodes[name])
                else:
                    continue
                _compare(name, found, _total(site, name in discrete.names))


def _entry(table: Table, index: Mapping[str, Tensor]) -> Tensor:
    """The sum over all rows of a table's entries at these indices."""
    entries, plates = table.log_prob, {frame.dim: s for s, frame in table.plates.items()}
    for symbol in [dim for dim in entries._pyro_dims if dim in table.latents]:
        at = packed.pack(index[table.latents[symbol]], plates)
        entries = packed.gather(entries, at, symbol)
    total: Tensor = entries.sum()
    return total


def _total(site: Any, is_enumerated: bool = False) -> Tensor:
    """The log density of a site; for a discrete latent as if it was not masked."""
    return log_prob_of_each({**site, "mask": None} if is_enumerated else site)[0].sum()


def _compare(name: str, found: Tensor, expected: Tensor) -> None:
    found, expected = found.double(), expected.double()
    # Outside of its support a distribution may have any number as its density.
    if found.isneginf() or torch.isclose(found, expected, rtol=1e-4, atol=1e-4, equal_nan=True):
        return
    raise ValueError(
        f"Discrete latents are summed out row by row, so a model should use each value by itself; "
        f"at site '{name}' the log density for single values is {expected:.6g}, and {found:.6g} in "
        "a table of all values. Code that combines rows, as z.sum() or z.cumsum(), or that indexes "
        "by a latent without Vindex(x)[..., z], can't be summed out: write it otherwise, or mark a "
        'latent outside of plates by infer={"enumerate": "sequential"}.'
    )
