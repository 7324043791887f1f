"""What flows remember: the passes that made the tensors that are still alive.

A pass is kept under the tensor that it made, and that tensor is held weakly, so a pass lives as
long as somebody holds what came of it. The way back from a value is kept likewise, under the noise
that was found. Nothing that is kept may lead back to the tensor that it is kept under through its
graph: it is older. A pass is returned only while all that it hangs on is as it was: the tensors'
identity, version and address, and the number of optimiser steps taken in this process, since some
optimisers write past the version.

Throughout, ``sources`` is what a pass depends on besides the tensor it starts from: modules,
tensors and settings, always in the same order. Nothing is kept in inference mode, or while
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
    "expect",
    "expected",
    "keep",
    "keep_gradient",
    "noise_of",
    "pass_back",
    "pass_between",
    "pass_to",
    "recognise",
    "settle",
]

_optimizer_steps = 0


def count_optimizer_step(*_: object) -> None:
    """The hook that runs after every step of every optimiser; it only counts."""
    global _optimizer_steps
    _optimizer_steps += 1


class Watched(NamedTuple):
    """What a pass depends on besides its ends."""

    tensors: list[Tensor]  # compared by identity, version and address
    objects: list[object]  # modules and partial functions, compared by identity
    settings: list[object]  # compared by value


class Pass:
    """One pass of a flow: the tensor at its other end, and the flow's log-slope there.

    The log-slope is kept, and not the log-determinant, so that everybody gets a sum of their own.
    """

    def __init__(
        self, watched: Watched, made: Tensor, partner: Tensor, given: Tensor, log_slope: Tensor
    ) -> None:
        self.partner = partner
        self.given = given  # the partner before the context widened its batch shape
        self._log_slope = log_slope
        self._tensors, self._settings = watched.tensors, watched.settings
        # Weakly, as a module may well hold what its flow made. Those alive have their ids for good.
        self._objects = list(map(weakref.ref, watched.objects))
        self._ids = list(map(id, watched.objects))
        self._steps = _optimizer_steps
        tensors = [*watched.tensors, partner, made]
        self._versions = _versions(tensors)
        self._storages = _storages(tensors)  # while they are held, their addresses stay theirs
        self._graph = _graph(tensors) if torch.is_grad_enabled() else None

    def is_fresh(self, sources: Sequence[object], made: Tensor) -> bool:
        """Whether a pass from these sources would make the same tensor now."""
        if self._steps != _optimizer_steps:
            return False
        now = _watch(sources)
        return (
            now is not None
            and self._settings == now.settings
            and self._ids == list(map(id, now.objects))
            and None not in [reference() for reference in self._objects]
            and len(self._tensors) == len(now.tensors)
            and all(map(operator.is_, self._tensors, now.tensors))
            and self._versions == _versions([*now.tensors, self.partner, made])
        )

    def has_enough_graph(self, made: Tensor) -> bool:
        """Whether all the gradients that are wanted now are there."""
        tensors = [*self._tensors, self.partner, made]
        if not torch.is_grad_enabled() or not any(t.requires_grad for t in tensors):
            return True
        return self._graph == _graph(tensors)

    def log_det(self) -> Tensor:
        """The flow's log-determinant, from noise to value."""
        return self._log_slope.sum(-1)


_forward = WeakIdKeyDictionary()  # value: the pass that made it of its noise
_backward = WeakIdKeyDictionary()  # noise: the pass that gave it the gradient it had lacked
_twins = WeakIdKeyDictionary()  # noise of a backward pass: the tensor that it is equal to
_values = WeakIdKeyDictionary()  # noise that an inverse has returned: its value, weakly


def keep(sources: Sequence[object], x: Tensor, y: Tensor, log_slope: Tensor, given: Tensor) -> None:
    """Remembers that a flow made ``y`` of ``x``, if all that this depends on can be watched."""
    _keep(_forward, sources, y, x, given, log_slope)


def keep_gradient(
    sources: Sequence[object],
    x: Tensor,
    y: Tensor,
    log_slope: Tensor,
    twin: Tensor | None = None,
) -> None:
    """Remembers ``x``, the inverse of ``y``; its twin is the same noise with less of a graph."""
    _keep(_backward, sources, x, y, y, log_slope)
    if twin is not None:
        _twins[x] = twin


def pass_to(sources: Sequence[object], y: Tensor) -> Pass | None:
    """The pass in which a flow made ``y``, if all its gradients are there."""
    return _recall(_forward, sources, y, graph=True)


def pass_back(sources: Sequence[object], x: Tensor) -> Pass | None:
    """The pass that gave ``x``, an inverse, its gradient, if all its gradients are there."""
    return _recall(_backward, sources, x, graph=True)


def pass_between(sources: Sequence[object], x: Tensor, y: Tensor) -> Pass | None:
    """The pass from ``x`` to ``y``, or back, if all its gradients are there."""
    known = pass_to(sources, y)
    if known is not None and (known.partner is x or known.given is x):
        return known
    known = pass_back(sources, x)
    return known if known is not None and known.partner is y else None


def noise_of(sources: Sequence[object], y: Tensor) -> Tensor | None:
    """The noise that a flow made ``y`` of, or something equal to ``y``; gradients may lack.

    They are given to it with a hook, which plain autograd alone would run.
    """
    if not runs_eagerly():
        return None
    known = _recall(_forward, sources, y, graph=False)
    if known is None and y in _twins and y._version == 0:
        known = _recall(_forward, sources, _twins[y], graph=False)
    return None if known is None else known.partner


def recognise(value: Tensor, y: Tensor) -> None:
    """Notes that ``value`` is ``y`` without its graph, if it is: ``y.detach()``."""
    if (
        value is not y
        and runs_eagerly()
        and value.shape == y.shape
        and value.dtype == y.dtype
        and value.stride() == y.stride()
        and value.data_ptr() == y.data_ptr()
        and not value.requires_grad
    ):
        _twins[value] = y


def expect(x: Tensor, y: Tensor) -> None:
    """Notes that an inverse returns ``x``, the noise of ``y``, so its flow can return ``y`` for it.

    Between an inverse and the log-determinant ``ComposeTransform`` asks its parts for the values in
    between once more, and knows them again by their identity only. The note holds until the
    log-determinant and no longer: whoever asks next may have changed the noise, or a parameter,
    past its version, as ``gradcheck`` does.
    """
    _values[x] = WeakIdRef(y)


def settle(x: Tensor) -> None:
    """Ends what :func:`expect` began."""
    if not torch.compiler.is_compiling():
        _values.pop(x, None)


def expected(sources: Sequence[object], x: Tensor) -> Tensor | None:
    """The value that is expected of ``x``, if nothing has changed."""
    reference = None if torch.compiler.is_compiling() else _values.get(x)
    y: Tensor | None = None if reference is None else reference()
    if y is None or (y.requires_grad and not torch.is_grad_enabled()):
        return None
    known = pass_to(sources, y)
    return y if known is not None and known.partner is x else None


def _keep(
    passes: WeakIdKeyDictionary,
    sources: Sequence[object],
    made: Tensor,
    partner: Tensor,
    given: Tensor,
    log_slope: Tensor,
) -> None:
    if torch.compiler.is_compiling() or torch.is_inference_mode_enabled():
        return
    watched = _watch(sources)
    # Tensors from inference mode have no version.
    if watched is not None and not any(t.is_inference() for t in (*watched.tensors, partner)):
        passes[made] = Pass(watched, made, partner, given, log_slope)


def _recall(
    passes: WeakIdKeyDictionary, sources: Sequence[object], made: Tensor, graph: bool
) -> Pass | None:
    if torch.compiler.is_compiling():
        return None
    known: Pass | None = passes.get(made)
    if known is None or not known.is_fresh(sources, made):
        return None
    return known if not graph or known.has_enough_graph(made) else None


def _watch(sources: Sequence[object]) -> Watched | None:
    """What there is to watch in the sources; None where something can't be watched."""
    tensors: list[Tensor | None] = []
    objects: list[object] = []
    settings: list[object] = []
    queue = list(sources)
    # The queue grows as we go. This runs at every recall: half as long as module.parameters().
    for source in queue:
        if isinstance(source, nn.Module):
            state = source.__dict__
            if "_pyro_samples" in state and (state["_pyro_samples"] or state["_pyro_params"]):
                return None  # Pyro sets these anew, past every version
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
            return None  # who knows what it closes over, or holds
    return Watched([tensor for tensor in tensors if tensor is not None], objects, settings)


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
    """Who wants gradients, and where they go. A node does not hold the tensor it made."""
    flags: list[object] = [tensor.requires_grad for tensor in tensors]
    return flags + [tensor.grad_fn for tensor in tensors]
