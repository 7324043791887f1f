"""The discrete latents of a model: which there are, and draws of them given the others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer import infer_discrete
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import Independent

from .arguments import Args, Kwargs, Program
from .particles import Particles
from .traces import bare, is_latent, quietly, samples
from .vectorized_markov import is_past

__all__ = ["EXACTLY", "Discrete", "DiscreteWatch", "discrete_draws", "is_discrete", "values_of"]

# Settings of Pyro's sites that would draw values, or list them for each row, are left out.
EXACTLY: dict[str, Any] = {"num_samples": None, "expand": False, "tmc": None}


class Discrete(NamedTuple):
    """The discrete latents of a model, which a guide leaves to be summed out.

    Attributes:
        names: Their names.
        nesting: How many dimensions the model's plates take, counted from the right.
        sequential: Those of them for each of whose values the model runs once more.
        at_once: Whether a ``vectorized_markov`` has those of all time steps in one site.
    """

    names: frozenset[str]
    nesting: int
    sequential: frozenset[str] = frozenset()
    at_once: bool = False


def is_discrete(site: Any) -> bool:
    """Whether a site is a latent with a discrete support."""
    try:
        return is_latent(site) and bool(site["fn"].support.is_discrete)
    except (AttributeError, NotImplementedError):  # a distribution without a support
        return False


class DiscreteWatch(Messenger):
    """Looks for discrete latents in a run of a model, draws them, and hides them.

    Attributes:
        found: The discrete latents, or None if there are none.

    Raises:
        ValueError: If one has infinitely many values.
    """

    def __init__(self) -> None:
        super().__init__()
        self._names: set[str] = set()
        self._sequential: set[str] = set()
        self._nesting, self._at_once = 0, False

    @property
    def found(self) -> Discrete | None:
        if not self._names:
            return None
        names, sequential = frozenset(self._names), frozenset(self._sequential)
        return Discrete(names, self._nesting, sequential, self._at_once)

    def _pyro_sample(self, msg: Any) -> None:
        if site_is_subsample(msg):
            return
        dims = [-frame.dim for frame in msg["cond_indep_stack"] if frame.vectorized]
        fn, value = msg["fn"], msg["value"]
        dims.append(len(getattr(fn, "batch_shape", ())))
        if msg["is_observed"] and isinstance(value, Tensor):
            dims.append(value.dim() - getattr(fn, "event_dim", 0))
        self._nesting = max(self._nesting, *dims)
        if is_past(msg) and is_latent(msg) and not is_discrete(msg):
            raise ValueError(
                f"Code in vectorized_markov runs for shifted times, so a continuous latent there, "
                f"as site '{msg['name']}', would be drawn more than once. Draw it before, in a "
                "pyro.plate over time, or write the chain by pyro.markov."
            )
        if is_discrete(msg):
            _check_enumerable(msg["name"], msg["fn"])
            self._names.add(msg["name"])
            self._at_once |= is_past(msg)
            in_rows = any(frame.vectorized and frame.size > 1 for frame in msg["cond_indep_stack"])
            # A tensor of several rows can't decide what the code does, so it goes in parallel.
            if msg["infer"].get("enumerate") == "sequential" and not in_rows:
                self._sequential.add(msg["name"])
            msg["stop"] = True

    def explain(self, error: BaseException) -> None:
        """Raises a ValueError if a guide found no latents because all of them are discrete."""
        if self.found is not None and "found no latent" in str(error):
            names = ", ".join(map(repr, sorted(self.found.names)))
            raise ValueError(
                f"A guide draws continuous latents, and all latents of this model are discrete: "
                f"{names}. pyro.infer.infer_discrete draws them exactly, without a guide."
            ) from error


def _check_enumerable(name: str, fn: Any) -> None:
    try:
        fn.enumerate_support(expand=False)
    except NotImplementedError as error:
        kind = type(bare(fn)).__name__
        cure = (
            f"Truncate it, as in pyro.sample('{name}', dist.Categorical(logits=...)) over the "
            "values that matter, or sum it out by hand and state its log density by pyro.factor."
        )
        if isinstance(fn, Independent):
            kind += " with to_event"
            cure = "Its numbers are independent: put them in a pyro.plate, without to_event."
        elif isinstance(bare(fn), dist.Multinomial):
            cure = "Draw each of its counts' units as a dist.Categorical in a pyro.plate."
        elif isinstance(bare(fn), dist.Binomial):
            kind += " whose total_count differs by row"
            cure = (
                f"Draw pyro.sample('{name}', dist.Categorical(logits=...)) over the numbers up to "
                "the largest total_count, with logits of -inf beyond that of a row."
            )
        raise ValueError(
            f"Discrete latents are summed out, so each should have finitely many values; site "
            f"'{name}' is a {kind}, whose values can't be listed. {cure}"
        ) from error


def values_of(fn: Any) -> Tensor:
    """The values of a discrete distribution, of shape ``(V,) + event_shape``."""
    values: Tensor = fn.enumerate_support(expand=False)
    return values.reshape(len(values), *fn.event_shape)


class _Indexed(Messenger):
    """Marks sites to be summed out, each as the index of its value.

    Pyro's ``infer_discrete`` takes no values with event dimensions, and leaves out dimensions where
    there is one value only.
    """

    def _pyro_sample(self, msg: Any) -> None:
        if site_is_subsample(msg):
            return
        msg["infer"] = {**msg["infer"], **EXACTLY, "enumerate": None}
        if is_discrete(msg):
            fn = msg["fn"]
            msg["infer"] |= {"enumerate": "parallel", "values": values_of(fn)}
            log_probs = fn.log_prob(fn.enumerate_support(expand=False))
            msg["fn"] = dist.Categorical(logits=log_probs.movedim(0, -1))
            msg["mask"] = None  # its shares count where the data are masked

    def _pyro_post_sample(self, msg: Any) -> None:
        if "values" in msg["infer"]:
            msg["value"] = msg["infer"]["values"][msg["value"]]


@torch.no_grad()
def discrete_draws(
    particles: Particles,
    model: Program,
    discrete: Discrete,
    latents: Mapping[str, Tensor],
    args: Args,
    kwargs: Kwargs,
    most_probable: bool = False,
) -> dict[str, Tensor]:
    """The discrete latents at draws of the others: drawn by their posterior, or the most probable.

    Args:
        particles: What runs the model without them.
        model: The model with them.
        discrete: What to draw.
        latents: Draws of the other latents, with a dimension of draws in front.
        args: Arguments of the model.
        kwargs: Likewise.
        most_probable: Whether to return the values that are the most probable together.

    Raises:
        ValueError: If some are enumerated sequentially, or are in a ``vectorized_markov``.
    """
    if discrete.at_once:
        raise ValueError(
            f"Discrete latents are drawn step by step, and "
            f"{', '.join(map(repr, sorted(discrete.names)))} is in vectorized_markov. Write the "
            "chain by pyro.markov(range(size)), build a guide for that model, and load this one's "
            "state_dict(): their continuous latents are the same."
        )
    if discrete.sequential:
        raise ValueError(
            f"Discrete latents are drawn from tables of all their values, and "
            f"{', '.join(map(repr, sorted(discrete.sequential)))} is enumerated sequentially. Mark "
            'it with infer={"enumerate": "parallel"}, and write torch.where for branches.'
        )
    num_draws = len(next(iter(latents.values())))
    marked = _Indexed()

    def run(given: Mapping[str, Tensor], size: int | None) -> dict[str, Any]:
        conditioned = particles.in_plate(marked(poutine.condition(model, dict(given))), size)
        first = -particles.nesting - (1 if size is None else 2)
        sampler = infer_discrete(conditioned, first, int(not most_probable))
        with quietly(), poutine.block():
            return samples(poutine.trace(sampler).get_trace(*args, **kwargs))

    one = run({name: draws[0] for name, draws in latents.items()}, None)
    names = sorted(name for name, site in one.items() if "values" in site["infer"])
    parts: dict[str, list[Tensor]] = {name: [] for name in names}
    start = 0
    for size in particles.sizes(num_draws):
        given = {name: draws[start : start + size] for name, draws in latents.items()}
        start += size
        if particles.at_once:
            for name, draws in given.items():
                given[name] = particles.padded(draws, one[name]["fn"].event_dim)
            sites = run(given, size)
        else:
            sites = run({name: draws[0] for name, draws in given.items()}, None)
        for name, found in parts.items():
            index, values = sites[name]["value"], sites[name]["infer"]["values"]
            batch = list(one[name]["fn"].batch_shape)
            full = batch
            if particles.at_once:
                full = [size, *particles.padded_shape(batch, len(batch))]
            index = index.reshape(index.shape[max(0, index.dim() - len(full)) :]).expand(full)
            found.append(values[index.reshape(size, *batch)])
    return {name: torch.cat(found) for name, found in parts.items()}
