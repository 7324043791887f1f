"""Which latents of a model stand in which plates, and how a guide goes over them row by row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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

# Plates of so many rows are subsampled without putting all in random order.
LARGE = 10_000


class Encoders(nn.Module):
    """Encoders by the names of their plates, modules and functions."""

    def __init__(self, encoders: Mapping[str, Any]) -> None:
        super().__init__()
        modules = {k: e for k, e in encoders.items() if isinstance(e, nn.Module)}
        self.functions = {k: e for k, e in encoders.items() if k not in modules}
        # By number, since names of plates may be no names of modules.
        self.places = {name: k for k, name in enumerate(modules)}
        self.parts = nn.ModuleList(modules.values())

    def of_plates(self, name: str) -> Any:
        """The encoder for a group of plates, if there is one."""
        place = self.places.get(name)
        return self.functions.get(name) if place is None else self.parts[place]


class Group(NamedTuple):
    """The latents that stand in the same plates.

    Attributes:
        plates: Names of the plates, the outermost first.
        shapes: What shape each site has in unconstrained space, by name; without the plates.
        parents: The groups that this one listens to: those in some of its plates.
        table: Which table its contexts are in, if it has no encoder.
    """

    plates: tuple[str, ...]
    shapes: dict[str, torch.Size]
    parents: tuple[int, ...]
    table: int | None

    @property
    def name(self) -> str:
        """What users call it by: its plates."""
        return "/".join(self.plates)

    @property
    def size(self) -> int:
        """How many numbers a row has in unconstrained space."""
        return sum(shape.numel() for shape in self.shapes.values())


def groups_of(sites: Mapping[str, Any], frames: Mapping[str, Any], encoder: Any) -> list[Group]:
    """The latents by their plates: those in fewer plates first, else in the model's order.

    Args:
        sites: The latents as in the model's first run, by name.
        frames: The plates that they are in, by name.
        encoder: One, :class:`Encoders`, or none.

    Raises:
        ValueError: If it is not clear which encoder is for which plates, or a row of a plate can't
            be drawn by itself.
    """
    by_plates: dict[tuple[str, ...], list[str]] = {}
    for name, site in sites.items():
        for frame in site["cond_indep_stack"]:
            _check_same(frame, frames[frame.name], name)
        if site["cond_indep_stack"]:
            _check_local(name, site)
        outermost_first = sorted(site["cond_indep_stack"], key=lambda frame: frame.dim)
        by_plates.setdefault(tuple(frame.name for frame in outermost_first), []).append(name)
    ordered = sorted(by_plates, key=len)
    names = {"/".join(plates) for plates in ordered if plates}
    if isinstance(encoder, Encoders):
        with_encoder = {*encoder.functions, *encoder.places}
        if strange := with_encoder - names:
            raise ValueError(
                f"There is an encoder for plate '{min(strange)}', but no latents are in a "
                f"plate of that name; there are some in {quoted(names)}."
            )
    elif encoder is not None:
        if len(names) != 1:
            raise ValueError(
                f"The model has latents in the plates {quoted(names)}, and one encoder can't "
                "tell them apart. Give a dictionary from names of plates to encoders; of "
                'nested plates "outer/inner".'
                if names
                else "There is an encoder, but no latent of this model is in a plate. For "
                "global latents that listen to the data use AutoIAF(model, encoder=...)."
            )
        with_encoder = names
    else:
        with_encoder = set()
    groups: list[Group] = []
    num_tables = 0
    for plates in ordered:
        has_table = bool(plates) and "/".join(plates) not in with_encoder
        parents = [k for k, group in enumerate(groups) if set(group.plates) < set(plates)]
        shapes = {name: _row_shape(sites[name]) for name in by_plates[plates]}
        table = num_tables if has_table else None
        num_tables += has_table
        groups.append(Group(plates, shapes, tuple(parents), table))
    return groups


def _check_same(frame: Any, known: Any, site: str) -> None:
    """Raises an error if there are two plates of one name."""
    if (known.dim, known.size) != (frame.dim, frame.size):
        raise ValueError(
            f"Site '{site}' is in a plate '{frame.name}' of size {frame.size} at dim {frame.dim}, "
            f"and there is another of that name, of size {known.size} at dim {known.dim}. Give "
            "each plate a name of its own."
        )


def _check_local(name: str, site: dict[str, Any]) -> None:
    """Raises an error unless rows of this site can be drawn by themselves."""
    frames = site["cond_indep_stack"]
    batch_shape = site["fn"].batch_shape
    dims = {frame.dim for frame in frames}
    loose = [size for d, size in enumerate(batch_shape, -len(batch_shape)) if d not in dims]
    if any(size > 1 for size in loose):
        raise ValueError(
            f"Site '{name}' has batch_shape {tuple(batch_shape)}, of which the dimensions "
            f"{sorted(dims)} are plates. Declare the others by a plate, or as part of the "
            "event: dist.Normal(...).to_event(1)."
        )
    support, event_dim = site["fn"].support, site["fn"].event_dim
    bounds = tensors_in(one_row(support, event_dim))
    if any(bound.dim() > event_dim and bound.numel() > 1 for bound in bounds):
        raise NotImplementedError(
            f"The support of site '{name}' is another for each row of its plate, so that a "
            "guide that knows one minibatch doesn't know the others'. Draw it on a fixed "
            "support, and shift or scale it in the model."
        )


def _row_shape(site: dict[str, Any]) -> torch.Size:
    """The shape of a site in unconstrained space, without what is batch of a plate."""
    fn = site["fn"]
    value: Tensor = biject_to(fn.support).inv(site["value"])
    num_batch = len(fn.batch_shape) if site["cond_indep_stack"] else 0
    return value.shape[num_batch:]


def checked_rows(
    rows: Mapping[str, Sequence[int] | Tensor], sizes: Mapping[str, int]
) -> dict[str, Tensor]:
    """Rows of plates by name as tensors, or a ValueError if there are no such."""
    if not isinstance(rows, Mapping):
        raise ValueError(
            f"rows should be a dict from names of plates to indices of rows; got {rows!r}."
        )
    checked = {}
    for name, chosen in rows.items():
        if name not in sizes:
            raise ValueError(
                f"There is no plate '{name}' to choose rows of; latents are in {quoted({*sizes})}."
            )
        index, size = torch.as_tensor(chosen), sizes[name]
        if index.dim() != 1 or index.dtype.is_floating_point or index.dtype == torch.bool:
            raise ValueError(
                f"rows[{name!r}] should be indices of rows, of shape (n,); got {chosen!r}."
            )
        if len(index) and not 0 <= int(index.min()) <= int(index.max()) < size:
            raise ValueError(f"rows[{name!r}] should be between 0 and {size - 1}; got {chosen!r}.")
        checked[name] = index
    return checked


class GivenSubsamples(Messenger):
    """Notes the plates whose subsample is given, and not drawn."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def _pyro_sample(self, msg: Any) -> None:
        if isinstance(msg["fn"], subsample_messenger._Subsample) and msg["value"] is not None:
            self.names.add(msg["name"])


class QuickSubsamples(Messenger):
    """Makes subsamples of many rows in the time of those that are drawn."""

    def _pyro_sample(self, msg: Any) -> None:
        fn = msg["fn"]
        is_subsample = type(fn) is subsample_messenger._Subsample
        if is_subsample and LARGE <= fn.size > (fn.subsample_size or fn.size):
            msg["fn"] = _Subsample(fn.size, fn.subsample_size, device=fn.device)


class _Subsample(subsample_messenger._Subsample):  # Pyro knows subsamples by this name
    """A subsample with a row from each of as many stretches of equal length.

    Each row is as likely as any other. Pyro's own way puts all rows in random order first.
    """

    def sample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008
        count: Any = self.subsample_size
        points = torch.rand(count, dtype=torch.float64, device=self.device)
        points = points + torch.arange(count, device=self.device)
        rows: Tensor = (points * (self.size / count)).long().clamp(max=self.size - 1)
        return rows


def quoted(names: set[str]) -> str:
    """Names for a message."""
    return ", ".join(f"'{name}'" for name in sorted(names))
