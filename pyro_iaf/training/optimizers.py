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
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..compiler.capture import Refused

__all__ = ["BETA_1", "BETA_2", "EPS", "Adam", "RowAdam"]

# Those of torch.optim.Adam.
BETA_1, BETA_2, EPS = 0.9, 0.999, 1e-8


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


class Adam:
    """Parameters and the state of Adam in flat tensors.

    Args:
        params: The parameters, of one dtype and device.
        optimizer: The optimiser whose state it takes over, and gives back.
        factors: By how much the rate of each of the optimiser's groups differs from the rate.

    Raises:
        Refused: If the parameters have several dtypes or devices, or came one after the other.
    """

    def __init__(
        self, params: Sequence[Tensor], optimizer: torch.optim.Adam, factors: Sequence[float]
    ) -> None:
        self.params, self.optimizer = list(params), optimizer
        if len({(param.dtype, param.device) for param in params}) != 1:
            raise Refused(
                "Parameters of several dtypes or devices can't be trained by compiled steps: give "
                "compile=False, or convert the guide and the model to one."
            )
        self.sizes = [param.numel() for param in params]
        factor_of = {
            id(param): factor
            for group, factor in zip(optimizer.param_groups, factors, strict=True)
            for param in group["params"]
        }
        rates = [p.detach().new_full((p.numel(),), factor_of[id(p)]) for p in params]
        self.rates = torch.cat(rates)
        self.load()

    @torch.no_grad()
    def load(self) -> None:
        """Reads parameters and state."""
        self.values = self._flat(lambda p: p)
        self.first = self._flat(lambda p: self._state_of(p).get("exp_avg", torch.zeros_like(p)))
        self.second = self._flat(lambda p: self._state_of(p).get("exp_avg_sq", torch.zeros_like(p)))
        taken = {float(self._state_of(param).get("step", 0)) for param in self.params}
        if len(taken) != 1:
            raise Refused(
                "Some parameters were trained for more steps than others, which compiled steps "
                "can't go on with: compile=False."
            )
        # The loss's health, and how many steps were taken.
        self.state = torch.tensor([0.0, *taken], dtype=torch.float64, device=self.values.device)
        self.views = self.in_shape(self.values)

    @torch.no_grad()
    def store(self) -> None:
        """Writes the parameters."""
        torch._foreach_copy_(self.params, self.views)

    @torch.no_grad()
    def store_state(self) -> None:
        """Writes the optimiser's state."""
        averages = zip(self.in_shape(self.first), self.in_shape(self.second), strict=True)
        for param, (first, second) in zip(self.params, averages, strict=True):
            self.optimizer.state[param] = {
                "step": self.state[1].float(),
                "exp_avg": first.clone(),
                "exp_avg_sq": second.clone(),
            }

    def in_shape(self, flat: Tensor) -> list[Tensor]:
        """The parts of a flat tensor, in the shapes of the parameters."""
        parts = flat.split_with_sizes(self.sizes)
        return [part.view(param.shape) for part, param in zip(parts, self.params, strict=True)]

    def _flat(self, of: Callable[[Tensor], Tensor]) -> Tensor:
        return torch.cat([of(param).detach().reshape(-1) for param in self.params])

    def _state_of(self, param: Tensor) -> dict[str, Tensor]:
        state: dict[str, Tensor] = self.optimizer.state.get(param, {})
        return state
