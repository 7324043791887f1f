"""When code is recorded, when a recording is compared with it again, and when it is left alone.

Code runs again and again. Calls of one kind differ in nothing but the numbers in their tensors, and
share a recording. What code reads besides its tensors is not seen to change, so a recording is
compared with the code when it is made, and at its uses ever more rarely.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from .capture import Refused, kind_of_tensor

__all__ = ["MAX_GRAPHS", "Recorder", "by_hash", "compare", "disagreement", "kind_of", "opened"]

# Arguments, besides tensors, that are part of a graph.
PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, nn.Module)
NUMPY_SCALARS = ("float64", "float32", "int64", "int32", "bool")

# Recordings that are kept at most, and how many kinds of calls are remembered beyond.
MAX_GRAPHS, MAX_KINDS = 8, 64

# How often a kind of call is recorded, where what its recording relies on changes.
MAX_BUILDS = 4

# How far a graph's numbers may be from those of the code, relative to 1 + their size: loss and
# gradients, which are sums of what nearly cancels.
TOLERANCES = {torch.float64: (1e-8, 1e-6), torch.float32: (1e-4, 2e-3)}

# Stands for the recording of a kind that came for the first time.
UNKNOWN = object()

Call = TypeVar("Call")
Recording = TypeVar("Recording")


class Recorder(Generic[Call, Recording]):
    """The recordings of some code, by kinds of calls, and one policy for them.

    Who runs the code asks :meth:`find` at each call. It gives a recording to run in the code's
    place, or says that the call is to be recorded, by :meth:`record`, before or after the code runs
    for it. At most ``MAX_GRAPHS`` recordings are kept, those used last, and a kind of call is
    recorded ``MAX_BUILDS`` times at most.

    A subclass owes :meth:`kind`, :meth:`make`, :meth:`is_current`, :meth:`check` and
    :meth:`leave_to_code`. It may say :meth:`is_due` and :meth:`made_before`.

    Attributes:
        check_growth: The uses at which a recording is checked are its powers: 1, 2, 4, 8 and so on.
    """

    check_growth = 2

    def __init__(self) -> None:
        self.recordings: OrderedDict[Hashable, Recording | None] = OrderedDict()
        self._kinds: OrderedDict[Hashable, None] = OrderedDict()
        self._builds: Counter[Hashable] = Counter()
        # How often a recording ran, and when it is checked next, by its id.
        self._uses: dict[int, list[int]] = {}

    def __getstate__(self) -> dict[str, Any]:
        fresh: Recorder[Any, Any] = Recorder()  # recordings are of this process
        return {**self.__dict__, **fresh.__dict__}

    # What a subclass says

    def kind(self, call: Call) -> Hashable:
        """All that makes a call another than the last, but for the numbers in its tensors."""
        raise NotImplementedError

    def make(self, call: Call) -> Recording | None:
        """A recording of a call, compared with the code; None where the code is to stay."""
        raise NotImplementedError

    def is_current(self, recording: Recording) -> bool:
        """Whether all that it relies on is as it was; refused if it can't run just now."""
        raise NotImplementedError

    def check(self, recording: Recording, call: Call) -> None:
        """Compares a recording with the code on one more call; refused if they don't agree."""
        raise NotImplementedError

    def leave_to_code(self, why: str) -> None:
        """Warns that calls are run by their code, or raises an error instead."""
        raise NotImplementedError

    def is_due(self, call: Call, kind: Hashable) -> bool:
        """Whether to record a call of a kind that has no recording.

        By default at once while there is room, and then where a kind comes again.
        """
        comes_again = kind in self._kinds
        self._kinds[kind] = None
        if len(self._kinds) > MAX_KINDS:
            self._kinds.popitem(last=False)
        if len(self.recordings) < MAX_GRAPHS:
            return True
        self.leave_to_code(
            f"Arguments are of ever new kinds, and {MAX_GRAPHS} graphs are kept; one more is built "
            "where a kind comes again. Pad tensors to one shape, and give numbers that change as "
            "tensors."
        )
        return comes_again

    def made_before(self, kind: Hashable) -> Recording | None:
        """A recording for such calls that was made elsewhere."""
        return None

    # The policy

    def find(self, call: Call) -> tuple[Recording | None, bool]:
        """The recording to run for a call; and if there is none, whether to :meth:`record` it.

        Raises:
            Refused: If the recording and the code don't agree any more.
        """
        try:
            kind = self.kind(call)
            recording: Any = self.recordings.get(kind, UNKNOWN)
            if recording is UNKNOWN and (found := self.made_before(kind)) is not None:
                recording = self._keep(kind, found)
            if recording is None:
                return None, False
            is_current = recording is not UNKNOWN and self.is_current(recording)
        except Refused as why:
            self.leave_to_code(str(why))
            return None, False
        if is_current:
            self.recordings.move_to_end(kind)
            uses = self._uses[id(recording)]
            uses[0] += 1
            if uses[0] == uses[1]:
                uses[1] *= self.check_growth
                self.check(recording, call)
            return recording, False
        self.recordings.pop(kind, None)
        if self._builds[kind] >= MAX_BUILDS:
            self.leave_to_code(
                "A number, a module or a parameter that their graph relies on keeps changing."
            )
            return None, False
        return None, self.is_due(call, kind)

    def record(self, call: Call) -> Recording | None:
        """Makes the recording of a call, and keeps it; refused if the code can't be recorded."""
        kind = self.kind(call)  # anew: at its first call code may have grown modules
        self._builds[kind] += 1
        return self._keep(kind, self.make(call))

    def _keep(self, kind: Hashable, recording: Recording | None) -> Recording | None:
        self.recordings[kind] = recording
        self._uses[id(recording)] = [0, 1]
        if len(self.recordings) > MAX_GRAPHS:
            self._uses.pop(id(self.recordings.popitem(last=False)[1]), None)
        return recording


def opened(
    args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[list[Tensor], Callable[[list[Tensor]], Any]]:
    """The tensors among arguments, and what puts others in their place."""
    if not args and not kwargs:
        return [], lambda _: ((), {})
    leaves, spec = tree_flatten((args, kwargs))
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]

    def rebuild(others: list[Tensor]) -> Any:
        rest = iter(others)
        filled = [next(rest) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        return tree_unflatten(filled, spec)

    return tensors, rebuild


def kind_of(
    model: Any, guide: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, ...]:
    """All that makes a call another one than the last, but for the numbers in tensors."""
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
        f"An argument is of type {type(leaf).__name__}, and a graph can't see it change. Give "
        "tensors, as torch.as_tensor(...) makes them of arrays, numbers and strings."
    )


def by_hash(thing: Any) -> Any:
    """The thing, or what stands for it where it has no hash."""
    try:
        hash(thing)
    except TypeError:
        return _ById(thing)
    return thing


class _ById:
    """A thing without a hash, as itself and no other."""

    def __init__(self, thing: Any) -> None:
        self.thing = thing

    def __hash__(self) -> int:
        return id(self.thing)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _ById) and other.thing is self.thing


def compare(found: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    """Compares a loss and gradients by a recording with those by the code, but for rounding.

    Raises:
        Refused: If they are others.
    """
    if not _agree(found, expected):
        raise disagreement(
            f"under one seed its loss is {expected[0].item():.6g}, and that of a graph of it "
            f"{found[0].item():.6g}; or else their gradients differ"
        )


def disagreement(how: str) -> Refused:
    """Why a recording must not run in the place of the code."""
    return Refused(
        f"The model or the guide and a graph of them don't agree: {how}. They may depend on "
        "something other than tensors that changes from run to run, as a counter, the random "
        "numbers of Python or NumPy, or a module that changes itself in training (.eval() ends "
        "that). Give such numbers as tensors; or train by Trace_ELBO, or fit(..., compile=False)."
    )


def _agree(found: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
    """Whether a loss and gradients are the same, but for rounding."""
    for k, (a, b) in enumerate(zip(found, expected, strict=True)):
        if a.shape != b.shape or not torch.equal(a.isfinite(), b.isfinite()):
            return False
        a, b = (x.nan_to_num(0.0, 0.0, 0.0) for x in (a, b))
        tolerance = TOLERANCES.get(b.dtype, (5e-2, 5e-2))[min(k, 1)]
        if (a - b).norm() > tolerance * (1 + b.norm()):
            return False
    return True
