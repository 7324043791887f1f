r"""Blockwise inverses and transposed solves for flows on a masked autoregressive network.

The network's units are sorted by degree, so consecutive coordinates form a block that can be solved
once those before it are known. A block depends on these only through the bracket in

.. math::
    h^{(k+1)}_b = a\Bigl( W_{bb}\, h^{(k)}_b + \bigl[ W_{b,<b}\, h^{(k)}_{<b} + c_b \bigr] \Bigr),

which is computed once. The transposed Jacobian is linear and triangular in the reversed order, so
it is solved in the same blocks, from the last to the first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..nn.made import ACTIVATIONS, MaskedAutoregressiveNetwork, product
from ..nn.univariate import UnivariateMap
from .fixed_point import has_values, runs_eagerly, solve_by_sweeps

__all__ = ["Autoregressive", "Cut", "can_be_cut", "solve_in_blocks", "transposed_in_blocks"]

# Sweeps that the first block is expected to take. Another takes about as many as the block before
# it, so convergence is first checked after one sweep less.
EXPECTED_SWEEPS = 3

ELEMENTWISE = {*ACTIVATIONS.values(), nn.CELU, nn.Hardtanh, nn.Hardswish, nn.Identity, nn.Mish}


class Autoregressive(Protocol):
    """An autoregressive map: a univariate map whose parameters a network computes."""

    network: Any
    context: Tensor | None
    univariate: UnivariateMap

    @property
    def order(self) -> Tensor: ...

    def params_at(self, x: Tensor) -> Sequence[Tensor]:
        """The map's parameters at ``x``, in one pass of the network."""


class Layer(NamedTuple):
    """The layer between two levels of a block: weights, then a function that acts row by row."""

    weight: Tensor
    then: Callable[..., Tensor]
    arguments: Sequence[Tensor]

    def __call__(self, units: Tensor) -> Tensor:
        return self.then(self.weight @ units, *self.arguments)


def can_be_cut(flow: Autoregressive) -> bool:
    """Whether the flow's network can be evaluated unit by unit from its weights."""
    network = flow.network
    return (
        type(network) is MaskedAutoregressiveNetwork
        and "forward" not in network.__dict__
        and type(network.activation) in ELEMENTWISE
        and not any(m._forward_hooks or m._forward_pre_hooks for m in (network, network.activation))
        and not network.mask.is_meta
        and not torch.is_autocast_enabled(network.mask.device.type)
    )


def solve_in_blocks(flow: Autoregressive, y: Tensor, method: str) -> tuple[Tensor, list[Tensor]]:
    """The inverse of ``y``, and the map's parameters there, all of its shape."""
    cut = Cut(flow, y.shape, method)
    network, L, offsets = cut.network, cut.L, cut.offsets
    y = cut.features_first(y)
    known = [y[:0] for _ in range(L + 1)]  # units of each level before this block
    solved: list[Tensor] = []
    num_sweeps = EXPECTED_SWEEPS
    for a, b in cut.blocks:
        if b - a == cut.D:
            *hidden, (weight, offset) = zip(cut.whole(), offsets, strict=True)
        else:
            *hidden, (weight, offset) = _within_block(cut, a, b, known, offsets)
        layers = [Layer(w, lambda z, o: network.activation(z + o), (o,)) for w, o in hidden]
        layers.append(Layer(weight, torch.add, (offset,)))
        if cut.one_by_one:
            sizes = [cut.units_of_each(k, a, b) for k in range(L + 1)]
            x, levels, params = _solve_one_by_one(cut, layers, sizes, y[a:b])
        else:
            x, (levels, params, _), num_sweeps = _solve_block(
                cut, layers, y[a:b], method, num_sweeps - 1
            )
        if b < cut.D:
            known = [torch.cat(pair) for pair in zip(known, [x, *levels], strict=True)]
        solved.append(torch.cat([x, params]).view(1 + cut.P, b - a, -1))
    x, *found = map(cut.as_given, torch.cat(solved, 1))
    return x, found


def _within_block(
    cut: Cut, a: int, b: int, known: list[Tensor], offsets: list[Tensor]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Each layer's weights within a block, and its offsets with the terms of all units before."""
    now = [cut.units(k, a, b) for k in range(cut.L + 1)]
    for k in range(cut.L):
        before, within = _split(cut.hidden(k, now[k + 1], slice(now[k].stop)), now[k].start)
        yield within, _plus(offsets[k][now[k + 1]], before, known[k])
    # The outputs, parameter by parameter, read the last hidden layer and the coordinates.
    last, offset = [], _stacked(offsets[-1].view(cut.P, cut.D, -1)[:, a:b])
    for k in (cut.L, 0):
        weight = _stacked(cut.output(slice(a, b), k, slice(now[k].stop)))
        before, within = _split(weight, now[k].start)
        last.append(within)
        offset = _plus(offset, before, known[k])
    yield torch.cat(last, 1), offset


def _solve_block(
    cut: Cut, layers: list[Layer], y: Tensor, method: str, first: int
) -> tuple[Tensor, Any, int]:
    def sweep(x: Tensor) -> tuple[Tensor, Any]:
        *levels, params = _through(layers, x)
        x, log_slope = cut.univariate.inverse(y, *params.chunk(cut.P))
        return x, (levels, params, log_slope)

    start, position = torch.zeros_like(y), torch.arange(len(y), device=y.device)[:, None]
    return solve_by_sweeps(
        sweep, start, position, method, size=lambda found: y / found[-1].exp(), first=first
    )


def _solve_one_by_one(
    cut: Cut, layers: list[Layer], sizes: list[list[int]], y: Tensor
) -> tuple[Tensor, list[Tensor], Tensor]:
    found: list[Tensor] = []

    def finish(j: int, params: Tensor) -> Tensor:
        found.append(params)
        return cut.univariate.inverse(y[j : j + 1], *params.split(1))[0]

    x, levels = _one_by_one(layers, [*sizes, cut.P], torch.zeros_like(y), range(len(y)), finish)
    return x, levels, _stacked(torch.stack(found, 1))


def transposed_in_blocks(cut: Cut, x: Tensor, v: Tensor) -> Tensor:
    """The ``u`` with ``J^T u = v``, where J is the Jacobian at ``x``; of the shape of ``v``."""
    L, (slopes, by_outputs, scale) = cut.L, _linearized(cut, x)
    one_by_one = cut.one_by_one and has_values(v)
    v = cut.features_first(v)
    # Gradients in the hidden units and in the outputs after this block.
    later, outputs_later = [v[:0] for _ in range(L + 1)], by_outputs[:, :0]
    solved = v[:0]
    num_sweeps = EXPECTED_SWEEPS
    for a, b in reversed(cut.blocks):
        # Units of degree d depend on the first d coordinates; later outputs depend on them.
        now = [slice(a, b), *(cut.units(k, a + 1, b + 1) for k in range(1, L + 1))]
        layers: list[Layer] = []
        within, offset = cut.from_outputs(L, now, outputs_later)
        for k in range(L, 0, -1):
            slope = slopes[k][now[k]]
            layers.append(Layer(within, _times_plus, (slope * offset, slope)))
            weight = cut.hidden(k - 1, slice(now[k].start, None), now[k - 1]).T
            within, after = _split(weight, now[k].stop - now[k].start)
            offset = after @ later[k]
        x_within, x_offset = cut.from_outputs(0, now, outputs_later)
        start = (v[a:b] - offset - x_offset) / scale[a:b]
        layers.append(
            Layer(torch.cat([within, x_within], 1), _times_plus, (start, -1 / scale[a:b]))
        )
        if one_by_one:
            sizes = [cut.units_of_each(k, a + 1, b + 1) for k in range(L, 0, -1)]
            u, levels = _solve_transposed_one_by_one(layers, sizes, by_outputs[:, a:b], start)
        else:
            u, levels, num_sweeps = _solve_transposed_block(
                layers, by_outputs[:, a:b], start, num_sweeps - 1
            )
        solved = torch.cat([u, solved])
        outputs_later = torch.cat([by_outputs[:, a:b] * u, outputs_later], 1)
        later[1:] = [torch.cat(pair) for pair in zip(reversed(levels), later[1:], strict=True)]
    return cut.as_given(solved)


def _solve_transposed_block(
    layers: list[Layer], by_outputs: Tensor, start: Tensor, first: int
) -> tuple[Tensor, Any, int]:
    def sweep(u: Tensor) -> tuple[Tensor, Any]:
        *levels, u = _through(layers, _stacked(by_outputs * u))
        return u, levels

    position = torch.arange(len(start) - 1, -1, -1, device=start.device)[:, None]
    return solve_by_sweeps(sweep, start, position, "auto", size=lambda _: start, first=first)


def _solve_transposed_one_by_one(
    layers: list[Layer], sizes: list[list[int]], by_outputs: Tensor, start: Tensor
) -> tuple[Tensor, list[Tensor]]:
    n = len(start)
    found: list[Tensor] = []

    def finish(j: int, u: Tensor) -> Tensor:
        found.insert(0, u)
        return by_outputs[:, j] * u

    outputs = by_outputs.new_zeros(len(by_outputs) * n, start.shape[1])
    rows: list[list[int] | int] = [len(by_outputs), *sizes, [1] * n]
    _, levels = _one_by_one(layers, rows, outputs, range(n - 1, -1, -1), finish)
    return torch.cat(found), levels


def _one_by_one(
    layers: list[Layer],
    sizes: list[list[int] | int],
    first: Tensor,
    positions: Iterable[int],
    finish: Callable[[int, Tensor], Tensor],
) -> tuple[Tensor, list[Tensor]]:
    """Solves a block coordinate by coordinate, each with the units that it adds to each level.

    ``sizes`` has the numbers of these units for each level; an int is for a level of outputs, with
    so many parameters. ``finish`` takes a coordinate and its rows of the last layer's result, and
    returns its rows of the first level, which starts at zero. Returns the first level and the
    hidden ones.
    """
    levels = [first.new_zeros(len(layer.weight), first.shape[1]) for layer in layers[:-1]]
    both = torch.cat([levels[-1], first])  # the input of the last layer
    levels[-1], first = both.split([len(levels[-1]), len(first)])
    rows, *rows_of_levels = map(_by_coordinate, [first, *levels], sizes)
    *pieces, last_pieces = map(_layer_by_coordinate, layers, sizes[1:])
    for j in positions:
        source = first
        for piece, level, level_rows in zip(pieces, levels, rows_of_levels, strict=True):
            if len(level_rows[j]):
                level_rows[j].copy_(piece[j](source))
            source = level
        rows[j].copy_(finish(j, last_pieces[j](both)))
    return first, levels


def _by_coordinate(level: Tensor, sizes: list[int] | int) -> Sequence[Tensor]:
    if isinstance(sizes, int):
        return torch.unbind(level.unflatten(0, (sizes, -1)), 1)
    return level.split_with_sizes(sizes)


def _layer_by_coordinate(layer: Layer, sizes: list[int] | int) -> list[Layer]:
    rows = (_by_coordinate(t, sizes) for t in (layer.weight, *layer.arguments))
    return [Layer(weight, layer.then, rest) for weight, *rest in zip(*rows, strict=True)]


def _times_plus(z: Tensor, added: Tensor, factor: Tensor) -> Tensor:
    return torch.addcmul(added, factor, z)


def _through(layers: list[Layer], x: Tensor) -> list[Tensor]:
    """The results of all layers; the last layer reads ``x`` too."""
    levels, h = [], x
    for layer in layers[:-1]:
        h = layer(h)
        levels.append(h)
    return [*levels, layers[-1](torch.cat([h, x]))]


def _linearized(cut: Cut, x: Tensor) -> tuple[list[Tensor], Tensor, Tensor]:
    """The activations' slopes at ``x`` by level, and the map's derivatives in outputs and ``x``."""
    x = h = cut.features_first(x.detach())
    *hidden, output = zip(cut.whole(), cut.offsets, strict=True)
    slopes = [x]
    with torch.enable_grad():
        for weight, offset in hidden:
            z = (weight @ h + offset).detach().requires_grad_()
            h = cut.network.activation(z.clone())  # which may write in place
            slopes += torch.autograd.grad(h.sum(), z)
            h = h.detach()
    with torch.no_grad():
        weight, offset = output
        params = (weight @ torch.cat([h, x]) + offset).view(cut.P, cut.D, -1)
        by_x, by_params, *_ = cut.univariate.derivatives(x, *params)
        return slopes, torch.stack(list(by_params)), by_x


class Cut:
    """A flow's network, cut into blocks of coordinates that are consecutive in its order.

    Tensors have features first, in that order, and the batch last. Level 0 holds the coordinates,
    levels 1 to L the hidden layers. Outputs are the P parameters of the univariate map, each for
    all coordinates.

    Args:
        flow: The flow.
        shape: Shape of the values.
        method: As for :func:`~pyro_iaf.invert`.
        keep: Whether to copy the weights, which may change before they are used.
    """

    def __init__(
        self, flow: Autoregressive, shape: torch.Size, method: str, keep: bool = False
    ) -> None:
        self.network: MaskedAutoregressiveNetwork = flow.network
        self.order, self.shape, self.univariate = flow.order, shape, flow.univariate
        self.D, self.L = shape[-1], len(self.network.hidden_dims)
        self.P = self.univariate.num_params
        self.natural = self.network.in_natural_order
        factors = self.network.factors()
        if keep:
            factors = [(product(factor).detach(),) for factor in factors]
            self.order = self.order.clone()
        *self._hidden, self._output, offsets = factors
        self.offsets = self._offsets(product(offsets), flow.context)
        num_columns = shape[:-1].numel()
        # For large batches arithmetic takes most of the time, and every sweep repeats all of it.
        is_large = method == "auto" and num_columns > 8 * self.D + 64
        self.one_by_one = runs_eagerly() and (method == "incremental" or is_large)
        size = block_size(num_columns, self.one_by_one, self.order.device)
        size = self.D if method == "fixed_point" else size
        self.blocks = [(a, min(a + size, self.D)) for a in range(0, self.D, size)]

    def features_first(self, y: Tensor) -> Tensor:
        y = y.reshape(-1, self.D).T
        return y.contiguous() if self.natural else y[self.order]

    def as_given(self, x: Tensor) -> Tensor:
        x = x if self.natural else x[torch.argsort(self.order)]
        return x.T.reshape(self.shape).clone(memory_format=torch.contiguous_format)

    def units(self, k: int, a: int, b: int) -> slice:
        """The units of level k that the coordinates from position a up to b add."""
        return self.network.units_between(k - 1, a, b) if k else slice(a, b)

    def units_of_each(self, k: int, a: int, b: int) -> list[int]:
        """The number of units of level k that each of these positions adds."""
        slices = (self.units(k, d, d + 1) for d in range(a, b))
        return [units.stop - units.start for units in slices]

    def whole(self) -> list[Tensor]:
        """All weights: of each hidden layer, and of the outputs on the last level and level 0."""
        first, *hidden, output = map(product, [*self._hidden, self._output])
        if not self.natural:
            first = first[:, self.order]
            H = output.shape[1] - self.D
            columns = torch.cat([torch.arange(H, device=output.device), H + self.order])
            output = self._outputs_in_order(output)[:, columns]
        return [first, *hidden, output]

    def hidden(self, k: int, rows: slice, columns: slice) -> Tensor:
        """Weights from level k to the next."""
        where = columns if k else self._at(columns)
        return product([_take(factor, rows, where) for factor in self._hidden[k]])

    def output(self, rows: slice, k: int, columns: slice) -> Tensor:
        """Weights from level k, L or 0, to the outputs, of shape ``(P, rows, columns)``."""
        H = self.network.hidden_dims[-1]
        inputs, where = (slice(H), columns) if k else (slice(H, None), self._at(columns))
        parts = [factor.view(self.P, self.D, -1)[..., inputs] for factor in self._output]
        return product([_take(part, self._at(rows), where) for part in parts])

    def from_outputs(self, k: int, now: list[slice], gradient: Tensor) -> tuple[Tensor, Tensor]:
        """Weights from a block's outputs back to level k, and the gradient from later outputs."""
        a, b = now[0].start, now[0].stop
        weight = self.output(slice(a, None), k, now[k])
        within, after = (_stacked(part).T for part in _split(weight, b - a, 1))
        return within, after @ _stacked(gradient)

    def _offsets(self, offsets: Tensor, context: Tensor | None) -> list[Tensor]:
        """What is added to the units of each hidden layer and to the outputs.

        The last dimension is the batch, or one if all rows have the same.
        """
        if context is not None:
            offsets = functional.linear(context, offsets[:, 1:], offsets[:, 0])
            if context.dim() > 1:
                offsets = offsets.expand(*self.shape[:-1], -1)
            offsets = offsets.reshape(-1, offsets.shape[-1]).T
        *hidden, output = offsets.split_with_sizes([*self.network.hidden_dims, self.P * self.D])
        return [*hidden, output if self.natural else self._outputs_in_order(output)]

    def _outputs_in_order(self, rows: Tensor) -> Tensor:
        return _stacked(rows.view(self.P, self.D, -1)[:, self.order])

    def _at(self, positions: slice) -> slice | Tensor:
        """The coordinates at these positions of the order."""
        return positions if self.natural else self.order[positions]


def block_size(num_columns: int, one_by_one: bool, device: torch.device) -> int:
    """The number of coordinates in a block, by measurement."""
    if not runs_eagerly():
        return 16  # each coordinate takes a sweep of its block
    if one_by_one:
        return 32
    if device.type != "cpu":
        return 512  # not measured: kernel launches cost more than arithmetic
    return min(max(8192 // max(num_columns, 1), 32), 128)


def _take(matrix: Tensor, rows: slice | Tensor, columns: slice | Tensor) -> Tensor:
    if isinstance(columns, slice):  # first, as it is a view: less to gather
        return matrix[..., columns][..., rows, :]
    return matrix[..., rows, :][..., columns]


def _split(weight: Tensor, size: int, dim: int = -1) -> tuple[Tensor, Tensor]:
    return weight.narrow(dim, 0, size), weight.narrow(dim, size, weight.shape[dim] - size)


def _stacked(parts: Tensor) -> Tensor:
    """The rows of P matrices, from shape ``(P, n, _)`` to ``(P n, _)``."""
    return parts.reshape(parts.shape[0] * parts.shape[1], parts.shape[2])


def _plus(offset: Tensor, weight: Tensor, units: Tensor) -> Tensor:
    return offset + weight @ units if len(units) else offset
