"""What guides made of flows have in common: when they are built, their parameters, and copies."""

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

from .._validation import (
    check_callable,
    check_levels,
    check_size,
    check_widths,
    in_one_line,
)
from ..models import param_store
from ..models.arguments import Args, Kwargs, Program, refusal
from ..models.constraints import each_tensor, without_graph
from ..models.log_joint import LogJoint
from ..models.masks import Unmasked, log_priors, sites_to_lift
from ..models.traces import full_size, is_latent, taking_turns
from ..models.weighted import WeightedParticles
from ..nn.made import MaskedAutoregressiveNetwork
from ..nn.univariate import Affine, UnivariateMap, map_of_repr, univariate_map
from .init_loc import or_draw
from .latents import check_latents, check_loaded, quantiles_of, warn_of_masks
from .pathfinder import Start
from .plates import quoted
from .transform import Transform, fresh_transform, make_of

__all__ = ["FlowGuide"]

# More latents than this have a scale for each by default, and not a matrix.
MAX_DENSE = 400

# Of a guide's repr.
MOST_LINES = 12


class FlowGuide(AutoGuide):
    """A guide that builds its flows when it first meets its model, and owns their parameters.

    Subclasses say in ``_build`` what is built, and in ``_own_modules`` what has parameters. The
    arguments are those of :class:`~pyro_iaf.AutoIAF`.
    """

    # Once the setup is over: in its midst another thread finds a guide half built.
    _is_set_up = False

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
        check_callable("model", model, may_be_missing=False)
        check_callable("init_loc_fn", init_loc_fn, may_be_missing=True)
        check_callable("create_plates", create_plates, may_be_missing=True)
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
        self.lifted: frozenset[str] = frozenset()  # sites whose masks it undoes
        self._conversions: list[Callable[[Tensor], Tensor]] = []  # asked for before the setup
        self._state_was_loaded = False
        self._loaded_sites: dict[str, list[int]] = {}  # of a state that came before the setup

    def __repr__(self) -> str:
        words = [f"num_flows={self.num_flows}"]
        widths = {tuple(network.hidden_dims) for network in self.networks()}
        if self.hidden_dims is not None or len(widths) == 1:
            words.append(f"hidden_dims={self.hidden_dims or list(*widths)}")
        if self.univariate != Affine():
            words.append(f"univariate={self.univariate}")
        if self._encoder is not None:
            words.append(
                f"encoder={getattr(self._encoder, '__name__', type(self._encoder).__name__)}"
            )
        if self.prototype_trace is None:
            return f"{type(self).__name__}({', '.join(words)}; built at its first call)"
        if hasattr(self, "latent_dim"):
            words.insert(0, f"latent_dim={self.latent_dim}")
        lines = [in_one_line(self, *words)]
        for name, shape in self._site_shapes().items():
            frames = self._latent_sites()[name]["cond_indep_stack"]
            plates = ", ".join(repr(frame.name) for frame in frames)
            where = f" in plate {plates}" if plates else ""
            lines.append(f"  {name}: {shape}{where}")
        if len(lines) > MOST_LINES:
            lines[MOST_LINES - 1 :] = [f"  and {len(lines) - MOST_LINES + 1} sites more"]
        return "\n".join(lines)

    # Building

    def setup(self, *args: Any, **kwargs: Any) -> None:
        """Builds the guide for a model with these arguments; does nothing if that was done.

        After it the parameters are there, for an optimiser of PyTorch. The model runs away from the
        caller's handlers, some hundred times where a start is looked for and once where not, on
        the subsample of its first run. Nothing is drawn from the guide.
        """
        if self._is_set_up:
            return
        with taking_turns:
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
        master = None if self.master is None else self.master()
        gradients = torch.is_grad_enabled()
        with poutine.block(), torch.inference_mode(False), torch.set_grad_enabled(gradients):
            if master is not None and master.prototype_trace is None:
                master._setup_prototype(*args, **kwargs)
            self._setup_prototype(*args, **kwargs)

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        model = self._model
        watched = self._watched(InitMessenger(self._init_loc_fn)(self.model))
        if self._loaded_sites and not torch.is_grad_enabled():
            # A prediction is made without the data of training: the model draws them.
            watched = poutine.block(
                watched, hide_fn=lambda s: is_latent(s) and s["name"] not in self._loaded_sites
            )
        self._model = (watched,)
        try:
            super()._setup_prototype(*args, **kwargs)
            latents = self._latent_sites()
            check_latents(latents, type(self).__name__, self._pyro_name)
            if self._loaded_sites:
                check_loaded(latents, self._loaded_sites)
            self.lifted = frozenset(sites_to_lift(model[0], latents, args, kwargs))
            warn_of_masks(latents, self.lifted)
            self.prototype_trace = without_graph(latents)
            self._build(model[0], args, kwargs)
        except BaseException:
            self.prototype_trace = None  # so that the next call tries again
            raise
        finally:
            self._model = model
        conversions, self._conversions = self._conversions, []
        for convert in conversions:
            self._apply(convert)

    def _build(self, model: Program, args: Args, kwargs: Kwargs) -> None:
        """Builds what has parameters; the model's first run is in ``prototype_trace``."""
        raise NotImplementedError

    def _site_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of all latents, with all rows of their plates."""
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
        """States the priors that the model's masks take away, so that they count for nothing."""
        if not self.lifted or not am_i_wrapped():  # nobody asks for a density
            return
        rows = {
            name: plate._indices for name, plate in plates.items() if plate._indices is not None
        }
        if self._model is None:  # after pickling it draws as before, and can not be trained
            found = dict.fromkeys(self.lifted, torch.tensor(-math.inf))
        else:
            found = log_priors(self.model, self.lifted, {**values, **rows}, args, kwargs)
        for name, log_prior in found.items():
            with ExitStack() as stack:
                for frame in self._latent_sites()[name]["cond_indep_stack"]:
                    stack.enter_context(plates[frame.name])
                pyro.factor(f"_{self._pyro_name}_{name}_masked", -log_prior, has_rsample=True)

    def _watched(self, model: Program) -> Program:
        """The model for its first run."""
        return model

    def _own_modules(self) -> Mapping[str, nn.Module]:
        """What has parameters, by name; built if need be."""
        raise NotImplementedError

    @property
    def _encoder(self) -> Any:
        """Without telling Pyro, which makes statements of all parameters if asked by attribute."""
        encoder = self._modules.get("encoder")
        return self.__dict__.get("encoder") if encoder is None else encoder

    @property
    def amortized(self) -> bool:
        """Whether an encoder tells the guide one data set from another."""
        return self._encoder is not None

    def networks(self) -> list[MaskedAutoregressiveNetwork]:
        """The networks of its flows."""
        return [network for transform in self._transforms() for network in transform.networks]

    def context_tables(self) -> list[nn.Parameter]:
        """Tables of contexts that it learns."""
        return []

    def _transforms(self) -> Sequence[Transform]:
        """All its transforms, as far as they are built."""
        raise NotImplementedError

    def log_joint(
        self, model: Program, trace: poutine.Trace, args: Args, kwargs: Kwargs
    ) -> LogJoint:
        """The density of all latents of the guide, those too that the model masks."""
        lifted: Program = Unmasked(self.lifted)(model) if self.lifted else model
        return LogJoint(lifted, trace, args, kwargs, self._latent_sites())

    def _latent_sites(self) -> dict[str, Any]:
        """The model's latents, in its order, as they were when the guide was set up."""
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

    def _rebuilt(self, state: dict[str, Tensor], univariate: str) -> Transform | None:
        """A transform of the make that a state is of; None if it is of none."""
        with torch.inference_mode(False):
            make = make_of(state)
            # A map of the user's own is known by this guide alone.
            own = univariate == repr(self.univariate)
            maps = self.univariate if own else map_of_repr(univariate)
            if make is None or maps is None:
                return None
            self.num_flows, self.univariate = make["num_flows"], maps
            return fresh_transform(**make, log_scale=0.0, univariate=maps)

    @property
    def model(self) -> Program:
        if self._model is None:
            raise RuntimeError("This guide has no model: pickling leaves it behind.")
        model: Program = self._model[0]
        return model

    def _setup_on_demand(self, *args: Any, **kwargs: Any) -> None:
        try:
            self.setup(*args, **kwargs)
        except TypeError as error:
            if args or kwargs or not refusal(self.model, (), {}):
                raise
            raise RuntimeError(
                f"{type(self).__name__} is not set up yet, and its model takes arguments: call "
                "guide.setup(*args, **kwargs) with them first."
            ) from error

    def _adopt_parameters(self) -> dict[str, Tensor]:
        """Takes what a loaded store holds, unless a state was loaded since the last call."""
        own: dict[str, Tensor] = {}
        for name, module in self._own_modules().items():
            own.update(param_store.parameters_of(module, f"{self._pyro_name}.{name}"))
        if not self._state_was_loaded:
            param_store.adopt(self, own)
        return own

    def _state_parameters(self) -> None:
        """Makes Pyro's statements of all parameters."""
        param_store.declare(self, self._adopt_parameters())
        self._state_was_loaded = False

    # Drawing

    def _encode(self, encoder: Callable[..., Any], args: Args, kwargs: Kwargs) -> Any:
        """What an encoder makes of the model's arguments."""
        try:
            return encoder(*args, **kwargs)
        except Exception as error:
            if args or kwargs:
                raise
            raise ValueError(
                "This guide has an encoder, so it wants the model's arguments wherever it draws: "
                "guide.sample_posterior(1000, *args), guide.median(*args), fit(model, guide, args) "
                "or fit(..., simulate=[...])."
            ) from error

    @torch.no_grad()
    def median(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """The median of each latent: coordinate by coordinate in unconstrained space.

        It lies in the support, and where a constraint acts on each number by itself, it is the
        median of that number. Read off draws that are the same at every call: 10,001 in mirrored
        pairs, or 4001 of a guide with latents in plates, fewer where these have ten million
        numbers.

        Args:
            args: As for ``sample_posterior``.
            kwargs: Likewise; also ``rows``, if that takes them.
        """
        levels = check_levels(0.5)
        draws = self._settled_draws(*args, **kwargs)
        return self._constrained({n: quantiles_of(d, levels)[0] for n, d in draws.items()})

    @torch.no_grad()
    def quantiles(
        self, quantiles: Sequence[float] | Tensor | float, *args: Any, **kwargs: Any
    ) -> dict[str, Tensor]:
        """Quantiles of each number of each site, in the units of the model.

        Read off the draws that :meth:`median` takes.

        Args:
            quantiles: Levels between 0 and 1.
            args: As for ``sample_posterior``.
            kwargs: Likewise; also ``rows``, if that takes them.

        Returns:
            For each site a tensor of shape ``(len(quantiles),) + shape``, increasing where the
            levels are.
        """
        levels = check_levels(quantiles)
        sites = self._constrained(self._settled_draws(*args, **kwargs))
        return {name: quantiles_of(draws, levels) for name, draws in sites.items()}

    def _settled_draws(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Unconstrained values of the sites at draws that are the same at every call."""
        raise NotImplementedError

    def _constrained(self, free: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Sites in the units of the model."""
        supports = {name: site["fn"].support for name, site in self._latent_sites().items()}
        return {name: biject_to(supports[name])(value) for name, value in free.items()}

    def _resampled(self, num_samples: int, args: Args, kwargs: Kwargs) -> dict[str, Tensor]:
        """Draws chosen by their importance weights from four times as many."""
        with taking_turns:
            draws = WeightedParticles(self.model, self, args, kwargs).weighted(
                max(4 * num_samples, 1000)
            )
        return draws.resampled(num_samples)

    # State and copies

    def get_extra_state(self) -> Tensor:
        """What no shape of a parameter tells, as the bytes of a text, so that all is tensors."""
        is_built = self.prototype_trace is not None
        sites = self._site_shapes() if is_built else self._loaded_sites
        text = json.dumps({"univariate": repr(self.univariate), "sites": sites})
        return torch.tensor(list(text.encode()), dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        """Nothing to set: loading has seen to it."""

    def _told_by(self, state_dict: dict[str, Any], prefix: str) -> dict[str, Any]:
        """What a state has from :meth:`get_extra_state`."""
        state = state_dict.get(f"{prefix}_extra_state")
        told: dict[str, Any] = {"univariate": repr(self.univariate), "sites": {}}
        return told if state is None else json.loads(bytes(state.tolist()))

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        univariate, theirs = self._told_by(state_dict, prefix).values()
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
                f"The state is of a guide with sites {quoted({*theirs})}; this one has "
                f"{quoted({*ours})}."
            )
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FlowGuide:
        if self.prototype_trace is None:
            self._conversions.append(fn)
        else:
            for site in self._latent_sites().values():
                site["fn"]._support = each_tensor(site["fn"].support, fn)
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
        # The copy is of the guide. Its model is the same, or the copy of it made alongside.
        if self._model is not None:
            twin._model = (memo.get(id(self.model), self.model),)
        twin.create_plates, twin._init_loc_fn = self.create_plates, self._init_loc_fn
        twin._conversions = list(self._conversions)
        return twin
