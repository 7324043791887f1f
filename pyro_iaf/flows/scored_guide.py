"""What training asks of a guide, so that it need not know its class."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol, runtime_checkable

from torch import Tensor, nn

from ..nn.made import MaskedAutoregressiveNetwork

__all__ = [
    "ScoredDraws",
    "ScoredGuide",
    "context_tables_of",
    "goes_through_draws",
    "networks_of",
    "row_gradients",
]


class ScoredDraws(NamedTuple):
    """Draws of a guide over one vector of latents, and what the gradient of a step is made of.

    Attributes:
        value: The draws in unconstrained space, of shape ``(num, D)``, with their graph: the
            latents of the model one after the other, in its order.
        log_prob: The guide's log density there, of shape ``(num,)``.
        score: The gradient of that density in the value, of shape ``(num, D)``. Graphs of
            density and score are not used.
    """

    value: Tensor
    log_prob: Tensor
    score: Tensor


@runtime_checkable
class ScoredGuide(Protocol):
    """A guide that scores its own draws; whoever has these methods qualifies.

    :func:`~pyro_iaf.fit` then takes gradients through the draws alone, with the score held still,
    and runs the model alone. A guide without ``sample_with_score`` that has the other two, as one
    that draws group by group, gets the same gradient from :class:`~pyro_iaf.TraceSTL_ELBO`. A
    subclass that draws in another way than its parent overrides ``sample_with_score`` too.

    Four things more are used where a guide has them: ``setup(*args, **kwargs)``, which builds it
    for a model with these arguments; ``log_joint(model, trace, args, kwargs)``, called like
    :class:`~pyro_iaf.models.log_joint.LogJoint`, for latents that count in another way than there;
    ``widen_tails(by)``, which makes all tails heavier and returns a function that undoes it; and
    ``amortized``, whether an encoder tells the guide one data set from another.
    """

    def sample_with_score(self, num: int, *args: Any, **kwargs: Any) -> ScoredDraws:
        """So many draws for a model with these arguments, as :class:`ScoredDraws` has them."""

    def context_tables(self) -> Sequence[nn.Parameter]:
        """Parameters of shape ``(N, C)``, of whose rows a step uses few.

        While the guide's attribute ``rows_alone`` is true, their gradients are to be sparse.
        """

    def networks(self) -> Sequence[nn.Module]:
        """The networks, whose weights count little each and so may move by more."""


def goes_through_draws(guide: Any) -> bool:
    """Whether a guide has flows of which gradients through the draws alone have the less noise."""
    methods = ("networks", "context_tables")  # both, as other modules have networks too
    return all(callable(getattr(guide, method, None)) for method in methods)


def _parts_of(guide: Any) -> list[Any]:
    """A guide and all that it is made of."""
    owner = getattr(guide, "__self__", guide)  # of a guide that is a method
    return list(owner.modules()) if isinstance(owner, nn.Module) else [owner]


def context_tables_of(guide: Any) -> list[nn.Parameter]:
    """The tables of contexts that a guide, or a part of it, learns."""
    parts = filter(goes_through_draws, _parts_of(guide))
    return [table for part in parts for table in part.context_tables()]


def networks_of(guide: Any) -> list[nn.Module]:
    """The networks of a guide and its parts, and those of flows of ours in a guide by hand."""
    parts = _parts_of(guide)
    own = [net for part in filter(goes_through_draws, parts) for net in part.networks()]
    return [*own, *(part for part in parts if isinstance(part, MaskedAutoregressiveNetwork))]


@contextmanager
def row_gradients(guide: Any) -> Iterator[None]:
    """Within it, gradients of tables have the rows drawn alone."""
    parts = list(filter(goes_through_draws, _parts_of(guide)))
    before = [getattr(part, "rows_alone", False) for part in parts]
    for part in parts:
        part.rows_alone = True
    try:
        yield
    finally:
        for part, was in zip(parts, before, strict=True):
            part.rows_alone = was
