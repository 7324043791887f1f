"""The methods of a guide that training uses, whatever the guide's class."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol, runtime_checkable

from torch import Tensor, nn

from ..nn.made import MaskedAutoregressiveNetwork

__all__ = [
    "ScoredDraws",
    "ScoredGuide",
    "WeightedDraws",
    "context_tables_of",
    "goes_through_draws",
    "networks_of",
    "row_gradients",
]


class ScoredDraws(NamedTuple):
    """Draws of a guide over one vector of latents, with their log densities and scores.

    Attributes:
        value: The draws in unconstrained space, of shape ``(num, D)``, with their graph: the
            model's latents, concatenated in the model's order.
        log_prob: The guide's log density there, of shape ``(num,)``. Its graph is not used.
        score: The gradient of that density in the value, of shape ``(num, D)``. Its graph is not
            used.
    """

    value: Tensor
    log_prob: Tensor
    score: Tensor


class WeightedDraws(ScoredDraws):
    """Draws that count differently in a mean over the guide, as draws of each component do.

    Attributes:
        weights: Their weights, of shape ``(num,)``, which add up to one, with their graph.
    """

    weights: Tensor

    def __new__(
        cls, value: Tensor, log_prob: Tensor, score: Tensor, weights: Tensor
    ) -> WeightedDraws:
        self = super().__new__(cls, value, log_prob, score)
        self.weights = weights
        return self


@runtime_checkable
class ScoredGuide(Protocol):
    """A guide that scores its own draws: any object with these methods.

    :func:`~pyro_iaf.fit` then takes gradients through the draws alone, with the score held
    constant, and traces the model only. A guide that has the other two methods and not
    ``sample_with_score``, such as one that draws group by group, gets the same gradient from
    :class:`~pyro_iaf.TraceSTL_ELBO`. A subclass that draws in another way than its parent also
    overrides ``sample_with_score``.

    Four optional attributes are used where a guide has them:

    - ``setup(*args, **kwargs)`` builds the guide for a model with these arguments;
    - ``log_joint(model, trace, args, kwargs)`` replaces
      :class:`~pyro_iaf.models.log_joint.LogJoint`;
    - ``widen_tails(by)`` makes all tails heavier and returns a function that undoes it; such a
      guide has ``get_posterior(*args, **kwargs)`` too, as guides of Pyro do;
    - ``amortized`` says whether the guide has an encoder that reads the data.
    """

    def sample_with_score(self, num: int, *args: Any, **kwargs: Any) -> ScoredDraws:
        """``num`` draws for a model with these arguments."""

    def context_tables(self) -> Sequence[nn.Parameter]:
        """Parameters of shape ``(N, C)``; one step uses few of their rows.

        While the guide's attribute ``rows_alone`` is true, their gradients should be sparse.
        """

    def networks(self) -> Sequence[nn.Module]:
        """The networks, whose weights may take larger steps than other parameters."""


def goes_through_draws(guide: Any) -> bool:
    """Whether a guide has flows, for which gradients through the draws alone have less noise."""
    methods = ("networks", "context_tables")  # both, as other modules have networks too
    return all(callable(getattr(guide, method, None)) for method in methods)


def _modules_of(guide: Any) -> list[Any]:
    owner = getattr(guide, "__self__", guide)  # a guide may be a method
    return list(owner.modules()) if isinstance(owner, nn.Module) else [owner]


def context_tables_of(guide: Any) -> list[nn.Parameter]:
    """The context tables of a guide and of guides within it."""
    parts = filter(goes_through_draws, _modules_of(guide))
    return [table for part in parts for table in part.context_tables()]


def networks_of(guide: Any) -> list[nn.Module]:
    """The networks of a guide and of guides within it, and those of flows in a handwritten one."""
    parts = _modules_of(guide)
    own = [net for part in filter(goes_through_draws, parts) for net in part.networks()]
    return [*own, *(part for part in parts if isinstance(part, MaskedAutoregressiveNetwork))]


@contextmanager
def row_gradients(guide: Any) -> Iterator[None]:
    """Makes gradients of context tables sparse within the block."""
    parts = list(filter(goes_through_draws, _modules_of(guide)))
    before = [getattr(part, "rows_alone", False) for part in parts]
    for part in parts:
        part.rows_alone = True
    try:
        yield
    finally:
        for part, was in zip(parts, before, strict=True):
            part.rows_alone = was
