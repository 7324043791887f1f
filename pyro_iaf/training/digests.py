"""Digests of a run's data, model and guide, by which a checkpoint recognises its run.

Every leaf of the data counts. What may differ after a restart does not: devices, addresses, threads
and the values of parameters.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterator, Mapping, Set
from contextlib import suppress
from types import FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import pyro
import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn
from torch.distributions import Distribution, Transform, biject_to
from torch.distributions.constraints import Constraint
from torch.distributions.utils import lazy_property

from ..models.arguments import Args, Kwargs, Program
from ..models.matching import FixedValues
from ..models.traces import compute_log_prob, quietly, samples

__all__ = ["Digests", "differing", "digest", "digests_of_sites", "in_words"]

#: By name: hashes, and numbers that are compared up to rounding.
Digests = dict[str, list[str | float]]

# The relative error allowed of numbers that a model computes, for rounding on other processors.
ROUNDING = 1e-4

# The fractional parts of its multiples are spread evenly. They are weights that depend on order.
GOLDEN = 0.6180339887498949

# How deep attributes of attributes are followed.
DEPTH = 8

# The classes whose attributes are followed in a site's distribution.
PARTS = (Distribution, Transform, Constraint)


def digest(thing: Any) -> str:
    """A hash that is the same for equal things in every process.

    Of an object its type, its ``repr`` without addresses and its attributes count; of modules and
    of tensors with a gradient only the shapes.

    Example:
        >>> digest([torch.ones(3), "a"]) == digest([torch.ones(3), "a"])
        True
        >>> digest({"y": 1.0}) == digest({"y": -50.0})
        False
    """
    found = hashlib.sha256()
    for part in _parts(thing, ()):
        data = memoryview(part).cast("B")
        found.update(len(data).to_bytes(8, "little"))  # marks where a part ends
        found.update(data)
    return found.hexdigest()


def in_words(thing: Any) -> str:
    """The ``repr`` of an object without addresses."""
    try:
        return re.sub(r" at 0x[0-9a-fA-F]+", "", repr(thing))
    except Exception:  # whatever a user's class may raise
        return type(thing).__qualname__


def _parts(thing: Any, within: tuple[int, ...]) -> Iterator[Any]:
    if isinstance(thing, Tensor):
        yield from _tensor_parts(thing)
        return
    if not isinstance(thing, np.ndarray) and hasattr(type(thing), "__array__"):
        with suppress(Exception):  # arrays of other libraries, which may be on another device
            thing = np.asarray(thing)
    if isinstance(thing, np.ndarray):
        yield f"{thing.dtype.str} {thing.shape}".encode()
        yield np.ma.getmaskarray(thing).tobytes()
        if not thing.dtype.hasobject:
            yield thing.tobytes()
            return
        thing = thing.tolist()
    yield type(thing).__qualname__.encode()
    if id(thing) in within or len(within) == DEPTH:
        return
    within = (*within, id(thing))
    if isinstance(thing, Mapping | Set):  # in any order
        pairs = thing.items() if isinstance(thing, Mapping) else ((item, None) for item in thing)
        thing = sorted(([digest(key), value] for key, value in pairs), key=lambda pair: pair[0])
    if isinstance(thing, list | tuple):
        yield str(len(thing)).encode()
        for item in thing:
            yield from _parts(item, within)
        return
    yield in_words(thing).encode()
    if isinstance(thing, nn.Module):
        state = thing.state_dict(keep_vars=True)
        shapes = {name: tuple(v.shape) for name, v in state.items() if isinstance(v, Tensor)}
        yield from _parts(shapes, within)
    elif not isinstance(thing, type | FunctionType | MethodType | ModuleType):
        for name, value in _attributes(thing).items():
            yield name.encode()
            yield from _parts(value, within)


def _tensor_parts(tensor: Tensor) -> Iterator[Any]:
    if tensor.is_nested:
        for part in tensor.unbind():
            yield from _tensor_parts(part)
        return
    yield f"{tensor.dtype} {tuple(tensor.shape)}".encode()
    if tensor.requires_grad or tensor.is_meta:
        return
    tensor = tensor.cpu()
    if tensor.is_quantized:
        tensor = tensor.dequantize()
    if tensor.layout != torch.strided:
        sparse = tensor.to_dense().to_sparse() if tensor.is_mkldnn else tensor.to_sparse()
        yield from _tensor_parts(sparse.coalesce().indices())
        tensor = sparse.coalesce().values()
    flat = tensor.resolve_conj().resolve_neg().contiguous().reshape(-1)
    yield flat.view(torch.uint8).numpy()


def _attributes(thing: Any) -> dict[str, Any]:
    """The attributes of an object, in slots or not."""
    slots = [s for kind in type(thing).__mro__ for s in getattr(kind, "__slots__", ())]
    held = {name: getattr(thing, name) for name in slots if hasattr(thing, name)}
    held |= getattr(thing, "__dict__", {})
    return {name: held[name] for name in sorted(held) if not name.startswith("__")}


def digests_of_sites(
    model: Program, guide: Program, args: Args, kwargs: Kwargs, simulated: Set[str] = frozenset()
) -> tuple[Digests, Digests]:
    """Digests of the data that a model observes, and of the sites of model and guide.

    Of a site these count: its shape, dtype, distribution and support; the constants in these, which
    depend on neither latents nor parameters; and its log density at fixed latents, unless it
    depends on parameters. Seeds the generators, and runs the model four times.

    The guide has to have run before. The data of ``simulated`` sites come from the model, and do
    not count.
    """
    seen, drawn = _traced_sites(model, guide, args, kwargs, seed=0)
    data: Digests = {
        f"the data of site '{name}'": [digest(site["value"])]
        for name, site in seen.items()
        if site["is_observed"] and name not in simulated
    }
    with _OtherParameters():  # what changes now, detached or not, is no constant of the model
        again, _ = _traced_sites(model, guide, args, kwargs, seed=1)
    latents = {n: site["value"] for n, site in seen.items() if not site["is_observed"]}
    # A discrete latent may have the same value in both runs, with all that depends on it.
    all_differ = all(n in drawn and drawn[n]["value"].requires_grad for n in latents)
    sites: Digests = {}
    for name, site in seen.items():
        words, numbers = _described(site)
        constants = zip(numbers, _described(again[name])[1] if all_differ else [], strict=False)
        means = [a for a, b in constants if a == b]
        sites[f"site '{name}' of the model"] = [digest(words), *(m for pair in means for m in pair)]
    for name, site in drawn.items():
        sites[f"site '{name}' of the guide"] = [digest(_described(site)[0])]
    if not (isinstance(model, nn.Module) and [*model.buffers()]):  # which training changes
        densities = _densities(model, latents, args, kwargs)
        with _OtherParameters():
            with_others = _densities(model, latents, args, kwargs)
        for name, density in densities.items():
            if name not in simulated and density == with_others.get(name):
                data[f"the density of site '{name}'"] = [*density]
    return data, sites


class _AtFixedValues(FixedValues):
    """Sets latents to fixed values in their supports, which may depend on earlier latents."""

    def value_of(self, site: Any) -> Tensor:
        return _fixed_value(site["fn"], torch.as_tensor(super().value_of(site)).detach())


def _fixed_value(fn: Any, like: Tensor) -> Tensor:
    """A fixed value in a distribution's support, of the shape and dtype of ``like``."""
    if fn.support.is_discrete:
        zeros = torch.zeros_like(like)
        if fn.support.check(zeros).all():
            return zeros
        return fn.enumerate_support()[0].to(like).expand_as(like)  # type: ignore[no-any-return]
    to_support = biject_to(fn.support)
    shape = to_support.inverse_shape(like.shape)
    steps = torch.arange(1, 1 + shape.numel(), device=like.device).to(like)
    return to_support(steps.sin().reshape(shape))  # type: ignore[no-any-return]


@torch.enable_grad()
def _densities(
    model: Program, latents: Mapping[str, Any], args: Args, kwargs: Kwargs
) -> dict[str, tuple[float, float]]:
    """Summaries of the sites' log densities at fixed latents and subsamples.

    Only of sites whose density has no gradient; of none if the model fails there.
    """
    pyro.set_rng_seed(0)
    try:
        with quietly(), poutine.block(expose_types=["param"]), _AtFixedValues(latents):
            trace = poutine.trace(model).get_trace(*args, **kwargs)
            compute_log_prob(trace)
    except Exception:  # whatever a model may raise at these values
        return {}
    found = {name: site["log_prob"] for name, site in samples(trace).items()}
    return {name: _summary(p) for name, p in found.items() if not p.requires_grad}


def _summary(numbers: Tensor) -> tuple[float, float]:
    """Weighted means of the positive and of the negative part, so that nothing cancels."""
    flat = numbers.detach().double().nan_to_num().flatten()
    weighted = flat * (1 + torch.arange(len(flat)).to(flat) * GOLDEN % 1)
    return weighted.clamp(min=0).mean().item(), weighted.clamp(max=0).mean().item()


class _OtherParameters(Messenger):
    """Changes the values of all parameters."""

    def _pyro_post_param(self, msg: Any) -> None:
        msg["value"] = 0.9 * msg["value"]


def _traced_sites(
    model: Program, guide: Program, args: Args, kwargs: Kwargs, seed: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The sites of a model and a guide; what depends on a latent has a gradient."""
    pyro.set_rng_seed(seed)
    with quietly():
        with torch.no_grad():
            guide_trace = poutine.trace(guide).get_trace(*args, **kwargs)
        drawn = samples(guide_trace)
        for site in drawn.values():
            value = torch.as_tensor(site["value"]).detach()
            site["value"] = value.requires_grad_(value.is_floating_point())
        with torch.enable_grad():
            replayed = poutine.replay(model, guide_trace)
            return samples(poutine.trace(replayed).get_trace(*args, **kwargs)), drawn


def _described(site: Any) -> tuple[list[str], list[tuple[float, float]]]:
    """A description of a site, and the constants in it, each by its summary."""
    fn, value = site["fn"], torch.as_tensor(site["value"])
    try:
        support = fn.support
    except NotImplementedError:
        support = None
    words = [str(value.dtype), str(tuple(value.shape)), str(site["is_observed"])]
    numbers: list[Tensor] = []
    _collect("", (fn, support, site["scale"], site["mask"]), words, numbers)
    return words, [_summary(number) for number in numbers]


def _collect(name: str, thing: Any, words: list[str], numbers: list[Tensor]) -> None:
    """Collects the parts of a distribution or a support, and its constants."""
    if isinstance(thing, float):
        thing = torch.tensor(thing, dtype=torch.float64)
    if isinstance(thing, Tensor):
        words.append(f"{name} {thing.dtype} {tuple(thing.shape)}")
        if not thing.requires_grad and not thing.is_complex() and thing.numel():
            numbers.append(thing.detach().cpu().to_dense() if thing.is_sparse else thing.detach())
    elif isinstance(thing, list | tuple):
        for item in thing:
            _collect(name, item, words, numbers)
    elif isinstance(thing, PARTS) and not isinstance(thing, nn.Module):
        words.append(f"{name} {type(thing).__qualname__}")
        for key, value in sorted(vars(thing).items()):
            # A lazy attribute is there only after someone has read it.
            is_lazy = isinstance(getattr(type(thing), key, None), lazy_property)
            if not is_lazy and not key.startswith(("_cache", "_inv", "_validate")):
                _collect(key, value, words, numbers)
    else:
        is_plain = isinstance(thing, bool | int | str | None)
        words.append(f"{name} {thing if is_plain else type(thing).__qualname__}")


def differing(theirs: Digests, ours: Digests) -> str:
    """The name of the first part in which they differ, or ""."""
    for name in [*ours, *theirs]:
        one, other = theirs.get(name, []), ours.get(name, [])
        if len(one) != len(other) or not all(map(_are_close, one, other)):
            return name
    return ""


def _are_close(one: str | float, other: str | float) -> bool:
    if isinstance(one, str) or isinstance(other, str):
        return one == other
    return math.isclose(one, other, rel_tol=ROUNDING)
