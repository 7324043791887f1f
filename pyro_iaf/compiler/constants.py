"""Numbers and shapes that code computes from its data, as constants of a recording.

A graph holds neither what Python does with a number out of a tensor, nor shapes that depend on
values. Computed from data alone, as ``int(group.max()) + 1`` or ``x[mask]``, they are the same in
every run until the data change. So they are taken at their values, and the graph that computes them
is kept to see whether they still hold. What depends on parameters, on latents or on random numbers
has no such value, and is refused.
"""

from __future__ import annotations

import math
import sys
import traceback
import weakref
from collections.abc import Callable, Collection, Iterable, Sequence
from functools import cache
from itertools import takewhile
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import pyro
import torch
from pyro.distributions import OneOneMatching, OneTwoMatching
from pyro.poutine.indep_messenger import IndepMessenger
from torch import Tensor, fx
from torch.distributions import Distribution
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing, get_proxy_mode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from .graph_passes import Refused, base_of, is_random, written_by

__all__ = ["Constants", "PythonReader", "Reader", "user_line", "value_in_python"]

# Error messages name a line of the user's code, so none of these.
LIBRARIES = [Path(torch.__file__).parent, Path(pyro.__file__).parent, Path(__file__).parents[1]]

# The code of distributions' argument checks, and of a loop over the rows of a plate.
CHECKS = (Distribution.__init__.__code__, Distribution._validate_sample.__code__)
LOOP = IndepMessenger.__iter__.__code__

# What reads values without an operation that a mode sees: of its first argument, of tensors in a
# list, and of its second argument.
READS_ALL = (Tensor.tolist, Tensor.numpy, Tensor.__array__)
READS_LISTS = (torch.tensor, torch.as_tensor, torch.asarray, Tensor.new_tensor)
READS_INDICES = (torch.tensor_split, Tensor.tensor_split)

# The shape of its residuals depends on values, but not that of its solution.
SHAPES_HOLD = (torch.ops.aten.linalg_lstsq.default,)


class Constants:
    """The constants of a graph, and whether they hold for other data.

    Args:
        part: The graph that computes them. It takes the inputs and the outside tensors.
        sources: The positions of those on which they depend.
        values: Their values.
        seen: The inputs and the outside tensors that they were computed from.
    """

    def __init__(
        self,
        part: fx.GraphModule,
        sources: Sequence[int],
        values: Sequence[Tensor],
        seen: Sequence[Tensor],
    ) -> None:
        self.part, self.sources, self.values = part, sources, values
        self._note(seen)

    def _note(self, given: Sequence[Tensor]) -> None:
        tensors = [given[k] for k in self.sources]
        self._seen = [(weakref.ref(tensor), _age_of(tensor)) for tensor in tensors]

    def hold_for(self, given: Sequence[Tensor]) -> bool:
        """Whether they have these values for such inputs and outside tensors."""
        tensors = [given[k] for k in self.sources]
        pairs = zip(tensors, self._seen, strict=True)
        if all(ref() is tensor and version == _age_of(tensor) for tensor, (ref, version) in pairs):
            return True
        with torch.no_grad():
            try:
                found = self.part(*given)
            except Exception:  # whatever an operation may raise at other values
                return False
        if all(map(_are_equal, found, self.values)):
            self._note(given)
            return True
        return False


def _age_of(tensor: Tensor) -> float:
    """The number of changes in place; NaN, which equals nothing, if it is not counted."""
    return math.nan if tensor.is_inference() else tensor._version


def _are_equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool(((a == b) | ((a != a) & (b != b))).all())


class Reader(TorchDispatchMode):
    """Takes numbers and shapes that depend on data alone at their values, while code is recorded.

    Args:
        data: The positions of inputs that are data.

    Attributes:
        outputs: What was taken, as results of the graph.
        values: The same, as tensors of their own.
    """

    def __init__(self, data: Collection[int]) -> None:
        super().__init__()
        self.data = data
        self.outputs: list[Tensor] = []
        self.values: list[Tensor] = []
        self._fixed: set[fx.Node] = set()
        self._tainted: set[fx.Node] = set()
        self._last: fx.Node | None = None
        self._num_inputs = 0
        self._recorder = sys._getframe(1).f_code  # lines of its callers are not the model's

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs, aten = kwargs or {}, torch.ops.aten
        if torch.Tag.data_dependent_output in func.tags:
            args, kwargs = tree_map_only(Tensor, self.value_of, (args, kwargs))
            with disable_proxy_modes_tracing():
                return func(*args, **kwargs)
        if func is aten.index.Tensor:
            return func(args[0], self._without_masks(args[1]))
        if func is aten.masked_select.default:
            x, mask = torch.broadcast_tensors(*args)
            return aten.index.Tensor(x, self._without_masks([mask]))
        if func is aten._pack_padded_sequence.default:
            return self._packed(*args)
        result = func(*args, **kwargs)
        if torch.Tag.dynamic_output_shape in func.tags and func not in SHAPES_HOLD:
            # Copies, which code may write into.
            return tree_map_only(Tensor, lambda t: self.value_of(t, _selection).clone(), result)
        return result

    def _without_masks(self, indices: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Indices with integers in place of masks, whose number is that of the True ones."""
        found: list[Tensor | None] = []
        for index in indices:
            if index is None or index.dtype not in (torch.bool, torch.uint8):
                found.append(index)
                continue
            mask = self.value_of(index, _selection)
            with disable_proxy_modes_tracing():
                found += mask.nonzero(as_tuple=True)
        return found

    def _packed(self, x: Tensor, lengths: Tensor, batch_first: bool) -> tuple[Tensor, Tensor]:
        """The steps of sequences of these lengths, and the number of sequences at each step."""
        x = x.transpose(0, 1) if batch_first else x
        lengths = self.value_of(lengths, _selection)
        with disable_proxy_modes_tracing():
            within = torch.arange(len(x)).unsqueeze(-1) < lengths
            places = [index.to(x.device) for index in within.nonzero(as_tuple=True)]
            sizes = within.sum(-1)[: int(lengths.max())]
        return torch.ops.aten.index.Tensor(x, places), sizes

    def value_of(self, tensor: Tensor, error: Callable[[str], Refused] | None = None) -> Tensor:
        """The value of a tensor, which becomes a constant.

        Raises:
            Refused: If it depends on more than data; says so by ``error``, given the user's line.
        """
        if not self._is_fixed(tensor):
            stack = traceback.walk_stack(sys._getframe())
            frames = takewhile(lambda pair: pair[0].f_code is not self._recorder, stack)
            raise (error or value_in_python)(user_line(traceback.StackSummary.extract(frames)))
        self.outputs.append(torch.ops.aten.clone.default(tensor))
        with disable_proxy_modes_tracing():
            value = tensor.clone()
        self.values.append(value)
        return value

    # What depends on data alone

    def _is_fixed(self, tensor: Tensor) -> bool:
        mode = get_proxy_mode()
        if mode is None or tensor not in mode.tracer.tensor_tracker:
            return not tensor.requires_grad
        self._follow(mode.tracer)
        return self._is_fixed_node(mode.tracer.tensor_tracker[tensor].proxy.node)

    def _is_fixed_node(self, node: fx.Node) -> bool:
        return node in self._fixed and base_of(node) not in self._tainted

    def _follow(self, tracer: Any) -> None:
        """Looks at the nodes that are new since the last time."""
        nodes = tracer.graph.nodes
        node: Any = next(iter(nodes), None) if self._last is None else self._last.next
        while node is not None and node.op != "root":
            if node.op == "placeholder":
                is_fixed = self._num_inputs in self.data
                self._num_inputs += 1
            elif node.op == "get_attr":
                is_fixed = not getattr(tracer.root, node.target).requires_grad
            else:
                is_fixed = not is_random(node)
                is_fixed = is_fixed and all(map(self._is_fixed_node, node.all_input_nodes))
            if is_fixed:
                self._fixed.add(node)
            else:
                self._tainted.update(map(base_of, written_by(node)))
            self._last, node = node, node.next


class PythonReader(TorchFunctionMode):
    """Handles values that Python reads from tensors without an operation that is recorded.

    Conversions to lists and arrays are read by ``reader``. The ``data`` of a tensor is the tensor
    without its gradient, and a mask of one number chooses between old and new values. Argument
    checks of distributions pass. A loop over a plate with all its rows runs outside of the graph.
    """

    def __init__(self, reader: Reader) -> None:
        super().__init__()
        self.reader = reader

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.__bool__ and (_caller() in _assertions() or is_within(CHECKS)):
            return True
        if is_within((LOOP,)) and not any(map(_is_traced, args[:1])):
            with disable_proxy_modes_tracing():
                return func(*args, **kwargs)
        if func is Tensor.data.__get__:  # type: ignore[attr-defined]
            return args[0].detach()
        if func is Tensor.__setitem__ and _is_one_bool(args[1]):
            x, mask, value = args
            return x.copy_(torch.where(mask, value, x))
        if func in READS_ALL:  # of a copy, since arrays share memory with their tensor
            value = self.reader.value_of(args[0])
            with disable_proxy_modes_tracing():
                return func(value.clone(), *args[1:], **kwargs)
        for tensor in _read_by(func, args, kwargs):
            self.reader.value_of(tensor)
        return func(*args, **kwargs)


def _read_by(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> list[Tensor]:
    """The tensors among lists of numbers, whose values a function reads out of our sight."""
    if func in READS_LISTS:
        given = [*args[func is Tensor.new_tensor :], *kwargs.values()]
        lists = [thing for thing in given if isinstance(thing, list | tuple)]
    elif func in READS_INDICES:
        lists = [*args[1:], *kwargs.values()]
    else:
        return []
    return [leaf for leaf in tree_leaves(lists) if isinstance(leaf, Tensor)]


def _is_one_bool(index: Any) -> bool:
    return isinstance(index, Tensor) and index.dtype == torch.bool and not index.dim()


def is_within(codes: Sequence[CodeType]) -> bool:
    """Whether one of these functions is on the call stack."""
    frame: FrameType | None = sys._getframe()
    while frame is not None and frame.f_code not in codes:
        frame = frame.f_back
    return frame is not None


@cache
def _assertions() -> tuple[CodeType, ...]:
    """Code that asks for the truth of numbers only to assert it, where it asks itself."""
    from pyro.infer.reparam import SymmetricStableReparam  # which importing us does not import

    return (
        SymmetricStableReparam.apply.__code__,
        vars(OneOneMatching)["log_partition_function"].wrapped.__code__,
        vars(OneTwoMatching)["log_partition_function"].wrapped.__code__,
    )


def _caller() -> CodeType | None:
    """The code that called a function of tensors."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code.co_name == "__torch_function__":
        frame = frame.f_back
    return frame.f_code if frame is not None else None


def _is_traced(thing: Any) -> bool:
    mode = get_proxy_mode()
    return isinstance(thing, Tensor) and mode is not None and thing in mode.tracer.tensor_tracker


# Errors


def user_line(frames: Iterable[traceback.FrameSummary]) -> str:
    """The first line of the user's code among these frames."""
    for frame in frames:
        path = Path(frame.filename)
        if path.exists() and not any(path.is_relative_to(library) for library in LIBRARIES):
            return f"{frame.filename}, line {frame.lineno}, in {frame.name}: `{frame.line}`"
    return "The model or the guide"


def value_in_python(line: str) -> Refused:
    """The error for a line that takes a number out of what is no data."""
    return Refused(
        f"{line} takes a number out of a tensor, by a branch, int(), item() or the like, and a "
        "graph can't record what Python does with it, unless it is computed from data alone. This "
        "one depends on a latent, a parameter or a random number. Use torch.where, poutine.mask or "
        "shapes instead; or train by Trace_ELBO, or fit(..., compile=False)."
    )


def _selection(line: str) -> Refused:
    return Refused(
        f"{line} selects by numbers that change, since they depend on a latent, a parameter or a "
        "random number, and the shapes of a graph stay the same. Use poutine.mask, or torch.where; "
        "or train by Trace_ELBO, or fit(..., compile=False)."
    )
