r"""The last step of a guide: from near the origin to where the posterior is.

.. math::
    z = c + R \, (\mu + S \, b(x)), \qquad
    b_i(x) = \sinh(e^{t_i} \operatorname{asinh}(x_i) + a_i)

with a fixed frame :math:`c, R`, which a guide takes from where it starts, and a loc :math:`\mu`, a
scale :math:`S`, skewnesses :math:`a` and tails :math:`t` to learn. In its own frame a latent is of
order one, whatever its units are, so one learning rate does for all. The bend :math:`b` (Jones and
Pewsey 2009, https://doi.org/10.1093/biomet/asp053) is what affine flows lack: theirs is normal in
the coordinate that comes first.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .._validation import in_one_line
from ..solvers.path_score import Solver
from .base import SinglePass

__all__ = ["LocScale"]


class LocScale(SinglePass):
    """A learned bend, scale and loc, in a frame.

    Args:
        loc: The frame's origin, of shape ``(D,)``.
        scale: The frame's scale: one for each coordinate, or a lower-triangular matrix.
        log_scale: Where the logarithm of the learned scale's diagonal starts; its loc starts at
            zero.
        dense: Whether a lower-triangular matrix is learned, and not its diagonal alone.
    """

    def __init__(self, loc: Tensor, scale: Tensor, log_scale: float, dense: bool) -> None:
        super().__init__()
        self.input_dim = len(loc)
        # One parameter is one step of an optimiser: loc, log of the diagonal, skewness, log of the
        # weight of the tails; and what lies below the diagonal.
        coefficients = torch.zeros_like(loc).repeat(4 + dense * len(loc), 1)
        coefficients[1] = log_scale
        self.coefficients = nn.Parameter(coefficients)
        rows = scale.diag() if dense and scale.dim() == 1 else scale.reshape(-1, len(loc))
        self.frame: Tensor
        self.register_buffer("frame", torch.cat([loc.unsqueeze(0), rows]))

    def condition(self, context: Tensor) -> LocScale:
        """Itself: what it learns is the same for all contexts."""
        return self

    @property
    def loc(self) -> Tensor:
        """What the origin becomes."""
        return self._compute(torch.zeros_like(self.frame[0]))[0]

    @property
    def _sources(self) -> tuple[object, ...]:
        return (self.coefficients, self.frame)

    def _compute(self, x: Tensor) -> tuple[Tensor, Tensor]:
        # Parted once, as the gradient of each part for itself is as large as that of the whole.
        rows, below = self.coefficients.tensor_split([4])
        shift, log_scale, skew, log_tail = rows.unbind()
        inner = log_tail.exp() * x.asinh() + skew
        bent = inner.sinh()
        y = torch.addcmul(shift, log_scale.exp(), bent)
        if len(below):
            y = y + bent @ self._below_diagonal(below).mT
        log_scale = self._log_scale(log_scale) + self._log_slope(x, bent, log_tail)
        return self.frame[0] + self._from_frame(y), log_scale

    def _log_slope(self, x: Tensor, bent: Tensor, log_tail: Tensor) -> Tensor:
        return log_tail + ((1 + bent.square()).log() - (1 + x.square()).log()) / 2

    def _undo(self, y: Tensor, method: str = "auto") -> tuple[Tensor, Tensor]:
        y = y - self.frame[0]
        dense = len(self.frame) > 2
        y = _solve(self.frame[1:].mT, y, upper=True) if dense else y / self.frame[1]
        y = y - self.coefficients[0]
        if len(self.coefficients) > 4:
            bent = _solve(self._learned().mT, y, upper=True)
        else:
            bent = y / self.coefficients[1].exp()
        x = ((bent.asinh() - self.coefficients[2]) / self.coefficients[3].exp()).sinh()
        log_slope = self._log_slope(x, bent, self.coefficients[3])
        # A copy: what is remembered under the noise has a graph, and that holds this one.
        return x.clone(), self._log_scale(self.coefficients[1]) + log_slope

    def _undo_known(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return self._undo(y)

    def solve_transposed(self, x: Tensor, v: Tensor) -> Tensor:
        # A row v of J^T u = v is u J = v.
        tail = self.coefficients[3].exp()
        slope = torch.addcmul(self.coefficients[2], tail, x.asinh()).cosh() * tail
        v = v * (1 + x.square()).sqrt() / slope
        if len(self.coefficients) > 4:
            v = _solve(self._learned(), v, upper=False)
        else:
            v = v / self.coefficients[1].exp()
        if len(self.frame) > 2:
            return _solve(self.frame[1:], v, upper=False)
        return v / self.frame[1]

    def pass_with_score(self, x: Tensor, by_kernel: bool) -> tuple[Tensor, Tensor, Solver]:
        y, log_slope = self._compute(x)
        return y, log_slope, Solver(self, x.detach(), self.slope_of_log_det(x).detach())

    @torch.no_grad()
    def slope_of_log_det(self, x: Tensor) -> Tensor:
        """The gradient of the log-determinant at ``x``."""
        tail, wide = self.coefficients[3].exp(), 1 + x.square()
        bent = torch.addcmul(self.coefficients[2], tail, x.asinh())
        return bent.tanh() * tail * wide.rsqrt() - x / wide

    def _log_scale(self, learned: Tensor) -> Tensor:
        frame = self.frame[1:]
        diagonal = frame.diagonal() if len(frame) > 1 else frame[0]
        return learned + diagonal.log()

    def _from_frame(self, y: Tensor) -> Tensor:
        frame = self.frame[1:]
        return y @ frame.mT if len(frame) > 1 else y * frame[0]

    def _below_diagonal(self, below: Tensor) -> Tensor:
        # An optimiser moves all its numbers at once, so each counts the less, the more there are.
        return below.tril(-1) / math.sqrt(self.input_dim)

    def _learned(self) -> Tensor:
        return self._below_diagonal(self.coefficients[4:]) + self.coefficients[1].exp().diag()

    def extra_repr(self) -> str:
        kind = "dense" if len(self.coefficients) > 4 else "diagonal"
        return f"{kind} loc and scale"

    def __repr__(self) -> str:
        return in_one_line(self, f"input_dim={self.input_dim}", self.extra_repr())


def _solve(matrix: Tensor, rows: Tensor, upper: bool) -> Tensor:
    """The rows ``x`` with ``x @ matrix = rows``."""
    flat = rows.reshape(-1, rows.shape[-1])
    solved: Tensor = torch.linalg.solve_triangular(matrix, flat, upper=upper, left=False)
    return solved.reshape(rows.shape)
