r"""The last step of a guide: a learned loc, scale, skewness and tail weight of each latent.

.. math::
    z = c + R \, (\mu + S \, b(x)), \qquad
    b_i(x) = \sinh(e^{t_i} \operatorname{asinh}(x_i) + a_i)

The frame :math:`c, R` is fixed: the loc and scale at which the guide starts. The loc :math:`\mu`,
scale :math:`S`, skewnesses :math:`a` and log tail weights :math:`t` are learned. In the frame each
latent is of order one, whatever its units are, so one learning rate suits all. Affine flows need
the bend :math:`b` (Jones and Pewsey 2009, https://doi.org/10.1093/biomet/asp053), since theirs is
normal in the first coordinate.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .._validation import module_repr
from ..solvers.fused import ScoredPass, last_step_pass
from ..solvers.path_score import Solver
from .base import SinglePass

__all__ = ["LocScale"]


class LocScale(SinglePass):
    """A learned bend, scale and loc, in a fixed frame.

    Args:
        loc: The frame's origin, of shape ``(D,)``.
        scale: The frame's scale: of each coordinate, or a lower-triangular matrix.
        log_scale: Initial logarithm of the learned scale's diagonal; the learned loc starts at
            zero.
        dense: Whether to learn a lower-triangular scale, not only a diagonal one.
    """

    def __init__(self, loc: Tensor, scale: Tensor, log_scale: float, dense: bool) -> None:
        super().__init__()
        self.input_dim = len(loc)
        # One parameter, as an optimiser takes long for each. Its rows: loc, log diagonal,
        # skewness, log tail weight; then the scale below its diagonal.
        coefficients = torch.zeros_like(loc).repeat(4 + dense * len(loc), 1)
        coefficients[1] = log_scale
        self.coefficients = nn.Parameter(coefficients)
        rows = scale.diag() if dense and scale.dim() == 1 else scale.reshape(-1, len(loc))
        self.frame: Tensor
        self.register_buffer("frame", torch.cat([loc.unsqueeze(0), rows]))

    def condition(self, context: Tensor) -> LocScale:
        """Itself: its parameters are the same for all contexts."""
        return self

    @property
    def loc(self) -> Tensor:
        """The value of zero noise."""
        return self._compute(torch.zeros_like(self.frame[0]))[0]

    @property
    def _sources(self) -> tuple[object, ...]:
        return (self.coefficients, self.frame)

    def _compute(self, x: Tensor) -> tuple[Tensor, Tensor]:
        # Split once: the gradient of each index operation would be as large as the whole.
        rows, below = self.coefficients.tensor_split([4])
        shift, log_scale, skew, log_tail = rows.unbind()
        bent = (log_tail.exp() * x.asinh() + skew).sinh()
        y = torch.addcmul(shift, log_scale.exp(), bent)
        if len(below):
            y = y + bent @ self._below_diagonal(below).mT
        frame = self._frame_scale
        y = y @ frame.mT if frame.dim() > 1 else y * frame
        return self.frame[0] + y, self._log_scale(log_scale) + self._log_slope(x, bent, log_tail)

    def _log_slope(self, x: Tensor, bent: Tensor, log_tail: Tensor) -> Tensor:
        return log_tail + ((1 + bent.square()).log() - (1 + x.square()).log()) / 2

    def _undo(self, y: Tensor, method: str = "auto") -> tuple[Tensor, Tensor]:
        y = _solve(self._frame_scale, y - self.frame[0], transposed=True)
        bent = _solve(self._learned_scale(), y - self.coefficients[0], transposed=True)
        x = ((bent.asinh() - self.coefficients[2]) / self.coefficients[3].exp()).sinh()
        log_slope = self._log_slope(x, bent, self.coefficients[3])
        # A copy: the log slope is cached under the returned noise, and its graph holds x.
        return x.clone(), self._log_scale(self.coefficients[1]) + log_slope

    def solve_transposed(self, x: Tensor, v: Tensor) -> Tensor:
        # Vectors are rows here: J^T u = v reads u J = v.
        tail = self.coefficients[3].exp()
        slope = torch.addcmul(self.coefficients[2], tail, x.asinh()).cosh() * tail
        v = v * (1 + x.square()).sqrt() / slope
        v = _solve(self._learned_scale(), v, transposed=False)
        return _solve(self._frame_scale, v, transposed=False)

    def pass_with_score(self, x: Tensor, by_kernel: bool) -> tuple[Tensor, Tensor, Solver]:
        y, log_slope = self._compute(x)
        return y, log_slope, Solver(self, x.detach(), self.slope_of_log_det(x).detach())

    def pass_at_once(self, x: Tensor, log_prob: Tensor, score: Tensor) -> ScoredPass | None:
        if x.dim() != 2 or x.dtype != self.frame.dtype:
            return None
        return last_step_pass(x, log_prob, score, self.coefficients, self.frame)

    @torch.no_grad()
    def slope_of_log_det(self, x: Tensor) -> Tensor:
        """The gradient of the log-determinant at ``x``."""
        tail, wide = self.coefficients[3].exp(), 1 + x.square()
        bent = torch.addcmul(self.coefficients[2], tail, x.asinh())
        return bent.tanh() * tail * wide.rsqrt() - x / wide

    def _log_scale(self, learned: Tensor) -> Tensor:
        frame = self._frame_scale
        return learned + (frame.diagonal() if frame.dim() > 1 else frame).log()

    @property
    def _frame_scale(self) -> Tensor:
        """The frame's scale: of each coordinate, or a lower-triangular matrix."""
        return self.frame[1:] if len(self.frame) > 2 else self.frame[1]

    def _learned_scale(self) -> Tensor:
        """The learned scale, likewise."""
        scale, below = self.coefficients[1].exp(), self.coefficients[4:]
        return self._below_diagonal(below) + scale.diag() if len(below) else scale

    def _below_diagonal(self, below: Tensor) -> Tensor:
        # An optimiser moves all D entries of a row at once: this bounds their joint effect.
        return below.tril(-1) / math.sqrt(self.input_dim)

    def extra_repr(self) -> str:
        kind = "dense" if len(self.coefficients) > 4 else "diagonal"
        return f"{kind} loc and scale"

    def __repr__(self) -> str:
        return module_repr(self, f"input_dim={self.input_dim}", self.extra_repr())


def _solve(scale: Tensor, rows: Tensor, transposed: bool) -> Tensor:
    """The rows ``x`` with ``x @ scale = rows``, or ``x @ scale.mT``; a vector is a diagonal."""
    if scale.dim() == 1:
        return rows / scale
    matrix, flat = scale.mT if transposed else scale, rows.reshape(-1, rows.shape[-1])
    solved: Tensor = torch.linalg.solve_triangular(matrix, flat, upper=transposed, left=False)
    return solved.reshape(rows.shape)
