"""An automatic guide with one flow over all the latents of a model.

The latents in unconstrained space, one after the other, are one vector, which
:class:`~pyro_iaf.guides.transform.GuideTransform` draws.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pyro
import torch
from pyro.distributions.util import broadcast_shape
from pyro.infer.autoguide.guides import AutoContinuous
from pyro.poutine.runtime import am_i_wrapped
from torch import Tensor
from torch.distributions import biject_to

from .._validation import check_callable, check_context, check_size, warn
from ..distributions import DiagonalNormal
from ..flows.mixture import GivenComponent
from ..flows.posterior import Posterior
from ..flows.scored_guide import ScoredDraws
from ..models import param_store
from ..models.arguments import Args, Kwargs, Program
from ..nn.univariate import UnivariateMap
from ..solvers.path_score import draw_scored
from .latents import joined, refuse_subsamples, with_discrete
from .mixture import Mixture, MixtureGuide
from .pathfinder import Start, StartNotFound, further_starts, pathfinder
from .site_delta import SiteDeltas
from .structured_transform import (
    SMALL_SPREAD,
    elbo_of,
    has_structure,
    settings_like,
    structured_parts,
    structured_transform,
)
from .transform import GuideTransform, Transform, entries_below

__all__ = ["AutoIAF"]

# Medians and quantiles are computed from this many draws and their mirror images.
NUM_MIRRORED = 5000


class AutoIAF(MixtureGuide, AutoContinuous):
    r"""A guide over all the continuous latents of a model, by inverse autoregressive flows.

    Noise from a :class:`~pyro_iaf.DiagonalNormal` passes through ``num_flows`` flows, a learned
    bend of each coordinate, and a learned loc and scale. The result is one vector of latents in
    unconstrained space, which Pyro's bijections map to the sites. The guide can represent
    correlations, skewness and funnels, which a mean-field guide can't. A fresh guide is close to a
    normal distribution at its start.

    Use it as any of Pyro's guides. A step of SVI costs one network pass per flow, O(D H + H²) per
    particle for D latents and widths H. The structure of the model, its shapes and the supports of
    its latents have to stay as they are at the first call.

    Discrete latents are summed out exactly, by Pyro's enumeration, as if all of them were marked
    ``infer={"enumerate": "parallel"}``; ``guide.discrete`` names them, and
    ``sample_posterior(..., discrete=True)`` draws them given the others. That goes for
    :func:`~pyro_iaf.fit`, :func:`~pyro_iaf.diagnose`, :func:`~pyro_iaf.to_arviz`,
    :class:`~pyro_iaf.CompiledTrace_ELBO` and :class:`~pyro_iaf.TraceSTL_ELBO`; in a loop with an
    ELBO of Pyro's own, take ``TraceEnum_ELBO``. A run costs the product of the numbers of values
    that depend on each other: rows belong in plates, chains in ``pyro.markov``.

    A guide owns the entries under its ``name`` in Pyro's parameter store. It adopts entries that
    came from a file. It replaces those of another guide, with a warning if that guide is alive. A
    state from ``load_state_dict``, also before the first call, takes precedence over the store.
    Pickling drops the model, ``init_loc_fn`` and ``create_plates``.

    Args:
        model: A Pyro model.
        num_flows: How many flows; each reverses the order of the one before it.
        hidden_dims: Widths of each network's hidden layers, a list or one int. By default two
            layers of ``max(64, D)``.
        univariate: How a flow maps each coordinate: ``"affine"``, ``"gated"`` or a
            :class:`~pyro_iaf.UnivariateMap`.
        num_components: How many flows share the posterior, each with a weight, for a posterior
            with several modes. With ``"auto"`` the guide begins with one, and :func:`fit` without
            ``num_steps`` adds others, up to 8, where a search finds modes that the guide misses.
            With an int, components start at the modes that Pathfinder finds. The gradient of the
            ELBO is unbiased for the weights too: Pyro's ELBOs draw the component and take the score
            function; ``fit`` draws as often from each. ``TraceMeanField_ELBO`` takes one component
            only, and of several :class:`~pyro_iaf.TraceSTL_ELBO` takes the ordinary gradient.
        structure: With ``"auto"`` the guide looks for a few global latents and, given them, a
            sparse graph of the others among 8 to 20,000 latents, as rows of plates and series
            have. Where it finds one, the flows are over the globals alone, and the others are
            drawn by a sparse factor that moves with the globals; ``guide.structure`` tells. With
            False the flows are over all latents.
        start: Where a fresh guide starts: ``"pathfinder"``, at the Gaussian with the highest ELBO
            on a few short paths up the log joint density; or ``"init"``, at the values of
            ``init_loc_fn``. By default ``"pathfinder"``, but ``"init"`` if ``init_scale`` or
            ``encoder`` is given.
        init_loc_fn: Gives the start value of each site, as for Pyro's guides; by default
            ``init_to_median``. Sites that can't be sampled, such as improper priors, start at a
            draw in unconstrained space. With ``"pathfinder"`` the first path begins there.
        init_scale: Standard deviation of a fresh guide in unconstrained space that starts at
            ``"init"``; by default 0.1.
        scale: Whether the last step learns a ``"dense"`` lower-triangular scale or a ``"diagonal"``
            one; ``"auto"`` is dense for up to 400 latents.
        encoder: A module or a function that takes the model's arguments and returns a context, of
            shape ``(context_dim,)``. The flows depend on it at every layer, so that one guide has
            the posteriors of many data sets; ``fit(..., simulate=...)`` trains it on data from the
            prior. Such a guide needs the arguments for every draw.
        context_dim: Size of the context; by default what the encoder returns at the first call.
        create_plates: A function of the model's arguments that returns a plate, or several, for
            the guide to use.
        name: Prefix of the guide's parameters in the store, by default ``"AutoIAF"``. Two guides in
            one program need two names.

    Raises:
        ValueError: If an argument is out of range, or, at the first call, if a latent is a Delta,
            on a sphere, or discrete with infinitely many values or too large a table.
        RuntimeError: At the first call, if the model has no latents.
        NotImplementedError: At the first call, if a latent is in a plate that is subsampled, or in
            a sequential one.

    References:
        Kingma et al. (2016), https://arxiv.org/abs/1606.04934

    Example:
        >>> def model():
        ...     scale = pyro.sample("scale", dist.HalfNormal(torch.tensor(1.0)))
        ...     pyro.sample("weights", dist.Normal(torch.zeros(3), scale).to_event(1))
        >>> guide = AutoIAF(model)
        >>> elbo = pyro.infer.Trace_ELBO()
        >>> svi = pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), elbo)
        >>> losses = [svi.step() for _ in range(10)]
        >>> guide.sample_posterior(100)["weights"].shape
        torch.Size([100, 3])
    """

    _own_names = ("transform", "mixture", "encoder")

    def __init__(
        self,
        model: Callable[..., Any],
        *,
        num_flows: int = 2,
        hidden_dims: int | Sequence[int] | None = None,
        univariate: str | UnivariateMap = "affine",
        num_components: int | str = "auto",
        structure: str | bool = "auto",
        start: str | None = None,
        init_loc_fn: Callable[..., Any] | None = None,
        init_scale: float | None = None,
        scale: str = "auto",
        encoder: Callable[..., Tensor] | None = None,
        context_dim: int | None = None,
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
        if start not in (None, "init", "pathfinder"):
            raise ValueError(
                f'start should be "pathfinder" or "init", or None for the default; got {start!r}.'
            )
        if start == "pathfinder" and init_scale is not None:
            raise ValueError(
                'init_scale is for start="init": with start="pathfinder" the guide finds its scale.'
            )
        # Pathfinder finds the posterior of one data set only.
        can_search = init_scale is None and encoder is None
        self._start = start or ("pathfinder" if can_search else "init")
        if structure not in ("auto", False):
            raise ValueError(f'structure should be "auto" or False; got {structure!r}.')
        self._looks_for_structure = bool(structure)
        check_callable("encoder", encoder, optional=True)
        if context_dim is not None and encoder is None:
            raise ValueError("context_dim is the size of an encoder's output; give an encoder.")
        if num_components != "auto":
            num_components = check_size("num_components", num_components)
            if encoder is not None and num_components > 1:
                raise ValueError(
                    "A guide with an encoder has one component, whose flows depend on the data; "
                    f"got num_components={num_components}. Leave out one of the two."
                )
        self.num_components = num_components
        self.encoder = encoder
        self.context_dim = None if context_dim is None else check_size("context_dim", context_dim)
        self.transform = self.mixture = None

    # Building

    def _build(self, model: Program, args: Args, kwargs: Kwargs) -> None:
        refuse_subsamples(self._latent_sites())
        loc = self._init_loc()
        transform = self._transform
        if self._encoder is not None:
            self.context_dim = self._context(args, kwargs).shape[-1]
        if transform is None:
            self.transform, *others = self._fresh_transforms(model, loc, args, kwargs)
            if others:
                self.mixture = Mixture(others, loc.new_zeros(1 + len(others)))
        elif self.latent_dim != (loaded := transform.latent_dim):
            raise ValueError(
                f"The state that was loaded is of a guide over {loaded} numbers in "
                f"unconstrained space; the latents of this model have {self.latent_dim}. "
                "Load one that fits."
            )
        for module in (self._transform, self._mixture):
            if module is not None:
                module.to(loc)  # a state may come from another device
        param_store.forget(f"{self._pyro_name}.mixture", self._adopt_parameters())

    def _init_loc(self) -> Tensor:
        sites = self._latent_sites().values()
        values = [biject_to(site["fn"].support).inv(site["value"].detach()) for site in sites]
        return joined([value.reshape(-1) for value in values])

    def _fresh_transforms(
        self, model: Program, loc: Tensor, args: Args, kwargs: Kwargs
    ) -> list[Transform]:
        """The transform of each fresh component."""
        num, context_dim = self._num_at_first(), self.context_dim or 0
        at_loc = Start(loc.detach().clone(), torch.ones_like(loc))
        around = [at_loc.beside(self._init_scale) for _ in range(num - 1)]
        log_scale = math.log(self._init_scale)

        def by_init() -> list[Transform]:
            return [self._fresh_transform(s, log_scale, context_dim) for s in (at_loc, *around)]

        saved = param_store.all_from_file(f"{self._pyro_name}.transform")
        if has_structure(saved) and self._may_have_structure:
            parts, settings = structured_parts(saved), settings_like(self)
            if len(parts.structure.before) == len(loc):
                return [structured_transform(*parts, **settings) for _ in range(num)]
        if saved or self._start == "init":
            return by_init()
        joint, dense = self._joint_of_start(model, args, kwargs), self._is_dense(len(loc))
        structured = self._structured_near(joint, loc.detach()) if num == 1 else None
        try:
            if structured is not None:
                elbo, spread = elbo_of(joint, structured.posterior())
                if spread < SMALL_SPREAD:
                    return [structured]
            first = pathfinder(joint, loc.detach(), dense)
            if structured is not None and elbo > elbo_of(joint, first.posterior())[0] - 1.0:
                return [structured]
            starts = [first, *further_starts(joint, first, dense, num - 1)]
            return [self._fresh_transform(start, 0.0, context_dim) for start in starts]
        except StartNotFound as why:
            if structured is not None:
                return [structured]
            warn(
                f"AutoIAF looked for a start by Pathfinder and found none: {why}. It starts at the "
                f"values of init_loc_fn, with standard deviation {self._init_scale}. Give "
                'start="init" to choose that without this warning.'
            )
            return by_init()

    # Drawing

    def get_base_dist(self) -> DiagonalNormal:
        """The distribution of the noise: a standard normal over vectors."""
        return self._built().noise()

    def get_transform(self, *args: Any, **kwargs: Any) -> GuideTransform:
        """The transform from the noise to all latents in unconstrained space."""
        transform = self._built(*args, **kwargs)
        if self._num_built > 1:
            raise ValueError(
                f"This guide has {self._num_built} components, so no one transform carries "
                "noise to its draws. Give AutoIAF(model, num_components=1) where one is needed, as "
                "for NeuTraReparam."
            )
        if isinstance(transform, GuideTransform):
            return transform
        return transform.condition(self._context(args, kwargs))

    def _context(self, args: Args, kwargs: Kwargs) -> Tensor:
        """The encoder's output for the model's arguments, checked."""
        assert self._encoder is not None
        context = self._encode(self._encoder, args, kwargs)
        if not isinstance(context, Tensor) or context.dim() != 1:
            got = tuple(context.shape) if isinstance(context, Tensor) else type(context).__name__
            raise ValueError(
                "An encoder should return one context for all the data, of shape (context_dim,); "
                f"got {got}. Sum or average over the data, or flatten."
            )
        check_context(context, self.context_dim)
        return context

    def get_posterior(self, *args: Any, **kwargs: Any) -> Any:
        """The guide's distribution over all latents, as one vector in unconstrained space."""
        self._built(*args, **kwargs)
        if self._num_built > 1:
            return self._mixed()
        transform = self.get_transform(*args, **kwargs)
        return Posterior(self.get_base_dist(), [transform], validate_args=False)

    def sample_latent(self, *args: Any, **kwargs: Any) -> Tensor:
        """Draws the vector of latents, after the number of its component if there are several."""
        posterior = self.get_posterior(*args, **kwargs)
        infer: Any = {"is_auxiliary": True}
        if self._num_built > 1:
            name = f"_{self._pyro_name}_component"
            component = pyro.sample(name, posterior.component(), infer=infer)
            posterior = GivenComponent(posterior, component)
        return pyro.sample(f"_{self._pyro_name}_latent", posterior, infer=infer)

    def sample_with_score(self, num: int, *args: Any, **kwargs: Any) -> ScoredDraws:
        """Draws ``num`` vectors in unconstrained space, with log density and its gradient."""
        self._built(*args, **kwargs)
        if self._num_built > 1:
            return self._mixed().stratified(num)
        transform = self.get_transform(*args, **kwargs)
        origin = transform.origin
        noise = torch.randn(num, len(origin), dtype=origin.dtype, device=origin.device)
        return ScoredDraws(*draw_scored(transform.parts, noise))

    def widen_tails(self, by: float) -> Callable[[], None]:
        """Makes the tails of all latents heavier; returns a function that undoes it."""
        undone = [transform.widen_tails(by) for transform in self._transforms()]

        def undo() -> None:
            for one in undone:
                one()

        return undo

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Draws every site of the model; returns them by name."""
        self.setup(*args, **kwargs)
        self._state_parameters()
        with SiteDeltas(self.lifted, is_scored=am_i_wrapped()):
            sites: dict[str, Tensor] = super().forward(*args, **kwargs)
        self._cancel_priors(sites, self.plates, args, kwargs)
        return sites

    def _unpack_latent(self, latent: Tensor) -> Iterator[tuple[Any, Tensor]]:
        """Each site of the model with its part of the latent vector.

        Pyro's method computes shapes by ``torch.broadcast_shapes``, which imports sympy: that takes
        as long as hundreds of steps.
        """
        parts, batch_shape = self._split(latent), latent.shape[:-1]
        for name, site in self._latent_sites().items():
            shape = parts[name].shape[len(batch_shape) :]
            event_dim = site["fn"].event_dim + len(shape) - site["value"].dim()
            padded = broadcast_shape(shape, batch_shape + (1,) * event_dim)
            yield site, parts[name].reshape(padded)

    @torch.no_grad()
    def sample_posterior(
        self,
        num_samples: int,
        *args: Any,
        resample: bool = False,
        discrete: bool | str = False,
        **kwargs: Any,
    ) -> dict[str, Tensor]:
        """Draws from the guide, all at once, in the units of the model.

        Args:
            num_samples: How many draws.
            args: What the model takes; needed only if the guide was never called or set up, if it
                has an encoder, to resample, and for discrete latents.
            discrete: Whether to draw the model's discrete latents too, each given the other latents
                of its draw and the data; ``"map"`` gives their most probable values together. It
                runs the model.
            resample: Whether to resample the draws, from four times as many, by their importance
                weights. That brings them nearer to the posterior if the guide is good enough: see
                :func:`~pyro_iaf.diagnose`. It runs the model.
            kwargs: Likewise.

        Returns:
            For each site a tensor of shape ``(num_samples,) + shape`` of its value in the model.

        Warns:
            UserWarning: If the importance weights are too unreliable to resample by.
        """
        check_size("num_samples", num_samples)
        posterior = self._ready_posterior(*args, **kwargs)
        if resample:
            sites = self._resampled(num_samples, args, kwargs)
        else:
            sites = self._constrained(self._split(posterior.sample((num_samples,))))
        return with_discrete(self, sites, discrete, args, kwargs)

    def _ready_posterior(self, *args: Any, **kwargs: Any) -> Any:
        self._setup_on_demand(*args, **kwargs)
        self._adopt_parameters()
        return self.get_posterior(*args, **kwargs)

    def _fixed_draws(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """An odd number of draws, from noise that is symmetric about zero.

        So the median of a symmetric guide is exact, and the median commutes with monotone maps.
        """
        self._ready_posterior(*args, **kwargs)
        several = self._num_built > 1
        transforms = self._transforms() if several else [self.get_transform(*args, **kwargs)]
        loc, weights = transforms[0].origin, self.component_weights
        generator = torch.Generator(loc.device).manual_seed(0)
        shape = (NUM_MIRRORED, *loc.shape)
        noise = torch.randn(shape, generator=generator, dtype=loc.dtype, device=loc.device)
        parts = noise.tensor_split((NUM_MIRRORED * weights.cumsum(0)[:-1]).round().long().cpu())
        pairs = zip(transforms, parts, strict=True)
        draws = [transform(torch.cat([part, -part])) for transform, part in pairs]
        draws.append(transforms[int(weights.argmax())](torch.zeros_like(noise[:1])))
        return self._split(torch.cat(draws))

    def _split(self, latent: Tensor) -> dict[str, Tensor]:
        """Unconstrained values of the sites, of shape ``batch_shape + shape``."""
        shapes = self._unconstrained_shapes
        parts = zip(shapes, latent.split([*map(math.prod, shapes.values())], -1), strict=True)
        return {name: part.reshape(latent.shape[:-1] + shapes[name]) for name, part in parts}

    # State and copies

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        given = entries_below(state_dict, f"{prefix}transform.")
        if self.prototype_trace is None and not self._fits(given):
            # The guide was never set up, so the state determines what to build.
            self.transform = self._rebuilt(state_dict, prefix, "transform")
            if (transform := self._transform) is not None:
                self.context_dim = transform.context_dim or None
                if transform.networks:
                    self.hidden_dims = transform.networks[0].hidden_dims
                self.scale = "dense" if transform.is_dense else "diagonal"
        self._state_was_loaded = self._state_was_loaded or self._fits(given)
        self._take_components(state_dict, prefix, args[4])
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _fits(self, state: dict[str, Tensor]) -> bool:
        transform = self._transform
        return transform is not None and _shapes(transform.state_dict()) == _shapes(state)


def _shapes(state: dict[str, Tensor]) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in state.items()}
