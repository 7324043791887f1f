"""How good a fitted guide is, in numbers and in words."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from .._validation import check_size
from ..importance import (
    MAX_KHAT,
    MAX_ROUNDING,
    MIN_LOG_WEIGHT,
    error_of_k,
    hardly_differ,
    pareto_k,
    rounding_message,
)
from ..models.arguments import check_call, check_pair
from ..models.traces import handler_lock
from ..models.weighted import Draws, WeightedParticles
from ..models.whole import particles_on_all
from .modes import Mode, search_modes

__all__ = ["Diagnosis", "conclude", "diagnose", "judge", "judged"]

# A guide is good up to this k-hat, this gap between ELBO and log evidence in nats, and this change
# by weighting: of a mean in standard deviations, of a log standard deviation.
GOOD_KHAT, SMALL_GAP, SMALL_CHANGE = 0.5, 0.1, 0.1

# The mass that a guide may miss in modes elsewhere, or that it may have at other values than the
# posterior, as a share.
SMALL_SHARE = 0.05

# By this factor the draws are multiplied where the standard error of k-hat leaves the verdict open.
# So many numbers in the sites of all draws are the most for that.
MORE, MOST_NUMBERS = 8, 2**24

# From this shape of a tail on, the mean is infinite. Draws far out that add a share of the variance
# cost half as many nats, so that below this gap they add nothing.
NO_MEAN, TINY_GAP = 1.0, 1e-3

# The guide is usable whatever k-hat says from this effective sample size on, as a share of the
# draws, where gap and changes are as small as those of a good guide.
MOST = 0.8

# A weight that is smaller than the mean by less, as a share of it, counts as equal to the mean.
SMALL_EXCESS = 1e-3

# A verdict needs this many finite weights.
MIN_DRAWS = 25


@dataclass
class Diagnosis:
    """How good a guide is; ``print(diagnosis)`` says it in words.

    Attributes:
        khat: Shape of the tail of the importance weights. Below 0.5 the weights are reliable. Up to
            0.7 the guide is usable with resampled draws; above, it should not be trusted, unless
            the weights hardly differ.
        elbo: The ELBO in nats.
        elbo_se: Its standard error.
        iw_elbo: The importance-weighted ELBO, the logarithm of the mean weight: a tighter lower
            bound on the log evidence.
        iw_elbo_se: Its standard error.
        ess: The effective sample size of the weighted draws.
        log_weights: The log importance weights of all draws, in double precision.
        sites: For each site the largest change of a mean by weighting, in standard deviations of
            the guide, and the largest factor by which a standard deviation changes.
        moved: For each site the largest share of the draws that weighting moves from one side of
            some value to the other: the largest change of a latent's distribution function.
        subsampled: Whether the model subsamples data. Then the weights depend on it too.
        is_point: Whether all draws are equal, so that the weights carry no information.
        spread_khat: Shape of the tail of what draws add to the guide's variances and weighting
            takes away. From 1 on the guide's tails are too heavy: a few draws far out, which are
            often not among those here, decide on its standard deviations.
        rounding: The error of a log-weight by floating-point rounding, in nats.
        improper: Latents with an unbounded flat prior that the model's density does not depend on.
        wavers: Whether the verdict would be another within the standard error of k-hat, although
            more draws were taken. Then it is the worse one.
        modes: Modes that the guide misses, the largest share of the mass first.
        searched: How modes were searched, or why not, in words; empty if nobody asked for it.
        peaks: Peaks that the guide's draws lead to and between which the density falls, the highest
            first: points in unconstrained space, of shape ``(J, D)``; None if there was no search.
        is_sure: Whether a search, where one was asked for, could tell of modes.

    Example:
        >>> def model():
        ...     pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        >>> diagnosis = diagnose(model, AutoIAF(model), num_samples=1000)
        >>> diagnosis.worst_sites
        ['z']
    """

    khat: float
    elbo: float
    elbo_se: float
    iw_elbo: float
    iw_elbo_se: float
    ess: float
    log_weights: Tensor = field(repr=False)
    sites: dict[str, tuple[float, float]]
    moved: Mapping[str, float] = field(default_factory=dict)
    subsampled: bool = False
    is_point: bool = False
    spread_khat: float = 0.0
    rounding: float = 0.0
    improper: Sequence[str] = ()
    wavers: bool = False
    modes: Sequence[Mode] = ()
    searched: str = ""
    peaks: Tensor | None = field(default=None, repr=False)
    is_sure: bool = True

    @property
    def share_missed(self) -> float:
        """The share of the posterior's mass in modes that the guide misses, as far as is known."""
        return sum(mode.share for mode in self.modes)

    @property
    def threshold(self) -> float:
        """The largest usable k-hat with ``S`` draws, ``min(1 - 1 / log10(S), 0.7)``."""
        return min(1 - 1 / math.log10(max(len(self.log_weights), 2)), MAX_KHAT)

    @property
    def worst_sites(self) -> list[str]:
        """The sites, sorted by how much weighting changes them; the largest change comes first."""

        def change(name: str) -> float:
            return max(_size_of_change(*self.sites[name]), 2 * self.moved.get(name, 0.0))

        return sorted(self.sites, key=change, reverse=True)

    @property
    def largest_change(self) -> float:
        """The largest change by weighting, of a mean in standard deviations or of a log one."""
        return max((_size_of_change(*change) for change in self.sites.values()), default=0.0)

    @property
    def share_moved(self) -> float:
        """The largest share of the draws that weighting moves to other values of a latent."""
        return max(self.moved.values(), default=0.0)

    @property
    def gap(self) -> float:
        """What the ELBO lacks to the log evidence, in nats, as far as the draws can tell."""
        return self.iw_elbo - self.elbo

    @property
    def hardly_differ(self) -> bool:
        """Whether all weights are so similar that the shape of their tail says nothing."""
        return hardly_differ(self.ess, self.gap, len(self.log_weights))

    @property
    def verdict(self) -> str:
        """``"good"``, ``"usable"``, ``"modes missing"``, ``"not to be trusted"``, or ``"none"``."""
        return self._verdict_at(self.khat + (self.khat_se if self.wavers else 0.0))

    @property
    def khat_se(self) -> float:
        """The standard error of k-hat."""
        return error_of_k(self.khat, len(self.log_weights))

    @property
    def is_decided(self) -> bool:
        """Whether the verdict is the same within the standard error of k-hat."""
        if not math.isfinite(self.khat):
            return True
        ends = self.khat - self.khat_se, self.khat + self.khat_se
        return len({self._verdict_at(khat) for khat in ends}) == 1

    def _verdict_at(self, khat: float) -> str:
        """The verdict if k-hat were this."""
        if self._no_verdict():
            return "none"
        if self.share_missed > SMALL_SHARE:
            return "modes missing"
        is_close = (
            self.gap < SMALL_GAP
            and self.largest_change < SMALL_CHANGE
            and self.share_moved < SMALL_SHARE
            and (self.spread_khat < NO_MEAN or self.gap < TINY_GAP)
            and bool(self.log_weights.isfinite().all())
        )
        is_tight = khat < min(GOOD_KHAT, self.threshold) or self.hardly_differ
        if is_close and is_tight and self.is_sure and not self._misses_a_small_mode:
            return "good"
        has_most = is_close and self.ess >= MOST * len(self.log_weights)
        is_usable = khat < self.threshold or self.hardly_differ or has_most
        return "usable" if is_usable else "not to be trusted"

    @property
    def _misses_a_small_mode(self) -> bool:
        """Whether modes that hold little change a mean or spread visibly."""
        return any(mode.moves(SMALL_CHANGE) for mode in self.modes)

    def __str__(self) -> str:
        error = f" +/- {self.khat_se:.2f}" if self.wavers else ""
        khat = f"k-hat {self.khat:.2f}{error} (below 0.5 good, below {self.threshold:.2f} usable)"
        if self.hardly_differ:
            khat = f"k-hat {self.khat:.2f}, of weights that hardly differ"
        lines = [
            self._in_words(),
            f"  {khat}",
            f"  effective sample size {self.ess:.0f} of {len(self.log_weights)} draws",
            f"  ELBO {self.elbo:.2f} +/- {self.elbo_se:.2f} nats, "
            f"importance-weighted {self.iw_elbo:.2f} +/- {self.iw_elbo_se:.2f}",
        ]
        lost = int((~self.log_weights.isfinite()).sum())
        if lost:
            lines.append(f"  {lost} draws where the model has no finite density")
        for name in self.worst_sites[:3]:
            shift, factor = self.sites[name]
            moved = self.moved.get(name, 0.0)
            more = f", and moves {moved:.0%} of the draws" if moved >= SMALL_SHARE else ""
            lines.append(
                f"  site '{name}': weighting moves a mean by {shift:.2f} sd, and multiplies a "
                f"standard deviation by {factor:.2f}{more}"
            )
        lines += [f"  {mode}" for mode in self.modes[:3]]
        if any(mode.is_relabelled for mode in self.modes):
            num_peaks = len(self.modes) + (0 if self.peaks is None else len(self.peaks))
            lines.append(
                f"  There are {num_peaks} modes at least, some of which differ by the order of "
                "entries. Order them in the model, as by "
                "pyro.distributions.transforms.OrderedTransform."
            )
        if self.searched:
            lines.append(f"  {self.searched}")
        if self.subsampled:
            lines.append(
                "  The model subsamples its data, so the weights also vary with the subsample. "
                "Diagnose the guide on all data to judge it alone."
            )
        return "\n".join(lines)

    def _in_words(self) -> str:
        verdict = self.verdict
        if verdict == "none":
            return f"No verdict: {self._no_verdict()}"
        if verdict == "modes missing":
            return (
                f"Modes missing: about {self.share_missed:.0%} of the posterior's mass is "
                "elsewhere. The draws describe the rest, and resampling can't repair that."
            )
        if verdict == "good":
            return "Good: the guide is close to the posterior."
        if verdict == "usable" and self._misses_a_small_mode:
            return (
                f"Usable: about {self.share_missed:.0%} of the posterior's mass is elsewhere. It "
                "changes a mean or spread, and resampling can't repair that."
            )
        if verdict == "usable" and replace(self, is_sure=True).verdict == "good":
            return (
                "Usable: the guide is close to the posterior around its draws. Whether there are "
                "other modes is not known."
            )
        if verdict == "usable":
            fault = "the guide misses a part of the posterior"
            if self.spread_khat >= NO_MEAN:
                fault = "the guide's tails are heavier than the posterior's"
            return f"Usable: {fault}. Use sample_posterior(..., resample=True)."
        return (
            "Not to be trusted: the guide misses too much of the posterior. refine(model, guide) "
            "draws from the posterior itself; or train longer, use more or wider flows, or "
            "reparameterise the model."
        )

    def _no_verdict(self) -> str:
        """Why there is no verdict; empty if there is one."""
        if self.is_point:
            return "the guide is a point, so its weights carry no information."
        if self.improper:
            names = ", ".join(f"'{name}'" for name in self.improper)
            return (
                f"the posterior is improper. The prior of {names} is flat, and the model's density "
                "does not depend on it. Give it a proper prior."
            )
        log_w = self.log_weights
        num_finite = int(log_w.isfinite().sum())
        if num_finite < MIN_DRAWS:
            return (
                f"{num_finite} of {len(log_w)} draws have a finite weight, and at least "
                f"{MIN_DRAWS} are needed."
            )
        if self.rounding > MAX_ROUNDING:
            return rounding_message(self.rounding)
        if math.isinf(self.khat) and int((log_w > log_w.max() + MIN_LOG_WEIGHT).sum()) >= MIN_DRAWS:
            return "too many weights are equal to fit a tail to them."
        return ""


@torch.no_grad()
def diagnose(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    data: Iterable[Any] | None = None,
    num_samples: int = 4000,
    search: bool = True,
) -> Diagnosis:
    """How close a guide is to the posterior, by importance sampling from the guide.

    Draws of the guide can't tell of a mode that none of them is near. So the log joint density is
    climbed from up to 132 points further apart, and each end that the guide misses is weighed. This
    finds no mode at which no climb ends, such as a narrow one far out. A guide that is a point gets
    no verdict.

    A model that subsamples rows by its plates is run on all of them, where it takes them from its
    data by the plate's indices and no latent belongs to a row.

    Costs ``num_samples`` runs of guide and model, vectorised if the model can be, and for the
    search a quarter as many gradients of the model, or some thousands of a small model. Where k-hat
    is within its standard error of another verdict, eight times as many draws decide, or the
    verdict is the worse one. Threads take turns: calls of this function and of :func:`fit` run one
    after the other.

    Args:
        model: A Pyro model.
        guide: A guide for it: one of ours, one of Pyro's, or your own.
        args: Positional arguments of both.
        kwargs: Keyword arguments of both.
        data: Minibatches, as for :func:`~pyro_iaf.fit`, instead of ``args``. The weights are on all
            of them together.
        num_samples: The number of draws.
        search: Whether to search for modes that the guide misses.

    Raises:
        ValueError: If ``num_samples`` is not positive, if ``search`` is not True or False, if model
            and guide are swapped or not callable, if the guide's sites or their shapes differ from
            the model's latents, or if minibatches don't add up to all data.
        TypeError: If the model does not take these arguments.
        RuntimeError: If the model raises an error at every draw.

    Warns:
        UserWarning: If the posterior is improper: a latent has a flat prior, and no density depends
            on it.

    References:
        Yao et al. (2018), Yes, but did it work?, https://arxiv.org/abs/1802.02538;
        Vehtari et al. (2024), https://arxiv.org/abs/1507.02646

    Example:
        >>> def model():
        ...     z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...     pyro.sample("y", dist.Normal(z, 1.0), obs=torch.tensor(1.0))
        >>> guide = AutoIAF(model)  # starts at the posterior, because that is Gaussian
        >>> diagnosis = diagnose(model, guide)
        >>> diagnosis.khat < 0.7
        True
        >>> print(str(diagnosis).splitlines()[0])
        Good: the guide is close to the posterior.
    """
    check_size("num_samples", num_samples)
    if not isinstance(search, bool):
        raise ValueError(f"search should be True or False; got {search!r}.")
    check_pair("diagnose", model, guide)
    if data is not None and args:
        raise ValueError("Give args or data, not both: data holds the model's arguments.")
    args, kwargs = check_call(args, kwargs, model if data is None else None)
    with handler_lock:
        particles = particles_on_all(model, guide, args, kwargs, data)
        return conclude(particles, num_samples, num_samples / 4 if search else None)


@torch.no_grad()
def judge(particles: WeightedParticles, num_samples: int) -> Diagnosis:
    """The diagnosis of a guide by so many new draws."""
    return judged(particles, particles.weighted(num_samples))


def judged(particles: WeightedParticles, draws: Draws) -> Diagnosis:
    """The diagnosis of a guide by these draws."""
    log_w, S = draws.log_weights, len(draws.log_weights)
    largest = log_w.max()
    weights = (log_w - largest).exp() if largest.isfinite() else torch.zeros_like(log_w)
    total, squares = weights.sum(), weights.square().sum()
    ess = (total.square() / squares).item() if squares > 0 else 0.0
    nothing: _Changes = ({}, {}, log_w.exp())
    changes, moved, excess = _changes(draws.weights, draws.sites) if total > 0 else nothing
    return Diagnosis(
        khat=draws.khat,
        elbo=log_w.mean().item(),
        elbo_se=(log_w.std() / math.sqrt(S)).item() if S > 1 else math.nan,
        iw_elbo=(log_w.logsumexp(0) - math.log(S)).item(),
        iw_elbo_se=math.sqrt(max(1 / ess - 1 / S, 0.0)) if ess else math.nan,
        ess=ess,
        log_weights=log_w,
        sites=changes,
        moved=moved,
        subsampled=particles.subsampled,
        is_point=S > 1 and all(bool((d == d[:1]).all()) for d in draws.sites.values()),
        spread_khat=pareto_k(excess.log()) if (excess > 0).sum() >= MIN_DRAWS else 0.0,
        rounding=draws.rounding,
        improper=particles.improper,
    )


@torch.no_grad()
def conclude(
    particles: WeightedParticles, num_samples: int, num_evaluations: float | None = None
) -> Diagnosis:
    """The diagnosis to show: of more draws where the verdict wavers, and with a search for modes.

    Args:
        particles: The model and its guide.
        num_samples: The number of draws.
        num_evaluations: About how many evaluations of the model's gradient a search for modes may
            take; None for no search.
    """
    draws = particles.weighted(num_samples)
    found = judged(particles, draws)
    if num_evaluations is not None and not (found.is_point or found.improper):
        search = search_modes(particles, draws, num_evaluations)
        found.modes, found.searched, found.peaks, found.is_sure = search
    is_small = MORE * num_samples * particles.work <= MOST_NUMBERS
    can_be_more = is_small and particles.at_once and not particles.subsampled
    # Of weights that hardly differ, few draws show a longer tail than there is.
    has_odd_tail = found.hardly_differ and found.khat >= GOOD_KHAT and found.verdict != "none"
    if can_be_more and (has_odd_tail or not found.is_decided):
        more = judge(particles, MORE * num_samples)
        kept = {key: getattr(found, key) for key in ("modes", "searched", "peaks", "is_sure")}
        found = replace(more, **kept)
    found.wavers = not found.is_decided
    return found


_Changes = tuple[dict[str, tuple[float, float]], dict[str, float], Tensor]


def _changes(weights: Tensor, sites: Mapping[str, Tensor]) -> _Changes:
    """What weighting changes.

    For each site the largest shift of a mean and factor of a standard deviation; the largest change
    of a distribution function; and for each draw what it adds to a variance, in units of the
    weighted one, and weighting takes away.
    """
    changes, moved, largest = {}, {}, torch.zeros_like(weights)
    more = weights - 1 / len(weights)
    for name, draws in sites.items():
        if not draws.is_floating_point():
            continue
        flat = draws.double().reshape(len(draws), -1)
        mean, sd = flat.mean(0), flat.std(0, correction=min(1, len(flat) - 1))
        weighted_mean = weights @ flat
        squares = (flat - weighted_mean).square()
        weighted_sd = (weights @ squares).sqrt()
        constant = sd < 1e-12 * (1 + mean.abs())  # as entries of a Cholesky factor are
        shift = ((weighted_mean - mean).abs() / sd).where(~constant, 0).max().item()
        factors = (weighted_sd / sd).where(~constant, 1)
        furthest = factors[factors.clamp(min=1e-9).log().abs().argmax()].item()
        changes[name] = (shift, furthest)
        rises = more[flat.mT.argsort(-1)].cumsum(-1).abs().amax(-1)
        moved[name] = rises.where(~constant, 0).max().item()
        relative = (squares / weighted_sd.square()).where(~constant, 0).amax(-1)
        largest = largest.maximum(relative.nan_to_num(0.0, math.inf))
    excess = 1 - len(weights) * weights
    # Rounding is no excess.
    return changes, moved, largest * excess.where(excess > SMALL_EXCESS, 0)


def _size_of_change(shift: float, factor: float) -> float:
    return max(shift, abs(math.log(max(factor, 1e-9))))
