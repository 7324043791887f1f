"""Sums of products of tensors in log space, as a backend of ``pyro.ops.einsum``.

Pyro's own, ``pyro.ops.einsum.torch_log``, is made for large tables: it takes some thirty operations
and as many for its gradient, where tables of a few numbers need four.
"""

from __future__ import annotations

import math

import torch
from pyro.ops.einsum import torch_log
from pyro.ops.einsum.util import Tensordot
from torch import Tensor

__all__ = ["einsum", "tensordot", "transpose", "with_zeros"]

# From so many products on, a matrix product is faster than all products written out.
LARGE = 2**16

transpose = torch_log.transpose


def einsum(equation: str, *operands: Tensor) -> Tensor:
    """The logarithm of an einsum of the exponentials of its operands."""
    inputs, output = equation.split("->")
    terms = inputs.split(",")
    sizes = {
        d: size
        for t, o in zip(terms, operands, strict=True)
        for d, size in zip(t, o.shape, strict=True)
    }
    if len(operands) > 1 and math.prod(sizes.values()) > LARGE:
        found: Tensor = torch_log.einsum(equation, *operands)
        return found
    summed = sorted(sizes.keys() - set(output))
    order = [*output, *summed]
    aligned = []
    for term, operand in zip(terms, operands, strict=True):
        dims = sorted(term, key=order.index)
        if dims != list(term):
            operand = operand.permute([term.index(dim) for dim in dims])
        shape = [sizes[dim] if dim in term else 1 for dim in order]
        aligned.append(operand.reshape(shape) if list(operand.shape) != shape else operand)
    total = aligned[0]
    for operand in aligned[1:]:
        total = total + operand
    if not summed:
        return total if len(operands) > 1 else total.clone()
    # A sum of nothing but zeros would have no gradient.
    total = total.clamp(min=_lowest(total))
    return total.logsumexp(list(range(len(output), len(order))))


def with_zeros(log_total: Tensor) -> Tensor:
    """The logarithm of a total, ``-inf`` where :func:`einsum` put a very low number for it."""
    return torch.where(log_total < _lowest(log_total) / 2, -torch.inf, log_total)


def _lowest(like: Tensor) -> float:
    return torch.finfo(like.dtype).min / 16


tensordot = Tensordot(einsum)
