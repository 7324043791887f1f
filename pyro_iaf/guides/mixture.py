"""Guides over one vector of latents: one transform, or several as components.

A guide with several components has a weight for each. Its first component is ``transform``, also
where it is the only one; the others and the weights are in ``mixture``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..flows.mixture import SMALLEST_WEIGHT, MixedPosterior
from ..models import param_store
from ..models.log_joint import LogJoint
from .pathfinder import Start, start_near
from .structured_guide import StructuredGuide
from .structured_transform import elbo_of
from .transform import Transform, entries_below

__all__ = ["MOST_COMPONENTS", "Mixture", "MixtureGuide"]

# The most components that are added to a guide.
MOST_COMPONENTS = 8


class Mixture(nn.Module):
    """The components of a guide after its first, and the weights of all.

    Attributes:
        others: The transforms after the first.
        logits: The logarithms of the weights, up to a constant, of shape ``(K,)``.
    """

    def __init__(self, others: Sequence[nn.Module], logits: Tensor) -> None:
        super().__init__()
        self.others = nn.ModuleList(others)
        self.logits = nn.Parameter(logits)

    def append(self, transform: nn.Module, share: float) -> None:
        """Adds a component that takes this share, between 0 and 1, from the others."""
        share = min(max(share, SMALLEST_WEIGHT), 1 - SMALLEST_WEIGHT)
        before = self.logits.detach().log_softmax(0) + torch.log1p(self.logits.new_tensor(-share))
        log_share = self.logits.new_tensor([share]).log()
        self.others.append(transform)
        self.logits = nn.Parameter(torch.cat([before, log_share]))


class MixtureGuide(StructuredGuide):
    """A guide over one vector, with one component or several.

    Attributes:
        num_components: The number that it is made with, or ``"auto"``.
    """

    num_components: int | str
    transform: Any
    mixture: Any

    def _num_at_first(self) -> int:
        """The number of components of a fresh guide, which "auto" may find in the store."""
        if not isinstance(self.num_components, str):
            return self.num_components
        logits = param_store.from_file(f"{self._pyro_name}.mixture$$$logits")
        return 1 if logits is None else len(logits)

    def _further_words(self) -> list[str]:
        return [f"num_components={self._num_built}"] if self._num_built > 1 else []

    @property
    def _num_built(self) -> int:
        """The number of components."""
        return 1 if self._mixture is None else len(self._mixture.logits)

    @property
    def component_weights(self) -> Tensor:
        """The weights of the components, of shape ``(K,)``; they add up to one."""
        if self._mixture is None:
            return self._built().origin.new_ones(1)
        return self._mixture.logits.detach().softmax(0)

    @property
    def can_grow(self) -> bool:
        """Whether :func:`~pyro_iaf.fit` may add components."""
        is_free = self.num_components == "auto" and self._encoder is None
        return is_free and self._num_built < MOST_COMPONENTS

    def add_component(self, joint: LogJoint, point: Tensor, share: float) -> None:
        """Adds a component near a point in unconstrained space, with a share of the draws.

        Args:
            joint: The model's log density.
            point: Where Pathfinder begins, of shape ``(D,)``.
            share: The weight of the component, between 0 and 1.
        """
        start = start_near(joint, point, self._is_dense(len(point)))
        if start is None:
            start = Start(point, torch.full_like(point, self._init_scale))
        transform: Any = self._structured_near(joint, point)
        if transform is not None:
            least = elbo_of(joint, start.posterior())[0]
            if elbo_of(joint, transform.posterior())[0] < least:
                transform = None
        if transform is None:
            transform = self._fresh_transform(start, 0.0)
        if self._mixture is None:
            self.mixture = Mixture([], point.new_zeros(1))
        assert self._mixture is not None
        self._mixture.append(transform, share)

    @torch.no_grad()
    def without_component(self, peaks: Tensor) -> list[Tensor]:
        """Those of some peaks, of shape ``(J, D)``, that share a component with an earlier one."""
        if self._mixture is None:
            return list(peaks[1:])
        nearest = self._mixed().log_probs(peaks).argmax(-1).tolist()
        return [peak for j, peak in enumerate(peaks) if nearest[j] in nearest[:j]]

    @torch.no_grad()
    def fit_weights(self, joint: LogJoint) -> None:
        """Sets the components' weights to their shares of the posterior, by importance sampling."""
        if self._mixture is not None:
            self._mixture.logits.copy_(self._mixed().fitted_logits(joint))

    def _mixed(self) -> MixedPosterior:
        """The distribution of a guide with several components."""
        assert self._mixture is not None
        return MixedPosterior([t.posterior() for t in self._transforms()], self._mixture.logits)

    def _transforms(self) -> list[Any]:
        """Those of all components; none before the setup."""
        first, mixture = self._transform, self._mixture
        found: list[Any] = [] if first is None else [first]
        found += [] if mixture is None else mixture.others
        return found

    def _built(self, *args: Any, **kwargs: Any) -> Transform:
        """The first transform; builds the guide first if necessary."""
        if not self._transforms():
            self._setup_on_demand(*args, **kwargs)
        return self._transforms()[0]  # type: ignore[no-any-return]

    @property
    def _transform(self) -> Transform | None:
        """The first transform, read without ``pyro.param`` statements for all its parameters."""
        return self._modules.get("transform")  # type: ignore[return-value]

    @property
    def _mixture(self) -> Mixture | None:
        """The further components and the weights, read likewise."""
        return self._modules.get("mixture")  # type: ignore[return-value]

    def _adopt_parameters(self) -> dict[str, Tensor]:
        stored = param_store.from_file(f"{self._pyro_name}.mixture$$$logits")
        is_other = stored is not None and len(stored) != self._num_built
        if is_other and self._is_set_up and not self._state_was_loaded:
            raise ValueError(
                f"The parameter store has entries of a guide named '{self._pyro_name}' with "
                f"{len(stored)} components; this one has {self._num_built}. Clear it with "  # type: ignore[arg-type]
                "pyro.clear_param_store(), or make a new guide, whose number they tell."
            )
        return super()._adopt_parameters()

    def _take_components(
        self, state_dict: dict[str, Any], prefix: str, error_messages: list[str]
    ) -> None:
        """Builds as many components as a state has."""
        if not entries_below(state_dict, f"{prefix}transform."):
            return
        logits = state_dict.get(f"{prefix}mixture.logits")
        num = 1 if logits is None else len(logits)
        if self.num_components not in ("auto", num):
            error_messages.append(
                f"The state is of a guide with {num} components; this one has "
                f"num_components={self.num_components}."
            )
        elif self._transform is not None and num != self._num_built:
            param_store.forget(f"{self._pyro_name}.mixture", {})
            names = [f"mixture.others.{k}" for k in range(num - 1)]
            others = [self._rebuilt(state_dict, prefix, name) for name in names]
            if logits is None or None in others:
                self.mixture = None
            else:
                self.mixture = Mixture(others, logits.clone()).to(self._transform.origin)  # type: ignore[arg-type]
