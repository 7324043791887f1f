r"""A guide that draws its latents group by group, each with all rows of its plates at once.

.. math::
    q(z, w_1, \dots, w_N) = q(z) \prod_i q(w_i \mid z, c_i)

The latents :math:`w_i` of a plate's rows come from one conditional flow that listens to the
globals :math:`z` and to a context :math:`c_i`: what an encoder makes of row i, or a learned row of
a table. So a minibatch of rows is drawn and scored without the others.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.distributions.util import sum_rightmost
from torch import Tensor, nn
from torch.distributions import biject_to

from .._validation import check_size
from ..models.arguments import Args, Kwargs, Program
from ..models.constraints import one_row
from ..models.particles import Particles
from ..models.traces import taking_turns
from ..solvers.path_score import noise_of_draw
from .contexts import TABLE_WIDTH, Contexts, GuideWithContexts
from .latents import joined
from .pathfinder import Start
from .plates import Group, checked_rows, groups_of
from .site_delta import MaskedSiteDelta, SiteDelta
from .transform import Transform, part_of

__all__ = ["AutoHierarchicalIAF"]

# Medians and quantiles are read off so many draws, or fewer if these would hold more numbers.
NUM_DRAWS, MOST_NUMBERS = 4001, 10_000_000


class AutoHierarchicalIAF(GuideWithContexts):
    r"""A guide for models with local latents, by flows: for large data, and for new data.

    The global latents come from one inverse autoregressive flow, those of each plate's rows from a
    conditional one that all rows share. It listens to the globals, to the latents of the plates
    around, and to a context of the row: what an ``encoder`` makes of the data, or a row of a
    learned table, of ``context_dim`` numbers. Plates may be subsampled, nested, and several. Rows
    of plates that stand side by side, as persons and questions do, are independent given the
    globals: there :class:`~pyro_iaf.AutoIAF` is the better guide, as long as it is not too large.

    A step costs as much as the minibatch it draws, whatever the data's size; in plates that
    ``create_plates`` or an ``AutoGuideList`` makes, Pyro puts all rows in random order first. A
    table of N rows holds ``N * context_dim`` numbers: :func:`~pyro_iaf.fit` updates the rows that a
    step has drawn and leaves the others; unlike other parameters, they are not averaged at its end.
    Under ``pyro.infer.SVI``, any optimiser but ``SparseAdam`` fills a gradient for all N rows at
    each step, which is slow from some 100,000 rows on; give ``embedding_grad="sparse"`` and
    ``pyro.optim.SparseAdam`` there.

    A guide starts around what ``init_loc_fn`` says, as :class:`~pyro_iaf.AutoIAF` does with
    ``start="init"``.

    Args:
        model: A Pyro model.
        encoder: What makes contexts of the model's arguments: a module or a function that takes
            them and returns a tensor of shape ``plate_shape + (context_dim,)``, a row for each row
            of the plate. It runs inside the plate, so that ``pyro.subsample(data, event_dim=...)``
            is the minibatch there; what it returns for all rows is cut to the subsample. For a
            model with several plates, a dictionary from the names of plates to encoders; of nested
            ones ``"outer/inner"``. Plates without an encoder have a table.
        context_dim: Size of a row of the tables, by default 8; with an encoder, what it returns.
        num_flows: How many flows for each group of latents.
        hidden_dims: Widths of each network's hidden layers; by default two layers of
            ``max(64, D)`` for the D numbers of a row.
        univariate: How a flow maps each coordinate: ``"affine"``, ``"gated"`` or a
            :class:`~pyro_iaf.UnivariateMap`.
        init_loc_fn: As for :class:`~pyro_iaf.AutoIAF`.
        init_scale: Standard deviation of a fresh guide in unconstrained space.
        scale: As for :class:`~pyro_iaf.AutoIAF`, for each group.
        embedding_grad: ``"dense"``, or ``"sparse"`` for ``pyro.optim.SparseAdam``: the gradients
            of tables have the rows drawn alone, and those of the guide's other parameters the
            form that this optimiser wants. :func:`~pyro_iaf.fit` needs neither.
        create_plates: A function of the model's arguments that returns plates for the guide to
            use, as when indices of a minibatch are an argument.
        name: What the guide's parameters are called in the store, by default
            ``"AutoHierarchicalIAF"``.

    Raises:
        ValueError: If an argument is out of range; at the first call, if plates and encoders don't
            go together, a latent is discrete or a Delta, or a context has another shape than its
            plate.
        NotImplementedError: At the first call, if a plate is sequential, or the support of a
            latent changes from row to row of its plate.
        RuntimeError: At the first call, if the model has no latents.

    References:
        Kingma et al. (2016), https://arxiv.org/abs/1606.04934;
        Agrawal and Domke (2021), https://arxiv.org/abs/2111.03144

    Example:
        >>> data = torch.randn(1000)
        >>> def model():
        ...     mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("rows", 1000, subsample_size=10) as rows:
        ...         effect = pyro.sample("effect", dist.Normal(mean, 1.0))
        ...         pyro.sample("y", dist.Normal(effect, 1.0), obs=data[rows])
        >>> guide = AutoHierarchicalIAF(model)
        >>> result = fit(model, guide, num_steps=20, progress=False)
        >>> guide.sample_posterior(100)["effect"].shape
        torch.Size([100, 1000])
        >>> rows = {"rows": torch.tensor([3, 4])}
        >>> guide.sample_posterior(100, rows=rows)["effect"].shape
        torch.Size([100, 2])
    """

    # Building

    def _build(self, model: Program, args: Args, kwargs: Kwargs) -> None:
        self.groups = groups_of(self._latent_sites(), self._prototype_frames, self._encoder)
        self._refuse_given_subsamples()
        starts = [self._init_loc(group) for group in self.groups]
        ahead = self._contexts_ahead(args, kwargs)
        plates = self._plates_of({}, args, kwargs)  # with as many rows as the model has
        widths, sizes = [], []
        for k, group in enumerate(self.groups):
            own = 0
            if group.table is not None:
                own = self._table_width(group)
                sizes.append(self._num_rows(group))
            elif group.plates:
                with ExitStack() as stack:
                    rows = {name: stack.enter_context(plates[name]) for name in group.plates}
                    own = self._encoded(k, plates, rows, ahead, args, kwargs).shape[-1]
            widths.append(own + sum(self.groups[j].size for j in group.parents))
        transforms, tables = self._modules["transforms"], self._modules["tables"]
        assert isinstance(transforms, nn.ModuleList)
        assert isinstance(tables, nn.ParameterList)
        if not len(transforms):
            for loc, context_dim in zip(starts, widths, strict=True):
                start, log_scale = Start(loc, torch.ones_like(loc)), math.log(self._init_scale)
                transforms.append(self._fresh_transform(start, log_scale, context_dim))
            for size in sizes:
                width = self.context_dim or TABLE_WIDTH
                tables.append(nn.Parameter(starts[0].new_zeros(size, width)))
        made = [(t.latent_dim, t.context_dim) for t in self._transforms()]
        loaded = [made, [len(table) for table in tables]]
        wanted = [[(len(s), c) for s, c in zip(starts, widths, strict=True)], sizes]
        if loaded != wanted:
            raise ValueError(
                "The state that was loaded is of a guide for another model: its groups have "
                f"(latents, context_dim) {loaded[0]} and tables of {loaded[1]} rows; this model "
                f"wants {wanted[0]} and {wanted[1]}."
            )
        for module in (transforms, tables):
            module.to(starts[0])

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

    def _transforms(self) -> list[Transform]:
        transforms: Any = self._modules["transforms"]
        return list(transforms)

    def _own_modules(self) -> dict[str, nn.Module]:
        own: dict[str, Any] = {name: self._modules[name] for name in ("transforms", "tables")}
        if isinstance(self._encoder, nn.Module):
            own["encoder"] = self._encoder
        return own

    # Drawing

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

    def _draw(
        self, plates: Mapping[str, pyro.plate], contexts: Contexts, args: Args, kwargs: Kwargs
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
                latent = pyro.sample(
                    "_".join(filter(None, (f"_{self._pyro_name}", group.name, "latent"))),
                    transform.posterior(),
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

    @torch.no_grad()
    def sample_posterior(
        self,
        num_samples: int,
        *args: Any,
        rows: Mapping[str, Sequence[int] | Tensor] | None = None,
        resample: bool = False,
        **kwargs: Any,
    ) -> dict[str, Tensor]:
        """Draws from the guide, all at once, in the units of the model.

        Args:
            num_samples: How many draws.
            args: What the model takes; needed only if the guide was never called or set up, if it
                has an encoder, and to resample. An encoder may see data that it was not trained on.
            rows: For plates by name which rows to draw, by default all.
            resample: As for :class:`~pyro_iaf.AutoIAF`; for models that don't subsample.
            kwargs: As ``args``.

        Returns:
            For each site a tensor of shape ``(num_samples,) + shape`` of its value in the model,
            with all rows of its plates or those chosen.

        Raises:
            ValueError: If there is no such plate, or no such row, or a model that subsamples is to
                be resampled.

        Warns:
            UserWarning: If the weights say that resampling can't repair the guide.
        """
        check_size("num_samples", num_samples)
        if resample:
            self._setup_on_demand(*args, **kwargs)
            if rows is not None or not all(map(self._is_whole, self._prototype_frames)):
                raise ValueError(
                    "Draws are resampled by the weight of all that they hold, so all rows have to "
                    "be there: leave out rows, and give a model that does not subsample."
                )
            return self._resampled(num_samples, args, kwargs)
        return self._constrained(self._draws(num_samples, args, kwargs, rows))

    def _settled_draws(
        self, *args: Any, rows: Mapping[str, Any] | None = None, **kwargs: Any
    ) -> dict[str, Tensor]:
        """Some four thousand, or as many as make ten million numbers; ``rows`` spares some."""
        self._setup_on_demand(*args, **kwargs)
        device = self._transforms()[0].origin.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(0)
            one = self._draws(1, args, kwargs, rows)
            numbers = sum(value.numel() for value in one.values())
            num_draws = max(101, min(NUM_DRAWS, MOST_NUMBERS // numbers))
            return self._draws(num_draws, args, kwargs, rows)

    def _draws(
        self,
        num_draws: int,
        args: Args,
        kwargs: Kwargs,
        rows: Mapping[str, Any] | None,
    ) -> dict[str, Tensor]:
        """Unconstrained values of the sites, with the draws in front and no plate beside them."""
        self._setup_on_demand(*args, **kwargs)
        self._adopt_parameters()
        contexts = self._contexts_ahead(args, kwargs, of_all=True)
        sizes, frames = self._sizes_of_plates(contexts), self._prototype_frames
        chosen = checked_rows(rows or {}, sizes)
        plates = {
            name: pyro.plate(name, size, subsample=chosen.get(name), dim=frames[name].dim)
            for name, size in sizes.items()
        }
        batch_shapes = [site["fn"].batch_shape for site in self._latent_sites().values()]
        nesting = max([*map(len, batch_shapes), *(-frame.dim for frame in frames.values())])
        particles = Particles(nesting, self._num_units(plates))
        parts: dict[str, list[Tensor]] = {}
        for size in particles.sizes(num_draws):
            draw = particles.in_plate(self._draw, size)
            with taking_turns, poutine.block():
                drawn = draw(plates, contexts, args, kwargs)
            for name, (value, free) in drawn.items():
                fn = self._latent_sites()[name]["fn"]
                num_event = free.dim() - value.dim() + fn.event_dim
                shape = free.shape[free.dim() - len(fn.batch_shape) - num_event :]
                parts.setdefault(name, []).append(particles.freed(free, shape, size))
        return {name: torch.cat(draws) for name, draws in parts.items()}

    def _num_units(self, plates: Mapping[str, pyro.plate]) -> int:
        """How many numbers the widest layers hold while all rows are drawn once."""
        most = 1
        for group, transform in zip(self.groups, self._transforms(), strict=True):
            num_rows = math.prod(plates[name].subsample_size for name in group.plates)
            most = max(most, num_rows * transform.num_units)
        return most

    # State

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        transforms, tables = self._modules["transforms"], self._modules["tables"]
        assert isinstance(transforms, nn.ModuleList)
        assert isinstance(tables, nn.ParameterList)
        if self.prototype_trace is None and not len(transforms):
            # Never set up, so the state says what to build.
            while True:
                part = part_of(state_dict, f"{prefix}transforms.{len(transforms)}.")
                transform = self._rebuilt(part, self._told_by(state_dict, prefix)["univariate"])
                if transform is None:
                    break
                transforms.append(transform)
            while (table := state_dict.get(f"{prefix}tables.{len(tables)}")) is not None:
                tables.append(nn.Parameter(torch.empty_like(table)))
        self._state_was_loaded = True
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
