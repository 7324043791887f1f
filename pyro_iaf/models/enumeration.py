r"""Models whose discrete latents are summed out, exactly, as Pyro's ``TraceEnum_ELBO`` does it.

.. math::
    \log p(x, z) = \log \sum_k p(x, z, k)

The model runs once with all values of its discrete latents :math:`k` in dimensions of their own,
left of plates and particles. Pyro's tensor variable elimination sums them out, and what comes of it
is the density of a factor. So whoever runs the model sees its continuous latents alone.
"""

from __future__ import annotations

import math
from collections import OrderedDict, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer import infer_discrete
from pyro.ops import packed
from pyro.ops.contract import contract_tensor_tree
from pyro.ops.rings import LogRing
from pyro.poutine.enum_messenger import EnumMessenger
from pyro.poutine.indep_messenger import CondIndepStackFrame, IndepMessenger
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import _PYRO_STACK
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import Distribution

from . import log_einsum
from .arguments import Args, Kwargs, Program
from .matching import unchecked
from .particles import MAX_NUMBERS, Particles
from .traces import is_latent, quietly, samples

__all__ = ["Discrete", "DiscreteWatch", "SummedOut", "discrete_draws", "marginal_of", "summed_out"]

# PyTorch's tensors have at most so many dimensions.
MOST_DIMS = 60


class Discrete(NamedTuple):
    """The discrete latents of a model, which a guide leaves to be summed out.

    Attributes:
        names: Their names.
        nesting: How many dimensions the model's plates take, counted from the right.
    """

    names: frozenset[str]
    nesting: int


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

    def __enter__(self) -> DiscreteWatch:
        self.found: Discrete | None = None
        self._names: set[str] = set()
        self._nesting = 0
        super().__enter__()
        return self

    def _pyro_sample(self, msg: Any) -> None:
        if site_is_subsample(msg):
            return
        dims = [-frame.dim for frame in msg["cond_indep_stack"] if frame.vectorized]
        fn, value = msg["fn"], msg["value"]
        dims.append(len(getattr(fn, "batch_shape", ())))
        if msg["is_observed"] and isinstance(value, Tensor):
            dims.append(value.dim() - getattr(fn, "event_dim", 0))
        self._nesting = max(self._nesting, *dims)
        if is_discrete(msg):
            _check_enumerable(msg["name"], msg["fn"])
            self._names.add(msg["name"])
            msg["stop"] = True
        if self._names:
            self.found = Discrete(frozenset(self._names), self._nesting)


def _check_enumerable(name: str, fn: Any) -> None:
    try:
        fn.enumerate_support(expand=False)
    except NotImplementedError as error:
        raise ValueError(
            f"Discrete latents are summed out, so each should have finitely many values; site "
            f"'{name}' is a {type(fn).__name__}, whose values can't be listed. Truncate it, as in "
            f"pyro.sample('{name}', dist.Categorical(logits=...)) over the values that matter, or "
            "sum it out by hand and state its log density by pyro.factor."
        ) from error


def summed_out(model: Program, guide: Any) -> Program:
    """The model without the discrete latents that its guide leaves out, if it is one of ours."""
    guide = poutine.unwrap(guide)
    if isinstance(model, SummedOut) or not hasattr(guide, "discrete"):
        return model
    return SummedOut(model, guide)


def marginal_of(elbo: Any, model: Program, guide: Any, args: Args, kwargs: Kwargs) -> Program:
    """What :func:`summed_out` returns, for an ELBO that knows how deep the model's plates nest."""
    program = summed_out(model, guide)
    if elbo.vectorize_particles and elbo.max_plate_nesting == math.inf and program is not model:
        elbo._guess_max_plate_nesting(model, guide, args, kwargs)  # by the plates of all sites
    return program


class SummedOut:
    """A model without its discrete latents, and with a factor for the data that depend on them.

    Continuous latents whose priors depend on them are sites without a density: theirs is in the
    factor.

    Args:
        model: A Pyro model.
        guide: A guide whose attribute ``discrete`` tells what to sum out. It may be set up later.
    """

    def __init__(self, model: Program, guide: Any) -> None:
        self.model, self.guide = model, guide

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.guide.discrete is None:
            return self.model(*args, **kwargs)
        with _Enumerated(self.guide.discrete) as run:
            returned = self.model(*args, **kwargs)
        run.state_factors()
        return returned


class _Enumerated(EnumMessenger):
    """Runs a model at all values of its discrete latents, and hides what depends on them."""

    def __init__(self, discrete: Discrete) -> None:
        self.discrete = discrete
        outer = [h.dim for h in _PYRO_STACK if isinstance(h, IndepMessenger) and h.dim is not None]
        # Particles may come without a plate, left of the model's own.
        self.first = min(-discrete.nesting - 1, *outer, 0) - 1
        super().__init__(self.first)
        self.trace = poutine.Trace()
        self.inside: dict[str, tuple[Any, Any, Any, Any]] = {}

    def _pyro_sample(self, msg: Any) -> None:
        if site_is_subsample(msg) or not hasattr(msg["fn"], "batch_shape"):
            return
        name, infer = msg["name"], msg["infer"]
        is_ours = name in self.discrete.names and is_discrete(msg)
        infer["enumerate"] = "parallel" if is_ours else None
        if not Distribution._validate_args:
            msg["fn"] = unchecked(msg["fn"])
        if is_ours:
            self._check_plates(msg)
        super()._pyro_sample(msg)
        if infer.get("_enumerate_dim", 0) < -MOST_DIMS:
            raise ValueError(
                f"At most some {MOST_DIMS} discrete latents may depend on each other; site "
                f"'{name}' is one more. Put independent ones in a pyro.plate, and a chain in "
                "pyro.markov."
            )
        if not is_ours and not self._depends(msg):
            return
        self._check_size(msg)
        # As they are inside the model, without the caller's handlers.
        self.inside[name] = msg["fn"], msg["cond_indep_stack"], msg["scale"], msg["mask"]
        if is_ours or msg["is_observed"]:
            msg["stop"] = True
        else:
            msg["fn"], msg["mask"] = _WithoutDensity(msg["fn"], self.first), None

    def _check_plates(self, msg: Any) -> None:
        declared = {frame.dim for frame in msg["cond_indep_stack"] if frame.vectorized}
        shape = msg["fn"].batch_shape
        for dim in range(-1, max(-len(shape), -self.discrete.nesting) - 1, -1):
            if shape[dim] > 1 and dim not in declared:
                raise ValueError(
                    f"The values of a discrete latent are summed out row by row, so its dimensions "
                    f"should be plates; site '{msg['name']}' has shape {tuple(shape)}, and "
                    f"dimension {dim} is in none. Put it in `with pyro.plate(..., {shape[dim]}):`."
                )

    def _check_size(self, msg: Any) -> None:
        shape = msg["fn"].batch_shape
        left = len(shape) + self.first + 1
        sizes = [*shape[: max(0, left)], *shape[max(0, len(shape) - self.discrete.nesting) :]]
        if math.prod(sizes) > MAX_NUMBERS:
            raise ValueError(
                f"The values that discrete latents take together should be at most {MAX_NUMBERS}; "
                f"at site '{msg['name']}' there are {math.prod(sizes)}, in a table of shape "
                f"{tuple(shape)}. Let it depend on fewer of them, put independent ones in a "
                "pyro.plate and a chain in pyro.markov, or sum them out by hand."
            )

    def _depends(self, msg: Any) -> bool:
        """Whether a site has dimensions of discrete latents."""
        value, shapes = msg["value"], [msg["fn"].batch_shape]
        if msg["is_observed"] and isinstance(value, Tensor):
            shapes.append(value.shape[: value.dim() - msg["fn"].event_dim])
        if isinstance(msg["mask"], Tensor):
            shapes.append(msg["mask"].shape)
        return any(size > 1 for s in shapes for size in s[: max(0, len(s) + self.first + 1)])

    def _pyro_post_sample(self, msg: Any) -> None:
        super()._pyro_post_sample(msg)
        if msg["name"] not in self.inside:
            return
        fn, frames, scale, mask = self.inside[msg["name"]]
        log_prob = fn.log_prob(msg["value"])
        is_enumerated = msg["infer"].get("_enumerate_dim") is not None
        if mask is not None and not is_enumerated:  # the shares of what is masked sum to one
            mask = torch.as_tensor(mask, device=log_prob.device)
            log_prob = torch.where(mask, log_prob, log_prob.new_zeros(()))
        frames = [frame for frame in frames if frame.vectorized]
        log_prob = self._without_further_dims(log_prob, frames)
        for dim in range(-self.discrete.nesting - 1, self.first, -1):
            frames.append(CondIndepStackFrame(f"_particles{dim}", dim, 0, 0))
        node = {"log_prob": log_prob, "scale": scale, "infer": msg["infer"]}
        self.trace.add_node(msg["name"], type="sample", cond_indep_stack=tuple(frames), **node)

    def _without_further_dims(self, log_prob: Tensor, frames: Sequence[Any]) -> Tensor:
        """A log density summed over the dimensions of the model that are no plates."""
        own = range(-1, max(-log_prob.dim(), -self.discrete.nesting) - 1, -1)
        plates = {frame.dim for frame in frames}
        further = [dim for dim in own if dim not in plates and log_prob.shape[dim] > 1]
        return log_prob.sum(further, keepdim=True) if further else log_prob

    def state_factors(self) -> None:
        """States the log density of all hidden sites as factors, one for each set of plates."""
        if not self.trace.nodes:
            return
        self.trace.symbolize_dims()
        sites: list[Any] = list(self.trace.nodes.values())
        symbols = self.trace.plate_to_symbol
        by_symbol: dict[str, Any] = {
            symbols[frame.name]: frame for site in sites for frame in site["cond_indep_stack"]
        }
        terms = []
        for site in sites:
            term = packed.pack(site["log_prob"], site["infer"]["_dim_to_symbol"])
            plates = frozenset(symbols[frame.name] for frame in site["cond_indep_stack"])
            terms.append((term, plates, site["scale"]))
        found: dict[Any, Any] = defaultdict(float)
        for part in _connected(terms, set(by_symbol)):
            scale = _common_scale([scale for *_, scale in part])
            for plates, log_probs in _contracted(part, set(by_symbol)).items():
                for log_prob in log_probs:
                    unpacked = packed.unpack(log_prob, self.trace.symbol_to_dim)
                    found[plates] = found[plates] + scale * unpacked
        num_numbers = sum(site["log_prob"].numel() for site in sites)
        for plates, log_prob in found.items():
            frames: list[Any] = sorted(map(by_symbol.get, plates), key=lambda f: -f.dim)
            frames = [frame for frame in frames if frame.dim >= -self.discrete.nesting]
            shape = (1,) * (self.discrete.nesting - log_prob.dim()) + log_prob.shape
            name = "_".join(["_summed_out", *(frame.name for frame in frames)])
            with _InPlates(frames, num_numbers):
                pyro.factor(name, log_prob.reshape(shape))
            num_numbers = 0


def _connected(terms: Iterable[Any], plates: set[str]) -> list[list[Any]]:
    """Groups of terms that share discrete latents."""
    parts: list[tuple[set[str], list[Any]]] = []
    for term in terms:
        dims, group, others = set(term[0]._pyro_dims) - plates, [term], []
        for part in parts:
            if part[0] & dims:
                dims, group = dims | part[0], part[1] + group
            else:
                others.append(part)
        parts = [*others, (dims, group)]
    return [group for _, group in parts]


def _common_scale(scales: Sequence[Any]) -> Any:
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
                f"{float(scale):g}. In a subsampled plate, draw the latent within the plate too."
            )
    return first


class _Ring(LogRing):
    _backend = log_einsum.__name__


def _contracted(part: Sequence[Any], plates: set[str]) -> Mapping[Any, Sequence[Tensor]]:
    """The sum over all discrete latents, as log densities by their sets of plates."""
    tree: Any = OrderedDict()
    for term, own, _ in part:
        tree.setdefault(own, []).append(term)
    dims = set("".join(term._pyro_dims for term, *_ in part)) - plates
    try:
        found: Mapping[Any, Sequence[Tensor]] = contract_tensor_tree(tree, dims, ring=_Ring())
    except NotImplementedError as error:
        raise ValueError(
            "Discrete latents should be summed out plate by plate, and here rows of one plate "
            "depend on each other through another, so the sum would have a term for each "
            "combination of their values. Sum them out by hand, or change the model."
        ) from error
    return found


class _InPlates(Messenger):
    """Puts a factor into plates that the model has left."""

    def __init__(self, frames: Sequence[Any], num_numbers: int) -> None:
        super().__init__()
        self.frames, self.num_numbers = tuple(frames), num_numbers

    def _pyro_sample(self, msg: Any) -> None:
        msg["cond_indep_stack"] = self.frames
        msg["infer"]["num_numbers"] = self.num_numbers


class _WithoutDensity(dist.TorchDistribution):
    """A continuous latent whose density, which depends on discrete latents, is in a factor.

    Its draws are those of the prior at values of the discrete latents that are all as probable.
    """

    arg_constraints: ClassVar[Any] = {}

    def __init__(self, fn: Any, first: int) -> None:
        self.fn, self.num_summed = fn, max(0, len(fn.batch_shape) + first + 1)
        shape = fn.batch_shape[self.num_summed :]
        self.num_ones = next((k for k, size in enumerate(shape) if size > 1), len(shape))
        super().__init__(shape[self.num_ones :], fn.event_shape)

    @property
    def support(self) -> Any:
        return self.fn.support

    @property
    def has_rsample(self) -> bool:  # type: ignore[override]
        return True

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        drawn: Tensor = self.fn(sample_shape).detach()
        at = len(sample_shape)
        for _ in range(self.num_summed):
            drawn = drawn.select(at, int(torch.randint(drawn.shape[at], ())))
        return drawn.reshape(self.shape(sample_shape))

    def log_prob(self, value: Tensor) -> Tensor:
        shape = value.shape[: value.dim() - self.event_dim]
        return value.new_zeros(torch.broadcast_shapes(shape, self.batch_shape))


class _Marked(Messenger):
    """Marks sites to be summed out."""

    def __init__(self, names: frozenset[str]) -> None:
        super().__init__()
        self.names = names

    def _pyro_sample(self, msg: Any) -> None:
        if not site_is_subsample(msg):
            msg["infer"]["enumerate"] = "parallel" if msg["name"] in self.names else None


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
    """
    num_draws = len(next(iter(latents.values())))
    marked = _Marked(discrete.names)

    def run(given: Mapping[str, Tensor], size: int | None) -> dict[str, Any]:
        conditioned = particles.in_plate(marked(poutine.condition(model, dict(given))), size)
        first = -particles.nesting - (1 if size is None else 2)
        sampler = infer_discrete(conditioned, first, int(not most_probable))
        with quietly(), poutine.block():
            return samples(poutine.trace(sampler).get_trace(*args, **kwargs))

    one = run({name: draws[0] for name, draws in latents.items()}, None)
    parts: dict[str, list[Tensor]] = {name: [] for name in sorted(discrete.names)}
    start = 0
    for size in particles.sizes(num_draws):
        given = {name: draws[start : start + size] for name, draws in latents.items()}
        start += size
        if particles.at_once:
            for name, draws in given.items():
                num_batch = draws.dim() - 1 - one[name]["fn"].event_dim
                padded = particles.padded_shape(draws.shape[1:], num_batch)
                given[name] = draws.reshape(size, *padded)
            sites = run(given, size)
        else:
            sites = run({name: draws[0] for name, draws in given.items()}, None)
        for name, found in parts.items():
            fn, value = sites[name]["fn"], sites[name]["value"]
            shape = list(one[name]["fn"].shape())
            padded = particles.padded_shape(shape, len(shape) - fn.event_dim)
            full = value.expand(size, *padded) if particles.at_once else value.expand(shape)
            found.append(full.reshape(size, *shape))
    return {name: torch.cat(found) for name, found in parts.items()}
