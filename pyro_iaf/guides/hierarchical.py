r"""A guide that draws its latents group by group, each with all rows of its plates at once.

.. math::
    q(z, w_1, \dots, w_N) = q(z) \prod_i q(w_i \mid z, c_i)

The latents :math:`w_i` of a plate's rows come from one conditional flow that listens to the
globals :math:`z` and to a context :math:`c_i`: what an encoder makes of row i, or a learned row of
a table. So a minibatch of rows is drawn and scored without the others.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import pyro
import torch
from pyro.distributions.util import sum_rightmost
from torch import Tensor, nn
from torch.distributions import biject_to
from torch.nn import functional

from .._validation import check_callable, check_size
from ..distributions import DiagonalNormal
from ..flows.posterior import Posterior
from ..models.constraints import one_row
from ..models.traces import full_size
from ..solvers.path_score import noise_of_draw
from .base import FlowGuide, joined
from .contexts import TABLE_WIDTH, Contexts, Encoders, make_gradients_sparse
from .pathfinder import Start
from .plates import GivenSubsamples, Group, QuickSubsamples, groups_of
from .site_delta import MaskedSiteDelta, SiteDelta

__all__ = ["GroupedGuide", "row_gradients", "tables_of"]


class GroupedGuide(FlowGuide):
    """A guide with a flow for each group of latents: the globals, and those of each plate's rows.

    The arguments are those of :class:`~pyro_iaf.AutoHierarchicalIAF`.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        *,
        encoder: Callable[..., Tensor] | Mapping[str, Callable[..., Tensor]] | None,
        context_dim: int | None,
        embedding_grad: str,
        **settings: Any,
    ) -> None:
        super().__init__(model, **settings)
        if isinstance(encoder, Mapping | nn.ModuleDict):
            for plate, one in encoder.items():
                check_callable(f"encoder[{plate!r}]", one, may_be_missing=False)
            encoder = Encoders(dict(encoder.items()))
        else:
            check_callable("encoder", encoder, may_be_missing=True)
        self.encoder = encoder
        self.context_dim = None if context_dim is None else check_size("context_dim", context_dim)
        if embedding_grad not in ("dense", "sparse"):
            raise ValueError(
                f'embedding_grad should be "dense" or "sparse"; got {embedding_grad!r}.'
            )
        self.embedding_grad = embedding_grad
        self.rows_alone = False  # whether gradients of tables have the rows drawn alone
        self.groups: list[Group] = []
        self.transforms = nn.ModuleList()
        self.tables = nn.ParameterList()

    # Building

    def _build(
        self, model: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        self.groups = groups_of(self._latent_sites(), self._prototype_frames, self._encoder)
        self._refuse_given_subsamples()
        starts = [self._init_loc(group) for group in self.groups]
        ahead = self._contexts_ahead(args, kwargs)
        plates = self._plates_of({}, args, kwargs)  # with as many rows as the model has
        contexts = []
        for k, group in enumerate(self.groups):
            own = 0
            if group.table is not None:
                own = self._table_width(group)
            elif group.plates:
                with ExitStack() as stack:
                    rows = {name: stack.enter_context(plates[name]) for name in group.plates}
                    own = self._encoded(k, plates, rows, ahead, args, kwargs).shape[-1]
            contexts.append(own + sum(self.groups[j].size for j in group.parents))
        sizes = [self._num_rows(group) for group in self.groups if group.table is not None]
        transforms, tables = self._modules["transforms"], self._modules["tables"]
        assert isinstance(transforms, nn.ModuleList)
        assert isinstance(tables, nn.ParameterList)
        if not len(transforms):
            for loc, context_dim in zip(starts, contexts, strict=True):
                start = Start(loc, torch.ones_like(loc))
                log_scale = math.log(self._init_scale)
                transforms.append(self._fresh_transform(start, log_scale, context_dim))
            for size in sizes:
                width = self.context_dim or TABLE_WIDTH
                tables.append(nn.Parameter(starts[0].new_zeros(size, width)))
        loaded = [[_sizes_of(transform) for transform in transforms], [len(t) for t in tables]]
        wanted = [[(len(s), c) for s, c in zip(starts, contexts, strict=True)], sizes]
        if loaded != wanted:
            raise ValueError(
                "The state that was loaded is of a guide for another model: its groups have "
                f"(latents, context_dim) {loaded[0]} and tables of {loaded[1]} rows; this model "
                f"wants {wanted[0]} and {wanted[1]}."
            )
        for module in (transforms, tables):
            module.to(starts[0])

    def _refuse_given_subsamples(self) -> None:
        """A guide that draws its own subsample is no guide for one that was given."""
        for name in self._given.names & set(self._prototype_frames):
            if self.create_plates is None and self.master is None and not self._is_whole(name):
                raise ValueError(
                    f"The model was given the subsample of plate '{name}', which the guide can't "
                    "see, and would draw one of its own. Give create_plates, a function of the "
                    "model's arguments that returns the same plate: "
                    "lambda rows: pyro.plate(name, size, subsample=rows)."
                )

    def _watched(self, model: Callable[..., Any]) -> Callable[..., Any]:
        self._given = GivenSubsamples()
        watched: Callable[..., Any] = self._given(model)
        return watched

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        super()._setup_prototype(*args, **kwargs)
        for site in self._latent_sites().values():
            if site["cond_indep_stack"]:
                site["fn"]._support = one_row(site["fn"].support, site["fn"].event_dim)

    def _init_loc(self, group: Group) -> Tensor:
        """Where a group starts: for rows of a plate, in the middle of where they do."""
        parts = []
        for name, shape in group.shapes.items():
            site = self._latent_sites()[name]
            value = biject_to(site["fn"].support).inv(site["value"].detach())
            num_rows = value.shape[: value.dim() - len(shape)].numel()
            parts.append(value.reshape(num_rows, shape.numel()).mean(0))
        return joined(parts)

    def _table_width(self, group: Group) -> int:
        tables: Any = self._modules["tables"]
        is_loaded = group.table is not None and group.table < len(tables)
        return tables[group.table].shape[1] if is_loaded else self.context_dim or TABLE_WIDTH

    def _num_rows(self, group: Group) -> int:
        return math.prod(full_size(self._prototype_frames[name]) for name in group.plates)

    # Drawing

    def _encoder_of(self, group: Group) -> Any:
        encoder = self._encoder
        if isinstance(encoder, Encoders):
            return encoder.of_plates(group.name)
        return encoder if group.plates else None

    def _own_modules(self) -> dict[str, nn.Module]:
        own: dict[str, Any] = {name: self._modules[name] for name in ("transforms", "tables")}
        if isinstance(self._encoder, nn.Module):
            own["encoder"] = self._encoder
        return own

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Draws every site of the model; returns them by name."""
        self.setup(*args, **kwargs)
        self._state_parameters()
        self._make_gradients_sparse()
        contexts = self._contexts_ahead(args, kwargs)
        plates = self._plates_of(contexts, args, kwargs)
        drawn = self._draw(plates, contexts, args, kwargs)
        sites = {name: value for name, (value, _) in drawn.items()}
        self._cancel_priors(sites, plates, args, kwargs)
        return sites

    def _contexts_ahead(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], of_all: bool = False
    ) -> Contexts:
        """Contexts for plates that are not subsampled, or of all: how many rows they have."""
        contexts = {}
        for group in self.groups:
            encoder = self._encoder_of(group)
            is_whole = of_all or all(map(self._is_whole, group.plates))
            if encoder is not None and is_whole:
                contexts[group.plates] = self._encode(encoder, args, kwargs)
        return contexts

    def _is_whole(self, plate: str) -> bool:
        frame = self._prototype_frames[plate]
        return bool(frame.size == full_size(frame))

    def _plates_of(
        self, contexts: Contexts, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> dict[str, pyro.plate]:
        """The plates of a call: the user's own, or as in the model's first run."""
        plates: dict[str, pyro.plate] = {}
        if self.master is not None:
            plates = self._create_plates()  # those of the list that this guide is part of
        elif self.create_plates is not None:
            made = self.create_plates(*args, **kwargs)
            plates = {p.name: p for p in ([made] if isinstance(made, pyro.plate) else made)}
        for name, size in self._sizes_of_plates(contexts).items():
            frame = self._prototype_frames[name]
            if name in plates:
                made = f"create_plates returned {plates[name].size} rows of"
                self._check_size(name, plates[name].size, made)
                continue
            drawn = size if self._is_whole(name) else frame.size
            with QuickSubsamples():
                plates[name] = pyro.plate(name, size, drawn, dim=frame.dim)
        return plates

    def _sizes_of_plates(self, contexts: Contexts) -> dict[str, int]:
        """How many rows there are: as in the model's first run, or as there are contexts."""
        sizes = {}
        for name, frame in self._prototype_frames.items():
            sizes[name] = full_size(frame)
            for plates, context in contexts.items():
                if name in plates and isinstance(context, Tensor) and context.dim() > -frame.dim:
                    sizes[name] = context.shape[frame.dim - 1]
            self._check_size(name, sizes[name], f"An encoder returned {sizes[name]} rows of")
        return sizes

    def _check_size(self, plate: str, size: int, what: str) -> None:
        first = full_size(self._prototype_frames[plate])
        has_table = any(g.table is not None and plate in g.plates for g in self.groups)
        if has_table and size != first:
            raise ValueError(
                f"{what} plate '{plate}'; the guide has a table of {first}, as the model's first "
                "run had. For data of several sizes give an encoder for each plate."
            )

    def _draw(
        self,
        plates: Mapping[str, pyro.plate],
        contexts: Contexts,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """Pyro's statements of all latents; the sites, and what they are in unconstrained space."""
        drawn: dict[str, tuple[Tensor, Tensor]] = {}
        noises: list[Tensor] = []
        for k, group in enumerate(self.groups):
            with ExitStack() as stack:
                rows = {name: stack.enter_context(plates[name]) for name in group.plates}
                parts = [noises[parent] for parent in group.parents]
                if group.table is not None:
                    parts.append(self._looked_up(group, plates, rows))
                elif group.plates:
                    parts.append(self._encoded(k, plates, rows, contexts, args, kwargs))
                transform = self._transform_at(k, parts)
                loc = torch.zeros_like(transform.parts[-1].frame[0])
                base = DiagonalNormal(loc, torch.ones_like(loc), validate_args=False)
                latent = pyro.sample(
                    "_".join(filter(None, (f"_{self._pyro_name}", group.name, "latent"))),
                    Posterior(base, [transform], validate_args=False),
                    infer={"is_auxiliary": True},
                )
                # As the noise that made them, latents have size one, wherever the guide moves.
                noises.append(noise_of_draw(transform, latent))
                for site, fn, value in self._split(group, latent):
                    drawn[site] = pyro.sample(site, fn), value
        return drawn

    def _transform_at(self, k: int, contexts: Sequence[Tensor]) -> Any:
        """The flow of a group, at what it listens to."""
        transform: Any = self._modules["transforms"][k]  # type: ignore[index]
        if not contexts:
            return transform
        shape = torch.broadcast_shapes(*(context.shape[:-1] for context in contexts))
        return transform.condition(torch.cat([c.expand(*shape, -1) for c in contexts], -1))

    def _split(self, group: Group, latent: Tensor) -> Iterator[tuple[str, SiteDelta, Tensor]]:
        """The sites of a vector of latents: their points, and these in unconstrained space."""
        start = 0
        for name, shape in group.shapes.items():
            site = self._latent_sites()[name]
            num_batch = 0 if group.plates else len(site["fn"].batch_shape)
            batch_shape = latent.shape[:-1] + (1,) * (len(shape) - num_batch)
            part = latent[..., start : start + shape.numel()]
            start += shape.numel()
            part = part.reshape(torch.broadcast_shapes(batch_shape, shape))
            constrain, event_dim = biject_to(site["fn"].support), site["fn"].event_dim
            value = constrain(part)
            log_density = constrain.inv.log_abs_det_jacobian(value, part)
            log_density = sum_rightmost(log_density, log_density.dim() - value.dim() + event_dim)
            kind = MaskedSiteDelta if name in self.lifted else SiteDelta
            yield name, kind(value, log_density=log_density, event_dim=event_dim), part

    def _looked_up(
        self, group: Group, plates: Mapping[str, Any], rows: Mapping[str, Any]
    ) -> Tensor:
        """The rows of a table."""
        table = self._modules["tables"][group.table]  # type: ignore[index]
        index: Any = 0
        for name in group.plates:
            own = rows[name].reshape(-1, *[1] * (-plates[name].dim - 1))
            index = index * plates[name].size + own.to(table.device)
        sparse = self.rows_alone or self.embedding_grad == "sparse"
        return functional.embedding(index, table, sparse=sparse)

    def _encoded(
        self,
        k: int,
        plates: Mapping[str, Any],
        rows: Mapping[str, Any],
        ahead: Contexts,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Tensor:
        """What an encoder makes of a group's rows of this call, unless it was run ahead.

        Raises:
            ValueError: If it doesn't fit the plates.
        """
        group = self.groups[k]
        context: Any = ahead.get(group.plates)
        if context is None:
            context = self._encode(self._encoder_of(group), args, kwargs)
        depth = max(-plates[name].dim for name in group.plates)
        shape = [1] * depth
        for name in group.plates:
            shape[plates[name].dim] = len(rows[name])
        own: Any = self.context_dim
        if len(transforms := self._modules["transforms"]):  # type: ignore[arg-type]
            network: Any = transforms[k].parts[0].network  # type: ignore[index]
            own = network.context_dim - sum(self.groups[j].size for j in group.parents)
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
                "Inside it pyro.subsample(data, event_dim=...) is the minibatch. Where minibatches "
                "come as arguments, of several sizes, create_plates=lambda x: pyro.plate(name, "
                "size, len(x)) says how many rows there are."
            )
        return context  # type: ignore[no-any-return]

    # Gradients of tables

    def _make_gradients_sparse(self) -> None:
        """For SparseAdam, which takes no others, that of each parameter."""
        if self.embedding_grad != "sparse" or self.rows_alone:
            return
        tables = set(self._modules["tables"].parameters())  # type: ignore[union-attr]
        for param in self.parameters():
            if param not in tables:
                make_gradients_sparse(param, self)

    # State

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        transforms, tables = self._modules["transforms"], self._modules["tables"]
        assert isinstance(transforms, nn.ModuleList)
        assert isinstance(tables, nn.ParameterList)
        if self.prototype_trace is None and not len(transforms):
            # Never set up, so the state says what to build.
            hidden_dims, scale = self.hidden_dims, self.scale
            while True:
                start = f"{prefix}transforms.{len(transforms)}."
                part = {
                    k.removeprefix(start): v for k, v in state_dict.items() if k.startswith(start)
                }
                transform = self._rebuilt(part, self._told_by(state_dict, prefix)["univariate"])
                if transform is None:
                    break
                transforms.append(transform)
            while (table := state_dict.get(f"{prefix}tables.{len(tables)}")) is not None:
                tables.append(nn.Parameter(torch.empty_like(table)))
            self.hidden_dims, self.scale = hidden_dims, scale
        self._state_was_loaded = True
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def tables_of(guide: Any) -> list[nn.Parameter]:
    """The tables of contexts that a guide, or a part of it, learns."""
    return [table for part in _parts_of(guide) for table in part._modules["tables"].parameters()]  # type: ignore[union-attr]


@contextmanager
def row_gradients(guide: Any) -> Iterator[None]:
    """Within it, gradients of tables have the rows drawn alone."""
    before = [(part, part.rows_alone) for part in _parts_of(guide)]
    for part, _ in before:
        part.rows_alone = True
    try:
        yield
    finally:
        for part, was in before:
            part.rows_alone = was


def _parts_of(guide: Any) -> list[GroupedGuide]:
    modules = guide.modules() if isinstance(guide, nn.Module) else ()
    return [module for module in modules if isinstance(module, GroupedGuide)]


def _sizes_of(transform: Any) -> tuple[int, int]:
    return transform.parts[-1].input_dim, transform.parts[0].network.context_dim
