"""Passes over a recorded graph before it runs.

Outside tensors become inputs, masks become indices, failed factorisations become NaN, and random
numbers are drawn ahead.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves

__all__ = [
    "Refused",
    "draw_ahead",
    "lift_tensors",
    "refuse_writes",
    "remove_identities",
    "replace_failures_by_nan",
    "replace_masks_by_indices",
]

# The same functions, whose arguments are parsed in a quarter of the time.
FAST_DRAWS = {torch.ops.aten.randn.default: torch.randn, torch.ops.aten.rand.default: torch.rand}


class Refused(ValueError):  # noqa: N818
    """Why code can't be run as a graph, and what to do."""


def lift_tensors(module: fx.GraphModule) -> list[Tensor]:
    """Turns the outside tensors of a graph into inputs, and returns them."""
    graph = module.graph
    found: dict[int, tuple[fx.Node, Tensor]] = {}
    for node in list(graph.nodes):
        if node.op != "get_attr":
            continue
        tensor = getattr(module, node.target)
        if any(user.target is torch.ops.aten.lift_fresh_copy.default for user in node.users):
            continue  # a constant, such as torch.tensor(1.0), in the code itself
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


def replace_masks_by_indices(
    module: fx.GraphModule, tensors: list[Tensor], num_inputs: int
) -> list[tuple[Tensor, int]]:
    """Replaces fixed masks by their indices, so that all shapes are fixed.

    The indices become further inputs, and are added to ``tensors``.

    Returns:
        The tensors that the masks were computed from, and their versions.

    Raises:
        Refused: If a mask depends on inputs or on random numbers.
    """
    graph = module.graph
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    outside = dict(zip(placeholders[num_inputs:], tensors, strict=True))
    fixed, masks = set(outside), []
    for node in graph.nodes:
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
    sources = _ancestors(mask for _, mask in masks)
    by_mask = [pair for pair in masks if pair[0].target is torch.ops.aten.index.Tensor]
    if by_mask:
        part = _subgraph(module, [mask for _, mask in by_mask])
        values = part(*[None] * num_inputs, *tensors)
        for (node, mask), value in zip(by_mask, values, strict=True):
            indices = value.nonzero(as_tuple=True)
            new = [_add_input(graph, f"{node.name}_{k}", index) for k, index in enumerate(indices)]
            by_index: list[Any] = []
            for old in node.args[1]:
                by_index += new if old is mask else [old]
            node.args = (node.args[0], by_index)
            tensors += indices
        _remove_dead_code(module)
    return [(tensor, tensor._version) for node, tensor in outside.items() if node in sources]


def _masks_of(node: fx.Node) -> list[fx.Node]:
    """The nodes whose values determine the shape of this one."""
    aten = torch.ops.aten
    if node.target is aten.index.Tensor:
        indices = [n for n in node.args[1] if isinstance(n, fx.Node)]  # type: ignore[union-attr]
        return [n for n in indices if n.meta["val"].dtype in (torch.bool, torch.uint8)]
    if node.target is aten.masked_select.default:
        return node.all_input_nodes[1:]
    if torch.Tag.dynamic_output_shape in getattr(node.target, "tags", ()):
        return node.all_input_nodes
    return []


def replace_failures_by_nan(module: fx.GraphModule) -> None:
    """Fills the result of a failed factorisation with NaN, where the code raises an error."""
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
    """Raises Refused if the graph writes into tensors that outlive the step."""
    for node in module.graph.nodes:
        schema = getattr(node.target, "_schema", None)
        arguments = zip(schema.arguments, node.args, strict=False) if schema else ()
        written = tree_leaves([value for argument, value in arguments if argument.is_write])
        if node.target is torch.ops.aten.native_batch_norm.default and node.args[5]:
            written += [node.args[3]]  # the running mean, of which its schema says nothing
        if any(_base(part).op == "placeholder" for part in written if isinstance(part, fx.Node)):
            raise Refused(
                f"The model or the guide writes into a tensor that outlives the step "
                f"({node.target}), as BatchNorm does with its averages. Call .eval() on such "
                "modules; or train by Trace_ELBO, or fit(..., compile=False)."
            )


def _base(node: fx.Node) -> fx.Node:
    """The node that a node is a view of."""
    while getattr(node.target, "is_view", False) or node.target is operator.getitem:
        if not isinstance(source := node.args[0], fx.Node):
            break
        node = source
    return node


def _is_random(node: fx.Node) -> bool:
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())


def draw_ahead(module: fx.GraphModule) -> fx.GraphModule:
    """Turns the random numbers of a graph into inputs, and returns the graph that draws them.

    That graph also computes all that a draw depends on, so the order of draws stays the same.
    """
    drawn: list[fx.Node] = []
    random = [node for node in module.graph.nodes if _is_random(node)]
    for node in random:
        drawn += [node] if isinstance(node.meta["val"], Tensor) else list(node.users)
    ahead = _subgraph(module, drawn)
    for k, node in enumerate(drawn):
        node.replace_all_uses_with(_add_input(module.graph, f"noise_{k}", node.meta["val"]))
    for node in reversed(module.graph.nodes):
        if node in random or node in drawn:
            module.graph.erase_node(node)
    _remove_dead_code(module)
    for node in ahead.graph.nodes:
        node.target = FAST_DRAWS.get(node.target, node.target)
    ahead.recompile()
    return ahead


def _ancestors(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """The nodes, and all that they depend on."""
    found, queue = set(), list(nodes)
    while queue:
        node = queue.pop()
        if node not in found:
            found.add(node)
            queue += node.all_input_nodes
    return found


def _subgraph(module: fx.GraphModule, outputs: list[fx.Node]) -> fx.GraphModule:
    """The part of a graph that computes these outputs, from the same inputs."""
    nodes, part = _ancestors(outputs), fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in module.graph.nodes:
        if node.op == "placeholder" or node in nodes:
            copies[node] = part.node_copy(node, copies.__getitem__)
    part.output(tuple(copies[node] for node in outputs))
    return fx.GraphModule(module, part)


def _remove_dead_code(module: fx.GraphModule) -> None:
    """Removes operations whose results are not used and that write into nothing."""

    def is_needed(node: fx.Node) -> bool:
        schema = getattr(node.target, "_schema", None)
        return node.is_impure() or (schema is not None and schema.is_mutable)

    module.graph.eliminate_dead_code(is_needed)
    module.recompile()


def remove_identities(module: fx.GraphModule) -> None:
    """Removes operations that return their argument, and all but the first of equal views."""
    aten = torch.ops.aten
    same = (aten.detach.default, aten.alias.default)
    shaped = (aten.expand.default, aten.view.default, aten._unsafe_view.default)
    views: dict[Any, fx.Node] = {}
    for node in list(module.graph.nodes):
        if node.op != "call_function" or not node.args:
            continue
        source, value = node.args[0], node.meta.get("val")
        is_same = node.target in same or (
            node.target in shaped and value.shape == source.meta["val"].shape
        )
        key = (node.target, repr(node.args), repr(node.kwargs))
        if not is_same and node.target in (*shaped, aten.t.default, aten.slice.Tensor):
            source = views.setdefault(key, node)
            is_same = source is not node
        if is_same:
            node.replace_all_uses_with(source)
            module.graph.erase_node(node)
    _remove_dead_code(module)
