"""A model run at a guide's values, site by site: what is missing or of another shape is told."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from types import TracebackType
from typing import Any

import pyro.distributions as dist
import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch.distributions import Distribution

from .traces import bare, is_latent

__all__ = ["Given", "Matching", "Mismatch", "Told", "Unchecked", "check_guide_site"]


class Unchecked(Messenger):
    """Takes the checks out of distributions that were made with them, before the run."""

    def _pyro_sample(self, msg: Any) -> None:
        msg["fn"] = _unchecked(msg["fn"])


def _unchecked(fn: Any) -> Any:
    parts = {name: part for name, part in vars(fn).items() if isinstance(part, Distribution)}
    bare = {name: _unchecked(part) for name, part in parts.items()}
    if not fn.__dict__.get("_validate_args") and all(bare[n] is parts[n] for n in parts):
        return fn
    twin = copy.copy(fn)
    vars(twin).update(bare, _validate_args=False)
    return twin


class Mismatch(ValueError):  # noqa: N818
    """The latents of a model are not those that its guide draws."""


class Matching(Messenger):
    """Sees to it that a model's run has just these latents, and takes values of their shapes.

    Args:
        names: Of the latents; asked for when the run begins.

    Raises:
        Mismatch: If the run has others, not all of them, or one of another shape.
    """

    def __init__(self, names: Callable[[], Iterable[str]]) -> None:
        super().__init__()
        self._names = names

    def __enter__(self) -> Matching:
        self._drawn = set(self._names())
        self._met: set[str] = set()
        self._rows: dict[str, int] = {}
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
            raise error.__cause__ from None  # as it was before Pyro wrote the run's shapes below it
        if error is None and (strange := self._drawn - self._met):
            raise Mismatch(
                f"A guide should draw latents of the model, and this one draws {_listed(strange)}; "
                f"the model's run has no such latent, but {_listed(self._met)}. Make a guide for "
                "this model and these arguments. A site that only helps to draw others takes "
                "infer={'is_auxiliary': True}."
            )

    def _pyro_sample(self, msg: Any) -> None:
        name = msg["name"]
        if site_is_subsample(msg):
            self._rows[name] = _num_rows(msg)
        if name in self._drawn and not msg["is_observed"]:
            self._met.add(name)
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
            _check_plate(msg, self._rows[msg["name"]])
        elif msg["name"] in self._met:
            _check_shape(msg, msg["value"].shape)


def _listed(names: Iterable[str]) -> str:
    return ", ".join(f"'{name}'" for name in sorted(names)) or "nothing"


class Told(Unchecked):
    """Gives sites values, as far as a run has such sites."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        super().__init__()
        self.values = values

    def _pyro_sample(self, msg: Any) -> None:
        super()._pyro_sample(msg)
        if msg["name"] in self.values and not msg["is_observed"]:
            msg["value"] = self.values[msg["name"]]
            msg["done"] = True


class Given(Matching):
    """Gives all latents of a model their values, and leaves all else of them alone.

    Distributions are not checked, as :class:`Unchecked` has it.

    Args:
        values: Of the latents, all of them and nothing else.
        kept: Of subsamples and of auxiliary sites, where the model has them.
        shapes: Of the latents, without the particles that stand before them.

    Raises:
        Mismatch: If the run has other latents, or one of another shape.
    """

    def __init__(
        self,
        values: Mapping[str, Any],
        kept: Mapping[str, Any],
        shapes: Mapping[str, torch.Size] | None = None,
    ) -> None:
        super().__init__(values.keys)
        self.values = {**kept, **values}
        self.shapes = {} if shapes is None else shapes

    def _pyro_sample(self, msg: Any) -> None:
        msg["fn"] = _unchecked(msg["fn"])
        super()._pyro_sample(msg)
        if msg["name"] in self.values and not msg["is_observed"]:
            msg["value"] = self.values[msg["name"]]
            msg["done"] = True
            # Before the model meets the value.
            if site_is_subsample(msg):
                _check_plate(msg, self._rows[msg["name"]])
            elif msg["name"] in self.shapes:
                _check_shape(msg, self.shapes[msg["name"]])

    def _pyro_post_sample(self, msg: Any) -> None:
        pass


def _check_shape(site: Any, shape: torch.Size) -> None:
    """Raises a Mismatch unless a value, a draw of this shape or several, is one of its site."""
    expected = torch.Size(site["fn"].shape())
    own = expected[-len(shape) :] if shape else torch.Size()
    found = torch.as_tensor(site["value"]).shape
    if _core(own) != _core(shape) or _core(torch.broadcast_shapes(expected, found)) != _core(found):
        raise Mismatch(
            f"A guide should draw values of the shapes that the model's sites have; at site "
            f"'{site['name']}' it draws shape {tuple(shape)}, and the model has {tuple(expected)}. "
            "Make a guide for this model and these arguments."
        )


def _num_rows(site: Any) -> int:
    """How many rows a plate takes of its own."""
    fn, own = site["fn"], site["value"]  # None unless the model tells the rows
    if own is not None:
        return len(own)
    return int(fn.size if fn.subsample_size is None else fn.subsample_size)


def _check_plate(site: Any, expected: int) -> None:
    """Raises a Mismatch unless a plate was given indices for as many rows as it takes."""
    found = len(site["value"])
    if found != expected:
        raise Mismatch(
            f"A plate should have as many rows in the guide as in the model; plate "
            f"'{site['name']}' has {found} in the guide and {expected} in the model. Make a guide "
            "for this model and these arguments."
        )


def _core(shape: torch.Size) -> tuple[int, ...]:
    """A shape without leading ones, which change no density."""
    sizes = list(shape)
    while sizes[:1] == [1]:
        del sizes[0]
    return tuple(sizes)


def check_guide_site(site: Any) -> None:
    """Raises a Mismatch where a guide observes data, which a factor or a deterministic site is not.

    Args:
        site: A sample site of the guide.
    """
    if site["is_observed"] and not isinstance(bare(site["fn"]), dist.Delta | dist.Unit):
        raise Mismatch(
            "A guide should draw latents and observe nothing, or data would count in its density; "
            f"this one observes site '{site['name']}'. Give the model first and then a guide for "
            "it."
        )
