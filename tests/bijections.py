"""The table of flows that the property tests run over: one line each."""

import shutil

import torch
from pyro.nn import AutoRegressiveNN
from univariate_maps import TOYS

from pyro_iaf import (
    DiagonalNormal,
    Gated,
    InverseAutoregressiveFlow,
    conditional_inverse_autoregressive_flow,
    inverse_autoregressive_flow,
)
from pyro_iaf.nn import made

# Inductor needs a C++ compiler; without one the same graphs are captured and run in eager mode.
BACKEND = "inductor" if shutil.which("g++") or shutil.which("clang++") else "aot_eager"

flow, conditional = inverse_autoregressive_flow, conditional_inverse_autoregressive_flow


def foreign(input_dim):
    return InverseAutoregressiveFlow(AutoRegressiveNN(input_dim, [16]))


def separate(make):
    """What ``make`` makes, with a parameter for each matrix, as in big networks."""
    largest = made.MAX_SHARED
    try:
        made.MAX_SHARED = 0
        return make()
    finally:
        made.MAX_SHARED = largest


BIJECTIONS = {
    "affine": lambda: flow(4, [16]),
    "affine, defaults": lambda: flow(4),
    "affine, two layers": lambda: flow(5, [16, 12]),
    "affine, own order": lambda: flow(4, [16], order=[2, 0, 3, 1]),
    "affine, narrow": lambda: flow(6, 2),
    "affine, one unit a layer": lambda: flow(4, [1, 1]),
    "affine, one coordinate": lambda: flow(1, [8]),
    "affine, tanh": lambda: flow(4, [16], activation="tanh"),
    "affine, float32": lambda: flow(4, [16]).float(),
    "affine, separate weights": lambda: separate(lambda: flow(4, [16])),
    "conditioned, separate weights": lambda: separate(
        lambda: conditional(4, 2, [16]).condition(torch.randn(2))
    ),
    "gated": lambda: flow(4, [16], univariate="gated"),
    "gated, biased": lambda: flow(4, [16], univariate=Gated(bias=-1.0)),
    "stack": lambda: flow(4, [16], num_flows=3),
    "stack, float32": lambda: flow(4, [16], num_flows=2).float(),
    "gated stack": lambda: flow(4, [16], num_flows=2, univariate="gated"),
    **{
        name: lambda univariate=univariate: flow(4, [16], univariate=univariate)
        for name, univariate in TOYS.items()
    },
    "bent stack": lambda: flow(4, [16], num_flows=2, univariate=TOYS["bent"]),
    "conditioned, bent": lambda: conditional(4, 2, [16], univariate=TOYS["bent"]).condition(
        torch.randn(2)
    ),
    "conditioned": lambda: conditional(4, 2, [16]).condition(torch.randn(2)),
    "conditioned, gated": lambda: conditional(4, 2, [16], univariate="gated").condition(
        torch.randn(2)
    ),
    "conditioned, one coordinate": lambda: conditional(1, 2, [8]).condition(torch.randn(2)),
    "conditioned stack": lambda: conditional(4, 2, 16, num_flows=2).condition(torch.randn(2)),
    "inverse": lambda: flow(4, [16]).inv,
    "inverse stack": lambda: flow(4, [16], num_flows=2).inv,
    "Pyro's network": lambda: foreign(4),
}


SINGLE = [name for name in BIJECTIONS if "stack" not in name and "inverse" not in name]
DOUBLE = [name for name in BIJECTIONS if "float32" not in name]


def rough(module, scale=0.3):
    """Moves every parameter away from where it starts, so that nothing is near zero by luck."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(scale * torch.randn_like(parameter))
    return module


def make(name):
    return rough(BIJECTIONS[name]())


def coordinate_by_coordinate(flow, y):
    """The inverse as one would write it down: D calls of the network, and autograd through them."""
    for part in reversed(getattr(flow, "parts", [flow])):
        x = torch.zeros_like(y)
        for k in part.order:
            better, _ = part.univariate.inverse(y, *part.params_at(x))
            x = torch.where(torch.arange(y.shape[-1]) == k, better, x)
        y = x
    return y


def biases(network):
    """The biases of all units of a small network, the outputs' last: a view."""
    return network.matrices(network.weights[0])[-1][:, 0]


def standard_normal(D, dtype=None, scale=1.0):
    return DiagonalNormal(torch.zeros(D, dtype=dtype), torch.full((D,), scale, dtype=dtype))


def flows_in(*transforms):
    """The single flows that transforms are made of, compositions taken apart."""
    flows = []
    for transform in transforms:
        if hasattr(transform, "parts"):
            flows += flows_in(*transform.parts)
        elif hasattr(transform, "network"):
            flows.append(transform)
    return flows


def dim_and_dtype(bijection):
    flow = getattr(bijection, "flow", bijection)  # of an inverse
    part = getattr(flow, "parts", [flow])[0]
    return part.input_dim, next(bijection.parameters()).dtype
