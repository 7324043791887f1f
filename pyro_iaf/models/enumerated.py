"""Runs of a model at all values of its discrete latents, which hide what depends on them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, ClassVar

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer.util import is_validation_enabled
from pyro.ops import packed
from pyro.poutine.enum_messenger import EnumMessenger
from pyro.poutine.indep_messenger import CondIndepStackFrame, IndepMessenger
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import _PYRO_STACK
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import biject_to

from .constraints import tensors_in
from .contraction import contracted
from .discrete import EXACTLY, Discrete, is_discrete
from .masks import masks_of
from .matching import Mismatch, unchecked
from .packed import Table
from .vectorized_markov import WITHOUT_NAMES, Chain, chains_among, is_past

__all__ = ["Enumerated", "InPlates"]

# The most values that discrete latents take together.
MAX_VALUES = 2**24

# PyTorch's tensors have at most so many dimensions.
MOST_DIMS = 60


class Enumerated(EnumMessenger):
    """Runs a model at all values of its discrete latents, and hides what depends on them."""

    hint = ""  # a further sentence of errors

    def __init__(self, discrete: Discrete) -> None:
        self.discrete = discrete
        outer = [h.dim for h in _PYRO_STACK if isinstance(h, IndepMessenger) and h.dim is not None]
        # Particles may come without a plate, left of the model's own.
        self.first = min(-discrete.nesting - 1, *outer, 0) - 1
        super().__init__(self.first)
        self.trace = poutine.Trace()
        self.inside: dict[str, tuple[Any, Any, Any, Any]] = {}
        self.markov: dict[str, Sequence[Any]] = {}

    def _pyro_post_markov_chain(self, msg: Any) -> None:
        """Takes the suffixes of the sites of a ``vectorized_markov``."""
        self.markov[msg["name"]] = msg["kwargs"]["suffixes"]

    def _pyro_sample(self, msg: Any) -> None:
        if site_is_subsample(msg) or not hasattr(msg["fn"], "batch_shape"):
            return
        name = msg["name"]
        self._check_nesting(msg)
        is_ours = is_discrete(msg)
        infer = {**msg["infer"], **EXACTLY, "enumerate": "parallel" if is_ours else None}
        msg["funsor"] = WITHOUT_NAMES
        msg["infer"] = infer
        if not is_validation_enabled():
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
        if not is_ours and not self._depends(msg) and not is_past(msg):
            return
        self._check_size(msg)
        # As they are inside the model, without the caller's handlers.
        self.inside[name] = msg["fn"], msg["cond_indep_stack"], msg["scale"], msg["mask"]
        if is_ours or msg["is_observed"]:
            msg["stop"] = True
        else:
            self._check_latent(msg)
            msg["fn"] = fn = _WithoutDensity(msg["fn"], self.first)
            if msg["value"] is not None:  # by a reparameteriser, for all values of the others
                msg["value"] = fn.of_one(msg["value"])

    def _check_nesting(self, msg: Any) -> None:
        nesting = self.discrete.nesting
        for frame in msg["cond_indep_stack"]:
            if frame.vectorized and -frame.dim > nesting:
                raise Mismatch(
                    f"A model with discrete latents should nest its plates as it did when its "
                    f"guide was set up, in {nesting} dimensions; plate '{frame.name}' is in "
                    f"dimension {frame.dim}. Build a guide for this model."
                )

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

    def _check_latent(self, msg: Any) -> None:
        fn, name = msg["fn"], msg["name"]
        if masks_of(msg):
            raise ValueError(
                f"Site '{name}' is masked, and its prior depends on discrete latents, which are "
                f"summed out: then nothing determines its masked entries.{self.hint} Mask only the "
                "likelihood: poutine.mask(mask=...) in place of obs_mask."
            )
        if self._support_depends(fn):
            raise ValueError(
                f"A latent should have one support, and that of site '{name}' depends on discrete "
                "latents. Write Uniform(0, scale), for example, as scale * Uniform(0, 1)."
            )

    def _check_size(self, msg: Any) -> None:
        shape = msg["fn"].batch_shape
        left = len(shape) + self.first + 1
        sizes = [*shape[: max(0, left)], *shape[max(0, len(shape) - self.discrete.nesting) :]]
        if math.prod(sizes) > MAX_VALUES:
            raise ValueError(
                f"The values that discrete latents take together should be at most {MAX_VALUES}; "
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
        return any(len(shape) >= -self.first for shape in shapes)  # also if it has one value only

    def _pyro_post_sample(self, msg: Any) -> None:
        value = msg["value"]
        if isinstance(value, Tensor):  # Pyro looks at the shape of .data, which vmap forbids
            msg["value"] = SimpleNamespace(data=value, dim=value.dim)
        super()._pyro_post_sample(msg)
        msg["value"] = value
        if msg["name"] not in self.inside:
            return
        fn, frames, scale, mask = self.inside[msg["name"]]
        log_prob = self._log_prob(fn, msg["value"])
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

    def _log_prob(self, fn: Any, value: Any) -> Tensor:
        """The log density of a value, ``-inf`` where discrete latents exclude it."""
        if not self._support_depends(fn):
            log_prob: Tensor = fn.log_prob(value)
            return log_prob
        is_possible = fn.support.check(value)
        event = is_possible.reshape(is_possible.shape + (1,) * fn.event_dim)
        inside = biject_to(fn.support)(torch.zeros_like(value + event))
        log_prob = unchecked(fn).log_prob(torch.where(event, value, inside))
        return torch.where(is_possible, log_prob, -torch.inf)

    def _support_depends(self, fn: Any) -> bool:
        """Whether the bounds of a distribution's values depend on discrete latents."""
        support = getattr(fn, "support", None)
        if support is None or support.is_discrete:
            return False
        return any(len(t.shape) >= fn.event_dim - self.first for t in tensors_in(support))

    def _without_further_dims(self, log_prob: Tensor, frames: Sequence[Any]) -> Tensor:
        """A log density summed over the dimensions of the model that are no plates."""
        own = range(-1, max(-log_prob.dim(), -self.discrete.nesting) - 1, -1)
        plates = {frame.dim for frame in frames}
        further = [dim for dim in own if dim not in plates and log_prob.shape[dim] > 1]
        return log_prob.sum(further, keepdim=True) if further else log_prob

    @property
    def sites(self) -> list[Any]:
        """The hidden sites, with their log densities."""
        return list(self.trace.nodes.values())

    @property
    def num_numbers(self) -> int:
        """How many numbers their log densities have."""
        return sum(site["log_prob"].numel() for site in self.sites)

    def tables(self) -> list[Table]:
        """The log densities of the hidden sites, packed, in the order of the run."""
        self.trace.symbolize_dims()
        owners: dict[str, Table] = {}
        found = []
        for name, site in zip(self.trace.nodes, self.sites, strict=True):
            symbols = site["infer"]["_dim_to_symbol"]
            log_prob: Any = packed.pack(site["log_prob"], symbols)
            plates = {symbols[frame.dim]: frame for frame in site["cond_indep_stack"]}
            depends_on = {dim: owners[dim] for dim in log_prob._pyro_dims if dim in owners}
            latents = {symbol: owner.name for symbol, owner in depends_on.items()}
            table = Table(name, log_prob, plates, latents, site["scale"])
            for owner in depends_on.values():
                table.check_plates(owner)
            if (symbol := site["infer"].get("_enumerate_symbol")) is not None:
                latents[symbol], owners[symbol] = name, table
            if not is_past(site):
                found.append(table)
        return found

    def _chains(self) -> list[Chain]:
        """The chains of all time steps at once, by symbols."""
        infers = {
            name: site["infer"] for name, site in zip(self.trace.nodes, self.sites, strict=True)
        }
        key = "_enumerate_symbol"
        symbols = {name: infer[key] for name, infer in infers.items() if key in infer}
        times = self.trace.plate_to_symbol
        return [
            chain
            for name, suffixes in self.markov.items()
            for chain in chains_among(symbols, times.get(name, ""), suffixes)
        ]

    def _by_plates(self, scaled: bool = True) -> dict[frozenset[Any], Tensor]:
        """The log density of all hidden sites, as a sum of parts by their sets of plates."""
        found = contracted(self.tables(), self._chains(), scaled)
        for plates, log_prob in found.items():
            shape = (1,) * (self.discrete.nesting - log_prob.dim()) + log_prob.shape
            found[plates] = log_prob.reshape(shape)
        return found

    def state_factors(self) -> None:
        """States the log density of all hidden sites as factors, one for each set of plates."""
        num_numbers = self.num_numbers
        for plates, log_prob in self._by_plates().items():
            frames = sorted(plates, key=lambda frame: -frame.dim)
            frames = [frame for frame in frames if frame.dim >= -self.discrete.nesting]
            name = "_".join(["_summed_out", *(frame.name for frame in frames)])
            with InPlates(frames, num_numbers):
                pyro.factor(name, log_prob)
            num_numbers = 0  # told once


class InPlates(Messenger):
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
        num_ones = next((k for k, size in enumerate(shape) if size > 1), len(shape))
        super().__init__(shape[num_ones:], fn.event_shape)

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

    def of_one(self, value: Tensor) -> Tensor:
        """Of values at all values of discrete latents, those at the first."""
        while value.dim() > len(self.shape()):
            value = value[0]
        return value.expand(self.shape())

    def log_prob(self, value: Tensor) -> Tensor:
        shape = value.shape[: value.dim() - self.event_dim]
        return value.new_zeros(torch.broadcast_shapes(shape, self.batch_shape))
