"""The plates of a model's latents: groups of latents, encoders, chosen rows and subsamples."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from pyro.poutine import subsample_messenger
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn
from torch.distributions import biject_to

from ..models.constraints import one_row, tensors_in

__all__ = [
    "Encoders",
    "GivenSubsamples",
    "Group",
    "QuickSubsamples",
    "checked_rows",
    "groups_of",
    "quoted",
]

# From so many rows on, a subsample is drawn without shuffling all rows.
LARGE = 10_000


class Encoders(nn.Module):
    """Modules and functions by the names of their plates."""

    def __init__(self, encoders: Mapping[str, Any]) -> None:
        super().__init__()
        modules = {k: e for k, e in encoders.items() if isinstance(e, nn.Module)}
        self.functions = {k: e for k, e in encoders.items() if k not in modules}
        # Numbered, as a plate's name may not be allowed as the name of a module.
        self.places = {name: k for k, name in enumerate(modules)}
        self.parts = nn.ModuleList(modules.values())

    def of_plates(self, name: str) -> Any:
        """The encoder for the plates of a group, if there is one."""
        place = self.places.get(name)
        return self.functions.get(name) if place is None else self.parts[place]


class Group(NamedTuple):
    """The latents that are in the same plates.

    Attributes:
        plates: Names of the plates, the outermost first.
        shapes: The shape of each site in unconstrained space, by name, without the plates.
        parents: Indices of the groups that this one depends on: those in some of its plates.
        table: Index of the table of its contexts, if it is in plates and has no encoder.
    """

    plates: tuple[str, ...]
    shapes: dict[str, torch.Size]
    parents: tuple[int, ...]
    table: int | None

    @property
    def name(self) -> str:
        """The key of its encoder: the names of its plates."""
        return "/".join(self.plates)

    @property
    def size(self) -> int:
        """How many numbers a row has in unconstrained space."""
        return sum(shape.numel() for shape in self.shapes.values())


def groups_of(sites: Mapping[str, Any], frames: Mapping[str, Any], encoder: Any) -> list[Group]:
    """Groups of latents, from sites and plates by name: those in fewer plates first.

    Raises:
        ValueError: If encoders and plates don't match, two plates share a name, or a batch
            dimension is no plate.
        NotImplementedError: If a support differs between the rows of a plate.
    """
    by_plates: dict[tuple[str, ...], list[str]] = {}
    for name, site in sites.items():
        _check_plates(name, site, frames)
        outermost_first = sorted(site["cond_indep_stack"], key=lambda frame: frame.dim)
        by_plates.setdefault(tuple(frame.name for frame in outermost_first), []).append(name)
    ordered = sorted(by_plates, key=len)
    names = {"/".join(plates) for plates in ordered if plates}
    with_encoder: set[str] = set()
    if isinstance(encoder, Encoders):
        with_encoder = {*encoder.functions, *encoder.places}
        if strange := with_encoder - names:
            raise ValueError(
                f"There is an encoder for plate '{min(strange)}', but no latent is in a plate of "
                f"that name; latents are in {quoted(names)}."
            )
    elif encoder is not None:
        if len(names) != 1:
            raise ValueError(
                f"The model has latents in the plates {quoted(names)}, and one encoder can't "
                "serve them all. Give a dictionary from names of plates to encoders; the name of "
                'nested plates is "outer/inner".'
                if names
                else "There is an encoder, but no latent of this model is in a plate. For "
                "global latents that depend on the data use AutoIAF(model, encoder=...)."
            )
        with_encoder = names
    groups: list[Group] = []
    tables = itertools.count()
    for plates in ordered:
        parents = [k for k, group in enumerate(groups) if set(group.plates) < set(plates)]
        shapes = {name: _row_shape(sites[name]) for name in by_plates[plates]}
        table = next(tables) if plates and "/".join(plates) not in with_encoder else None
        groups.append(Group(plates, shapes, tuple(parents), table))
    return groups


def _check_plates(name: str, site: dict[str, Any], known: Mapping[str, Any]) -> None:
    """Raises an error unless rows of a site's plates can be drawn alone."""
    frames, batch_shape = site["cond_indep_stack"], site["fn"].batch_shape
    for frame in frames:
        other = known[frame.name]
        if (other.dim, other.size) != (frame.dim, frame.size):
            raise ValueError(
                f"Site '{name}' is in a plate '{frame.name}' of size {frame.size} at dim "
                f"{frame.dim}, but there is another plate of that name, of size {other.size} at "
                f"dim {other.dim}. Give each plate a name of its own."
            )
    if not frames:
        return
    dims = {frame.dim for frame in frames}
    sizes = enumerate(batch_shape, -len(batch_shape))
    if any(size > 1 and dim not in dims for dim, size in sizes):
        raise ValueError(
            f"Site '{name}' has batch_shape {tuple(batch_shape)}, of which the dimensions "
            f"{sorted(dims)} are plates. Declare the others by a plate, or as part of the "
            "event: dist.Normal(...).to_event(1)."
        )
    event_dim = site["fn"].event_dim
    bounds = tensors_in(one_row(site["fn"].support, event_dim))
    if any(bound.dim() > event_dim and bound.numel() > 1 for bound in bounds):
        raise NotImplementedError(
            f"The support of site '{name}' differs between the rows of its plate, so one minibatch "
            "does not tell the guide the supports of the other rows. Draw the site on a fixed "
            "support, and shift or scale it in the model."
        )


def _row_shape(site: dict[str, Any]) -> torch.Size:
    """The shape of a site in unconstrained space, without the dimensions of plates."""
    fn = site["fn"]
    shape: torch.Size = biject_to(fn.support).inv(site["value"]).shape
    return shape[len(fn.batch_shape) :] if site["cond_indep_stack"] else shape


def checked_rows(
    rows: Mapping[str, Sequence[int] | Tensor], sizes: Mapping[str, int]
) -> dict[str, Tensor]:
    """Indices of rows by plate as tensors; raises a ValueError if there are no such rows."""
    if not isinstance(rows, Mapping):
        raise ValueError(
            f"rows should be a dict from names of plates to indices of rows; got {rows!r}."
        )
    checked = {}
    for name, chosen in rows.items():
        if name not in sizes:
            raise ValueError(
                f"There is no plate '{name}' to choose rows of; latents are in {quoted(sizes)}."
            )
        index, size = torch.as_tensor(chosen), sizes[name]
        is_whole = not (index.dtype.is_floating_point or index.dtype == torch.bool)
        if index.dim() != 1 or not (len(index) and is_whole):
            raise ValueError(
                f"rows[{name!r}] should be indices of at least one row, of shape (n,); got "
                f"{chosen!r}. Without rows all are drawn."
            )
        if not 0 <= int(index.min()) <= int(index.max()) < size:
            raise ValueError(f"rows[{name!r}] should be between 0 and {size - 1}; got {chosen!r}.")
        checked[name] = index
    return checked


class GivenSubsamples(Messenger):
    """Notes the plates whose subsample the model is given instead of drawing it."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def _pyro_sample(self, msg: Any) -> None:
        if isinstance(msg["fn"], subsample_messenger._Subsample) and msg["value"] is not None:
            self.names.add(msg["name"])


class QuickSubsamples(Messenger):
    """Draws subsamples of large plates at a cost of the rows drawn instead of all rows."""

    def _pyro_sample(self, msg: Any) -> None:
        fn = msg["fn"]
        is_subsample = type(fn) is subsample_messenger._Subsample
        if is_subsample and LARGE <= fn.size > (fn.subsample_size or fn.size):
            msg["fn"] = _Subsample(fn.size, fn.subsample_size, device=fn.device)


class _Subsample(subsample_messenger._Subsample):  # Pyro recognises subsamples by this name
    """A stratified subsample: a row from each of as many stretches of equal length.

    Every row is equally likely. Pyro's own subsample shuffles all rows first.
    """

    def sample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008
        count: Any = self.subsample_size
        points = torch.rand(count, dtype=torch.float64, device=self.device)
        points = points + torch.arange(count, device=self.device)
        rows: Tensor = (points * (self.size / count)).long().clamp(max=self.size - 1)
        return rows


def quoted(names: Iterable[str]) -> str:
    """Names for a message."""
    return ", ".join(f"'{name}'" for name in sorted(names))
