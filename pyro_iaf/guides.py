r"""Guides that write themselves: a flow over all the latents of a model.

.. math::
    z = c + R \, \bigl( \mu + S \, b(f(x)) \bigr), \qquad x \sim N(0, I)

where :math:`f` is a stack of inverse autoregressive flows, nearly the identity at first, and
:math:`z` holds the model's latents, each carried to the real line, one after the other. The frame
:math:`c, R` is where the guide starts, the rest is learnt in its units (:mod:`pyro_iaf.affine`).
"""

from __future__ import annotations

import copy
import inspect
import math
import warnings
from collections.abc import Callable, Sequence
from numbers import Real
from typing import Any

import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer.autoguide.guides import AutoContinuous, AutoGuide
from pyro.infer.autoguide.initialization import InitMessenger, init_to_median
from torch import Tensor, nn
from torch.distributions import biject_to

from . import memory, store
from .affine import LocScale
from .conditional import (
    ConditionalInverseAutoregressiveFlowStack,
    conditional_inverse_autoregressive_flow,
)
from .distributions import DiagonalNormal
from .initialization import Start, StartNotFound, or_draw, pathfinder
from .joint import Given, LogJoint
from .networks import check_context, check_size, check_widths
from .sites import SiteDeltas, each_tensor, without_graph
from .transforms import InverseAutoregressiveFlowStack, inverse_autoregressive_flow
from .weights import Particles, pareto_k, resampled

__all__ = ["AutoIAF"]

GATE_BIAS = 2.0

Transform = InverseAutoregressiveFlowStack | ConditionalInverseAutoregressiveFlowStack

# More latents than this have a scale for each by default, and not a matrix.
MAX_DENSE = 400

# Medians and quantiles are read off this many draws and their mirror images.
NUM_MIRRORED = 5000


class AutoIAF(AutoContinuous):
    r"""A guide over all the continuous latents of a model, by inverse autoregressive flows.

    Noise from a :class:`~pyro_iaf.DiagonalNormal` goes through ``num_flows`` flows, a learned
    bend of each coordinate, and a learned loc and scale, and comes out as one vector of latents in
    unconstrained space, which Pyro's bijections carry to the sites. It sees correlations, skewness
    and funnels that a mean-field guide can't. A fresh guide is nearly a normal where it starts.

    Use it as any of Pyro's guides. A step of SVI costs one network pass per flow, O(D H + H²) per
    particle for D latents and widths H. The structure of the model, its shapes and the supports of
    its latents have to stay as they are at the first call.

    A guide owns the entries under its ``name`` in Pyro's parameter store. Entries that came from a
    file are adopted; those of another guide are replaced, with a warning if that guide is alive.
    A state that was loaded with ``load_state_dict``, also before the first call, wins over the
    store. Pickling leaves the model behind, and what belongs to it: ``init_loc_fn`` and
    ``create_plates``.

    Args:
        model: A Pyro model.
        num_flows: How many flows; each has the order of the one before it reversed.
        hidden_dims: Widths of each network's hidden layers, a list or one int. By default two
            layers of ``max(64, D)``.
        gated: Whether the flows gate instead of shift and scale.
        start: Where a fresh guide sits: ``"pathfinder"``, at the Gaussian of the highest ELBO that
            a few short climbs of the log joint density meet; or ``"init"``, around what
            ``init_loc_fn`` says. By default ``"pathfinder"``, unless ``init_scale`` is given.
        init_loc_fn: Says where each site starts, as for Pyro's guides; by default
            ``init_to_median``. Sites that can't be sampled, as improper priors, start at a draw in
            unconstrained space. With ``"pathfinder"`` the first path begins there.
        init_scale: Standard deviation of a fresh guide in unconstrained space that starts at
            ``"init"``; by default 0.1.
        scale: Whether the last step learns a ``"dense"`` lower-triangular scale or a ``"diagonal"``
            one; ``"auto"`` is dense for up to 400 latents.
        encoder: What the guide sees of the model's arguments: a module or a function that takes
            them and returns a context, of shape ``(context_dim,)``. The flows listen to it at every
            layer, so that one guide holds the posteriors of many data sets; ``fit(...,
            simulate=...)`` trains it on data from the prior. Such a guide starts at ``"init"``, and
            wants the arguments wherever it draws.
        context_dim: Size of the context; by default what the encoder returns at the first call.
        create_plates: A function of the model's arguments that returns a plate, or several, for
            the guide to use.
        name: What the guide's parameters are called in the store, by default ``"AutoIAF"``. Two
            guides in one program need two names.

    Raises:
        ValueError: If an argument is out of range, or, at the first call, if a latent is discrete
            or on a sphere.
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

    def __init__(
        self,
        model: Callable[..., Any],
        *,
        num_flows: int = 2,
        hidden_dims: int | Sequence[int] | None = None,
        gated: bool = False,
        start: str | None = None,
        init_loc_fn: Callable[..., Any] | None = None,
        init_scale: float | None = None,
        scale: str = "auto",
        encoder: Callable[..., Tensor] | None = None,
        context_dim: int | None = None,
        create_plates: Callable[..., Any] | None = None,
        name: str | None = None,
    ) -> None:
        given = {
            "model": model,
            "init_loc_fn": init_loc_fn,
            "encoder": encoder,
            "create_plates": create_plates,
        }
        for word, thing in given.items():
            if not callable(thing) and (thing is not None or word == "model"):
                raise ValueError(f"{word} should be a callable; got {thing!r}.")
        AutoGuide.__init__(self, model, create_plates=create_plates)
        self.num_flows = check_size("num_flows", num_flows)
        self.hidden_dims = None if hidden_dims is None else check_widths(hidden_dims, 1)
        self.gated = bool(gated)
        if start not in (None, "init", "pathfinder"):
            raise ValueError(
                f'start should be "pathfinder" or "init", or None for the default; got {start!r}.'
            )
        if start == "pathfinder" and init_scale is not None:
            raise ValueError(
                'init_scale belongs to start="init": with start="pathfinder" the scale is found.'
            )
        # Pathfinder starts at the posterior of one data set.
        found = init_scale is None and encoder is None
        self._start = start or ("pathfinder" if found else "init")
        if context_dim is not None and encoder is None:
            raise ValueError("context_dim is the size of what an encoder returns; give an encoder.")
        self.encoder = encoder
        self.context_dim = None if context_dim is None else check_size("context_dim", context_dim)
        if scale not in ("auto", "dense", "diagonal"):
            raise ValueError(f'scale should be "auto", "dense" or "diagonal"; got {scale!r}.')
        self.scale = scale
        self._init_loc_fn = or_draw(init_to_median if init_loc_fn is None else init_loc_fn)
        if not (init_scale is None or (isinstance(init_scale, Real) and 0 < init_scale < math.inf)):
            raise ValueError(f"init_scale should be a positive number; got {init_scale!r}.")
        self._init_scale = 0.1 if init_scale is None else float(init_scale)
        if name is not None:
            if not isinstance(name, str) or not name or "$" in name:
                raise ValueError(
                    f"name should be a string, not empty and without '$'; got {name!r}."
                )
            self._pyro_name = name
        self.transform: Transform | None = None
        self._conversions: list[Callable[[Tensor], Tensor]] = []  # asked for before the setup
        self._state_was_loaded = False

    # Building

    def setup(self, *args: Any, **kwargs: Any) -> None:
        """Builds the guide for a model with these arguments; does nothing if that was done.

        After it the parameters are there, for an optimiser of PyTorch. The model runs away from the
        caller's handlers, some hundred times where a start is looked for and once where not, on
        the subsample of its first run. Nothing is drawn from the guide.
        """
        if self.prototype_trace is not None:
            return
        if self._model is None:
            raise RuntimeError(
                "This guide was pickled before its first call, and pickling leaves the model "
                "behind. Make a new one, AutoIAF(model), and give it the state with "
                "load_state_dict."
            )
        master = None if self.master is None else self.master()
        with poutine.block(), torch.inference_mode(False):
            if master is not None and master.prototype_trace is None:
                master._setup_prototype(*args, **kwargs)
            self._setup_prototype(*args, **kwargs)
            if master is None:
                self._create_plates(*args, **kwargs)

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        model = self._model
        self._model = (InitMessenger(self._init_loc_fn)(self.model),)
        try:
            super()._setup_prototype(*args, **kwargs)
            self._refuse_subsamples()
            loc = self._init_loc()
            transform = self._transform
            if self._encoder is not None:
                self.context_dim = self._context(args, kwargs).shape[-1]
            if transform is None:
                start, log_scale = self._find_start(model[0], loc, args, kwargs)
                self.transform = transform = self._fresh_transform(start, log_scale)
            elif self.latent_dim != (loaded := transform.parts[-1].input_dim):
                raise ValueError(
                    f"The state that was loaded is of a guide over {loaded} numbers in "
                    f"unconstrained space; the latents of this model have {self.latent_dim}. "
                    "Load one that fits."
                )
            transform.to(loc)  # a state may come from another device
        except BaseException:
            self.prototype_trace = None  # so that the next call tries again
            raise
        finally:
            self._model = model
        self.prototype_trace = without_graph(self._latent_sites())
        conversions, self._conversions = self._conversions, []
        for convert in conversions:
            self._apply(convert)

    def _latent_sites(self) -> dict[str, Any]:
        """The model's latents, in its order, as they were when the guide was set up."""
        assert self.prototype_trace is not None
        return dict(self.prototype_trace.iter_stochastic_nodes())

    def _refuse_subsamples(self) -> None:
        for name, site in self._latent_sites().items():
            for frame in site["cond_indep_stack"]:
                full_size = frame.full_size or frame.size
                if frame.size != full_size:
                    raise NotImplementedError(
                        f"Site '{name}' is local to plate '{frame.name}', which is subsampled: "
                        f"{frame.size} of {full_size}. AutoIAF holds all latents in one vector, so "
                        "it can't follow a subsample. Run it on all the data; or put AutoIAF on "
                        "the other sites and a guide that subsamples, as AutoNormal, on this one, "
                        "in an AutoGuideList with create_plates. (AutoHierarchicalIAF will do "
                        "both; it is not there yet.)"
                    )

    def _init_loc(self) -> Tensor:
        parts = [
            biject_to(site["fn"].support).inv(site["value"].detach()).reshape(-1)
            for site in self._latent_sites().values()
        ]
        # An improper prior over real numbers knows of no device.
        device = next((part.device for part in parts if part.device.type != "cpu"), None)
        loc = torch.cat([part.to(device) for part in parts])
        return loc if loc.is_floating_point() else loc.to(torch.get_default_dtype())

    def _find_start(
        self, model: Callable[..., Any], loc: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Start, float]:
        """The frame of a fresh guide, and the logarithm of its scale in that frame."""
        at_loc = Start(loc.detach().clone(), torch.ones_like(loc)), math.log(self._init_scale)
        if self._start == "init" or store.has_from_file(self._entries):
            return at_loc
        latents: dict[str, Any] = dict(without_graph(self._latent_sites()).nodes)
        with Given({name: site["value"] for name, site in latents.items()}):
            trace = poutine.trace(model).get_trace(*args, **kwargs)  # with data and subsamples
        joint = LogJoint(model, trace, args, kwargs, latents)
        try:
            return pathfinder(joint, loc.detach(), self._is_dense(len(loc))), 0.0
        except StartNotFound as why:
            warnings.warn(
                f"AutoIAF looked for a start of the guide by Pathfinder and found none: {why}. It "
                f"starts at what init_loc_fn says, with standard deviation {self._init_scale}; "
                'start="init" chooses that without this warning.',
                UserWarning,
                stacklevel=2,
            )
            return at_loc

    def _is_dense(self, latent_dim: int) -> bool:
        return self.scale == "dense" or (self.scale == "auto" and latent_dim <= MAX_DENSE)

    def _fresh_transform(self, start: Start, log_scale: float) -> Transform:
        """The flows, nearly the identity, and the final affine."""
        D = len(start.loc)
        settings: dict[str, Any] = {
            "hidden_dims": 2 * [max(64, D)] if self.hidden_dims is None else self.hidden_dims,
            "num_flows": self.num_flows,
            "gated": self.gated,
            "gate_bias": GATE_BIAS,
            # The last flow takes the latents as the model draws them: causes before effects.
            "order": torch.arange(D) if self.num_flows % 2 else torch.arange(D).flip(0),
        }
        if self.gated:  # each flow contracts
            log_scale += self.num_flows * math.log1p(math.exp(-GATE_BIAS))
        flows: Any
        if self._encoder is None:
            flows = inverse_autoregressive_flow(D, **settings)
            kind: Any = InverseAutoregressiveFlowStack
        else:
            assert self.context_dim is not None
            flows = conditional_inverse_autoregressive_flow(D, self.context_dim, **settings)
            kind = ConditionalInverseAutoregressiveFlowStack
        transform: Transform = kind([flows]) if self.num_flows == 1 else flows
        # In the model's own precision, whatever the default is.
        affine = LocScale(start.loc, start.scale, log_scale, self._is_dense(D))
        transform.to(start.loc).parts.append(affine)  # type: ignore[union-attr]  # a ModuleList
        return transform

    @property
    def model(self) -> Callable[..., Any]:
        if self._model is None:
            raise RuntimeError("This guide has no model: pickling leaves it behind.")
        model: Callable[..., Any] = self._model[0]
        return model

    # Drawing

    def get_base_dist(self) -> DiagonalNormal:
        """The noise: a standard normal over vectors."""
        origin: Tensor = self._built().parts[-1].frame[0]  # type: ignore[index]
        zeros = torch.zeros_like(origin)
        return DiagonalNormal(zeros, torch.ones_like(zeros), validate_args=False)

    def get_transform(self, *args: Any, **kwargs: Any) -> InverseAutoregressiveFlowStack:
        """What carries the noise to all latents in unconstrained space, as one transform."""
        transform = self._built(*args, **kwargs)
        if isinstance(transform, InverseAutoregressiveFlowStack):
            return transform
        return transform.condition(self._context(args, kwargs))

    def _context(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """What the encoder makes of the model's arguments."""
        assert self._encoder is not None
        try:
            context = self._encoder(*args, **kwargs)
        except Exception as error:
            if args or kwargs:
                raise
            raise ValueError(
                "This guide has an encoder, so it wants the model's arguments wherever it draws: "
                "guide.sample_posterior(1000, *args), guide.median(*args), fit(model, guide, args) "
                "or fit(..., simulate=[...])."
            ) from error
        if not isinstance(context, Tensor) or context.dim() != 1:
            got = tuple(context.shape) if isinstance(context, Tensor) else type(context).__name__
            raise ValueError(
                f"An encoder should return one context for all the data, of shape (context_dim,); "
                f"got {got}. Sum or average over the data, or flatten."
            )
        check_context(context, self.context_dim)
        return context

    @property
    def _encoder(self) -> Callable[..., Tensor] | None:
        """Without telling Pyro, see ``_transform``."""
        return self._modules.get("encoder") or self.__dict__.get("encoder")

    def get_posterior(self, *args: Any, **kwargs: Any) -> dist.TransformedDistribution:
        """The guide's distribution over all latents, as one vector in unconstrained space."""
        transform = self.get_transform(*args, **kwargs)
        return _Posterior(self.get_base_dist(), [transform], validate_args=False)

    def _built(self, *args: Any, **kwargs: Any) -> Transform:
        """The transform, built if need be."""
        if self._transform is None:
            self._setup_on_demand(*args, **kwargs)
        assert self._transform is not None
        return self._transform

    @property
    def _transform(self) -> Transform | None:
        """Without telling Pyro, which makes statements of all parameters if asked by attribute."""
        return self._modules.get("transform")  # type: ignore[return-value]

    def _setup_on_demand(self, *args: Any, **kwargs: Any) -> None:
        try:
            self.setup(*args, **kwargs)
        except TypeError as error:
            if args or kwargs or not _wants_arguments(self.model):
                raise
            raise RuntimeError(
                "AutoIAF is not set up yet, and its model takes arguments: call "
                "guide.setup(*args, **kwargs) with them first."
            ) from error

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Draws every site of the model; returns them by name."""
        self.setup(*args, **kwargs)
        own = self._adopt_parameters()
        store.declare(self, own)
        self._state_was_loaded = False
        with SiteDeltas():
            sites: dict[str, Tensor] = super().forward(*args, **kwargs)
        return sites

    @torch.no_grad()
    def sample_posterior(
        self, num_samples: int, *args: Any, resample: bool = False, **kwargs: Any
    ) -> dict[str, Tensor]:
        """Draws from the guide, all at once, in the units of the model.

        Args:
            num_samples: How many draws.
            args: What the model takes; needed only if the guide was never called or set up, if it
                has an encoder, and to resample.
            resample: Whether to resample the draws, from four times as many, by their importance
                weights. That brings them nearer to the posterior where the guide is good enough:
                see :func:`~pyro_iaf.diagnose`. The model runs for it.
            kwargs: Likewise.

        Returns:
            For each site a tensor of shape ``(num_samples,) + shape`` of its value in the model.

        Warns:
            UserWarning: If the weights say that resampling can't repair the guide.
        """
        check_size("num_samples", num_samples)
        posterior = self._ready_posterior(*args, **kwargs)
        if not resample:
            return self._sites(posterior.sample((num_samples,)))
        particles = Particles(self.model, self, args, kwargs)
        log_weights, sites = particles.weighted(max(4 * num_samples, 1000))
        if (khat := pareto_k(log_weights)) > 0.7:
            warnings.warn(
                f"The guide's importance weights have k-hat {khat:.2f}: above 0.7, resampled draws "
                "are no draws from the posterior. Train the guide further, or make it wider.",
                UserWarning,
                stacklevel=2,
            )
        index = resampled(log_weights, num_samples)
        return {name: draws[index] for name, draws in sites.items()}

    @torch.no_grad()
    def median(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """The median of each latent: coordinate by coordinate in unconstrained space.

        It lies in the support, and where a constraint acts on each number by itself, it is the
        median of that number. Read off 10,001 draws in mirrored pairs, the same at every call.

        Args:
            args: What the model takes; needed only if the guide was never called or set up, or has
                an encoder.
            kwargs: Likewise.
        """
        return self._sites(self._mirrored(*args, **kwargs).quantile(0.5, dim=0))

    @torch.no_grad()
    def quantiles(
        self, quantiles: Sequence[float] | Tensor | float, *args: Any, **kwargs: Any
    ) -> dict[str, Tensor]:
        """Quantiles of each number of each site, in the units of the model.

        Read off 10,001 draws in mirrored pairs, the same at every call.

        Args:
            quantiles: Levels between 0 and 1.
            args: What the model takes; needed only if the guide was never called or set up, or has
                an encoder.
            kwargs: Likewise.

        Returns:
            For each site a tensor of shape ``(len(quantiles),) + shape``, increasing where the
            levels are.
        """
        draws = self._mirrored(*args, **kwargs)
        levels = torch.as_tensor(quantiles, dtype=draws.dtype, device=draws.device).reshape(-1)
        if not ((levels >= 0) & (levels <= 1)).all():
            raise ValueError(f"quantiles should be levels between 0 and 1; got {quantiles}.")
        sites = self._sites(draws)
        return {name: value.quantile(levels, dim=0) for name, value in sites.items()}

    def _ready_posterior(self, *args: Any, **kwargs: Any) -> dist.TransformedDistribution:
        self._setup_on_demand(*args, **kwargs)
        self._adopt_parameters()
        return self.get_posterior(*args, **kwargs)

    @property
    def _entries(self) -> str:
        """What the names of this guide's entries in the store begin with."""
        return f"{self._pyro_name}.transform"

    def _adopt_parameters(self) -> dict[str, Tensor]:
        """Takes what a loaded store holds, unless a state was loaded since the last call."""
        own = store.parameters_of(self._built(), self._entries)
        if isinstance(self._encoder, nn.Module):
            own.update(store.parameters_of(self._encoder, f"{self._pyro_name}.encoder"))
        if not self._state_was_loaded:
            store.adopt(self, own)
        return own

    def _mirrored(self, *args: Any, **kwargs: Any) -> Tensor:
        """Latents of noise that is symmetric about zero, an odd number of them.

        The median of a guide that is symmetric itself is exact; the middle one of an odd number
        commutes with every monotone map.
        """
        posterior = self._ready_posterior(*args, **kwargs)
        loc = posterior.base_dist.loc
        generator = torch.Generator(loc.device).manual_seed(0)
        shape = (NUM_MIRRORED, *loc.shape)
        noise = torch.randn(shape, generator=generator, dtype=loc.dtype, device=loc.device)
        noise = torch.cat([noise, -noise, torch.zeros_like(noise[:1])])
        (transform,) = posterior.transforms
        latents: Tensor = transform(noise)
        return latents if latents.dtype == torch.float64 else latents.float()  # no half quantiles

    def _sites(self, latent: Tensor) -> dict[str, Tensor]:
        """The sites of latents of shape ``batch_shape + (D,)``; the batch stands to their left."""
        sites, start = {}, 0
        for name, site in self._latent_sites().items():
            shape = self._unconstrained_shapes[name]
            part = latent[..., start : start + shape.numel()]
            start += shape.numel()
            sites[name] = biject_to(site["fn"].support)(part.reshape(latent.shape[:-1] + shape))
        return sites

    # State and copies

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        start = f"{prefix}transform."
        given = {k.removeprefix(start): v for k, v in state_dict.items() if k.startswith(start)}
        sizes = [v for k, v in given.items() if k.endswith(".network._extra_state")]
        affine = f"parts.{len(sizes)}"
        learned, frame = given.get(f"{affine}.coefficients"), given.get(f"{affine}.frame")
        gated = state_dict.get(f"{prefix}_extra_state", torch.tensor(self.gated)).item()
        is_new = self.prototype_trace is None and not self._fits(given)
        if is_new and sizes and learned is not None and frame is not None:
            # Never set up, so the state says what to build.
            self.num_flows, self.gated = len(sizes), bool(gated)
            self.hidden_dims = sizes[0][3:].tolist()
            self.context_dim = sizes[0][1].item() or None
            with torch.inference_mode(False):
                self.scale = "dense" if len(learned) > 4 else "diagonal"
                loc, scale = frame[0].clone(), frame[1:].clone().squeeze(0)
                self.transform = self._fresh_transform(Start(loc, scale), 0.0)
        if self.gated != gated:
            error_messages: list[str] = args[4]
            error_messages.append(f"The state is of a guide with {gated=}; this one is not.")
        self._state_was_loaded = self._state_was_loaded or self._fits(given)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def get_extra_state(self) -> Tensor:
        """Whether the flows gate, for the state: no shape tells that."""
        return torch.tensor(self.gated)

    def set_extra_state(self, state: Tensor) -> None:
        """Nothing to set: loading has seen to it."""

    def _fits(self, state: dict[str, Tensor]) -> bool:
        transform = self._transform
        return transform is not None and _shapes(transform.state_dict()) == _shapes(state)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> AutoIAF:
        if self.prototype_trace is None:
            self._conversions.append(fn)
        else:
            self._convert_supports(fn)
        super()._apply(fn, recurse)
        return self

    def _convert_supports(self, fn: Callable[[Tensor], Tensor]) -> None:
        for site in self._latent_sites().values():
            site["fn"]._support = each_tensor(site["fn"].support, fn)

    def __getstate__(self) -> dict[str, Any]:
        # Not AutoGuide's, which takes the model from the original too.
        state = dict(super(AutoGuide, self).__getstate__())
        left_behind = ("_model", "create_plates", "_init_loc_fn", "master")
        return {**state, **dict.fromkeys(left_behind), "_conversions": []}

    def __deepcopy__(self, memo: dict[int, Any]) -> AutoIAF:
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        twin.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        # The copy is of the guide. Its model is the same, or the copy of it made alongside.
        if self._model is not None:
            twin._model = (memo.get(id(self.model), self.model),)
        twin.create_plates, twin._init_loc_fn = self.create_plates, self._init_loc_fn
        twin._conversions = list(self._conversions)
        return twin


class _Posterior(dist.TransformedDistribution):  # type: ignore[misc]
    """A guide's distribution, which knows its last draw again without its graph."""

    _drawn: Tensor | None = None

    def rsample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008
        self._drawn = super().rsample(sample_shape)
        return self._drawn

    def log_prob(self, value: Tensor) -> Tensor:
        if self._drawn is not None:  # reweighted wake-sleep scores its draws after detach()
            memory.recognise(value, self._drawn)
        (transform,) = self.transforms
        x, log_det = transform._noise_and_log_det(value)
        log_prob: Tensor = self.base_dist.log_prob(x) - log_det
        return log_prob


def _wants_arguments(model: Callable[..., Any]) -> bool:
    fn = poutine.unwrap(model)
    try:
        inspect.signature(fn.forward if isinstance(fn, nn.Module) else fn).bind()
    except TypeError:
        return True
    except ValueError:
        pass  # a builtin, which tells nothing
    return False


def _shapes(state: dict[str, Tensor]) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in state.items()}
