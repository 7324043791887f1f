"""A cache of flows' passes, kept as long as the tensors that they produced are alive.

A pass is stored under the tensor that it produced, its key, which is held weakly. A forward pass is
stored under the value. An inverse is stored under the noise. Nothing stored may lead back to its
key through an autograd graph: all of it is older than the key. A pass is returned only while
everything that it depends on is unchanged: each tensor's identity, version and address, and the
number of optimiser steps taken in this process, since some optimisers write to tensors without a
new version.

Throughout, ``sources`` is what a pass depends on besides the tensor it starts from: modules,
tensors and settings, always in the same order. Nothing is stored in inference mode, or while
``torch.compile`` traces.
"""

from __future__ import annotations

import functools
import operator
import weakref
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary, WeakIdRef

from ..nn.univariate import UnivariateMap
from ..solvers.fixed_point import runs_eagerly

__all__ = [
    "count_optimizer_step",
    "keep",
    "keep_inverse",
    "link",
    "linked_value",
    "noise_of",
    "pass_back",
    "pass_between",
    "pass_to",
    "recognise",
    "unlink",
]

_optimizer_steps = 0


def count_optimizer_step(*_: object) -> None:
    """The hook that runs after every step of every optimiser."""
    global _optimizer_steps
    _optimizer_steps += 1


class Dependencies(NamedTuple):
    """What a pass depends on besides its two ends."""

    tensors: list[Tensor]  # compared by identity, version and address
    objects: list[object]  # modules and partial functions, compared by identity
    settings: list[object]  # compared by value


class Pass:
    """One pass of a flow: the tensor at its other end, and the log slope of each coordinate.

    The log slope is kept and not its sum, so that every caller gets a new tensor.
    """

    def __init__(
        self, sources: Dependencies, key: Tensor, partner: Tensor, given: Tensor, log_slope: Tensor
    ) -> None:
        self.partner = partner
        self.given = given  # the partner before the context expanded its batch shape
        self._log_slope = log_slope
        self._tensors, self._settings = sources.tensors, sources.settings
        # Weakly, since a module may hold what its flow produced.
        self._objects = list(map(weakref.ref, sources.objects))
        self._steps = _optimizer_steps
        tensors = [*sources.tensors, partner, key]
        self._versions = _versions(tensors)
        self._storages = _storages(tensors)  # held, so that no other tensor gets their addresses
        self._graph = _graph(tensors) if torch.is_grad_enabled() else None

    def is_fresh(self, sources: Sequence[object], key: Tensor) -> bool:
        """Whether a pass from these sources would produce the same tensor now."""
        if self._steps != _optimizer_steps:
            return False
        now = _dependencies(sources)
        return (
            now is not None
            and self._settings == now.settings
            and len(self._objects) == len(now.objects)
            and all(map(operator.is_, [ref() for ref in self._objects], now.objects))
            and len(self._tensors) == len(now.tensors)
            and all(map(operator.is_, self._tensors, now.tensors))
            and self._versions == _versions([*now.tensors, self.partner, key])
        )

    def has_enough_graph(self, key: Tensor) -> bool:
        """Whether the stored tensors have all the gradients that are required now."""
        tensors = [*self._tensors, self.partner, key]
        if not torch.is_grad_enabled() or not any(t.requires_grad for t in tensors):
            return True
        return self._graph == _graph(tensors)

    def log_det(self) -> Tensor:
        """The flow's log-determinant, from noise to value."""
        return self._log_slope.sum(-1)


_forward = WeakIdKeyDictionary()  # value: the pass that produced it from its noise
_backward = WeakIdKeyDictionary()  # noise: the inverse that found it, or added its gradient
_aliases = WeakIdKeyDictionary()  # a tensor: an equal one with another graph, by which it is known
_values = WeakIdKeyDictionary()  # noise that an inverse has just returned: its value, weakly


def keep(sources: Sequence[object], x: Tensor, y: Tensor, log_slope: Tensor, given: Tensor) -> None:
    """Stores the pass in which a flow made ``y`` from ``x``, if its dependencies can be checked."""
    _keep(_forward, sources, y, x, given, log_slope)


def keep_inverse(
    sources: Sequence[object],
    x: Tensor,
    y: Tensor,
    log_slope: Tensor,
    alias: Tensor | None = None,
) -> None:
    """Stores ``x`` as the inverse of ``y``; ``alias`` is the same noise with less of a graph."""
    _keep(_backward, sources, x, y, y, log_slope)
    if alias is not None:
        _aliases[x] = alias


def pass_to(sources: Sequence[object], y: Tensor) -> Pass | None:
    """The pass in which a flow made ``y``, if all its gradients are there."""
    return _recall(_forward, sources, y, graph=True)


def pass_back(sources: Sequence[object], x: Tensor) -> Pass | None:
    """The inverse that returned ``x``, if all its gradients are there."""
    return _recall(_backward, sources, x, graph=True)


def pass_between(sources: Sequence[object], x: Tensor, y: Tensor) -> Pass | None:
    """The pass from ``x`` to ``y``, or back, if all its gradients are there."""
    known = pass_to(sources, y)
    if known is not None and (known.partner is x or known.given is x):
        return known
    known = pass_back(sources, x)
    return known if known is not None and known.partner is y else None


def noise_of(sources: Sequence[object], y: Tensor) -> Tensor | None:
    """The noise from which a flow made ``y``, or a tensor equal to ``y``; it may lack gradients.

    A custom backward adds the gradients. Only plain autograd runs it, so there is none elsewhere.
    """
    if not runs_eagerly():
        return None
    known = _recall(_forward, sources, y, graph=False)
    if known is None and y in _aliases and y._version == 0:
        known = _recall(_forward, sources, _aliases[y], graph=False)
    return None if known is None else known.partner


def recognise(value: Tensor, y: Tensor) -> None:
    """Records that ``value`` is ``y.detach()``, if it is, so that the noise of ``y`` is its own."""
    if (
        value is not y
        and runs_eagerly()
        and value.shape == y.shape
        and value.dtype == y.dtype
        and value.stride() == y.stride()
        and value.data_ptr() == y.data_ptr()
        and not value.requires_grad
    ):
        _aliases[value] = y


def link(x: Tensor, y: Tensor) -> None:
    """Records that an inverse has returned ``x`` for ``y``, so that the flow returns ``y`` for it.

    Between an inverse and the log-determinant, ``ComposeTransform`` calls its parts once more for
    the values in between, and compares these by identity. The link ends with the log-determinant:
    later the noise or a parameter may have changed without a new version, as in ``gradcheck``.
    """
    _values[x] = WeakIdRef(y)


def unlink(x: Tensor) -> None:
    """Ends what :func:`link` began."""
    if not torch.compiler.is_compiling():
        _values.pop(x, None)


def linked_value(sources: Sequence[object], x: Tensor) -> Tensor | None:
    """The value that ``x`` is linked to, if nothing has changed."""
    reference = None if torch.compiler.is_compiling() else _values.get(x)
    y: Tensor | None = None if reference is None else reference()
    if y is None or (y.requires_grad and not torch.is_grad_enabled()):
        return None
    known = pass_to(sources, y)
    return y if known is not None and known.partner is x else None


def _keep(
    passes: WeakIdKeyDictionary,
    sources: Sequence[object],
    key: Tensor,
    partner: Tensor,
    given: Tensor,
    log_slope: Tensor,
) -> None:
    if torch.compiler.is_compiling() or torch.is_inference_mode_enabled():
        return
    found = _dependencies(sources)
    # Tensors from inference mode have no version.
    if found is not None and not any(t.is_inference() for t in (*found.tensors, partner)):
        passes[key] = Pass(found, key, partner, given, log_slope)


def _recall(
    passes: WeakIdKeyDictionary, sources: Sequence[object], key: Tensor, graph: bool
) -> Pass | None:
    if torch.compiler.is_compiling():
        return None
    known: Pass | None = passes.get(key)
    if known is None or not known.is_fresh(sources, key):
        return None
    return known if not graph or known.has_enough_graph(key) else None


def _dependencies(sources: Sequence[object]) -> Dependencies | None:
    """All that the sources consist of; None if a change of some source can't be detected."""
    tensors: list[Tensor | None] = []
    objects: list[object] = []
    settings: list[object] = []
    queue = list(sources)
    # The queue grows in the loop. This runs at every lookup: half as long as module.parameters().
    for source in queue:
        if isinstance(source, nn.Module):
            state = source.__dict__
            if "_pyro_samples" in state and (state["_pyro_samples"] or state["_pyro_params"]):
                return None  # Pyro replaces these without a new version
            objects.append(source)
            settings.append(source.training)
            if parameters := state["_parameters"]:
                tensors += parameters.values()
            if buffers := state["_buffers"]:
                tensors += buffers.values()
            if children := state["_modules"]:
                queue += children.values()
        elif source is None or isinstance(source, bool | int | float | str):
            settings.append(source)
        elif isinstance(source, Tensor):
            tensors.append(source)
        elif isinstance(source, UnivariateMap):
            settings += type(source), vars(source).copy()
        elif isinstance(source, functools.partial):
            objects.append(source)
            queue += [source.func, *source.args, *source.keywords.values()]
        else:
            return None  # a function may depend on anything
    return Dependencies([tensor for tensor in tensors if tensor is not None], objects, settings)


def _versions(tensors: list[Tensor]) -> list[int]:
    versions = [tensor._version for tensor in tensors]
    if torch._C._len_torch_dispatch_stack():
        return versions  # a tracer's tensors have no address
    try:
        return versions + [tensor.data_ptr() for tensor in tensors]
    except RuntimeError:
        return versions  # nor have those of torch.func


def _storages(tensors: list[Tensor]) -> list[object]:
    try:
        return [tensor.untyped_storage() for tensor in tensors]
    except RuntimeError:
        return []  # those of torch.func have no storage either


def _graph(tensors: list[Tensor]) -> list[object]:
    """Which tensors require gradients, and their nodes. A node does not hold its tensor."""
    flags: list[object] = [tensor.requires_grad for tensor in tensors]
    return flags + [tensor.grad_fn for tensor in tensors]
