"""What becomes of a recorded graph before it runs.

Tensors from elsewhere become inputs, masks become indices, failures become NaN, and random numbers
are drawn ahead.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

__all__ = [
    "Refused",
    "draw_ahead",
    "let_failures_be_nan",
    "lift_tensors",
    "refuse_writes",
    "settle_shapes",
    "tidy",
]

# The same calls, whose arguments are parsed in a quarter of the time.
QUICKER = {torch.ops.aten.randn.default: torch.randn, torch.ops.aten.rand.default: torch.rand}


class Refused(ValueError):  # noqa: N818
    """Why code can't be run as a graph, and what to do."""


def lift_tensors(module: fx.GraphModule) -> list[Tensor]:
    """Turns tensors from elsewhere into inputs, and returns them."""
    graph = module.graph
    found: dict[int, tuple[fx.Node, Tensor]] = {}
    for node in list(graph.nodes):
        if node.op != "get_attr":
            continue
        tensor = getattr(module, node.target)
        if any(user.target is torch.ops.aten.lift_fresh_copy.default for user in node.users):
            continue  # torch.tensor(1.0) in the code itself, which stays what it is
        if id(tensor) not in found:
            found[id(tensor)] = _add_input(graph, f"tensor_{len(found)}", tensor), tensor
        placeholder, _ = found[id(tensor)]
        node.replace_all_uses_with(placeholder)
        graph.erase_node(node)
    module.recompile()
    return [tensor for _, tensor in found.values()]


def _add_input(graph: fx.Graph, name: str, value: Any) -> fx.Node:
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    first = next(iter(graph.nodes))
    with graph.inserting_after(inputs[-1]) if inputs else graph.inserting_before(first):
        node = graph.placeholder(name)
    node.meta["val"] = value
    return node


def settle_shapes(
    module: fx.GraphModule, tensors: list[Tensor], num_inputs: int
) -> list[tuple[Tensor, int]]:
    """Makes selections by fixed masks selections by indices; refuses those by masks that change.

    Returns the tensors that the masks were read from, and their versions.
    """
    placeholders = [node for node in module.graph.nodes if node.op == "placeholder"]
    held = dict(zip(placeholders[num_inputs:], tensors, strict=True))
    fixed, masks = set(held), []
    for node in module.graph.nodes:
        if node.op == "placeholder":
            continue
        found = _masks_of(node)
        if not fixed.issuperset(found):
            raise Refused(
                f"The model or the guide selects by numbers that change ({node.target}), and the "
                "shapes of a graph stay the same. Use poutine.mask, or torch.where; or train by "
                "Trace_ELBO, or fit(..., compile=False)."
            )
        masks += [(node, mask) for mask in found]
        if fixed.issuperset(node.all_input_nodes) and not _is_random(node):
            fixed.add(node)
    read = _ancestors(mask for _, mask in masks)
    by_mask = [pair for pair in masks if pair[0].target is torch.ops.aten.index.Tensor]
    if by_mask:
        part = _part(module, _ancestors(mask for _, mask in by_mask), [m for _, m in by_mask])
        values = part(*[None] * num_inputs, *tensors)
        for (node, mask), value in zip(by_mask, values, strict=True):
            tensors += _select_by_indices(module.graph, node, mask, value)
        tidy(module)
    return [(tensor, tensor._version) for node, tensor in held.items() if node in read]


def _masks_of(node: fx.Node) -> list[fx.Node]:
    """The nodes whose numbers the shape of this one hangs on."""
    aten = torch.ops.aten
    if node.target is aten.index.Tensor:
        indices = [n for n in node.args[1] if isinstance(n, fx.Node)]  # type: ignore[union-attr]
        return [n for n in indices if n.meta["val"].dtype in (torch.bool, torch.uint8)]
    if node.target is aten.masked_select.default:
        return node.all_input_nodes[1:]
    if torch.Tag.dynamic_output_shape in getattr(node.target, "tags", ()):
        return node.all_input_nodes
    return []


def _select_by_indices(
    graph: fx.Graph, node: fx.Node, mask: fx.Node, value: Tensor
) -> Sequence[Tensor]:
    """Puts indices in the place of a mask; returns them, as further inputs of the graph."""
    indices = value.nonzero(as_tuple=True)
    inputs = [_add_input(graph, f"{node.name}_{k}", index) for k, index in enumerate(indices)]
    expanded: list[Any] = []
    for index in node.args[1]:  # type: ignore[union-attr]
        expanded += inputs if index is mask else [index]
    node.args = (node.args[0], expanded)
    return indices


def let_failures_be_nan(module: fx.GraphModule) -> None:
    """Makes a matrix that can't be factorised NaN, instead of an error that would end a replay."""
    aten, graph = torch.ops.aten, module.graph
    for node in list(graph.nodes):
        if node.target is not aten._linalg_check_errors.default:
            continue
        info = node.args[0]
        (result,) = (n for n in info.args[0].users if n.args[1] == 0)
        graph.erase_node(node)
        with graph.inserting_after(max(info, result)):
            failed = graph.call_function(aten.ne.Scalar, (info, 0))
            failed.meta["val"] = info.meta["val"] != 0
        for _ in range(result.meta["val"].dim() - info.meta["val"].dim()):
            with graph.inserting_after(failed):
                wider = graph.call_function(aten.unsqueeze.default, (failed, -1))
                wider.meta["val"] = failed.meta["val"].unsqueeze(-1)
                failed = wider
        with graph.inserting_after(failed):
            filled = graph.call_function(aten.masked_fill.Scalar, (result, failed, math.nan))
            filled.meta.update(result.meta)
        result.replace_all_uses_with(filled, lambda user, new=filled: user is not new)
    module.recompile()


def refuse_writes(module: fx.GraphModule) -> None:
    """Refuses writing into tensors that outlive the step."""
    for node in module.graph.nodes:
        schema = getattr(node.target, "_schema", None)
        if schema is None or not schema.is_mutable:
            continue
        written = [
            part
            for argument, value in zip(schema.arguments, node.args, strict=False)
            if argument.is_write
            for part in (value if isinstance(value, list | tuple) else [value])
        ]
        if any(_base(part).op == "placeholder" for part in written if isinstance(part, fx.Node)):
            raise _writes(node)
    for node in module.graph.nodes:
        # Its schema does not say that it writes into the averages it is given.
        is_norm = node.target is torch.ops.aten.native_batch_norm.default
        if is_norm and node.args[3] is not None and node.args[5]:
            raise _writes(node)


def _writes(node: fx.Node) -> Refused:
    return Refused(
        f"The model or the guide writes into a tensor that outlives the step ({node.target}), as "
        "BatchNorm does with its averages. Call .eval() on such modules; or train by Trace_ELBO, "
        "or fit(..., compile=False)."
    )


def _base(node: fx.Node) -> fx.Node:
    """What a node is a view of."""
    while getattr(node.target, "is_view", False) or node.target is operator.getitem:
        source = node.args[0]
        if not isinstance(source, fx.Node):
            break
        node = source
    return node


def _is_random(node: fx.Node) -> bool:
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())


def draw_ahead(module: fx.GraphModule) -> fx.GraphModule:
    """Takes the random numbers out of a graph, which gets them as inputs; returns what draws them.

    All that a draw hangs on is computed ahead too, so the order of draws stays what it was.
    """
    drawn: list[fx.Node] = []
    random = [node for node in module.graph.nodes if _is_random(node)]
    for node in random:
        drawn += [node] if isinstance(node.meta["val"], Tensor) else list(node.users)
    ahead = _part(module, _ancestors(drawn), drawn)
    for k, node in enumerate(drawn):
        noise = _add_input(module.graph, f"noise_{k}", node.meta["val"])
        node.replace_all_uses_with(noise)
    for node in reversed(module.graph.nodes):
        if node in random or node in drawn:
            module.graph.erase_node(node)
    tidy(module)
    for node in ahead.graph.nodes:
        node.target = QUICKER.get(node.target, node.target)
    ahead.recompile()
    return ahead


def _ancestors(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """The nodes, and all that they hang on."""
    found, queue = set(), list(nodes)
    while queue:
        node = queue.pop()
        if node not in found:
            found.add(node)
            queue += node.all_input_nodes
    return found


def _part(module: fx.GraphModule, nodes: set[fx.Node], outputs: list[fx.Node]) -> fx.GraphModule:
    """A part of a graph, of the same inputs."""
    part: fx.Graph = fx.Graph()
    twins: dict[fx.Node, fx.Node] = {}
    for node in module.graph.nodes:
        if node.op == "placeholder" or node in nodes:
            twins[node] = part.node_copy(node, twins.__getitem__)
    part.output(tuple(twins[node] for node in outputs))
    return fx.GraphModule(module, part)


def tidy(module: fx.GraphModule) -> None:
    """Leaves out what nobody needs."""

    def is_needed(node: fx.Node) -> bool:
        schema = getattr(node.target, "_schema", None)
        return node.is_impure() or (schema is not None and schema.is_mutable)

    module.graph.eliminate_dead_code(is_needed)
    module.recompile()
