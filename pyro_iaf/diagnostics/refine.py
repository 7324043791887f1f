"""Draws of the posterior itself, by Markov chains that start from a guide."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any, NamedTuple

import pyro
import torch
from torch import Tensor

from .._progress import progress_bar
from .._validation import check_size
from ..guides.climbs import are_joined
from ..importance import resampled
from ..models.arguments import check_call, check_pair
from ..models.particles import threads_for
from ..models.traces import handler_lock, latent_sites, quietly
from ..models.weighted import WeightedParticles
from ..models.whole import particles_on_all
from .chains import Chains
from .convergence import ess, rhat
from .diagnose import SMALL_SHARE
from .modes import Mode, search_modes
from .noise import NoiseCoordinates

__all__ = ["Refined", "refine"]

# How many chains there are, and from how many draws of the guide their starts are chosen.
NUM_CHAINS, NUM_DRAWS = 64, 2000

# Steps of the warm-up, and those after which the scales of momenta are found anew. It goes on up to
# the second number, while fewer trajectories are accepted in the last of them.
WARM_UP, LONGEST_WARM_UP, RESCALED = 60, 300, (10, 20, 40)
FEWEST_ACCEPTED, LAST = 0.6, 20

# Convergence is checked after so many steps, each time after a half more, and at last after these.
FEWEST, MOST = 100, 1600

# The most numbers that are kept, except for samples that are wanted.
MOST_NUMBERS = 2**27

# Every quantity should be below the first and above the second, which are usual.
MAX_RHAT, MIN_ESS = 1.01, 400

# About so many gradients are evaluated, as far as one can say before.
NUM_GRADIENTS = 1000

# A draw is at a mode if the density is as high at so many points between them; so many draws are
# looked at.
NUM_BETWEEN, NUM_JOINED = 9, 200


@dataclass
class Refined:
    """Draws of the posterior by :func:`refine`; ``print(refined)`` says how far to trust them.

    Attributes:
        samples: For each site draws of shape ``(num_samples,) + shape``.
        rhat: For each site the largest rank-normalised split R-hat of its numbers.
        ess: For each site the smallest effective sample size, of bulk or tails, of all draws.
        converged: Whether R-hat is below 1.01 and the effective sample size above 400 everywhere,
            and the chains have visited all modes that a search found; ``searched`` tells if
            there was one.
        stopped: Why the chains stopped, in words.
        seconds: The duration.
        chains: For each site all draws, of shape ``(chains, draws) + shape``.
        accepted: The share of trajectories that were accepted.
        jumped: The share of independent draws of the guide that were.
        num_gradients: How many gradients of the model each chain took.
        num_lost: The number of proposals at which the density was not finite, all rejected.
        modes: Modes that the guide misses and no chain has visited, the largest share first.
        searched: How modes were searched, in words.
        backend: What evaluated the gradients: ``"inductor"``, ``"graph"`` or ``"eager"``.
        guide: The guide.
        log_weights: None, since all draws count the same.

    Example:
        >>> chains = {"z": torch.randn(4, 500)}
        >>> refined = Refined({"z": chains["z"].flatten()}, {"z": 1.001}, {"z": 1900.0}, True,
        ...     "all quantities have converged", 1.5, chains)
        >>> print(refined)
        Converged: R-hat at most 1.001 ('z'), effective sample size at least 1900 ('z'); 1.5 s
    """

    samples: dict[str, Tensor] = field(repr=False)
    rhat: dict[str, float]
    ess: dict[str, float]
    converged: bool
    stopped: str
    seconds: float
    chains: dict[str, Tensor] = field(repr=False)
    accepted: float = math.nan
    jumped: float = math.nan
    num_gradients: int = 0
    num_lost: int = 0
    modes: Sequence[Mode] = ()
    searched: str = ""
    backend: str = "eager"
    guide: Any = field(default=None, repr=False)
    log_weights: None = None

    @property
    def share_missed(self) -> float:
        """The share of the posterior's mass in modes that no chain has visited."""
        return sum(mode.share for mode in self.modes)

    def __str__(self) -> str:
        worst = max(self.rhat, key=lambda name: _or(self.rhat[name], math.inf))
        fewest = min(self.ess, key=lambda name: _or(self.ess[name], 0.0))
        lines = [
            f"{'Converged' if self.converged else 'Not converged'}: R-hat at most "
            f"{self.rhat[worst]:.3f} ('{worst}'), effective sample size at least "
            f"{self.ess[fewest]:.0f} ('{fewest}'); {self.seconds:.1f} s"
        ]
        if not self.converged:
            lines.append(f"  stopped as {self.stopped}")
        if self.share_missed > SMALL_SHARE:
            lines.append(
                f"  about {self.share_missed:.0%} of the mass is in modes that the chains did not "
                "reach; fit(model, guide) without num_steps adds components there"
            )
            lines += [f"  {mode}" for mode in self.modes[:3]]
        elif self.chains and not self.converged and len(self.chains[worst][0]) >= FEWEST:
            lines.append(
                "  the nearer the guide, the faster the chains: train it longer, as by "
                "fit(model, guide), and refine again"
            )
        if self.searched:
            lines.append(f"  {self.searched}")
        if self.num_lost:
            lines.append(f"  {self.num_lost} proposals without a finite density were rejected")
        return "\n".join(lines)


def _or(value: float, if_nan: float) -> float:
    return if_nan if math.isnan(value) else value


def refine(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    num_samples: int = 1000,
    seed: int | None = None,
    progress: bool = True,
) -> Refined:
    r"""Draws of the posterior itself, where a guide is only near it.

    64 Markov chains start at draws of the guide, chosen by their importance weights. They move in
    the guide's noise :math:`x`, where the posterior is nearly a standard normal,

    .. math::
        \log \pi(x) = \log p(T(x)) + \log |\det T'(x)|,

    by Hamiltonian Monte Carlo, all at once, with step size and lengths of trajectories found from
    all chains (ChEES). After each trajectory an independent draw of the guide is proposed, by which
    chains go between the components of a guide, in their shares of the posterior. It ends when
    R-hat is below 1.01 and the effective sample size above 400 for every number of every site, or
    after 1,600 steps. Ctrl-C ends it too, with the draws until then.

    Chains hardly find a mode that the guide misses. So modes are searched as in
    :func:`~pyro_iaf.diagnose`, and nothing has converged while one that holds more than 5 % is not
    visited.

    Costs some thousand gradients of the model for 64 particles, recorded or compiled where that is
    worth it. Threads take turns, as in :func:`~pyro_iaf.diagnose`.

    Args:
        model: A Pyro model, which does not subsample.
        guide: A guide that carries normal noise to all latents: one of ours, one of Pyro's with a
            normal or a flow, or your own. It should be trained: the nearer, the faster.
        args: Positional arguments of both.
        kwargs: Keyword arguments of both.
        num_samples: The number of draws to return.
        seed: A seed for all random numbers; None goes on with those of PyTorch.
        progress: Whether to show a progress bar.

    Raises:
        ValueError: As :func:`~pyro_iaf.diagnose`; if the model subsamples, or the guide is a point
            or not made of normal noise.
        TypeError: If the model does not take these arguments.
        RuntimeError: If the model has no finite density at any draw of the guide. Errors of the
            model itself at its first run are raised as they are.

    References:
        Hoffman et al. (2019), NeuTra-lizing bad geometry, https://arxiv.org/abs/1903.03704;
        Hoffman, Radul and Sountsov (2021), https://proceedings.mlr.press/v130/hoffman21a.html;
        Gabrié, Rotskoff and Vanden-Eijnden (2022), https://arxiv.org/abs/2105.12603

    Example:
        >>> def model():
        ...     z = pyro.sample("z", dist.StudentT(3.0, 0.0, 1.0))
        ...     pyro.sample("y", dist.Normal(z, 1.0), obs=torch.tensor(4.0))
        >>> guide = AutoIAF(model)
        >>> refined = refine(model, guide, seed=0, progress=False)
        >>> refined.converged, refined.samples["z"].shape
        (True, torch.Size([1000]))
    """
    check_size("num_samples", num_samples)
    check_pair("refine", model, guide)
    args, kwargs = check_call(args, kwargs, model)
    began = time.perf_counter()
    with handler_lock:
        _set_seed(seed)
        particles = particles_on_all(model, guide, args, kwargs)
        _check(particles)
        _set_seed(seed)  # the guide may be built by now, or was before
        with quietly(), torch.no_grad(), threads_for(NUM_CHAINS * particles.num_numbers):
            run = _Run(particles, num_samples)
            return run.to_the_end(began, progress)


def _set_seed(seed: int | None) -> None:
    if seed is not None:
        pyro.set_rng_seed(seed)


def _check(particles: WeightedParticles) -> None:
    if particles.subsampled:
        raise ValueError(
            "Markov chains need the density of all data, and this model subsamples them, so each "
            "step would have another posterior. Run it on all its rows, with subsample_size=None."
        )
    first = latent_sites(particles.first_guide)
    again = latent_sites(particles.run_guide(None))
    if all(torch.equal(site["value"], again[name]["value"]) for name, site in first.items()):
        raise ValueError(
            "Chains start from draws of a guide, and this one is a point. Take a guide with a "
            "spread, as AutoIAF(model)."
        )


class _Drawn(NamedTuple):
    """The draws of all chains, and how far they agree, by site.

    Attributes:
        chains: Of shape ``(chains, draws) + shape``.
        num_steps: The number of draws of each chain.
        rhat: The largest R-hat of a site's numbers.
        ess: The smallest effective sample size.
    """

    chains: dict[str, Tensor]
    num_steps: int
    rhat: dict[str, float]
    ess: dict[str, float]

    @classmethod
    def of(cls, target: NoiseCoordinates, latents: Sequence[Tensor]) -> _Drawn:
        """Those with these latents in unconstrained space, one tensor for each step."""
        z = torch.stack([*latents], 1)
        sites = target.sites(z.flatten(0, 1))
        chains = {name: draws.unflatten(0, z.shape[:2]) for name, draws in sites.items()}
        some = {name: draws for name, draws in chains.items() if draws.numel()}
        rhats = {name: rhat(draws).max().item() for name, draws in some.items()}
        sizes = {name: ess(draws).min().item() for name, draws in some.items()}
        return cls(chains, len(latents), rhats, sizes)

    @property
    def largest_rhat(self) -> float:
        return max(_or(value, math.inf) for value in self.rhat.values())

    @property
    def smallest_ess(self) -> float:
        return min(_or(value, 0.0) for value in self.ess.values())

    @property
    def has_converged(self) -> bool:
        return self.largest_rhat < MAX_RHAT and self.smallest_ess > MIN_ESS


class _Run:
    """The chains of one call, and what they have drawn."""

    def __init__(self, particles: WeightedParticles, num_samples: int) -> None:
        self.particles, self.num_samples = particles, num_samples
        self.target = NoiseCoordinates(particles)
        self.latents: list[Tensor] = []
        self.drawn: _Drawn | None = None
        self.accepted = self.jumped = 0.0
        self.num_lost, self.num_gradients = 0, 0
        self.modes: Sequence[Mode] = ()
        self.searched = ""
        self.shortest = max(FEWEST, -(-num_samples // NUM_CHAINS))
        self.most = max(self.shortest, min(MOST, MOST_NUMBERS // (NUM_CHAINS * self.target.dim)))

    def to_the_end(self, began: float, progress: bool) -> Refined:
        stopped = "it was interrupted"
        try:
            with progress_bar(self.most, 0, progress) as self.bar:
                chains = self._warm_up()
                stopped = self._sample(chains)
        except KeyboardInterrupt:
            if not self.latents:
                raise
        return self._result(stopped, time.perf_counter() - began)

    def _warm_up(self) -> Chains:
        """Chains at draws of the guide, which have found the sizes of their steps."""
        noise, component = self.target.draw(NUM_DRAWS)
        log_weights = self.target.log_weights(noise, component)
        if not log_weights.max().isfinite():
            raise RuntimeError(
                f"The model has no finite density at any of {NUM_DRAWS} draws of the guide, so "
                "there is nowhere to start. Train the guide first: fit(model, guide)."
            )
        rows = resampled(log_weights, NUM_CHAINS)
        start = noise[rows], component[rows]
        self.target.record(*start)
        self.target.compile(NUM_GRADIENTS)
        chains = Chains(self.target, self.target.at(*start))
        self._search()
        accepted: list[float] = []
        while len(accepted) < WARM_UP or (
            len(accepted) < LONGEST_WARM_UP and fmean(accepted[-LAST:]) < FEWEST_ACCEPTED
        ):
            step = chains.step(adapt=True)
            accepted.append(step.accepted)
            if len(accepted) in RESCALED:
                chains.rescale()
        return chains

    def _search(self) -> None:
        """Looks for modes that chains from the guide don't reach."""
        draws = self.particles.weighted(NUM_DRAWS)
        found = search_modes(self.particles, draws, NUM_DRAWS / 4)
        self.modes, self.searched = found.modes, found.summary

    def _sample(self, chains: Chains) -> str:
        """Takes steps until all has converged; says why it stopped."""
        num_next = self.shortest
        while True:
            for _ in range(num_next - len(self.latents)):
                step = chains.step(adapt=False)
                self.latents.append(step.latent)
                self.accepted += step.accepted
                self.jumped += step.jumped
                self.num_lost += step.lost
                self.num_gradients = chains.num_gradients
                self.bar.update(1)
            drawn = self.drawn = _Drawn.of(self.target, self.latents)
            shown = {"R-hat": f"{drawn.largest_rhat:.3f}", "ESS": f"{drawn.smallest_ess:.0f}"}
            self.bar.set_postfix(shown)
            if drawn.has_converged:
                return "all quantities have converged"
            if len(self.latents) >= self.most:
                return f"{len(self.latents)} steps of each chain were taken"
            self.target.compile(self.num_gradients)  # as many again may be to come
            num_next = min(self.most, len(self.latents) * 3 // 2)

    def _is_visited(self, mode: Mode) -> bool:
        """Whether about as many draws as should be are joined with a mode, without a valley."""
        joint, z = self.target.joint, torch.cat(self.latents)
        some = z[torch.linspace(0, len(z) - 1, NUM_JOINED).round().long().to(z.device)]
        sites = {name: value.unsqueeze(0) for name, value in mode.sites.items()}
        peak = joint.unconstrained(sites)
        return are_joined(joint, some, peak, NUM_BETWEEN).to(z).mean().item() > mode.share / 2

    def _result(self, stopped: str, seconds: float) -> Refined:
        num_steps, drawn = len(self.latents), self.drawn
        if drawn is None or drawn.num_steps < num_steps:  # it was interrupted between checks
            drawn = _Drawn.of(self.target, self.latents)
        chains = drawn.chains
        by_draw = {name: draws.transpose(0, 1).flatten(0, 1) for name, draws in chains.items()}
        total = NUM_CHAINS * num_steps
        rows = torch.randperm(total, device=self.target.like.device)[: self.num_samples]
        refined = Refined(
            samples={name: draws[rows] for name, draws in by_draw.items()},
            rhat=drawn.rhat,
            ess=drawn.ess,
            converged=num_steps >= FEWEST and drawn.has_converged,
            stopped=stopped,
            seconds=seconds,
            chains=chains,
            accepted=self.accepted / num_steps,
            jumped=self.jumped / num_steps,
            num_gradients=self.num_gradients,
            num_lost=self.num_lost,
            modes=[mode for mode in self.modes if not self._is_visited(mode)],
            searched=self.searched,
            backend=self.target.backend,
            guide=self.particles.guide,
        )
        if refined.converged and refined.share_missed > SMALL_SHARE:
            refined.converged, refined.stopped = False, "the chains miss modes"
        return refined
