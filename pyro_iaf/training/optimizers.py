r"""Adam for tables of which a step touches few rows: the others cost nothing.

.. math::
    t_i \leftarrow t_i + 1, \quad
    m_i \leftarrow \beta_1 m_i + (1 - \beta_1) g_i, \quad
    v_i \leftarrow \beta_2 v_i + (1 - \beta_2) g_i^2

for the rows :math:`i` that have a gradient, and Adam's step for these, each by its own count
:math:`t_i` of the steps it was in.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

__all__ = ["BETA_1", "BETA_2", "EPS", "RowAdam", "make_gradients_sparse"]

# Those of torch.optim.Adam.
BETA_1, BETA_2, EPS = 0.9, 0.999, 1e-8

_made_sparse: Any = WeakIdKeyDictionary()  # parameters, and whose they are


class RowAdam:
    """An optimiser of tables whose gradients are sparse.

    Args:
        tables: Parameters of shape ``(N, C)``.
    """

    def __init__(self, tables: Sequence[Tensor]) -> None:
        self.tables = list(tables)
        self.first = [torch.zeros_like(table, requires_grad=False) for table in tables]
        self.second = [torch.zeros_like(table, requires_grad=False) for table in tables]
        self.counts = [table.detach().new_zeros(len(table)) for table in tables]
        self._found: list[tuple[int, Tensor, Tensor]] = []
        for table in self.tables:
            table.grad = None  # of whoever trained it before

    @property
    def visits(self) -> float:
        """In how many steps a row was, in the mean; of the table that was least."""
        return min((float(counts.mean()) for counts in self.counts), default=math.inf)

    @torch.no_grad()
    def gradients(self) -> list[Tensor]:
        """Takes the tables' gradients; returns tensors that have those of rows, for clipping."""
        self._found.clear()
        for k, table in enumerate(self.tables):
            if table.grad is not None:
                gradient, table.grad = table.grad.coalesce(), None
                rows = gradient.values()
                rows.grad = rows.clone()
                self._found.append((k, gradient.indices()[0], rows))
        return [rows for _, _, rows in self._found]

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """A step by the gradients that were taken."""
        for k, index, rows in self._found:
            assert rows.grad is not None
            count = self.counts[k][index] + 1
            m = self.first[k][index].lerp_(rows.grad, 1 - BETA_1)
            v = self.second[k][index].lerp_(rows.grad.square(), 1 - BETA_2)
            for state, value in ((self.counts, count), (self.first, m), (self.second, v)):
                state[k][index] = value
            root = (v / (1 - BETA_2**count).unsqueeze(-1)).sqrt_().add_(EPS)
            size = (rate / (1 - BETA_1**count)).unsqueeze(-1)
            self.tables[k].index_add_(0, index, size * m / root, alpha=-1)
        self._found.clear()

    def state(self) -> dict[str, Any]:
        """What a checkpoint has of it."""
        return {"first": self.first, "second": self.second, "counts": self.counts}

    def restore(self, state: dict[str, Any]) -> None:
        """Goes on from such a state."""
        for name, saved in state.items():
            for own, value in zip(getattr(self, name), saved, strict=True):
                own.copy_(value)


def make_gradients_sparse(param: Tensor, guide: Any) -> None:
    """Gives a parameter's gradients the form that ``SparseAdam`` wants, while its guide does."""
    if param not in _made_sparse:
        param.register_post_accumulate_grad_hook(_make_sparse)
    _made_sparse[param] = weakref.ref(guide)


def _make_sparse(param: Tensor) -> None:
    guide = _made_sparse[param]() if param in _made_sparse else None
    is_wanted = guide is not None and guide.embedding_grad == "sparse" and not guide.rows_alone
    if is_wanted and param.grad is not None and not param.grad.is_sparse:
        param.grad = param.grad.to_sparse()
