r"""Models whose discrete latents are summed out, exactly, as Pyro's ``TraceEnum_ELBO`` does it.

.. math::
    \log p(x, z) = \log \sum_k p(x, z, k)

The model runs once with all values of its discrete latents :math:`k` in dimensions of their own,
left of plates and particles. Pyro's tensor variable elimination sums them out, and what comes of it
is the density of a factor. So whoever runs the model sees its continuous latents alone.
"""

from __future__ import annotations

from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from .arguments import Args, Kwargs, Program
from .contraction import common_scale
from .discrete import Discrete, is_discrete
from .enumerated import Enumerated, InPlates
from .traces import is_latent

__all__ = ["SummedOut", "summed_out"]

# What PyTorch and Python say of code that needs to know a value, and finds a tensor of several.
ASKED = ("Boolean value of Tensor", "only one element tensors", "only integer tensors of a single")

# A model with sequential sites runs at most so many times.
MOST_RUNS = 1000


def summed_out(model: Program, guide: Any) -> Program:
    """The model without the discrete latents that its guide leaves out, if it is one of ours."""
    guide = poutine.unwrap(guide)
    if isinstance(model, SummedOut) or not hasattr(guide, "discrete"):
        return model
    if guide.discrete is None and guide.prototype_trace is not None:  # there is nothing to sum out
        return model
    return SummedOut(model, guide)


class SummedOut:
    """A model without its discrete latents, and with a factor for the data that depend on them.

    Continuous latents whose priors depend on them are sites without a density: theirs is in the
    factor.

    Args:
        model: A Pyro model.
        guide: A guide whose attribute ``discrete`` tells what to sum out. It may be set up later.
    """

    def __init__(self, model: Program, guide: Any) -> None:
        self.model, self.guide = model, guide
        self.__self__ = getattr(model, "__self__", model)  # a module's mode counts in recordings

    def __eq__(self, other: object) -> bool:
        same = isinstance(other, SummedOut) and self.model == other.model
        return same and self.guide is other.guide  # type: ignore[attr-defined]

    def __hash__(self) -> int:
        return hash(self.model)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        discrete = self.guide.discrete
        if discrete is None:
            return self.model(*args, **kwargs)
        if discrete.sequential:
            return self._one_after_the_other(discrete, args, kwargs)
        with Enumerated(discrete) as run:
            try:
                returned = self.model(*args, **kwargs)
            except IndexError as error:
                if "out of bounds for dimension" not in str(error):
                    raise
                raise ValueError(
                    "What depends on a discrete latent should be in its plate or in one within, "
                    "since it is summed out row by row: z[..., group] can't pick rows. "
                    "Write groups as rows of a matrix, and mask what is padded by "
                    f"poutine.mask(mask=...). {error}."
                ) from error
            except (RuntimeError, TypeError, ValueError) as error:
                if not any(words in str(error) for words in ASKED):
                    raise
                raise ValueError(
                    "A model that is summed over its discrete latents runs once at all of their "
                    f"values, so its code can't ask which one it is: {str(error).splitlines()[0]}. "
                    "Write torch.where(z > 0, a, b) in place of if z, and Vindex(x)[..., z] in "
                    'place of x[int(z)]; or mark the latent by infer={"enumerate": "sequential"}, '
                    "if it is in no plate."
                ) from error
        run.state_factors()
        return returned

    def _one_after_the_other(self, discrete: Discrete, args: Args, kwargs: Kwargs) -> Any:
        """Runs the model for each value of the discrete latents that its code may branch on."""
        waiting: list[dict[str, int]] = [{}]
        latents: dict[str, Any] = {}
        log_probs: list[Tensor] = []
        scales: list[Any] = []
        returned, num_numbers = None, 0
        while waiting:
            with _OneOfSeveral(discrete, waiting.pop(), latents, not log_probs) as run:
                found = self.model(*args, **kwargs)
            returned = returned if log_probs else found
            if run.missing:
                raise ValueError(
                    "A model should have the same continuous latents whatever its discrete ones "
                    f"are; {', '.join(map(repr, sorted(run.missing)))} is there for some values "
                    "alone. Draw it always, and use it where it is needed."
                )
            waiting += run.further
            log_probs.append(run.total())
            scales += [site["scale"] for site in run.sites]
            num_numbers += run.num_numbers
            if len(log_probs) + len(waiting) > MOST_RUNS:
                raise ValueError(
                    f"Discrete latents that are enumerated sequentially should take at most "
                    f"{MOST_RUNS} values together. Mark them with "
                    'infer={"enumerate": "parallel"}, and write torch.where for branches.'
                )
        log_prob = torch.stack(torch.broadcast_tensors(*log_probs)).logsumexp(0)
        with InPlates([], num_numbers):
            pyro.factor("_summed_out", common_scale(scales, run.hint) * log_prob)
        return returned


class _OneOfSeveral(Enumerated):
    """A run for one choice of the values of sequential sites, with all its densities hidden.

    Args:
        discrete: The model's discrete latents.
        choice: The numbers of the values of sequential sites; others take their first.
        latents: The values of what the first run draws.
        is_first: Whether this is the first run.

    Attributes:
        further: The choices that this run leaves to others.
        missing: Latents that this run or the first lacks.
    """

    def __init__(
        self, discrete: Discrete, choice: dict[str, int], latents: dict[str, Any], is_first: bool
    ) -> None:
        super().__init__(discrete)
        self.choice, self.latents, self.is_first = choice, latents, is_first
        self.further: list[dict[str, int]] = []
        self.met: set[str] = set()

    @property
    def missing(self) -> set[str]:
        return self.met ^ self.latents.keys()

    def total(self) -> Tensor:
        """The log density of this choice."""
        total = torch.zeros((1,) * self.discrete.nesting)
        for log_prob in self._by_plates(scaled=False).values():
            plates = range(-1, -self.discrete.nesting - 1, -1)
            total = total.to(log_prob) + (log_prob.sum([*plates], True) if plates else log_prob)
        return total

    def _pyro_sample(self, msg: Any) -> None:
        name = msg["name"]
        if site_is_subsample(msg):
            self._repeat(msg)
            return
        if name in self.discrete.sequential and is_discrete(msg):
            values = msg["fn"].enumerate_support(expand=False)
            if name not in self.choice:
                self.further += [{**self.choice, name: k} for k in range(1, len(values))]
                self.choice[name] = 0
            msg["value"], msg["is_observed"] = values[self.choice[name]], True
        super()._pyro_sample(msg)
        if is_latent(msg) and not msg.get("stop"):
            self._repeat(msg)

    def _repeat(self, msg: Any) -> None:
        self.met.add(msg["name"])
        if not self.is_first and msg["name"] in self.latents:
            msg["value"], msg["done"], msg["stop"] = self.latents[msg["name"]], True, True

    def _depends(self, msg: Any) -> bool:
        return True

    hint = " Where a latent is enumerated sequentially, all sites count as depending on it."

    def _pyro_post_sample(self, msg: Any) -> None:
        super()._pyro_post_sample(msg)
        if self.is_first and msg["name"] in self.met:
            self.latents[msg["name"]] = msg["value"]
