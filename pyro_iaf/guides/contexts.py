"""The contexts of the rows of plates: encoded data, or rows of a learned table."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pyro
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.weak import WeakIdKeyDictionary

from .._validation import check_callable, check_size
from ..models.arguments import Args, Kwargs
from ..models.traces import full_size
from ..nn.univariate import UnivariateMap
from .base import FlowGuide
from .plates import Encoders, Group, QuickSubsamples

__all__ = ["Contexts", "GuideWithContexts"]

# Contexts that are encoded before the plates are made, by the plates of their group.
Contexts = Mapping[tuple[str, ...], Tensor]
TABLE_WIDTH = 8
_guides_of_sparse: Any = WeakIdKeyDictionary()  # weak references, by parameter


class GuideWithContexts(FlowGuide):
    """A guide for latents in plates: the plates of a call, and the contexts of their rows.

    A subclass sets in ``_build`` the ``groups`` of latents, a transform for each, and a table for
    each that is in plates and has no encoder. The arguments are those of
    :class:`~pyro_iaf.AutoHierarchicalIAF`.
    """

    _own_names = ("transforms", "tables", "encoder")

    def __init__(
        self,
        model: Callable[..., Any],
        *,
        encoder: Callable[..., Tensor] | Mapping[str, Callable[..., Tensor]] | None = None,
        context_dim: int | None = None,
        num_flows: int = 2,
        hidden_dims: int | Sequence[int] | None = None,
        univariate: str | UnivariateMap = "affine",
        init_loc_fn: Callable[..., Any] | None = None,
        init_scale: float | None = None,
        scale: str = "auto",
        embedding_grad: str = "dense",
        create_plates: Callable[..., Any] | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(
            model,
            num_flows=num_flows,
            hidden_dims=hidden_dims,
            univariate=univariate,
            init_loc_fn=init_loc_fn,
            init_scale=init_scale,
            scale=scale,
            create_plates=create_plates,
            name=name,
        )
        if isinstance(encoder, Mapping | nn.ModuleDict):
            for plate, one in encoder.items():
                check_callable(f"encoder[{plate!r}]", one)
            encoder = Encoders(dict(encoder.items()))
        else:
            check_callable("encoder", encoder, optional=True)
        self.encoder = encoder
        self.context_dim = None if context_dim is None else check_size("context_dim", context_dim)
        if embedding_grad not in ("dense", "sparse"):
            raise ValueError(
                f'embedding_grad should be "dense" or "sparse"; got {embedding_grad!r}.'
            )
        self.embedding_grad = embedding_grad
        self.rows_alone = False  # whether gradients of tables hold only the rows drawn
        self.groups: list[Group] = []
        self.transforms = nn.ModuleList()
        self.tables = nn.ParameterList()

    # Plates

    def _refuse_given_subsamples(self) -> None:
        """Raises an error if the model is given a subsample that the guide can't see."""
        for name in self._given.names & set(self._prototype_frames):
            if self.create_plates is None and self.master is None and not self._is_whole(name):
                raise ValueError(
                    f"The model was given the subsample of plate '{name}', which the guide can't "
                    "see: it would draw another one. Give create_plates, a function of the model's "
                    "arguments that returns the same plate: "
                    "lambda rows: pyro.plate(name, size, subsample=rows)."
                )

    def _is_whole(self, plate: str) -> bool:
        frame = self._prototype_frames[plate]
        return bool(frame.size == full_size(frame))

    def _plates_of(self, contexts: Contexts, args: Args, kwargs: Kwargs) -> dict[str, pyro.plate]:
        """The plates of a call: the user's own, or as in the model's first run."""
        plates: dict[str, pyro.plate] = {}
        if self.master is not None:
            plates = self._create_plates()  # those of the AutoGuideList
        elif self.create_plates is not None:
            made = self.create_plates(*args, **kwargs)
            plates = {p.name: p for p in ([made] if isinstance(made, pyro.plate) else made)}
        for name, size in self._sizes_of_plates(contexts).items():
            if name in plates:
                self._check_size(name, plates[name].size, "create_plates returned")
            else:
                frame = self._prototype_frames[name]
                drawn = size if self._is_whole(name) else frame.size
                with QuickSubsamples():
                    plates[name] = pyro.plate(name, size, drawn, dim=frame.dim)
        return plates

    def _sizes_of_plates(self, contexts: Contexts) -> dict[str, int]:
        """The number of rows of each plate: that of contexts, else of the model's first run."""
        sizes = {}
        for name, frame in self._prototype_frames.items():
            sizes[name] = full_size(frame)
            for plates, context in contexts.items():
                if name in plates and isinstance(context, Tensor) and context.dim() > -frame.dim:
                    sizes[name] = context.shape[frame.dim - 1]
            self._check_size(name, sizes[name], "An encoder returned")
        return sizes

    def _check_size(self, plate: str, size: int, found: str) -> None:
        first = full_size(self._prototype_frames[plate])
        has_table = any(g.table is not None and plate in g.plates for g in self.groups)
        if has_table and size != first:
            raise ValueError(
                f"{found} {size} rows of plate '{plate}'; the guide has a table of {first} rows, "
                "as in the model's first run. For data of several sizes give an encoder for each "
                "plate."
            )

    # Encoders

    def _encoder_of(self, group: Group) -> Any:
        encoder = self._encoder
        if isinstance(encoder, Encoders):
            return encoder.of_plates(group.name)
        return encoder if group.plates else None

    def _contexts_ahead(self, args: Args, kwargs: Kwargs, of_all: bool = False) -> Contexts:
        """Contexts of plates that are not subsampled, or of all; they tell the number of rows."""
        contexts = {}
        for group in self.groups:
            encoder = self._encoder_of(group)
            if encoder is not None and (of_all or all(map(self._is_whole, group.plates))):
                contexts[group.plates] = self._encode(encoder, args, kwargs)
        return contexts

    def _encoded(
        self,
        k: int,
        plates: Mapping[str, Any],
        rows: Mapping[str, Any],
        ahead: Contexts,
        args: Args,
        kwargs: Kwargs,
    ) -> Tensor:
        """The contexts of a group's rows in this call, or a ValueError if they don't fit them."""
        group = self.groups[k]
        context: Any = ahead.get(group.plates)
        if context is None:
            context = self._encode(self._encoder_of(group), args, kwargs)
        depth = max(-plates[name].dim for name in group.plates)
        shape = [1] * depth
        for name in group.plates:
            shape[plates[name].dim] = len(rows[name])
        own: Any = self.context_dim
        if transforms := self._transforms():
            own = transforms[k].context_dim - sum(self.groups[j].size for j in group.parents)
        fits = isinstance(context, Tensor) and context.dim() == depth + 1
        if fits:
            for name in group.plates:
                if context.shape[plates[name].dim - 1] == plates[name].size != len(rows[name]):
                    index = rows[name].to(context.device)
                    context = context.index_select(plates[name].dim - 1, index)
            fits = list(context.shape[:-1]) == shape and own in (None, context.shape[-1])
        if not fits:
            got = tuple(context.shape) if isinstance(context, Tensor) else type(context).__name__
            raise ValueError(
                f"The encoder for plate '{group.name}' should return a context for each of its "
                f"rows, of shape {(*shape, 'context_dim' if own is None else own)}; got {got}. "
                "Inside it pyro.subsample(data, event_dim=...) is the minibatch. If minibatches of "
                "several sizes come as arguments, tell their size by create_plates=lambda x: "
                "pyro.plate(name, size, len(x))."
            )
        return context  # type: ignore[no-any-return]

    # Tables

    def context_tables(self) -> list[nn.Parameter]:
        """The tables of contexts, of shape ``(N, C)``, of whose rows a minibatch uses few."""
        return list(self._modules["tables"].parameters())  # type: ignore[union-attr]

    def _table_shape(self, group: Group) -> tuple[int, int]:
        """The rows of a group's plates, and the width of its table, loaded or new."""
        rows = math.prod(full_size(self._prototype_frames[name]) for name in group.plates)
        tables: Any = self._modules["tables"]
        is_loaded = group.table is not None and group.table < len(tables)
        width = tables[group.table].shape[1] if is_loaded else self.context_dim or TABLE_WIDTH
        return rows, width

    def _looked_up(
        self, group: Group, plates: Mapping[str, Any], rows: Mapping[str, Any]
    ) -> Tensor:
        """The contexts of a group's rows in this call, from its table."""
        table = self._modules["tables"][group.table]  # type: ignore[index]
        index: Any = 0
        for name in group.plates:
            own = rows[name].reshape(-1, *[1] * (-plates[name].dim - 1))
            index = index * plates[name].size + own.to(table.device)
        sparse = self.rows_alone or self.embedding_grad == "sparse"
        return functional.embedding(index, table, sparse=sparse)

    def _make_gradients_sparse(self) -> None:
        """Gives all parameters sparse gradients, since SparseAdam takes no others."""
        if self.embedding_grad != "sparse" or self.rows_alone:
            return
        for param in set(self.parameters()) - set(self.context_tables()):
            if param not in _guides_of_sparse:
                param.register_post_accumulate_grad_hook(_make_sparse)
            _guides_of_sparse[param] = weakref.ref(self)


def _make_sparse(param: Tensor) -> None:
    """Makes a parameter's gradient sparse, while its guide has ``embedding_grad="sparse"``."""
    guide = _guides_of_sparse[param]() if param in _guides_of_sparse else None
    is_wanted = guide is not None and guide.embedding_grad == "sparse" and not guide.rows_alone
    if is_wanted and param.grad is not None and not param.grad.is_sparse:
        param.grad = param.grad.to_sparse()
