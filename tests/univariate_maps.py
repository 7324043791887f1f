"""The table of univariate maps that the property tests run over: ours, and some of a user's."""

import torch
from torch.nn import functional

from pyro_iaf import Affine, Gated, UnivariateMap


class Bent(UnivariateMap):
    """y = m + e^s sinh(e^t asinh(x) + a): it bends, and has more parameters than a scale needs.

    All but the shift are bounded, as powers of powers would outgrow every dtype in a stack.
    """

    num_params = 4

    def forward(self, x, m, *params):
        s, t, a = bounded(params)
        inner = t.exp() * x.asinh() + a
        return m + s.exp() * inner.sinh(), self.log_slope(x, s, t, inner)

    def inverse(self, y, m, *params):
        s, t, a = bounded(params)
        inner = ((y - m) / s.exp()).asinh()
        x = ((inner - a) / t.exp()).sinh()
        return x, self.log_slope(x, s, t, inner)

    def log_slope(self, x, s, t, inner):
        return s + t + inner.cosh().log() - (1 + x.square()).log() / 2


def bounded(params):
    return [param.tanh() / 2 for param in params]


class Softened(UnivariateMap):
    """y = m + softplus(s + c) (x + tanh(x) / 2 + sin(r)): its inverse takes steps of its own."""

    num_params = 3

    def __init__(self, offset):
        self.offset = offset

    def forward(self, x, m, s, r):
        scale = functional.softplus(s + self.offset)
        log_slope = scale.log() + (1 + (1 - x.tanh().square()) / 2).log()
        return m + scale * (x + x.tanh() / 2 + r.sin()), log_slope

    def inverse(self, y, m, s, r):
        target = (y - m) / functional.softplus(s + self.offset) - r.sin()
        x = target
        for _ in range(60):  # the slope is between 1 and 1.5, so this contracts
            x = x - (x + x.tanh() / 2 - target) / 1.5
        return x, self.forward(x, m, s, r)[1]


class Shift(UnivariateMap):
    """y = x + m: one parameter, and a log-slope that depends on nothing."""

    num_params = 1

    def forward(self, x, m):
        return x + m, torch.zeros_like(x)

    def inverse(self, y, m):
        return y - m, torch.zeros_like(y)


TOYS = {"bent": Bent(), "softened": Softened(0.5), "shift": Shift()}
MAPS = {"affine": Affine(), "gated": Gated(), "gated, biased": Gated(bias=-1.0), **TOYS}
