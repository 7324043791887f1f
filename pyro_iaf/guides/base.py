"""The base of guides made of flows: setup, parameters, quantiles, state and copies."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from numbers import Real
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer.autoguide.guides import AutoGuide
from pyro.infer.autoguide.initialization import InitMessenger, init_to_median
from pyro.poutine.runtime import am_i_wrapped
from torch import Tensor, nn
from torch.distributions import biject_to

from .._validation import check_callable, check_levels, check_size, check_widths, module_repr
from ..models import param_store
from ..models.arguments import Args, Kwargs, Program, signature_error
from ..models.constraints import map_tensors, without_graph
from ..models.discrete import Discrete, DiscreteWatch
from ..models.enumeration import summed_out
from ..models.log_joint import LogJoint
from ..models.masks import Unmasked, masked_log_probs, sites_to_unmask
from ..models.tables import check_tables
from ..models.traces import full_size, handler_lock, is_latent
from ..models.whole import particles_on_all
from ..nn.made import MaskedAutoregressiveNetwork
from ..nn.univariate import Affine, UnivariateMap, map_of_repr, univariate_map
from .init_loc import or_draw
from .latents import check_latents, check_loaded, quantiles_of, warn_of_masks
from .pathfinder import Start
from .plates import GivenSubsamples, quoted
from .structured_transform import transform_from_state
from .transform import Transform, entries_below, fresh_transform

__all__ = ["FlowGuide"]

# The most latents that have a dense scale by default.
MAX_DENSE = 400

# The most lines of a guide's repr.
MOST_LINES = 12


class FlowGuide(AutoGuide):
    """A guide that builds its flows at its first call, and owns their parameters.

    A subclass defines ``_build``, ``_transforms`` and ``_fixed_draws``, and names in ``_own_names``
    its modules with parameters. The arguments are those of :class:`~pyro_iaf.AutoIAF`.
    """

    _own_names: tuple[str, ...] = ("encoder",)

    # Set at the end of the setup, since another thread may find the guide half built.
    _is_set_up = False

    # The model's discrete latents, which are summed out; known after the setup.
    discrete: Discrete | None = None

    def __init__(
        self,
        model: Program,
        *,
        num_flows: int,
        hidden_dims: int | Sequence[int] | None,
        univariate: str | UnivariateMap,
        init_loc_fn: Callable[..., Any] | None,
        init_scale: float | None,
        scale: str,
        create_plates: Callable[..., Any] | None,
        name: str | None,
    ) -> None:
        check_callable("model", model)
        check_callable("init_loc_fn", init_loc_fn, optional=True)
        check_callable("create_plates", create_plates, optional=True)
        AutoGuide.__init__(self, model, create_plates=create_plates)
        self.num_flows = check_size("num_flows", num_flows)
        self.hidden_dims = None if hidden_dims is None else check_widths(hidden_dims, 1)
        self.univariate = univariate_map(univariate)
        if scale not in ("auto", "dense", "diagonal"):
            raise ValueError(f'scale should be "auto", "dense" or "diagonal"; got {scale!r}.')
        self.scale = scale
        self._init_loc_fn = or_draw(init_to_median if init_loc_fn is None else init_loc_fn)
        is_number = isinstance(init_scale, Real) and not isinstance(init_scale, bool)
        if not (init_scale is None or (is_number and 0 < init_scale < math.inf)):
            raise ValueError(f"init_scale should be a positive number; got {init_scale!r}.")
        self._init_scale = 0.1 if init_scale is None else float(init_scale)
        if name is not None:
            if not isinstance(name, str) or not name or "$" in name:
                raise ValueError(
                    f"name should be a string, not empty and without '$'; got {name!r}."
                )
            self._pyro_name = name
        self.lifted: frozenset[str] = frozenset()  # sites whose masks it lifts
        self._conversions: list[Callable[[Tensor], Tensor]] = []  # those before the setup
        self._state_was_loaded = False
        self._loaded_sites: dict[str, list[int]] = {}  # of a state loaded before the setup

    def __repr__(self) -> str:
        words = [f"num_flows={self.num_flows}", *self._further_words()]
        widths = {tuple(network.hidden_dims) for network in self.networks()}
        if self.hidden_dims is not None or len(widths) == 1:
            words.append(f"hidden_dims={self.hidden_dims or list(*widths)}")
        if self.univariate != Affine():
            words.append(f"univariate={self.univariate}")
        if self._encoder is not None:
            kind = type(self._encoder).__name__
            words.append(f"encoder={getattr(self._encoder, '__name__', kind)}")
        if self.prototype_trace is None:
            return f"{type(self).__name__}({', '.join(words)}; built at its first call)"
        if hasattr(self, "latent_dim"):
            words.insert(0, f"latent_dim={self.latent_dim}")
        lines = [module_repr(self, *words)]
        for name, shape in self._site_shapes().items():
            frames = self._latent_sites()[name]["cond_indep_stack"]
            plates = ", ".join(repr(frame.name) for frame in frames)
            lines.append(f"  {name}: {shape}" + (f" in plate {plates}" if plates else ""))
        if len(lines) > MOST_LINES:
            lines[MOST_LINES - 1 :] = [f"  and {len(lines) - MOST_LINES + 1} sites more"]
        return "\n".join(lines)

    def _further_words(self) -> list[str]:
        """What the repr says besides flows, widths, map and encoder."""
        return []

    # Building

    def setup(self, *args: Any, **kwargs: Any) -> None:
        """Builds the guide for a model with these arguments; does nothing if it is built.

        Then its parameters exist, and can be given to an optimiser of PyTorch. The model runs
        outside of the caller's handlers, on the subsample of its first run: some hundred times if
        Pathfinder finds the start, else once. Nothing is drawn from the guide.
        """
        if self._is_set_up:
            return
        with handler_lock:
            if self.prototype_trace is None:
                self._set_up(*args, **kwargs)
            self._is_set_up = True

    def _set_up(self, *args: Any, **kwargs: Any) -> None:
        if self._model is None:
            raise RuntimeError(
                "This guide was pickled before its first call, and pickling leaves the model "
                f"behind. Make a new one, {type(self).__name__}(model), and give it the state with "
                "load_state_dict."
            )
        gradients = torch.is_grad_enabled()
        with poutine.block(), torch.inference_mode(False), torch.set_grad_enabled(gradients):
            if self.master is not None and self.master().prototype_trace is None:
                self.master()._setup_prototype(*args, **kwargs)
            self._setup_prototype(*args, **kwargs)

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        model = self._model
        self._given = GivenSubsamples()
        watch = DiscreteWatch()
        try:
            self._trace_prototype(watch(self.model), args, kwargs)
            self.discrete = watch.found
            program = summed_out(model[0], self)
            if self.discrete is not None:
                self._trace_prototype(program, args, kwargs)
                values = {name: site["value"] for name, site in self._latent_sites().items()}
                check_tables(self._given(model[0]), self.discrete, values, args, kwargs)
            latents = self._latent_sites()
            check_latents(latents, type(self).__name__, self._pyro_name)
            if self._loaded_sites:
                check_loaded(latents, self._loaded_sites)
            self.lifted = frozenset(sites_to_unmask(program, latents, args, kwargs))
            warn_of_masks(latents, self.lifted)
            self.prototype_trace = without_graph(latents)
            self._build(program, args, kwargs)
        except BaseException as error:
            self.prototype_trace = None  # so that the next call tries again
            watch.explain(error)
            raise
        finally:
            self._model = model
        conversions, self._conversions = self._conversions, []
        for convert in conversions:
            self._apply(convert)

    def _trace_prototype(self, program: Program, args: Args, kwargs: Kwargs) -> None:
        """Finds the latents of a run that begins at the values of ``init_loc_fn``."""
        watched: Program = self._given(InitMessenger(self._init_loc_fn)(program))
        if self._loaded_sites and not torch.is_grad_enabled():
            # Predictive runs the model without the data, and the model draws them.
            watched = poutine.block(
                watched, hide_fn=lambda s: is_latent(s) and s["name"] not in self._loaded_sites
            )
        self._model = (watched,)
        try:
            super()._setup_prototype(*args, **kwargs)
        except NotImplementedError:  # of Pyro, without the site's name
            if self.prototype_trace is not None:
                check_latents(self._latent_sites(), type(self).__name__, self._pyro_name)
            raise

    def _build(self, model: Program, args: Args, kwargs: Kwargs) -> None:
        """Builds the modules with parameters; the model's first run is in ``prototype_trace``."""
        raise NotImplementedError

    def _site_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of all latents by name, with all rows of their plates."""
        shapes = {}
        for name, site in self._latent_sites().items():
            shape = list(site["value"].shape)
            for frame in site["cond_indep_stack"]:
                shape[frame.dim - site["fn"].event_dim] = full_size(frame)
            shapes[name] = tuple(shape)
        return shapes

    def _cancel_priors(
        self, values: Mapping[str, Tensor], plates: Mapping[str, Any], args: Args, kwargs: Kwargs
    ) -> None:
        """Adds factors that cancel the priors of lifted sites, which the model masks."""
        if not self.lifted or not am_i_wrapped():  # no handler, so no density
            return
        rows = {n: plate._indices for n, plate in plates.items() if plate._indices is not None}
        if self._model is None:  # after pickling the guide can draw, but can't be trained
            found = dict.fromkeys(self.lifted, torch.tensor(-math.inf))
        else:
            program = summed_out(self.model, self)
            found = masked_log_probs(program, self.lifted, {**values, **rows}, args, kwargs)
        for name, log_prior in found.items():
            with ExitStack() as stack:
                for frame in self._latent_sites()[name]["cond_indep_stack"]:
                    stack.enter_context(plates[frame.name])
                pyro.factor(self._correction(name), -log_prior, has_rsample=True)

    @property
    def corrections(self) -> list[str]:
        """The factors that cancel priors of masked sites; without them the guide's density."""
        return [self._correction(name) for name in self.lifted]

    def _correction(self, name: str) -> str:
        return f"_{self._pyro_name}_{name}_masked"

    @property
    def _encoder(self) -> Any:
        """The encoder, read without ``pyro.param`` statements for all its parameters."""
        return {**self.__dict__, **self._modules}.get("encoder")

    @property
    def amortized(self) -> bool:
        """Whether the guide depends on the data through an encoder."""
        return self._encoder is not None

    def networks(self) -> list[MaskedAutoregressiveNetwork]:
        """The networks of the guide's flows."""
        return [network for transform in self._transforms() for network in transform.networks]

    def context_tables(self) -> list[nn.Parameter]:
        """The tables of contexts that the guide learns."""
        return []

    def _transforms(self) -> Sequence[Transform]:
        """All transforms that are built."""
        raise NotImplementedError

    def log_joint(
        self, model: Program, trace: poutine.Trace, args: Args, kwargs: Kwargs
    ) -> LogJoint:
        """The log joint density of all latents of the guide, without the masks that it lifts."""
        lifted: Program = Unmasked(self.lifted)(model) if self.lifted else model
        return LogJoint(lifted, trace, args, kwargs, self._latent_sites())

    def _latent_sites(self) -> dict[str, Any]:
        """The model's latents by name, in its order, as they were at the setup."""
        assert self.prototype_trace is not None
        return dict(self.prototype_trace.iter_stochastic_nodes())

    def _is_dense(self, size: int) -> bool:
        return self.scale == "dense" or (self.scale == "auto" and size <= MAX_DENSE)

    def _fresh_transform(self, start: Start, log_scale: float, context_dim: int = 0) -> Transform:
        return fresh_transform(
            start,
            log_scale,
            context_dim=context_dim,
            num_flows=self.num_flows,
            hidden_dims=self.hidden_dims,
            univariate=self.univariate,
            dense=self._is_dense(len(start.loc)),
        )

    def _rebuilt(self, state_dict: dict[str, Any], prefix: str, name: str) -> Transform | None:
        """A transform that fits a part of a state; None if there is no such part."""
        with torch.inference_mode(False):
            univariate, _ = self._extra_state_in(state_dict, prefix)
            # The repr of a user's own map is known only to this guide.
            is_own = univariate == repr(self.univariate)
            maps = self.univariate if is_own else map_of_repr(univariate)
            found = transform_from_state(entries_below(state_dict, f"{prefix}{name}."), maps)
            if maps is not None and found is not None:
                self.univariate = maps
                self.num_flows = found.num_flows or self.num_flows
            return found

    @property
    def model(self) -> Any:
        if self._model is None:
            raise RuntimeError("This guide has no model: pickling leaves it behind.")
        return self._model[0]

    def _setup_on_demand(self, *args: Any, **kwargs: Any) -> None:
        try:
            self.setup(*args, **kwargs)
        except TypeError as error:
            if args or kwargs or not signature_error(self.model, (), {}):
                raise
            raise RuntimeError(
                f"{type(self).__name__} is not set up yet, and its model takes arguments: call "
                "guide.setup(*args, **kwargs) with them first."
            ) from error

    def _adopt_parameters(self) -> dict[str, Tensor]:
        """The parameters, with values of a loaded store unless a state was loaded after it."""
        own: dict[str, Tensor] = {}
        for name in self._own_names:
            if (module := self._modules.get(name)) is not None:
                own.update(param_store.parameters_of(module, f"{self._pyro_name}.{name}"))
        if not self._state_was_loaded:
            param_store.adopt(self, own)
        return own

    def _state_parameters(self) -> None:
        """Makes a ``pyro.param`` statement for each parameter."""
        param_store.declare(self, self._adopt_parameters())
        self._state_was_loaded = False

    # Drawing

    def _encode(self, encoder: Callable[..., Any], args: Args, kwargs: Kwargs) -> Any:
        """The output of an encoder for the model's arguments."""
        try:
            return encoder(*args, **kwargs)
        except Exception as error:
            if args or kwargs:
                raise
            raise ValueError(
                "This guide has an encoder, so it needs the model's arguments for every draw: "
                "guide.sample_posterior(1000, *args), guide.median(*args), fit(model, guide, args) "
                "or fit(..., simulate=[...])."
            ) from error

    @torch.no_grad()
    def median(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """The median of each latent: coordinate by coordinate in unconstrained space.

        It lies in the support. Where a constraint acts on each number alone, it is the median of
        that number. It is computed from draws that are the same at every call: 10,001 in mirrored
        pairs, or for :class:`~pyro_iaf.AutoHierarchicalIAF` 4001, fewer if they would have more
        than ten million numbers.

        Args:
            args: As for ``sample_posterior``.
            kwargs: Likewise; also ``rows``, if that takes them.
        """
        draws, half = self._fixed_draws(*args, **kwargs), check_levels(0.5)
        return self._constrained({n: quantiles_of(d, half)[0] for n, d in draws.items()})

    @torch.no_grad()
    def quantiles(
        self, quantiles: Sequence[float] | Tensor | float, *args: Any, **kwargs: Any
    ) -> dict[str, Tensor]:
        """Quantiles of each number of each site, in the units of the model.

        They are computed from the same draws as :meth:`median`.

        Args:
            quantiles: Levels between 0 and 1.
            args: As for ``sample_posterior``.
            kwargs: Likewise; also ``rows``, if that takes them.

        Returns:
            For each site a tensor of shape ``(len(quantiles),) + shape``, increasing where the
            levels are.
        """
        levels = check_levels(quantiles)
        sites = self._constrained(self._fixed_draws(*args, **kwargs))
        return {name: quantiles_of(draws, levels) for name, draws in sites.items()}

    def _fixed_draws(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Unconstrained values of the sites at draws that are the same at every call."""
        raise NotImplementedError

    def _constrained(self, free: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Values of sites in the units of the model."""
        sites = self._latent_sites()
        return {name: biject_to(sites[name]["fn"].support)(value) for name, value in free.items()}

    def _resampled(self, num_samples: int, args: Args, kwargs: Kwargs) -> dict[str, Tensor]:
        """Draws chosen by their importance weights from four times as many."""
        with handler_lock:
            particles = particles_on_all(self.model, self, args, kwargs)
            draws = particles.weighted(max(4 * num_samples, 1000))
        return draws.resampled(num_samples)

    # State and copies

    def get_extra_state(self) -> Tensor:
        """The univariate map and the sites as JSON in a tensor, for ``weights_only=True``."""
        sites = self._loaded_sites if self.prototype_trace is None else self._site_shapes()
        text = json.dumps({"univariate": repr(self.univariate), "sites": sites})
        return torch.tensor(list(text.encode()), dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        """Does nothing, since ``_load_from_state_dict`` reads it."""

    def _extra_state_in(self, state_dict: dict[str, Any], prefix: str) -> tuple[str, Any]:
        """The univariate map and the sites in a state, from :meth:`get_extra_state`."""
        state = state_dict.get(f"{prefix}_extra_state")
        if state is None:
            return repr(self.univariate), {}
        found = json.loads(bytes(state.tolist()))
        return found["univariate"], found["sites"]

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        univariate, theirs = self._extra_state_in(state_dict, prefix)
        error_messages: list[str] = args[4]
        if univariate != (own := repr(self.univariate)):
            error_messages.append(
                f"The state is of a guide with univariate={univariate}; this one has "
                f"univariate={own}."
            )
        if self.prototype_trace is None:
            self._loaded_sites = theirs
        elif theirs and theirs.keys() != (ours := self._latent_sites().keys()):
            error_messages.append(
                f"The state is of a guide with sites {quoted(theirs)}; this one has {quoted(ours)}."
            )
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FlowGuide:
        if self.prototype_trace is None:
            self._conversions.append(fn)
        else:
            for site in self._latent_sites().values():
                site["fn"]._support = map_tensors(site["fn"].support, fn)
        super()._apply(fn, recurse)
        return self

    def __getstate__(self) -> dict[str, Any]:
        # Not AutoGuide's, which takes the model from the original too.
        state = dict(super(AutoGuide, self).__getstate__())
        left_behind = ("_model", "create_plates", "_init_loc_fn", "master")
        return {**state, **dict.fromkeys(left_behind), "_conversions": []}

    def __deepcopy__(self, memo: dict[int, Any]) -> FlowGuide:
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        twin.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        # The model is not copied, except if a copy was made in the same call.
        if self._model is not None:
            twin._model = (memo.get(id(self.model), self.model),)
        twin.create_plates, twin._init_loc_fn = self.create_plates, self._init_loc_fn
        twin._conversions = list(self._conversions)
        return twin
