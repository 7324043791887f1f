"""When code is recorded, when its recording is checked, and when the code runs instead.

Calls of one kind differ only in the values of their tensors, and share a recording. A recording
can't see changes of values that are not tensors, so it is compared with the code when it is made,
and then ever more rarely, by default at uses 1, 2, 4, 8, ...

Numbers that the code takes out of its data are constants of a recording. For data with other such
numbers a second recording is made beside the first, and so on.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Hashable, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from .capture import Refused, kind_of_tensor

__all__ = ["KEEPS_CHANGING", "MAX_BUILDS", "MAX_GRAPHS", "Recorder", "by_hash", "compare"]
__all__ += ["disagreement", "kind_of"]

# Types of arguments, besides tensors, that become constants of a graph.
PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, nn.Module)
NUMPY_SCALARS = ("float64", "float32", "int64", "int32", "bool")

# How many recordings are kept, and how many kinds of calls without one are remembered.
MAX_GRAPHS, MAX_KINDS = 8, 64

# How often calls of one kind are recorded by default, if the recordings become outdated.
MAX_BUILDS = 4

# The errors allowed of a graph's loss and of its gradients, which are sums of terms that nearly
# cancel, relative to 1 + their norm.
TOLERANCES = {torch.float64: (1e-8, 1e-6), torch.float32: (1e-4, 2e-3)}

# Why calls of a kind are recorded no more.
KEEPS_CHANGING = (
    "A number, a module or a parameter that their graph depends on keeps changing, or more than "
    f"{MAX_GRAPHS} kinds of arguments take turns. Numbers that the model computes from its data in "
    "Python, by int(), item() or the like, or as the shape of a selection, should be the same for "
    "all data; compute them before, and pass them as tensors."
)

# In place of the recording of a kind that has none yet.
UNKNOWN = object()

Call = TypeVar("Call")
Recording = TypeVar("Recording")


class Recorder(Generic[Call, Recording]):
    """The recordings of some code by kinds of calls, and the policy for them.

    The caller asks :meth:`find` at each call. It returns a recording to run in place of the code,
    or whether to :meth:`record` the call, before or after the code runs. The ``MAX_GRAPHS``
    recordings used last are kept, and a kind of call is recorded at most ``most_builds`` times.

    A subclass defines :meth:`kind`, :meth:`make`, :meth:`is_current`, :meth:`check` and
    :meth:`leave_to_code`. It may override :meth:`fits`, :meth:`is_due` and :meth:`made_before`.

    Attributes:
        check_growth: A recording is checked at uses that are its powers: 1, 2, 4, 8 and so on.
        most_builds: How often calls of one kind are recorded.
    """

    check_growth = 2
    most_builds = MAX_BUILDS

    def __init__(self) -> None:
        self.recordings: OrderedDict[Hashable, Recording | None] = OrderedDict()
        self._kinds: OrderedDict[Hashable, None] = OrderedDict()
        self._builds: Counter[Hashable] = Counter()
        # By the id of a recording: how often it ran, and at which use it is checked next.
        self._uses: dict[int, list[int]] = {}
        # Of recordings that another recorder made: the ids of those in use, and those refused.
        self._adopted: set[int] = set()
        self._refused: list[Any] = []

    def __getstate__(self) -> dict[str, Any]:
        fresh: Recorder[Any, Any] = Recorder()  # recordings stay in this process
        return {**self.__dict__, **fresh.__dict__}

    def kind(self, call: Call) -> Hashable:
        """All properties of a call except the values of its tensors."""
        raise NotImplementedError

    def make(self, call: Call) -> Recording | None:
        """A recording of a call, compared with the code; None if the code should run instead."""
        raise NotImplementedError

    def is_current(self, recording: Recording) -> bool:
        """Whether all that it depends on is unchanged; raises Refused if it can't run now."""
        raise NotImplementedError

    def fits(self, recording: Recording, call: Call) -> bool:
        """Whether the constants of a recording are those of a call of its kind."""
        return True

    def check(self, recording: Recording, call: Call) -> None:
        """Compares a recording with the code on a call; raises Refused if they differ."""
        raise NotImplementedError

    def leave_to_code(self, why: str) -> None:
        """Warns that the code itself runs, or raises an error instead."""
        raise NotImplementedError

    def is_due(self, call: Call, kind: Hashable) -> bool:
        """Whether to record a call of a kind that has no recording.

        By default at once while fewer than ``MAX_GRAPHS`` are kept, then when a kind comes again.
        """
        comes_again = kind in self._kinds
        self._kinds[kind] = None
        if len(self._kinds) > MAX_KINDS:
            self._kinds.popitem(last=False)
        if len(self.recordings) < MAX_GRAPHS:
            return True
        self.leave_to_code(
            f"Arguments are of ever new kinds, and only {MAX_GRAPHS} graphs are kept; another is "
            "built when a kind comes again. Pad tensors to one shape, and pass numbers that change "
            "as tensors."
        )
        return comes_again

    def made_before(self, kind: Hashable) -> Recording | None:
        """A recording for calls of this kind that another recorder made."""
        return None

    def find(self, call: Call) -> tuple[Recording | None, bool]:
        """The recording to run for a call, and if there is none, whether to :meth:`record` it.

        Raises:
            Refused: If the recording and the code no longer agree.
        """
        try:
            kind = self.kind(call)
            key, recording = self._look_up(kind, call)
            if recording is UNKNOWN:
                found = self.made_before(kind)
                is_refused = any(found is other for other in self._refused)
                if found is not None and not is_refused and self.fits(found, call):
                    recording = self._keep(key, found)
                    self._adopted.add(id(found))
            if recording is None:
                return None, False
            is_current = recording is not UNKNOWN and self.is_current(recording)
        except Refused as why:
            self.leave_to_code(str(why))
            return None, False
        if is_current:
            self.recordings.move_to_end(key)
            uses = self._uses[id(recording)]
            uses[0] += 1
            if uses[0] < uses[1]:
                return recording, False
            uses[1] *= self.check_growth
            try:
                self.check(recording, call)
                return recording, False
            except Refused:
                # What another recorder made may depend on something that has changed since.
                if id(recording) not in self._adopted or uses[0] > 1:
                    raise
                self._refused.append(recording)
        self.recordings.pop(key, None)
        if self._builds[kind] >= self.most_builds:
            self.leave_to_code(KEEPS_CHANGING)
            return None, False
        return None, self.is_due(call, kind)

    def holds(self, recording: Recording, call: Call) -> bool:
        """Whether this recording is kept, and the one to run for a call."""
        try:
            _, found = self._look_up(self.kind(call), call)
        except Refused:  # a graph can't take it
            return False
        return found is recording and self.is_current(recording)

    def _look_up(self, kind: Hashable, call: Call) -> tuple[Hashable, Any]:
        """The recording that fits a call, or None or UNKNOWN, and its key."""
        free: Hashable = None
        for key in ((kind, k) for k in range(MAX_GRAPHS + 1)):  # one more than are kept
            recording: Any = self.recordings.get(key, UNKNOWN)
            if recording is UNKNOWN:
                free = free or key
            elif recording is None or self.fits(recording, call):
                return key, recording
        return free, UNKNOWN

    def record(self, call: Call) -> Recording | None:
        """Makes and keeps the recording of a call; raises Refused if it can't be recorded."""
        kind = self.kind(call)  # again, since the first call of the code may create modules
        self._builds[kind] += 1
        return self._keep(self._look_up(kind, call)[0], self.make(call))

    def _keep(self, key: Hashable, recording: Recording | None) -> Recording | None:
        self.recordings[key] = recording
        self._uses[id(recording)] = [0, 1]
        if len(self.recordings) > MAX_GRAPHS:
            self._uses.pop(id(self.recordings.popitem(last=False)[1]), None)
        return recording


def kind_of(
    model: Any, guide: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, ...]:
    """All properties of a call of model and guide except the values of tensors."""
    leaves, spec = tree_flatten((args, kwargs)) if args or kwargs else ([], None)
    owners = [getattr(fn, "__self__", fn) for fn in (model, guide)]
    modules = [owner for owner in owners if isinstance(owner, nn.Module)]
    return (
        spec,
        tuple(map(_kind, leaves)),
        tuple(module.training for owner in modules for module in owner.modules()),
        torch.get_default_dtype(),
        *(torch.is_autocast_enabled(device) for device in ("cpu", "cuda")),
        torch.is_grad_enabled(),
    )


def _kind(leaf: Any) -> Any:
    if isinstance(leaf, Tensor):
        return kind_of_tensor(leaf)
    if isinstance(leaf, PLAIN) or callable(leaf) or type(leaf).__name__ in NUMPY_SCALARS:
        return type(leaf), by_hash(leaf)
    raise Refused(
        f"An argument is of type {type(leaf).__name__}, and a graph can't see it change. Pass "
        "tensors instead: torch.as_tensor(...) makes them from arrays and numbers."
    )


def by_hash(thing: Any) -> Any:
    """The thing, or a wrapper that is hashed by identity if it has no hash."""
    try:
        hash(thing)
    except TypeError:
        return _ById(thing)
    return thing


class _ById:
    def __init__(self, thing: Any) -> None:
        self.thing = thing

    def __hash__(self) -> int:
        return id(self.thing)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _ById) and other.thing is self.thing


def compare(found: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    """Compares the loss and the gradients of a recording with those of the code.

    Raises:
        Refused: If they differ by more than rounding.
    """
    for k, (a, b) in enumerate(zip(found, expected, strict=True)):
        differ = a.shape != b.shape or not torch.equal(a.isfinite(), b.isfinite())
        if not differ:
            a, b = (x.nan_to_num(0.0, 0.0, 0.0) for x in (a, b))
            tolerance = TOLERANCES.get(b.dtype, (5e-2, 5e-2))[min(k, 1)]
            differ = bool((a - b).norm() > tolerance * (1 + b.norm()))
        if differ:
            raise disagreement(
                f"under one seed its loss is {expected[0].item():.6g}, and that of a graph of it "
                f"{found[0].item():.6g}; or else their gradients differ"
            )


def disagreement(how: str) -> Refused:
    """The error for a recording that differs from the code."""
    return Refused(
        f"The model or the guide and a graph of them don't agree: {how}. They may depend on "
        "something other than tensors that changes from run to run: a counter, random numbers of "
        "Python or NumPy, or a module that changes itself in training (call .eval() on it). Pass "
        "such numbers as tensors; or train by Trace_ELBO, or fit(..., compile=False)."
    )
