"""Whose parameters Pyro's parameter store holds.

The guide that runs owns the entries under its name. What nobody in this process put there came from
a file, and is adopted; what another guide put there makes way. A guide's own parameters never
change places: values are copied into them, and they go into the store themselves.
"""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.distributions import constraints
from pyro.nn import PyroModule
from pyro.poutine.runtime import effectful
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from .._validation import warn

__all__ = ["adopt", "declare", "has_from_file", "parameters_of", "state", "stated"]

_makers = WeakIdKeyDictionary()  # a parameter in the store: the guide that put it there, weakly
_warned: weakref.WeakSet[PyroModule] = weakref.WeakSet()
_leaves = WeakIdKeyDictionary()  # a frame: a leaf of the same memory, for the store


def parameters_of(module: nn.Module, name: str) -> dict[str, Tensor]:
    """A module's parameters, and its frame, under the names that Pyro gives them in the store.

    The frame is not trained, but the others mean nothing without it. All that the store holds may
    be asked for its gradient, so there it has a leaf, to which no gradient ever comes.
    """
    named = module.named_parameters()  # under functional_call these are no Parameters
    own: dict[str, Tensor] = {key: p for key, p in named if isinstance(p, nn.Parameter)}
    if own:
        frames = [item for item in module.named_buffers() if item[0].endswith("frame")]
        for key, frame in frames:
            if frame not in _leaves:
                _leaves[frame] = frame.detach().requires_grad_()
            own[key] = _leaves[frame]
    return {f"{name}$$${key}": value for key, value in own.items()}


def has_from_file(name: str) -> bool:
    """Whether the store has entries of a module that came from a file."""
    entries = pyro.get_param_store()._params
    local = pyro.settings.get("module_local_params")
    return not local and any(
        key.startswith(f"{name}$$$") and value not in _makers for key, value in entries.items()
    )


def adopt(guide: PyroModule, own: dict[str, Tensor]) -> None:
    """Takes over the values that the store has from a file."""
    if pyro.settings.get("module_local_params"):
        return
    entries = pyro.get_param_store()._params
    loaded = [
        name
        for name, value in own.items()
        if entries.get(name, value) is not value and entries[name] not in _makers
    ]
    if loaded:
        _check_entries(guide, own)
    for name in loaded:
        with torch.no_grad():
            own[name].copy_(entries[name])
        _replace_entry(guide, name, own[name])


def declare(guide: PyroModule, own: dict[str, Tensor]) -> None:
    """Makes Pyro's statement for each parameter; the store's entries become this guide's."""
    entries = pyro.get_param_store()._params
    local = pyro.settings.get("module_local_params")
    for name, value in own.items():
        if isinstance(value, nn.Parameter) and not value.requires_grad:
            continue
        if not isinstance(value, nn.Parameter):  # a frame: it is saved, and not trained
            if not local and entries.get(name) is not value:
                _replace_entry(guide, name, value)
            continue
        if local:  # handlers hear of it, the store does not
            state(name, value)
            continue
        if entries.get(name) is not value or value not in _makers:
            _replace_entry(guide, name, value)
        pyro.param(name, value)


def state(name: str, value: Tensor) -> None:
    """Makes Pyro's statement of a parameter that is not in the store: handlers hear of it."""
    value.unconstrained = weakref.ref(value)  # type: ignore[attr-defined]
    _statement(name, value, constraint=constraints.real, name=name)


def stated(trace: poutine.Trace) -> dict[str, Tensor]:
    """The unconstrained parameters that a run stated; a module's own stand for themselves."""
    sites: dict[str, Any] = dict(trace.nodes)
    values = {name: site["value"] for name, site in sites.items()}
    return {n: v.unconstrained() if hasattr(v, "unconstrained") else v for n, v in values.items()}


@effectful(type="param")
def _statement(name: str, value: Tensor, **_: Any) -> Tensor:
    return value


def _check_entries(guide: PyroModule, own: dict[str, Tensor]) -> None:
    prefixes = tuple({name.partition("$$$")[0] + "$$$" for name in own})
    entries = pyro.get_param_store()._params
    theirs = {name: tuple(p.shape) for name, p in entries.items() if name.startswith(prefixes)}
    ours = {name: tuple(value.shape) for name, value in own.items()}
    frozen = {n for n, p in own.items() if isinstance(p, nn.Parameter) and not p.requires_grad}
    wanted = own.keys() - frozen  # those are in no store
    strange = dict(theirs.items() - ours.items()).keys() | (wanted - theirs.keys())
    if strange:
        name = min(strange)
        raise ValueError(
            f"The parameter store has entries of a guide named '{guide._pyro_name}' of another "
            f"make: {name} has shape {theirs.get(name, 'missing')} there and "
            f"{ours.get(name, 'missing')} here. Clear it with pyro.clear_param_store(), or give "
            f"the guide a name of its own: {type(guide).__name__}(model, name=...)."
        )


def _replace_entry(guide: PyroModule, name: str, value: Tensor) -> None:
    store = pyro.get_param_store()
    if name in store:
        old = store._params.pop(name)
        store._param_to_name.pop(old, None)  # it may have had two names, and be out already
        if guide not in _warned and _has_another_owner(old, guide):
            _warned.add(guide)
            warn(
                f"Another guide named '{guide._pyro_name}' is alive. Its parameters leave Pyro's "
                "parameter store for those of this one. Give each a name of its own: "
                f"{type(guide).__name__}(model, name=...)."
            )
    if value.requires_grad:  # what is frozen is in no store
        store.setdefault(name, value)
        _makers[value] = weakref.ref(guide)


def _has_another_owner(value: Tensor, guide: PyroModule) -> bool:
    """Whether a guide other than this one made the entry, and is still in use."""

    def maker() -> Any:
        return _makers.get(value, lambda: None)()

    if maker() in (None, guide):
        return False
    gc.collect()  # a guide that nobody holds may wait in a cycle
    return maker() not in (None, guide)
