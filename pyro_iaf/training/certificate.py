r"""When a guide is good enough to stop training it, decided from fresh draws.

With log weights :math:`\log w = \log p(x, z) - \log q(z)` of draws :math:`z \sim q`, more training
can raise the ELBO by

.. math::
    \log \mathbb{E}[w] - \mathbb{E}[\log w] = \mathrm{KL}(q \,\|\, p(\cdot \mid x)),

and moves means and standard deviations to where weighting moves them, as far as the draws can tell.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..diagnostics.diagnose import GOOD_KHAT, SMALL_GAP, Diagnosis, conclude, judge
from ..diagnostics.modes import Mode
from ..importance import MAX_KHAT
from ..models.arguments import Args, Kwargs, Program
from ..models.weighted import WeightedParticles
from .averages import Averages
from .schedule import Schedule

__all__ = ["Certificate", "can_judge", "missing_modes", "particles_or_none", "shared_peaks"]

# Training ends where weighting moves means by less, in standard deviations, and standard deviations
# by less, in their logarithms; and moves less of the draws from one side of a value to the other.
UNSEEN_CHANGE, UNSEEN_SHARE = 0.05, 0.03

# The ELBO is known where its standard error is below so many nats, or such a share of the gap.
KNOWN_TO, KNOWN_TO_SHARE = 0.05, 0.25

# From this look on the ELBO may have settled, and weights that hardly differ are enough: before it,
# more steps still change the tails. From the other one on the posterior may be out of reach.
FEWEST_LOOKS, FEWEST_LOOKS_AT_PACE = 4, 5

# Draws of the verdict, and of a look for each step that was taken: if they run at once, or not.
NUM_DRAWS, DRAWS_A_STEP, DRAWS_A_STEP_ALONE = 4000, 10, 2

# Before its first step a guide is looked at as after so many.
STEPS_AHEAD = 100

# There are fewer where the sites of all draws would hold more numbers, but at least so many.
MOST_NUMBERS, FEWEST_DRAWS = 2**25, 500

# A guide whose ELBO lacks at most so many nats is kept, and comes back where training loses so much
# of it that a good guide would not be good any more, and more than so many standard errors.
NEAR, NUM_ERRORS = 0.5, 3.0

# The search for modes takes this share of the evaluations of the model that training took, or fewer
# where each takes long.
SHARE_OF_SEARCH, FEWEST_EVALUATIONS = 0.2, 300

# At this look a guide that can grow is searched before it is certified: to train one component to
# cover two modes takes long.
EARLY_LOOK = 2

# A mode gets a component if it holds more of the mass than this, and a peak that shares one if the
# ELBO lacks more than this, in nats.
SMALLEST_SHARE, LARGEST_GAP = 0.02, 0.05

# Why to stop where a look finds that weighting changes nothing: if the last draws say so too, or if
# they still find a tail.
UNCHANGED = "more of them would change nothing"
UNMOVED = "more of them would move no mean or spread that you see"

# Draws that show whether a guide can be judged: if they run at once, or not.
NUM_TRIED, NUM_TRIED_ALONE = 64, 4


def particles_or_none(
    model: Program, guide: Program, args: Args, kwargs: Kwargs
) -> WeightedParticles | None:
    """Weighted draws of a guide, if its draws have weights: a loss may sum latents out."""
    try:
        return WeightedParticles(model, guide, args, kwargs)
    except Exception:  # whatever the model raises where its loss would hide sites from it
        return None


def can_judge(particles: WeightedParticles) -> bool:
    """Whether weights of draws say how good a guide is: not of subsamples, or of a point."""
    if particles.subsampled:
        return False
    num_draws = NUM_TRIED if particles.at_once else NUM_TRIED_ALONE
    try:
        with torch.random.fork_rng():
            return not judge(particles, num_draws).is_point
    except Exception:  # whatever the model or the guide raises where its loss would not run it
        return False


def missing_modes(found: Diagnosis) -> list[Mode]:
    """The modes that get components: those that are large, or move a mean or spread visibly."""
    return [m for m in found.modes if m.share > SMALLEST_SHARE or m.moves(UNSEEN_CHANGE)]


def shared_peaks(guide: Any, found: Diagnosis) -> list[Tensor]:
    """Peaks for which a guide that is not close yet may get components: those that share one."""
    if (found.verdict == "good" and found.gap < LARGEST_GAP) or found.peaks is None:
        return []
    peaks: list[Tensor] = guide.without_component(found.peaks)
    return peaks


def _changes_nothing(found: Diagnosis) -> bool:
    """Whether weighting changes nothing that a user sees."""
    return found.largest_change < UNSEEN_CHANGE and found.share_moved < UNSEEN_SHARE


class Certificate:
    """Looks at a guide after each round of training, and says when to stop, and why.

    Args:
        particles: The model and its guide.
        adjust_tails: Makes the guide's tails heavier if importance weights need it.
        num_particles: How many evaluations of the model a step takes.
        averages: Keeps the guide where it is near, and has it back.
        schedule: Takes smaller steps where training makes it worse.
        has_own_loss: Whether the guide is trained by a loss of the user's, without components.

    Attributes:
        elbos: The ELBO at each look and its standard error.
        reason: Why to stop, in words; empty before.
        diagnosis: The verdict, from draws that took no part in the decision to stop.
    """

    def __init__(
        self,
        particles: WeightedParticles,
        adjust_tails: Callable[[], None],
        num_particles: int,
        averages: Averages,
        schedule: Schedule,
        has_own_loss: bool = False,
    ) -> None:
        self.particles, self.adjust_tails = particles, adjust_tails
        self.averages, self.schedule = averages, schedule
        self.num_particles, self.has_own_loss = num_particles, has_own_loss
        self.kept: Sequence[float] | None = None  # the ELBO then, and its standard error
        self.elbos: list[Sequence[float]] = []
        self.reason = ""
        self.diagnosis: Diagnosis | None = None

    def look_ahead(self) -> None:
        """Keeps a guide that is near before its first step; if it is there, steps are small."""
        with torch.random.fork_rng():
            found = judge(self.particles, self._num_draws(STEPS_AHEAD))
        self._is_worse(found)
        if found.verdict == "good" and found.hardly_differ and _changes_nothing(found):
            self.schedule.slow_down()

    def _is_worse(self, found: Diagnosis) -> bool:
        """Whether the guide was better when it was kept; keeps it if it is near and better now."""
        if self.kept is not None:
            elbo, error = self.kept
            visible = max(SMALL_GAP, NUM_ERRORS * math.hypot(error, found.elbo_se))
            if not elbo - found.elbo <= visible:
                return True
        if found.gap < NEAR and (self.kept is None or found.elbo > self.kept[0]):
            self.kept = found.elbo, found.elbo_se
            self.averages.keep()
        return False

    def look(self, step: int, num_rounds_left: int) -> bool:
        """Whether to stop after so many steps, where so many rounds may follow."""
        num_draws = self._num_draws(step)
        found = judge(self.particles, num_draws)
        if self._is_worse(found):
            self.averages.restore()
            self.schedule.slow_down()
            found = judge(self.particles, num_draws)
        gap = found.gap
        if found.khat >= GOOD_KHAT and _changes_nothing(found):
            self.adjust_tails()
            found = judge(self.particles, num_draws)
        self.elbos.append((found.elbo, found.elbo_se))
        is_long = len(self.elbos) >= FEWEST_LOOKS
        is_good = found.verdict == "good" or (found.hardly_differ and is_long)
        if is_good and _changes_nothing(found):
            self.reason = UNCHANGED
        elif self._has_settled(gap):
            self.reason = "the ELBO no longer rises"
        elif num_rounds_left == 0:
            self.reason = "fit takes no more by itself, so give num_steps to go further"
        elif self._is_out_of_reach(gap, num_rounds_left):
            self.reason = "at this pace it needs many more, so give num_steps to go further"
        else:
            return len(self.elbos) == EARLY_LOOK and self._finds_more(step)
        self.diagnosis = self._conclude(step)
        if self.reason == UNCHANGED and self.diagnosis.verdict not in ("good", "modes missing"):
            self.reason = UNMOVED
            is_usable = self.diagnosis.verdict == "usable" and self.diagnosis.khat < MAX_KHAT
            return is_usable or len(self.elbos) >= FEWEST_LOOKS_AT_PACE or num_rounds_left == 0
        return True

    def state(self) -> list[list[float]]:
        """What a checkpoint holds of it: the ELBO of the kept guide, if any, and the others."""
        return [list(self.kept or ()), *map(list, self.elbos)]

    def go_on(self, state: Sequence[Sequence[float]]) -> None:
        """Goes on from a state."""
        self.kept, self.elbos = state[0] or None, [*state[1:]]

    @property
    def may_grow(self) -> bool:
        """Whether the guide may get components."""
        can_grow = getattr(self.particles.guide, "can_grow", False)
        return bool(can_grow) and not self.has_own_loss

    def _finds_more(self, step: int) -> bool:
        """Whether a guide that can grow should get components now."""
        if not self.may_grow:
            return False
        found = self._conclude(step)
        if not (missing_modes(found) or shared_peaks(self.particles.guide, found)):
            return False
        self.diagnosis, self.reason = found, "other modes were found"
        return True

    def _conclude(self, step: int) -> Diagnosis:
        """The verdict after so many steps, with a search for modes."""
        affordable = max(FEWEST_EVALUATIONS, 4 * MOST_NUMBERS / self.particles.work)
        num_evaluations = min(SHARE_OF_SEARCH * step * self.num_particles, affordable)
        return conclude(self.particles, self._num_draws(math.inf), num_evaluations)

    def _is_out_of_reach(self, gap: float, num_rounds_left: int) -> bool:
        """Whether the ELBO will still lack too much after all rounds if each brings the same.

        Rounds grow twofold, and bring less and less each: so this waits too long rather than not
        long enough.
        """
        if len(self.elbos) < FEWEST_LOOKS_AT_PACE:
            return False
        (before, _), (after, _) = self.elbos[-2:]
        return gap - SMALL_GAP > num_rounds_left * max(0.0, after - before)

    def _num_draws(self, step: float) -> int:
        particles = self.particles
        affordable = max(FEWEST_DRAWS, MOST_NUMBERS // particles.work)
        if particles.at_once:
            return int(min(NUM_DRAWS, DRAWS_A_STEP * step, affordable))
        return int(min(NUM_DRAWS // 4, DRAWS_A_STEP_ALONE * step, affordable))

    def _has_settled(self, gap: float) -> bool:
        """Whether the ELBO rose by less than its standard error from look to look, twice."""
        if len(self.elbos) < FEWEST_LOOKS:
            return False
        pairs = zip(self.elbos[-3:-1], self.elbos[-2:], strict=True)
        for (before, error_before), (after, error_after) in pairs:
            error = math.hypot(error_before, error_after)
            if not (after - before <= error <= max(KNOWN_TO, KNOWN_TO_SHARE * gap)):
                return False
        return True
