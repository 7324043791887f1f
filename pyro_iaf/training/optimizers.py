r"""Adam by one rule, for all parameters at once, and for tables with sparse gradients.

.. math::
    m \leftarrow \beta_1 m + (1 - \beta_1) g, \quad
    v \leftarrow \beta_2 v + (1 - \beta_2) g^2, \quad
    \phi \leftarrow \phi - \eta \, \frac{m / (1 - \beta_1^t)}{\sqrt{v / (1 - \beta_2^t)} + \epsilon}
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..compiler.capture import Refused

__all__ = ["BETAS", "EPS", "Adam", "FlatAdam", "RowAdam", "adam_coefficients", "adam_update"]

# The defaults of torch.optim.Adam.
BETAS, EPS = (0.9, 0.999), 1e-8


def adam_coefficients(
    count: Tensor, rate: Tensor | float, is_taken: Tensor | float = 1.0
) -> list[Any]:
    """The scalars of a step of Adam, with the corrections for averages that began with zeros.

    ``count`` is the number of steps, with this one. A step with ``is_taken`` zero changes nothing.
    """
    left_1, left_2 = (beta**count for beta in BETAS)
    root = (1 - left_2).sqrt()
    new_1, new_2 = (is_taken * (1 - beta) for beta in BETAS)
    return [is_taken * rate * root / (1 - left_1), EPS * root, 1 - new_1, new_1, 1 - new_2, new_2]


def adam_update(
    first: Tensor, second: Tensor, gradient: Tensor, numbers: Sequence[Any]
) -> tuple[Tensor, Tensor, Tensor]:
    """The averages of the gradient and of its square after a step, and the step itself.

    The step is to be subtracted from the parameters. ``numbers`` are :func:`adam_coefficients`.
    """
    size, eps, keep_1, new_1, keep_2, new_2 = numbers
    m = first * keep_1 + gradient * new_1
    v = second * keep_2 + gradient.square() * new_2
    return m, v, size * m / (v.sqrt() + eps)


class Adam:
    """Adam for parameters in groups, each of which has a rate of its own.

    By the kernel of :class:`torch.optim.Adam`, whose class would import PyTorch's compiler, which
    takes as long as hundreds of steps.

    Attributes:
        groups: The parameters of each group.
        state: For each parameter that was trained, ``step`` and two averages: ``exp_avg`` and
            ``exp_avg_sq``.
    """

    def __init__(self, num_groups: int) -> None:
        self.groups: list[list[Tensor]] = [[] for _ in range(num_groups)]
        self.state: dict[Tensor, dict[str, Tensor]] = {}

    @property
    def params(self) -> list[Tensor]:
        """All parameters, group by group."""
        return [param for group in self.groups for param in group]

    def zero_grad(self) -> None:
        """Removes all gradients."""
        for param in self.params:
            param.grad = None

    @torch.no_grad()
    def step(self, rates: Sequence[float]) -> None:
        """Takes a step with those parameters that have a gradient."""
        for rate, group in zip(rates, self.groups, strict=True):
            kinds: dict[Any, list[Tensor]] = {}
            for param in group:
                if param.grad is not None:
                    kinds.setdefault((param.device, param.dtype), []).append(param)
            for (device, dtype), params in kinds.items():
                if device.type in ("cpu", "cuda") and dtype.is_floating_point:
                    self._step_by_kernel(params, rate)
                else:
                    self._step_by_rule(params, rate)

    def _step_by_kernel(self, params: list[Tensor], rate: float) -> None:
        states = [self._state_of(param) for param in params]
        counts = [state["step"] for state in states]
        torch._foreach_add_(counts, 1)
        torch._fused_adam_(
            params,
            [param.grad for param in params if param.grad is not None],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            counts,
            lr=rate,
            beta1=BETAS[0],
            beta2=BETAS[1],
            weight_decay=0.0,
            eps=EPS,
            amsgrad=False,
            maximize=False,
        )
        torch.autograd.graph.increment_version(params)  # the kernel does not

    def _step_by_rule(self, params: list[Tensor], rate: float) -> None:
        for param in params:
            state, gradient = self._state_of(param), param.grad
            assert gradient is not None
            state["step"] += 1
            count = torch.tensor(state["step"].item(), dtype=torch.float64, device="cpu")
            numbers = adam_coefficients(count, rate)
            parts = [param, state["exp_avg"], state["exp_avg_sq"], gradient]
            if param.is_complex():
                parts = list(map(torch.view_as_real, parts))
            value, first, second, gradient = parts
            *new, change = adam_update(first, second, gradient, numbers)
            torch._foreach_copy_([first, second], new)
            value.sub_(change)

    def _state_of(self, param: Tensor) -> dict[str, Tensor]:
        if param not in self.state:
            self.state[param] = {
                "step": torch.zeros((), dtype=torch.float32, device=param.device),
                "exp_avg": torch.zeros_like(param, memory_format=torch.preserve_format),
                "exp_avg_sq": torch.zeros_like(param, memory_format=torch.preserve_format),
            }
        return self.state[param]

    def state_dict(self) -> dict[int, dict[str, Tensor]]:
        """The state for a checkpoint, by the positions of parameters."""
        params = enumerate(self.params)
        return {k: self.state[param] for k, param in params if param in self.state}

    def load_state_dict(self, state: dict[int, dict[str, Tensor]]) -> None:
        """Takes over a :meth:`state_dict`; raises a LookupError if it is of other parameters."""
        params = self.params
        self.state = {}
        for k, saved in state.items():
            own = self._state_of(params[k])
            for name, value in own.items():
                value.copy_(saved[name])


class RowAdam:
    """Adam for tables with sparse gradients: rows without a gradient cost nothing.

    Each row has its own count of steps.

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
            table.grad = None  # of an earlier training

    @property
    def visits(self) -> float:
        """The mean number of steps per row, of the table where it is smallest."""
        return min((float(counts.mean()) for counts in self.counts), default=math.inf)

    @torch.no_grad()
    def gradients(self) -> list[Tensor]:
        """Moves the tables' gradients to tensors of rows, which are returned for clipping."""
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
        """Takes a step by the gradients that :meth:`gradients` found."""
        for k, index, rows in self._found:
            assert rows.grad is not None
            count = self.counts[k][index] + 1
            numbers = adam_coefficients(count.unsqueeze(-1), rate)
            first, second = self.first[k][index], self.second[k][index]
            m, v, change = adam_update(first, second, rows.grad, numbers)
            for state, value in ((self.counts, count), (self.first, m), (self.second, v)):
                state[k][index] = value
            self.tables[k].index_add_(0, index, change, alpha=-1)
        self._found.clear()

    def state(self) -> dict[str, Any]:
        """The state for a checkpoint."""
        return {"first": self.first, "second": self.second, "counts": self.counts}

    def restore(self, state: dict[str, Any]) -> None:
        """Takes over a :meth:`state`."""
        for name, saved in state.items():
            for own, value in zip(getattr(self, name), saved, strict=True):
                own.copy_(value)


class FlatAdam:
    """Parameters and the state of Adam as flat tensors, for compiled steps.

    Args:
        params: The parameters, of one dtype and device.
        optimizer: The optimiser, whose state is read here and written by :meth:`store_state`.
        factors: The factor of the learning rate for each of its groups.

    Raises:
        Refused: If the parameters have several dtypes or devices, or different numbers of steps.
    """

    @torch.no_grad()
    def __init__(self, params: Sequence[Tensor], optimizer: Adam, factors: Sequence[float]) -> None:
        self.params, self.optimizer = list(params), optimizer
        if len({(param.dtype, param.device) for param in params}) != 1:
            raise Refused(
                "Parameters of several dtypes or devices can't be trained by compiled steps: give "
                "compile=False, or convert the guide and the model to one."
            )
        self.sizes = [param.numel() for param in params]
        self.shapes = [param.shape for param in params]
        factor_of = {
            id(param): factor
            for group, factor in zip(optimizer.groups, factors, strict=True)
            for param in group
        }
        states = [optimizer.state.get(param, {}) for param in params]
        counts = {float(state.get("step", 0)) for state in states}
        if len(counts) != 1:
            raise Refused(
                "Compiled steps need parameters that were all trained for the same number of "
                "steps, and some of these were trained for fewer. Give compile=False."
            )

        def average(name: str) -> Tensor:
            found = (s.get(name, torch.zeros_like(p)) for s, p in zip(states, params, strict=True))
            return torch.cat([average.reshape(-1) for average in found])

        self.values = torch.cat([param.reshape(-1) for param in params])
        self.first, self.second = average("exp_avg"), average("exp_avg_sq")
        self.rates = torch.cat([p.new_full((p.numel(),), factor_of[id(p)]) for p in params])
        # The relative effective sample size of the loss, and the number of steps.
        self.state = torch.tensor([0.0, *counts], dtype=torch.float64, device=self.values.device)
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

    @property
    def tensors(self) -> list[Tensor]:
        """The tensors that :meth:`step` changes, and the rates."""
        return [self.values, self.first, self.second, self.state, self.rates]

    @staticmethod
    def step(
        tensors: Sequence[Tensor],
        value: Tensor,
        ess: Tensor,
        gradient: Tensor,
        rate: Tensor,
        largest_norm: Tensor,
    ) -> Tensor:
        """Takes a step by a flat gradient, clipped, if it and the loss ``value`` are finite.

        Changes the :attr:`tensors` in place, and stores there the relative effective sample size.
        Returns the norm of the gradient before clipping.
        """
        values, first, second, state, rates = tensors
        norm: Tensor = gradient.norm().to(state.dtype)
        is_finite = value.isfinite() & norm.isfinite()
        is_taken = is_finite.to(state.dtype)
        clip = torch.where(is_finite, (largest_norm / (norm + 1e-6)).clamp(max=1), 0)
        # In one tensor, since compiled code would else compute them for each parameter again.
        common = torch.stack([clip, *adam_coefficients(state[1] + 1, rate, is_taken)])
        clip, *numbers = common.to(values.dtype).unbind()
        gradient = torch.where(is_finite, gradient, 0) * clip
        m, v, change = adam_update(first, second, gradient, numbers)
        values.copy_(values - rates * change)
        first.copy_(m)
        second.copy_(v)
        state.copy_(torch.stack([ess.to(state.dtype), state[1] + is_taken]))
        return norm

    def in_shape(self, flat: Tensor) -> list[Tensor]:
        """The parts of a flat tensor in the shapes of the parameters."""
        parts = flat.split_with_sizes(self.sizes)
        return [part.view(shape) for part, shape in zip(parts, self.shapes, strict=True)]
