"""What flows remember: the passes that made the tensors that are still alive.

A pass is kept under the tensor that it made, and that tensor is held weakly, so a pass lives as
long as somebody holds what came of it. Nothing that is kept may lead back to that tensor through
its graph: the noise and the log-determinant of a pass are older than the value. A pass is returned
only while all that it hangs on is as it was: the tensors' identity, version and address, and the
number of optimiser steps taken in this process, since some optimisers write past the version.

Throughout, ``sources`` is what a pass depends on besides the tensor it starts from: modules,
tensors and settings, always in the same order. Nothing is kept in inference mode, or while
``torch.compile`` traces.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary, WeakIdRef

_optimizer_steps = 0


def count_optimizer_step(*_: object) -> None:
    """The hook that runs after every step of every optimiser; it only counts."""
    global _optimizer_steps
    _optimizer_steps += 1


class Pass:
    """One pass of a flow: the tensor at its other end, and the flow's log-determinant."""

    __slots__ = ("_gradients", "_sources", "_steps", "_tensors", "_versions", "log_det", "partner")

    def __init__(
        self,
        sources: Sequence[object],
        tensors: list[Tensor],
        made: Tensor,
        partner: Tensor,
        log_det: Tensor,
    ) -> None:
        self.partner, self.log_det = partner, log_det
        self._sources, self._tensors, self._steps = sources, tensors, _optimizer_steps
        self._versions = _versions([*tensors, partner, made])
        self._gradients = self._wanted(made)

    def is_fresh(self, sources: Sequence[object], made: Tensor) -> bool:
        """Whether a pass from these sources would make the same tensor now."""
        if self._steps != _optimizer_steps or not _same(self._sources, sources):
            return False
        tensors = _tensors(sources)
        return (
            tensors is not None
            and _same(self._tensors, tensors)
            and self._versions == _versions([*tensors, self.partner, made])
        )

    def has_enough_graph(self, made: Tensor) -> bool:
        """Whether all the gradients that are wanted now are there."""
        wanted = self._wanted(made)
        return wanted is None or not any(wanted) or wanted == self._gradients

    def wanted_log_det(self) -> Tensor:
        """The log-determinant, with a graph where gradients are on."""
        return self.log_det if torch.is_grad_enabled() else self.log_det.detach()

    def _wanted(self, made: Tensor) -> list[bool] | None:
        if not torch.is_grad_enabled():
            return None
        return [tensor.requires_grad for tensor in (*self._tensors, self.partner, made)]


_forward = WeakIdKeyDictionary()  # value: the pass that made it of its noise
_backward = WeakIdKeyDictionary()  # noise: the pass that gave it the gradient it had lacked
_twins = WeakIdKeyDictionary()  # noise of a backward pass: the tensor that it is equal to
_values = WeakIdKeyDictionary()  # noise that an inverse has returned: its value, weakly


def keep(sources: Sequence[object], x: Tensor, y: Tensor, log_det: Tensor) -> None:
    """Remembers that a flow made ``y`` of ``x``, if all that this depends on can be watched."""
    _keep(_forward, sources, y, x, log_det)


def keep_gradient(
    sources: Sequence[object], x: Tensor, y: Tensor, log_det: Tensor, twin: Tensor
) -> None:
    """Remembers ``x``, the inverse of ``y`` with a graph; its twin is the noise without one."""
    _keep(_backward, sources, x, y, log_det)
    _twins[x] = twin


def pass_to(sources: Sequence[object], y: Tensor) -> Pass | None:
    """The pass in which a flow made ``y``, if all its gradients are there."""
    if torch.compiler.is_compiling():
        return None
    known = _recall(_forward, sources, y)
    return known if known is not None and known.has_enough_graph(y) else None


def noise_of(sources: Sequence[object], y: Tensor) -> Tensor | None:
    """The noise that a flow made ``y`` of, or something equal to ``y``; gradients may lack."""
    if torch.compiler.is_compiling():
        return None
    known = _recall(_forward, sources, y) or _recall(_forward, sources, _twins.get(y))
    return None if known is None else known.partner


def pass_between(sources: Sequence[object], x: Tensor, y: Tensor) -> Pass | None:
    """The pass from ``x`` to ``y``, or back, if all its gradients are there."""
    if torch.compiler.is_compiling():
        return None
    for passes, made, partner in ((_forward, y, x), (_backward, x, y)):
        known = _recall(passes, sources, made)
        if known is not None and known.partner is partner and known.has_enough_graph(made):
            return known
    return None


def expect(x: Tensor, y: Tensor) -> None:
    """Notes that an inverse returns ``x`` for ``y``, so that its flow can return ``y`` for ``x``.

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
    return None if pass_between(sources, x, y) is None else y


def _keep(
    passes: WeakIdKeyDictionary,
    sources: Sequence[object],
    made: Tensor,
    partner: Tensor,
    log_det: Tensor,
) -> None:
    if torch.compiler.is_compiling() or torch.is_inference_mode_enabled():
        return
    tensors = _tensors(sources)
    # Tensors from inference mode have no version.
    if tensors is not None and not any(t.is_inference() for t in (*tensors, partner)):
        passes[made] = Pass(sources, tensors, made, partner, log_det)


def _recall(
    passes: WeakIdKeyDictionary, sources: Sequence[object], made: Tensor | None
) -> Pass | None:
    if made is None:
        return None
    known: Pass | None = passes.get(made)
    return known if known is not None and known.is_fresh(sources, made) else None


def _tensors(sources: Sequence[object]) -> list[Tensor] | None:
    """All tensors in the sources; None where there is something that can't be watched."""
    tensors: list[Tensor | None] = []
    queue = list(sources)
    for source in queue:  # it grows as we go: several times faster than module.parameters()
        if isinstance(source, nn.Module):
            state = source.__dict__
            if state.get("_pyro_samples"):
                return None  # weights with a prior are drawn anew, past every version
            tensors += state["_parameters"].values()
            tensors += state["_buffers"].values()
            queue += state["_modules"].values()
        elif source is None or isinstance(source, bool | float):
            continue
        elif isinstance(source, Tensor):
            tensors.append(source)
        elif isinstance(source, functools.partial):
            queue += [source.func, *source.args, *source.keywords.values()]
        elif callable(source):
            return None  # who knows what it closes over
    return [tensor for tensor in tensors if tensor is not None]


def _same(these: Sequence[object], those: Sequence[object]) -> bool:
    return len(these) == len(those) and all(map(operator.is_, these, those))


def _versions(tensors: list[Tensor]) -> list[int]:
    versions = [tensor._version for tensor in tensors]
    try:
        return versions + [tensor.data_ptr() for tensor in tensors]
    except RuntimeError:
        return versions  # the tensors of tracers and of torch.func have no address
