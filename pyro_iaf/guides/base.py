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
from pyro.infer.autoguide.utils import helpful_support_errors
from pyro.poutine.runtime import am_i_wrapped
from torch import Tensor, nn
from torch.distributions import biject_to

from .._validation import check_callable, check_size, check_widths, in_one_line, warn
from ..flows.autoregressive import InverseAutoregressiveFlowStack, inverse_autoregressive_flow
from ..flows.conditional import (
    ConditionalInverseAutoregressiveFlowStack,
    conditional_inverse_autoregressive_flow,
)
from ..flows.sinh_arcsinh import LocScale
from ..models import param_store
from ..models.arguments import refusal
from ..models.constraints import each_tensor, without_graph
from ..models.masks import Unmasked, log_priors, sites_to_lift, where_counted
from ..models.matching import Mismatch
from ..models.particles import Particles
from ..models.traces import full_size, is_latent, is_point, taking_turns
from ..nn.made import MaskedAutoregressiveNetwork
from ..nn.univariate import Affine, UnivariateMap, map_of_repr, univariate_map
from .pathfinder import Start, or_draw
from .plates import quoted

__all__ = ["FlowGuide", "Transform", "check_unknown", "joined", "quantiles_of"]
Transform = InverseAutoregressiveFlowStack | ConditionalInverseAutoregressiveFlowStack

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
        model: Callable[..., Any],
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
        given = {"model": model, "init_loc_fn": init_loc_fn, "create_plates": create_plates}
        for word, thing in given.items():
            check_callable(word, thing, word != "model")
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
        networks = [m for m in self.modules() if isinstance(m, MaskedAutoregressiveNetwork)]
        widths = {tuple(network.hidden_dims) for network in networks}
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
            watched = poutine.block(watched, hide_fn=self._is_not_of_the_state)
        self._model = (watched,)
        try:
            super()._setup_prototype(*args, **kwargs)
            self._check_latents()
            latents = self._latent_sites()
            self.lifted = frozenset(sites_to_lift(model[0], latents, args, kwargs))
            self._build(model[0], args, kwargs)
        except BaseException:
            self.prototype_trace = None  # so that the next call tries again
            raise
        finally:
            self._model = model
        self._warn_of_masks()
        self.prototype_trace = without_graph(self._latent_sites())
        conversions, self._conversions = self._conversions, []
        for convert in conversions:
            self._apply(convert)

    def _build(
        self, model: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Builds what has parameters; the model's first run is in ``prototype_trace``."""
        raise NotImplementedError

    def _check_latents(self) -> None:
        """Raises an error if a latent can't be drawn by flows, or by those that were loaded."""
        sites = self._latent_sites()
        check_unknown(sites)
        for name, site in sites.items():
            with helpful_support_errors(site):
                biject_to(site["fn"].support)
            if name.startswith(f"_{self._pyro_name}_"):
                raise ValueError(
                    f"Site '{name}' of the model is called as sites of the guide are. Give it "
                    f"another name, or the guide: {type(self).__name__}(model, name=...)."
                )
            if site["value"].dtype in (torch.float16, torch.bfloat16):
                raise ValueError(
                    f"Latents should be in torch.float32 or torch.float64, which triangular "
                    f"matrices can be solved in; site '{name}' is in {site['value'].dtype}. Give "
                    "its prior parameters of those, and convert its value in the model."
                )
        if not any(site["value"].numel() for site in sites.values()):
            raise RuntimeError(
                f"{type(self).__name__} found no latent variables: all sites of the model are "
                "observed, or of size zero. A model without latents needs no guide but an empty "
                "function."
            )
        theirs = self._loaded_sites
        if not theirs:
            return
        ours = self._latent_sites().keys()
        if missing := theirs.keys() - ours:
            raise Mismatch(
                f"The state that was loaded is of a guide with sites {quoted({*theirs})}; in this "
                f"run of the model {quoted(missing)} is no latent. Load the state of a guide for "
                "this model, or give the arguments that it was trained with."
            )
        if new := ours - theirs.keys():
            raise Mismatch(
                f"Site {quoted(new)} is latent in this run of the model, and the state that was "
                f"loaded is of a guide with sites {quoted({*theirs})}: it was observed in "
                "training. Call guide.setup(...) with its data. To predict it, draw under "
                "torch.no_grad(), as Predictive does."
            )

    def _is_not_of_the_state(self, site: Any) -> bool:
        return is_latent(site) and site["name"] not in self._loaded_sites

    def _site_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of all latents, with all rows of their plates."""
        shapes = {}
        for name, site in self._latent_sites().items():
            shape = list(site["value"].shape)
            for frame in site["cond_indep_stack"]:
                shape[frame.dim - site["fn"].event_dim] = full_size(frame)
            shapes[name] = tuple(shape)
        return shapes

    def _warn_of_masks(self) -> None:
        for name, site in self._latent_sites().items():
            mask = where_counted(site)
            if name not in self.lifted and mask is not None and not mask.all():
                warn(
                    f"Site '{name}' is masked in the model: its density counts nothing there. "
                    "Unless the data hold it, the guide widens without end. Mask the likelihood "
                    "alone."
                )

    def with_priors(self, model: Callable[..., Any]) -> Callable[..., Any]:
        """A model whose joint density is that of all latents of the guide, the masked ones too."""
        lifted: Callable[..., Any] = Unmasked(self.lifted)(model) if self.lifted else model
        return lifted

    def _cancel_priors(
        self,
        values: Mapping[str, Tensor],
        plates: Mapping[str, Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
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

    def _watched(self, model: Callable[..., Any]) -> Callable[..., Any]:
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

    def _latent_sites(self) -> dict[str, Any]:
        """The model's latents, in its order, as they were when the guide was set up."""
        assert self.prototype_trace is not None
        return dict(self.prototype_trace.iter_stochastic_nodes())

    def _is_dense(self, size: int) -> bool:
        return self.scale == "dense" or (self.scale == "auto" and size <= MAX_DENSE)

    def _fresh_transform(self, start: Start, log_scale: float, context_dim: int = 0) -> Transform:
        """The flows, nearly the identity, and the final affine."""
        D = len(start.loc)
        settings: dict[str, Any] = {
            "hidden_dims": 2 * [max(64, D)] if self.hidden_dims is None else self.hidden_dims,
            "num_flows": self.num_flows,
            "univariate": self.univariate,
            # The last flow takes the latents as the model draws them: causes before effects.
            "order": torch.arange(D) if self.num_flows % 2 else torch.arange(D).flip(0),
        }
        # What the maps of fresh flows do to the scale, gates above all, is made up for.
        zeros = torch.zeros(1 + self.univariate.num_params, dtype=torch.float64, device="cpu")
        log_scale -= self.num_flows * float(self.univariate.forward(*zeros)[1])
        flows: Any
        if context_dim:
            flows = conditional_inverse_autoregressive_flow(D, context_dim, **settings)
            kind: Any = ConditionalInverseAutoregressiveFlowStack
        else:
            flows = inverse_autoregressive_flow(D, **settings)
            kind = InverseAutoregressiveFlowStack
        transform: Transform = kind([flows]) if self.num_flows == 1 else flows
        # In the model's own precision, whatever the default is.
        affine = LocScale(start.loc, start.scale, log_scale, self._is_dense(D))
        transform.to(start.loc).parts.append(affine)  # type: ignore[union-attr]  # a ModuleList
        return transform

    def _rebuilt(self, state: dict[str, Tensor], univariate: str) -> Transform | None:
        """A transform of the make that a state is of; None if it is of none."""
        sizes = [v for k, v in state.items() if k.endswith(".network._extra_state")]
        affine = f"parts.{len(sizes)}"
        learned, frame = state.get(f"{affine}.coefficients"), state.get(f"{affine}.frame")
        if not sizes or learned is None or frame is None:
            return None
        if univariate != repr(self.univariate):
            kind = map_of_repr(univariate)
            if kind is None:
                return None
            self.univariate = kind
        self.num_flows = len(sizes)
        _, context_dim, _, *self.hidden_dims = sizes[0].tolist()
        self.scale = "dense" if len(learned) > 4 else "diagonal"
        with torch.inference_mode(False):
            start = Start(frame[0].clone(), frame[1:].clone().squeeze(0))
            return self._fresh_transform(start, 0.0, context_dim)

    @property
    def model(self) -> Callable[..., Any]:
        if self._model is None:
            raise RuntimeError("This guide has no model: pickling leaves it behind.")
        model: Callable[..., Any] = self._model[0]
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

    def _encode(
        self, encoder: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
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

    def _resampled(
        self, num_samples: int, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> dict[str, Tensor]:
        """Draws chosen by their importance weights from four times as many."""
        with taking_turns:
            draws = Particles(self.model, self, args, kwargs).weighted(max(4 * num_samples, 1000))
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


def quantiles_of(draws: Tensor, levels: Tensor) -> Tensor:
    """Quantiles along the first axis, of tensors of any size and precision."""
    draws = draws if draws.dtype == torch.float64 else draws.float()  # no half quantiles
    flat = draws.reshape(len(draws), -1)
    at_once = max(1, 2**24 // len(draws))  # torch.quantile takes no more numbers
    levels = levels.to(flat)
    parts = [part.quantile(levels, dim=0) for part in flat.split(at_once, 1)]
    return torch.cat(parts, 1).reshape(len(levels), *draws.shape[1:])


def joined(parts: Sequence[Tensor]) -> Tensor:
    """Parts of a vector, some of them perhaps of an improper prior, which knows of no device."""
    device = next((part.device for part in parts if part.device.type != "cpu"), None)
    loc = torch.cat([part.to(device) for part in parts])
    return loc if loc.is_floating_point() else loc.to(torch.get_default_dtype())


def check_unknown(latents: Mapping[str, Any]) -> None:
    """Raises a ValueError if the value of a latent site is known."""
    for name, site in latents.items():
        if is_point(site["fn"]):
            raise ValueError(
                f"A guide finds out values that the model leaves open; site '{name}' is a Delta, "
                f"whose value is known. State it by pyro.deterministic('{name}', value), and a log "
                "density by pyro.factor."
            )
