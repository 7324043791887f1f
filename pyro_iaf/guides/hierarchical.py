r"""An automatic guide for latents in plates, which draws all rows of a plate at once.

.. math::
    q(z, w_1, \dots, w_N) = q(z) \prod_i q(w_i \mid z, c_i)

The latents :math:`w_i` of a plate's rows come from one conditional flow, which depends on the
global latents :math:`z` and on a context :math:`c_i`: an encoder's output for row i, or a row of a
learned table. So a minibatch of rows is drawn and scored without the others.
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
from ..models.traces import handler_lock
from ..solvers.path_score import noise_of_draw
from .contexts import Contexts, GuideWithContexts
from .latents import joined, with_discrete
from .pathfinder import Start
from .plates import Group, checked_rows, groups_of
from .site_delta import MaskedSiteDelta, SiteDelta
from .transform import Transform

__all__ = ["AutoHierarchicalIAF"]

# Medians and quantiles are computed from NUM_DRAWS draws, or fewer that hold MOST_NUMBERS numbers.
NUM_DRAWS, MOST_NUMBERS = 4001, 10_000_000


class AutoHierarchicalIAF(GuideWithContexts):
    r"""A guide for models with local latents, by flows: for large data, and for new data.

    The global latents come from one inverse autoregressive flow. The latents of each plate come
    from a conditional flow that all its rows share. It depends on the global latents, on the
    latents of enclosing plates, and on a context of the row: the output of an ``encoder``, or a row
    of a learned table, of ``context_dim`` numbers. Plates may be subsampled, nested, and several.
    Rows of plates that cross, such as persons and questions, are independent given the global
    latents: there :class:`~pyro_iaf.AutoIAF` is the better guide if it is not too large.

    The cost of a step grows with the minibatch and not with the data; but Pyro shuffles all rows of
    plates that ``create_plates`` or an ``AutoGuideList`` makes. A table of N rows holds
    ``N * context_dim`` numbers. :func:`~pyro_iaf.fit` updates only the rows that a step has drawn,
    and does not average them at its end as it does other parameters. Under ``pyro.infer.SVI``, all
    optimisers except ``SparseAdam`` fill a gradient for all N rows at each step, which is slow from
    some 100,000 rows on; give ``embedding_grad="sparse"`` and ``pyro.optim.SparseAdam`` there.

    Discrete latents are summed out, as under :class:`~pyro_iaf.AutoIAF`.

    A guide starts at the values of ``init_loc_fn``, as :class:`~pyro_iaf.AutoIAF` does with
    ``start="init"``.

    Args:
        model: A Pyro model.
        encoder: A module or a function that takes the model's arguments and returns contexts, of
            shape ``plate_shape + (context_dim,)``, one for each row of the plate. It runs inside
            the plate, so ``pyro.subsample(data, event_dim=...)`` is the minibatch there. If it
            returns contexts for all rows, the guide takes those of the subsample. For a model with
            several plates give a dictionary from names of plates to encoders; the name of nested
            plates is ``"outer/inner"``. Plates without an encoder have a table.
        context_dim: Size of a context; by default what the encoder returns, and 8 in tables.
        num_flows: How many flows for each group of latents.
        hidden_dims: Widths of each network's hidden layers; by default two layers of
            ``max(64, D)`` for the D numbers of a row.
        univariate: As for :class:`~pyro_iaf.AutoIAF`.
        init_loc_fn: As for :class:`~pyro_iaf.AutoIAF`.
        init_scale: Standard deviation of a fresh guide in unconstrained space.
        scale: As for :class:`~pyro_iaf.AutoIAF`, for each group.
        embedding_grad: ``"dense"``, or ``"sparse"`` for ``pyro.optim.SparseAdam``: then gradients
            of tables hold only the rows drawn, and those of the guide's other parameters have the
            form that this optimiser takes. :func:`~pyro_iaf.fit` needs neither.
        create_plates: A function of the model's arguments that returns plates for the guide to
            use, for example if the indices of a minibatch are an argument.
        name: Prefix of the guide's parameters in the store, by default ``"AutoHierarchicalIAF"``.

    Raises:
        ValueError: If an argument is out of range; at the first call, if plates and encoders don't
            match, a latent is a Delta or has infinitely many discrete values, or a context doesn't
            fit its plate.
        NotImplementedError: At the first call, if a plate is sequential, or the support of a
            latent differs between the rows of its plate.
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
        context_dims, table_shapes = [], []
        for k, group in enumerate(self.groups):
            own = 0
            if group.table is not None:
                table_shapes.append(self._table_shape(group))
                own = table_shapes[-1][1]
            elif group.plates:
                with ExitStack() as stack:
                    rows = {name: stack.enter_context(plates[name]) for name in group.plates}
                    own = self._encoded(k, plates, rows, ahead, args, kwargs).shape[-1]
            context_dims.append(own + sum(self.groups[j].size for j in group.parents))
        transforms: Any = self._modules["transforms"]
        tables: Any = self._modules["tables"]
        if not len(transforms):
            for loc, context_dim in zip(starts, context_dims, strict=True):
                start, log_scale = Start(loc, torch.ones_like(loc)), math.log(self._init_scale)
                transforms.append(self._fresh_transform(start, log_scale, context_dim))
            for shape in table_shapes:
                tables.append(nn.Parameter(starts[0].new_zeros(shape)))
        found = [(t.latent_dim, t.context_dim) for t in self._transforms()], [*map(len, tables)]
        sizes = [group.size for group in self.groups]
        wanted = [*zip(sizes, context_dims, strict=True)], [rows for rows, _ in table_shapes]
        if found != wanted:
            raise ValueError(
                "The state that was loaded is of a guide for another model: its groups have "
                f"(latents, context_dim) {found[0]} and tables of {found[1]} rows; this model "
                f"needs {wanted[0]} and {wanted[1]}. Load one that fits."
            )
        for module in (transforms, tables):
            module.to(starts[0])

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        super()._setup_prototype(*args, **kwargs)
        for site in self._latent_sites().values():
            if site["cond_indep_stack"]:
                site["fn"]._support = one_row(site["fn"].support, site["fn"].event_dim)

    def _init_loc(self, group: Group) -> Tensor:
        """The start of a group in unconstrained space, averaged over the rows of its plates."""
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
        """Samples all latents; their values in the model and in unconstrained space, by name."""
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
                    self._latent_name(group),
                    transform.posterior(),
                    infer={"is_auxiliary": True},
                )
                # Groups depend on their parents' noise, of unit scale wherever the guide moves.
                noises.append(noise_of_draw(transform, latent))
                for site, fn, value in self._split(group, latent):
                    drawn[site] = pyro.sample(site, fn), value
        return drawn

    def auxiliary_values(self, unconstrained: Mapping[str, Tensor], nesting: int) -> dict[str, Any]:
        """The vectors of the groups at latents in unconstrained space, by name of their sites.

        Args:
            unconstrained: The latents, with a dimension of draws left of ``nesting`` others.
            nesting: How many dimensions the plates take.
        """
        vectors = {}
        for group in self.groups:
            parts = []
            for name, shape in group.shapes.items():
                lead = unconstrained[name].shape[: unconstrained[name].dim() - len(shape)]
                ones = (1,) * (nesting + 1 - len(lead))
                parts.append(unconstrained[name].reshape(*lead, *ones, shape.numel()))
            vectors[self._latent_name(group)] = torch.cat(parts, -1)
        return vectors

    def _latent_name(self, group: Group) -> str:
        return "_".join(filter(None, (f"_{self._pyro_name}", group.name, "latent")))

    def _transform_at(self, k: int, contexts: Sequence[Tensor]) -> Any:
        """The flow of a group, conditioned on its contexts."""
        transform: Any = self._modules["transforms"][k]  # type: ignore[index]
        if not contexts:
            return transform
        shape = torch.broadcast_shapes(*(context.shape[:-1] for context in contexts))
        return transform.condition(torch.cat([c.expand(*shape, -1) for c in contexts], -1))

    def _split(self, group: Group, latent: Tensor) -> Iterator[tuple[str, SiteDelta, Tensor]]:
        """The sites of a vector of latents: name, point, and value in unconstrained space."""
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
        discrete: bool | str = False,
        **kwargs: Any,
    ) -> dict[str, Tensor]:
        """Draws from the guide, all at once, in the units of the model.

        Args:
            num_samples: How many draws.
            args: What the model takes; needed only if the guide was never called or set up, if it
                has an encoder, and to resample. The data may be new to the encoder.
            rows: Indices of the rows to draw, by name of the plate; by default all.
            resample: As for :class:`~pyro_iaf.AutoIAF`; only for models that don't subsample.
            discrete: Likewise.
            kwargs: As ``args``.

        Returns:
            For each site a tensor of shape ``(num_samples,) + shape`` of its value in the model,
            with all rows of its plates or those chosen.

        Raises:
            ValueError: If there is no such plate or row, or if ``resample`` or ``discrete`` is
                given with ``rows`` or for a model that subsamples.

        Warns:
            UserWarning: If the importance weights are too unreliable to resample by.
        """
        check_size("num_samples", num_samples)
        if resample or discrete:
            self._setup_on_demand(*args, **kwargs)
            if rows is not None or not all(map(self._is_whole, self._prototype_frames)):
                raise ValueError(
                    "Importance weights and discrete latents are of all latents together, so all "
                    "rows have to be there: leave out rows, and give a model that does not "
                    "subsample."
                )
        if resample:
            sites = self._resampled(num_samples, args, kwargs)
        else:
            sites = self._constrained(self._draws(num_samples, args, kwargs, rows))
        return with_discrete(self, sites, discrete, args, kwargs)

    def _fixed_draws(
        self, *args: Any, rows: Mapping[str, Any] | None = None, **kwargs: Any
    ) -> dict[str, Tensor]:
        self._setup_on_demand(*args, **kwargs)
        device = self._transforms()[0].origin.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(0)
            one = self._draws(1, args, kwargs, rows)
            numbers = sum(value.numel() for value in one.values())
            num_draws = max(101, min(NUM_DRAWS, MOST_NUMBERS // numbers))
            return self._draws(num_draws, args, kwargs, rows)

    def _draws(
        self, num_draws: int, args: Args, kwargs: Kwargs, rows: Mapping[str, Any] | None
    ) -> dict[str, Tensor]:
        """Unconstrained values of the sites, of shape ``(num_draws,) + shape``."""
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
            with handler_lock, poutine.block():
                drawn = draw(plates, contexts, args, kwargs)
            for name, (value, free) in drawn.items():
                fn = self._latent_sites()[name]["fn"]
                num_event = free.dim() - value.dim() + fn.event_dim
                shape = free.shape[free.dim() - len(fn.batch_shape) - num_event :]
                parts.setdefault(name, []).append(particles.unpadded(free, shape, size))
        return {name: torch.cat(draws) for name, draws in parts.items()}

    def _num_units(self, plates: Mapping[str, pyro.plate]) -> int:
        """How many numbers the widest layers hold in one draw of all rows."""
        most = 1
        for group, transform in zip(self.groups, self._transforms(), strict=True):
            num_rows = math.prod(plates[name].subsample_size for name in group.plates)
            most = max(most, num_rows * transform.num_units)
        return most

    # State

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        transforms: Any = self._modules["transforms"]
        tables: Any = self._modules["tables"]
        if self.prototype_trace is None and not len(transforms):
            # The guide was never set up, so the state determines what to build.
            while transform := self._rebuilt(state_dict, prefix, f"transforms.{len(transforms)}"):
                transforms.append(transform)
            while (table := state_dict.get(f"{prefix}tables.{len(tables)}")) is not None:
                tables.append(nn.Parameter(torch.empty_like(table)))
        self._state_was_loaded = True
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
