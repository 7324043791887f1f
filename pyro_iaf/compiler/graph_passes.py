"""Passes over a recorded graph before it runs.

Outside tensors become inputs, what computes constants is split off, failed factorisations become
NaN, and random numbers are drawn ahead. The code of a changed graph is compiled by its user.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves

__all__ = [
    "Refused",
    "base_of",
    "draw_ahead",
    "is_random",
    "lift_tensors",
    "refuse_writes",
    "remove_identities",
    "replace_failures_by_nan",
    "split_outputs",
    "written_by",
]

# The same functions, whose arguments are parsed in a quarter of the time.
FAST_DRAWS = {torch.ops.aten.randn.default: torch.randn, torch.ops.aten.rand.default: torch.rand}


class Refused(ValueError):  # noqa: N818
    """Why code can't be run as a graph, and what to do."""


def lift_tensors(module: fx.GraphModule) -> list[Tensor]:
    """Turns the outside tensors of a graph into inputs, and returns them.

    Raises:
        Refused: If there is a generator of random numbers among them.
    """
    graph = module.graph
    found: dict[int, tuple[fx.Node, Tensor]] = {}
    for node in list(graph.nodes):
        if node.op != "get_attr":
            continue
        tensor = getattr(module, node.target)
        if isinstance(tensor, torch.Generator):
            raise Refused(
                "The model draws by a torch.Generator of its own, whose state a graph would "
                "forget. Draw without it, or outside the model; or train by Trace_ELBO, or "
                "fit(..., compile=False)."
            )
        if any(user.target is torch.ops.aten.lift_fresh_copy.default for user in node.users):
            continue  # a constant, such as torch.tensor(1.0), in the code itself
        if id(tensor) not in found:
            found[id(tensor)] = _add_input(graph, f"tensor_{len(found)}", tensor), tensor
        placeholder, _ = found[id(tensor)]
        node.replace_all_uses_with(placeholder)
        graph.erase_node(node)
    return [tensor for _, tensor in found.values()]


def _add_input(graph: fx.Graph, name: str, value: Any) -> fx.Node:
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    first = next(iter(graph.nodes))
    with graph.inserting_after(inputs[-1]) if inputs else graph.inserting_before(first):
        node = graph.placeholder(name)
    node.meta["val"] = value
    return node


def split_outputs(module: fx.GraphModule, number: int) -> tuple[fx.GraphModule, list[int]]:
    """Splits the last outputs off a graph.

    Returns:
        The graph that computes them, and the positions of the inputs on which they depend.
    """
    (output,) = (node for node in module.graph.nodes if node.op == "output")
    kept = len(output.args[0]) - number
    taken = list(output.args[0][kept:])
    part = fx.GraphModule(module, _subgraph(module, taken))
    needed = _ancestors(taken)
    placeholders = [node for node in module.graph.nodes if node.op == "placeholder"]
    output.args = (output.args[0][:kept],)
    _remove_dead_code(module)
    return part, [k for k, node in enumerate(placeholders) if node in needed]


def replace_failures_by_nan(module: fx.GraphModule) -> None:
    """Fills the result of a failed factorisation with NaN, where the code raises an error."""
    aten, graph = torch.ops.aten, module.graph
    for node in list(graph.nodes):
        if node.target is not aten._linalg_check_errors.default:
            continue
        info = node.args[0]
        result = next((n for n in info.args[0].users if n.args[1] == 0), None)
        graph.erase_node(node)
        if result is None:  # which nothing uses
            continue
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


def refuse_writes(module: fx.GraphModule) -> None:
    """Raises Refused if the graph writes into tensors that outlive the step."""
    for node in module.graph.nodes:
        if any(base_of(part).op == "placeholder" for part in written_by(node)):
            raise Refused(
                f"The model or the guide writes into a tensor that outlives the step "
                f"({node.target}), as BatchNorm does with its averages. Call .eval() on such "
                "modules; or train by Trace_ELBO, or fit(..., compile=False)."
            )


def written_by(node: fx.Node) -> list[fx.Node]:
    """The nodes into whose results a node writes."""
    schema: Any = getattr(node.target, "_schema", None)
    is_mutable = schema is not None and schema.is_mutable
    arguments = zip(schema.arguments, node.args, strict=False) if is_mutable else ()
    written = tree_leaves([value for argument, value in arguments if argument.is_write])
    if node.target is torch.ops.aten.native_batch_norm.default and node.args[5]:
        written += [node.args[3]]  # the running mean, of which its schema says nothing
    return [part for part in written if isinstance(part, fx.Node)]


def base_of(node: fx.Node) -> fx.Node:
    """The node that made the memory of a node's result, by views and changes in place."""
    while isinstance(source := node.args[0] if node.args else None, fx.Node) and (
        getattr(node.target, "is_view", False)
        or node.target is operator.getitem
        or source in written_by(node)
    ):
        node = source
    return node


def is_random(node: fx.Node) -> bool:
    """Whether a node draws random numbers."""
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())


def draw_ahead(module: fx.GraphModule) -> fx.GraphModule:
    """Turns the random numbers of a graph into inputs, and returns the graph that draws them.

    That graph also computes all that a draw depends on, so the order of draws stays the same.
    """
    drawn: list[fx.Node] = []
    random = [node for node in module.graph.nodes if is_random(node)]
    for node in random:
        drawn += [node] if isinstance(node.meta["val"], Tensor) else list(node.users)
    ahead = _subgraph(module, drawn)
    for k, node in enumerate(drawn):
        node.replace_all_uses_with(_add_input(module.graph, f"noise_{k}", node.meta["val"]))
    for node in reversed(module.graph.nodes):
        if node in random or node in drawn:
            module.graph.erase_node(node)
    _remove_dead_code(module)
    for node in ahead.nodes:
        node.target = FAST_DRAWS.get(node.target, node.target)
    return fx.GraphModule(module, ahead)


def _ancestors(nodes: Sequence[fx.Node]) -> set[fx.Node]:
    """The nodes, and all that they depend on, also by what was written in place before."""
    if not nodes:
        return set()
    place = {node: k for k, node in enumerate(nodes[0].graph.nodes)}
    writers: dict[fx.Node, list[fx.Node]] = {}
    for node in place:
        for part in written_by(node):
            writers.setdefault(base_of(part), []).append(node)
    found, queue = set(), list(nodes)
    while queue:
        node = queue.pop()
        if node in found:
            continue
        found.add(node)
        for source in node.all_input_nodes:
            before = writers.get(base_of(source), ()) if writers else ()
            queue += [source, *(writer for writer in before if place[writer] < place[node])]
    return found


def _subgraph(module: fx.GraphModule, outputs: list[fx.Node]) -> fx.Graph:
    """The part of a graph that computes these outputs, from the same inputs."""
    nodes, part = _ancestors(outputs), fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in module.graph.nodes:
        if node.op == "placeholder" or node in nodes:
            copies[node] = part.node_copy(node, copies.__getitem__)
    part.output(tuple(copies[node] for node in outputs))
    return part


def _remove_dead_code(module: fx.GraphModule) -> None:
    """Removes operations whose results are not used and that write into nothing."""

    def is_needed(node: fx.Node) -> bool:
        schema = getattr(node.target, "_schema", None)
        return node.is_impure() or (schema is not None and schema.is_mutable)

    module.graph.eliminate_dead_code(is_needed)


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
