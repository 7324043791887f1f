"""Runs of a model at given values, and errors where its latents don't match its guide's."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from itertools import dropwhile
from types import TracebackType
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions.util import broadcast_shape
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch.distributions import Distribution

from .traces import bare, is_latent

__all__ = [
    "FixedLatents",
    "FixedValues",
    "LatentCheck",
    "Mismatch",
    "Unchecked",
    "check_guide_site",
    "unchecked",
]


class Unchecked(Messenger):
    """Turns off the validation of all distributions, also of those made before the run."""

    def _pyro_sample(self, msg: Any) -> None:
        msg["fn"] = unchecked(msg["fn"])


def unchecked(fn: Any) -> Any:
    """A distribution that does not validate its values; a copy, if it does."""
    parts = {name: part for name, part in vars(fn).items() if isinstance(part, Distribution)}
    own = {name: unchecked(part) for name, part in parts.items()}
    if not vars(fn).get("_validate_args") and all(own[n] is parts[n] for n in parts):
        return fn
    twin = copy.copy(fn)
    vars(twin).update(own, _validate_args=False)
    return twin


class Mismatch(ValueError):  # noqa: N818
    """The latents of a model are not those that its guide draws."""


class LatentCheck(Messenger):
    """Checks that a model's run has exactly the latents of its guide, with values that fit.

    Args:
        names: Returns the names of the guide's latents; called when the run begins.

    Raises:
        Mismatch: If a latent is missing on either side, or has another shape.
    """

    def __init__(self, names: Callable[[], Iterable[str]]) -> None:
        super().__init__()
        self._names = names

    def __enter__(self) -> LatentCheck:
        self._drawn = set(self._names())
        self._found: set[str] = set()
        self._plate_sizes: dict[str, int] = {}
        super().__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        super().__exit__(kind, error, traceback)
        if isinstance(error, Mismatch) and isinstance(error.__cause__, Mismatch):
            raise error.__cause__ from None  # without the table of shapes that Pyro appends
        if error is None and (unknown := self._drawn - self._found):
            raise Mismatch(
                f"A guide should draw latents of the model, and this one draws {_listed(unknown)}; "
                f"the model's run has no such latent, but {_listed(self._found)}. Make a guide for "
                "this model and these arguments. A site that only helps to draw others takes "
                "infer={'is_auxiliary': True}."
            )

    def _pyro_sample(self, msg: Any) -> None:
        name = msg["name"]
        if site_is_subsample(msg):
            self._plate_sizes[name] = _num_rows(msg)
        if name in self._drawn and not msg["is_observed"]:
            self._found.add(name)
            return
        if not is_latent(msg):
            return
        if msg["infer"].get("enumerate"):
            raise Mismatch(
                f"Site '{name}' is to be enumerated, which neither fit's own loss nor importance "
                "weights do: give fit loss=TraceEnum_ELBO(...), or sum the site out of the model."
            )
        raise Mismatch(
            f"A guide should draw all latents of the model, or they would come from the prior; "
            f"site '{name}' is a latent in this run, and the guide draws {_listed(self._drawn)}. "
            "Make a guide for this model and these arguments, observe the site, or sum it out."
        )

    def _pyro_post_sample(self, msg: Any) -> None:
        if site_is_subsample(msg):
            _check_plate(msg, self._plate_sizes[msg["name"]])
        elif msg["name"] in self._found:
            _check_shape(msg, msg["value"].shape)


def _listed(names: Iterable[str]) -> str:
    return ", ".join(f"'{name}'" for name in sorted(names)) or "nothing"


class FixedValues(Unchecked):
    """Gives sites these values, and ignores values of sites that the run doesn't have.

    A subclass that computes the value of a site in its run overrides :meth:`value_of`.
    """

    def __init__(self, values: Mapping[str, Any]) -> None:
        super().__init__()
        self.values = values

    def value_of(self, site: Any) -> Any:
        """The value of a site that is in ``values``."""
        return self.values[site["name"]]

    def _pyro_sample(self, msg: Any) -> None:
        super()._pyro_sample(msg)
        if msg["name"] in self.values and not msg["is_observed"]:
            msg["value"] = self.value_of(msg)
            msg["done"] = True


class FixedLatents(LatentCheck):
    """Gives all latents of a model these values, without validation of its distributions.

    Args:
        values: Values of the latents, of all of them and of nothing else.
        auxiliary: Values of subsamples and of auxiliary sites, where the model has them.
        shapes: Shapes of the latents' values, without the dimension of the particles.

    Raises:
        Mismatch: If the run has other latents, or one of another shape.
    """

    def __init__(
        self,
        values: Mapping[str, Any],
        auxiliary: Mapping[str, Any],
        shapes: Mapping[str, torch.Size] | None = None,
    ) -> None:
        super().__init__(values.keys)
        self.values = {**auxiliary, **values}
        self.shapes = shapes or {}

    def _pyro_sample(self, msg: Any) -> None:
        msg["fn"] = unchecked(msg["fn"])
        super()._pyro_sample(msg)
        if msg["name"] in self.values and not msg["is_observed"]:
            msg["value"] = self.values[msg["name"]]
            msg["done"] = True
            # Now, because the model may fail on a value that doesn't fit.
            if site_is_subsample(msg):
                _check_plate(msg, self._plate_sizes[msg["name"]])
            elif msg["name"] in self.shapes:
                _check_shape(msg, self.shapes[msg["name"]])

    def _pyro_post_sample(self, msg: Any) -> None:
        pass


def _check_shape(site: Any, shape: torch.Size) -> None:
    """Raises a Mismatch unless the value of a site, whose draws have this shape, fits the site."""
    expected = torch.Size(site["fn"].shape())
    own = expected[-len(shape) :] if shape else torch.Size()
    found = torch.as_tensor(site["value"]).shape
    if _core(own) != _core(shape) or _core(broadcast_shape(expected, found)) != _core(found):
        raise Mismatch(
            f"A guide should draw values of the shapes that the model's sites have; at site "
            f"'{site['name']}' it draws shape {tuple(shape)}, and the model has {tuple(expected)}. "
            "Make a guide for this model and these arguments."
        )


def _num_rows(site: Any) -> int:
    """The size of a plate's subsample in the model."""
    fn, indices = site["fn"], site["value"]  # no indices unless the model gives them
    if indices is not None:
        return len(indices)
    return int(fn.size if fn.subsample_size is None else fn.subsample_size)


def _check_plate(site: Any, expected: int) -> None:
    """Raises a Mismatch unless a plate was given as many indices as it has rows in the model."""
    found = len(site["value"])
    if found != expected:
        raise Mismatch(
            f"A plate should have as many rows in the guide as in the model; plate "
            f"'{site['name']}' has {found} in the guide and {expected} in the model. Make a guide "
            "for this model and these arguments."
        )


def _core(shape: torch.Size) -> tuple[int, ...]:
    """A shape without leading ones, which change no density."""
    return tuple(dropwhile(lambda size: size == 1, shape))


def check_guide_site(site: Any) -> None:
    """Raises a Mismatch if a sample site of a guide has data; factors and Deltas are allowed."""
    if site["is_observed"] and not isinstance(bare(site["fn"]), dist.Delta | dist.Unit):
        raise Mismatch(
            "A guide should draw latents and observe nothing, or data would count in its density; "
            f"this one observes site '{site['name']}'. Give the model first and then its guide."
        )
