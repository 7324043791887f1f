"""A guide's parameters in Pyro's parameter store.

The guide that runs owns the entries under its name. Entries that no guide of this process made come
from a file, and the guide copies their values. Entries of another guide are replaced. A guide's
parameters always stay the same tensors, and the store holds those.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Mapping
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

__all__ = [
    "adopt",
    "all_from_file",
    "declare",
    "declare_local",
    "forget",
    "from_file",
    "parameters_of",
    "unconstrained_params",
]

_owners = WeakIdKeyDictionary()  # a weak reference to the guide that put a parameter into the store
_warned: weakref.WeakSet[PyroModule] = weakref.WeakSet()
_leaves = WeakIdKeyDictionary()  # the leaf in the store that shares a frame's memory
_copied = WeakIdKeyDictionary()  # which version of a frame of indices a leaf is a copy of


def parameters_of(module: nn.Module, name: str) -> dict[str, Tensor]:
    """A module's parameters and its frame by their names in Pyro's store.

    The frame is not trained, but it is saved with the parameters, which are relative to it. Every
    entry of the store must have ``requires_grad``, so a frame is stored as a leaf that never gets a
    gradient, and one of indices as a copy in floating point.
    """
    named = module.named_parameters()  # under functional_call these are no Parameters
    own: dict[str, Tensor] = {key: p for key, p in named if isinstance(p, nn.Parameter)}
    for key, buffer in module.named_buffers() if own else ():
        if key.endswith("frame"):
            own[key] = _leaf(buffer)
    return {f"{name}$$${key}": value for key, value in own.items()}


def _leaf(buffer: Tensor) -> Tensor:
    """The leaf for a frame, or the copy of one of indices, as it is now."""
    is_index = not buffer.is_floating_point()
    leaf: Tensor | None = _leaves.get(buffer)
    if leaf is None or (is_index and _copied[leaf] != buffer._version):
        leaf = (buffer.float() if is_index else buffer.detach()).requires_grad_()
        _leaves[buffer] = leaf
        if is_index:
            _copied[leaf] = buffer._version
    return leaf


def all_from_file(name: str) -> dict[str, Tensor]:
    """The store's entries of this module that come from a file, by their names in the module."""
    if pyro.settings.get("module_local_params"):
        return {}
    entries, prefix = pyro.get_param_store()._params, f"{name}$$$"
    return {
        key.removeprefix(prefix): value.detach()
        for key, value in entries.items()
        if key.startswith(prefix) and value not in _owners
    }


def from_file(name: str) -> Tensor | None:
    """The store's entry of this name, if it comes from a file."""
    value = pyro.get_param_store()._params.get(name)
    is_local = pyro.settings.get("module_local_params")
    return None if is_local or value is None or value in _owners else value


def forget(name: str, own: Mapping[str, Tensor]) -> None:
    """Removes entries of this module that no file brought and its guide lacks."""
    store = pyro.get_param_store()
    for key, value in list(store._params.items()):
        if key.startswith(f"{name}$$$") and key not in own and value in _owners:
            del store[key]


def adopt(guide: PyroModule, own: dict[str, Tensor]) -> None:
    """Copies the values of the store's entries that come from a file into a guide's parameters.

    Raises:
        ValueError: If their names or shapes are not those of the guide.
    """
    if pyro.settings.get("module_local_params"):
        return
    entries = pyro.get_param_store()._params
    loaded = [
        name
        for name, value in own.items()
        if entries.get(name, value) is not value and entries[name] not in _owners
    ]
    prefixes = _prefixes(own)
    if loaded or any(
        name.startswith(prefixes) and name not in own and value not in _owners
        for name, value in entries.items()
    ):
        _check_entries(guide, own)
    for name in loaded:
        if own[name] in _copied and not own[name].equal(entries[name].to(own[name])):
            raise _of_another_make(guide, f"{name} has other values there than here")
    for name in loaded:
        with torch.no_grad():
            own[name].copy_(entries[name])
        _replace_entry(guide, name, own[name])


def declare(guide: PyroModule, own: dict[str, Tensor]) -> None:
    """States each parameter by ``pyro.param`` and makes it the store's entry."""
    entries = pyro.get_param_store()._params
    local = pyro.settings.get("module_local_params")
    for name, value in own.items():
        is_param = isinstance(value, nn.Parameter)  # else a frame, which is saved but not trained
        if is_param and not value.requires_grad:
            continue
        if not local and (entries.get(name) is not value or value not in _owners):
            _replace_entry(guide, name, value)
        if is_param and local:
            declare_local(name, value)
        elif is_param:
            pyro.param(name, value)


def declare_local(name: str, value: Tensor) -> None:
    """States a parameter to Pyro's handlers without entering it in the store."""
    value.unconstrained = weakref.ref(value)  # type: ignore[attr-defined]
    _statement(name, value, constraint=constraints.real, name=name)


def unconstrained_params(trace: poutine.Trace) -> dict[str, Tensor]:
    """The parameters in a trace of ``pyro.param`` statements, in unconstrained space."""
    nodes: dict[str, Any] = dict(trace.nodes)
    values = {name: site["value"] for name, site in nodes.items()}
    return {n: v.unconstrained() if hasattr(v, "unconstrained") else v for n, v in values.items()}


@effectful(type="param")
def _statement(name: str, value: Tensor, **_: Any) -> Tensor:
    return value


def _prefixes(own: Mapping[str, Tensor]) -> tuple[str, ...]:
    """What the names of a guide's entries begin with."""
    return tuple({name.partition("$$$")[0] + "$$$" for name in own})


def _check_entries(guide: PyroModule, own: dict[str, Tensor]) -> None:
    prefixes = _prefixes(own)
    entries = pyro.get_param_store()._params
    theirs = {name: tuple(p.shape) for name, p in entries.items() if name.startswith(prefixes)}
    ours = {name: tuple(value.shape) for name, value in own.items()}
    stored = {name for name, value in own.items() if value.requires_grad}  # the others are frozen
    if unlike := dict(theirs.items() - ours.items()).keys() | (stored - theirs.keys()):
        name = min(unlike)
        there, here = (shapes.get(name, "missing") for shapes in (theirs, ours))
        raise _of_another_make(guide, f"{name} has shape {there} there and {here} here")


def _of_another_make(guide: PyroModule, why: str) -> ValueError:
    return ValueError(
        f"The parameter store has entries of a guide named '{guide._pyro_name}' of another make: "
        f"{why}. Clear it with pyro.clear_param_store(), or give the guide a name of its own: "
        f"{type(guide).__name__}(model, name=...)."
    )


def _replace_entry(guide: PyroModule, name: str, value: Tensor) -> None:
    store = pyro.get_param_store()
    if name in store:
        old = store._params.pop(name)
        store._param_to_name.pop(old, None)  # absent if the parameter had two names
        if guide not in _warned and _has_another_owner(old, guide):
            _warned.add(guide)
            warn(
                f"Another guide named '{guide._pyro_name}' is alive. Its parameters in Pyro's "
                "parameter store are replaced by those of this guide. Give each a name of its own: "
                f"{type(guide).__name__}(model, name=...)."
            )
    if value.requires_grad:  # frozen parameters are not stored
        store.setdefault(name, value)
        _owners[value] = weakref.ref(guide)


def _has_another_owner(value: Tensor, guide: PyroModule) -> bool:
    """Whether another guide made the entry and is still in use."""

    def owner() -> Any:
        return _owners.get(value, lambda: None)()

    if owner() in (None, guide):
        return False
    gc.collect()  # frees guides that are only in reference cycles
    return owner() not in (None, guide)
