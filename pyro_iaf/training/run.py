r"""One training run, step by step.

.. math::
    \max_\phi \; \mathbb{E}_{z \sim q_\phi} \bigl[ \log p(x, z) - \log q_\phi(z) \bigr]

by Adam, at a constant learning rate until the ELBO has settled and then at a falling one; the last
iterates are averaged. Without a number of steps, in rounds until the guide is certified.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pyro import poutine
from pyro.infer import Trace_ELBO
from pyro.poutine import runtime
from torch import Tensor, nn
from tqdm.auto import tqdm

from .._progress import progress_bar, show
from .._validation import warn
from ..compiler.capture import Refused
from ..elbo.marginal import program_for
from ..elbo.objectives import RECORDABLE, LatentLoss, Loss, TraceLoss
from ..elbo.stl import TraceSTL_ELBO
from ..flows.scored_guide import (
    ScoredGuide,
    context_tables_of,
    goes_through_draws,
    networks_of,
    row_gradients,
)
from ..models.arguments import Args, Batch, Kwargs, Program
from ..models.matching import Mismatch
from ..models.nonfinite import describe_nonfinite, impossible_data
from ..models.param_store import unconstrained_params
from ..models.particles import threads_for
from ..models.traces import quietly
from ..models.weighted import WeightedParticles, check_latents
from .averages import Averages
from .batches import Batches, odd_data
from .certificate import Certificate, can_judge, particles_or_none
from .checkpoints import Checkpoint, settings_of
from .compiled_step import Built, CompiledSteps
from .interrupts import Interrupts
from .minibatches import Minibatches
from .optimizers import Adam, RowAdam
from .result import AVERAGED, FitResult
from .schedule import Rounds, Schedule

if TYPE_CHECKING:
    from .stages import Stage

__all__ = ["Run"]

# The learning rates of other parameters and of our networks' weights. The latter are divided by the
# square root of the number of inputs of their unit, so they may move by more.
RATES = (1.0, 4.0)

# The learning rate of a table's rows, of which each takes part in few steps.
RATE_OF_ROWS = 10.0

# The ELBO has settled only after each row of a table took part in so many steps, on average.
FEWEST_VISITS = 30

# How many steps in a row may be skipped, and which share of all steps.
MAX_SKIPPED, MAX_SHARE_SKIPPED = 25, 0.2

# How many compiled steps run before their losses are read: at first, and at most. They should not
# take longer than these seconds.
FIRST_CHUNK, LARGEST_CHUNK, SECONDS_A_CHUNK = 50, 500, 0.2


class Run:
    """One call of :func:`~pyro_iaf.fit`, step by step."""

    def __init__(
        self,
        *,
        model: Program,
        guide: Program,
        batches: Batches,
        schedule: Schedule,
        num_particles: int,
        clip_norm: float,
        elbo: Any,
        compile: bool | str,  # noqa: A002
        anchor: bool,
        seed: int | None,
        checkpoint: Path | None,
        checkpoint_every: int,
        stage: Stage,
    ) -> None:
        self.stage = stage
        self.model, self.guide, self.batches = model, guide, batches
        self.num_particles, self.clip_norm, self.elbo = num_particles, clip_norm, elbo
        self.schedule, self.compile, self.anchor, self.seed = schedule, compile, anchor, seed
        self.checkpoint = Checkpoint(self, checkpoint, checkpoint_every)
        self.step, self.resumed_at = 0, 0
        self.is_consistent = True  # False within a step, while it changes the state
        self.losses: list[float] = []
        self.skipped, self.skipped_in_a_row = 0, 0
        self.params: dict[str, Tensor] = {}
        self.averages = Averages(self.params)
        self.particles: WeightedParticles | None = None
        self.certificate: Certificate | None = None
        self.minibatches = Minibatches(self.model, self.guide, batches)
        self.backend = "eager"
        self.chunk = FIRST_CHUNK

    def to_the_end(self, progress: bool) -> FitResult:
        """Runs all steps; an error gets the result so far as its attribute ``result``."""
        self.began = time.perf_counter()
        handlers = list(runtime._PYRO_STACK)
        try:
            with torch.enable_grad(), row_gradients(self.guide):
                return self._take_steps(*self._begin(), progress)
        except BaseException as error:
            runtime._PYRO_STACK[:] = handlers  # Ctrl-C may come while a handler leaves
            error.result = self._result()  # type: ignore[attr-defined]
            raise

    def _take_steps(self, first: Batch, saved: dict[str, Any] | None, progress: bool) -> FitResult:
        self.waiting = [first] if saved is None else []  # a resumed run goes on with the next batch
        if saved is None and self.certificate is not None:
            self.certificate.look_ahead()
        bar, size = progress_bar(self.schedule.end, self.step, progress), self._size_of_step()
        with bar, Interrupts() as self.interrupts:
            try:
                while not self._has_arrived():
                    with threads_for(size):
                        self._take_some(bar)
                    if self.step % self.checkpoint.every == 0:
                        self.checkpoint.save()
                    show(bar, self.step, self.schedule.end, self.losses, self.skipped)
                if self.skipped > max(MAX_SHARE_SKIPPED * self.step, 1):
                    self._give_up(*first)
                if self.backend != "eager":  # a recording does not notice new or missing sites
                    with torch.random.fork_rng([]):
                        check_latents(self.model, self.guide, *first)
                self.checkpoint.save()
                self.interrupts.check()
            except BaseException as error:
                self.steps.stop()
                # Parameters that are not finite, or half updated, are not saved.
                if self.is_consistent and not isinstance(error, FloatingPointError):
                    self.checkpoint.save()
                raise
            self.steps.stop()
            bar.total = self.step
        if self.certificate is None:
            self.averages.set(self.averages.values)
            self.loss.fit_weights()
            self.loss.adjust_tails()
        return self._result()

    def _has_arrived(self) -> bool:
        """Whether the run is over; otherwise the schedule has another step."""
        schedule = self.schedule
        if self.step < schedule.end:
            return False
        if self.certificate is None or not isinstance(schedule, Rounds):
            return True
        self.checkpoint.save()
        self.steps.stop()
        last = self.averages.now()
        self.averages.set(self.averages.values)
        try:
            with self.interrupts.open(), torch.random.fork_rng():  # the same draws if resumed here
                self.loss.fit_weights()
                is_annealed = schedule.weight(self.step - 1) < 1 and not schedule.is_last
                if not is_annealed and self.certificate.look(self.step, schedule.num_rounds_left):
                    return True
        except BaseException:
            self.averages.set(last)
            raise
        self.averages.set(self.averages.values)  # without what the look has changed
        self.averages.values.clear()
        self.minibatches.follow()
        schedule.next_round()
        self.steps.expect(schedule.num_left(self.step))
        return False

    def _size_of_step(self) -> float:
        """The numbers that the largest operations of a step take; infinite if that is unknown."""
        if self.particles is None:
            return math.inf
        num_particles = getattr(self.elbo, "num_particles", self.num_particles)
        drawn = num_particles * self.particles.num_numbers
        return max(drawn, *(param.numel() for param in self.params.values()), 0)

    def _begin(self) -> tuple[Batch, dict[str, Any] | None]:
        """Prepares the steps; returns the first batch, and a checkpoint's state if there is one."""
        saved = self.checkpoint.open()
        first = self.batches.next()
        self.batches.check(*first)
        if self.anchor or self.schedule.asked is None:
            self.minibatches.look()
        self.loss = self._make_loss(*first)
        self.minibatches.serve(self.loss)
        is_plain = saved is None and self.elbo is None and self.schedule.annealing is None
        if self.anchor and is_plain:
            self.minibatches.place_anchor()
        if self.rows.tables and self.compile is not False:
            if self.compile != "auto":
                raise Refused(
                    "A guide with a table of contexts can't be compiled, since each step reads "
                    "other rows. Give compile=False, or an encoder."
                )
            self.compile = False
        self.checkpoint.compute_digests(*first)
        if saved is not None:
            self.checkpoint.restore(saved)
        self.resumed_at = self.step
        self.steps = CompiledSteps(
            self.loss,
            self.params,
            self.optimizer,
            factors=RATES,
            weighted=self.schedule.annealing is not None,
            settings=(self.num_particles, settings_of(self.elbo)),
            compile=self.compile,
            num_left=self.schedule.num_left,
            change=self.batches.change,
            before=None if saved is None else saved["recordings"],
        )
        return first, saved

    def _result(self) -> FitResult:
        schedule, certificate = self.schedule, self.certificate
        reason = schedule.reason(self.step) if certificate is None else certificate.reason
        begin = schedule.begin if self.step == schedule.end else 0  # nothing was averaged before
        return FitResult(
            losses=torch.tensor(self.losses, dtype=torch.float64),
            num_steps=self.step,
            stopped=reason or "something else ended it",
            skipped=self.skipped,
            seconds=time.perf_counter() - self.began,
            backend=self.backend,
            resumed_at=self.resumed_at,
            num_averaged=int(AVERAGED * (self.step - begin)),
            diagnosis=None if certificate is None else certificate.diagnosis,
            noise=self.minibatches.noise,
        )

    # Before the first step

    def _make_loss(self, args: Args, kwargs: Kwargs) -> Loss:
        """Runs model and guide once, with all checks; finds the parameters and the loss."""
        elbo = Trace_ELBO() if self.elbo is None else self.elbo
        if fault := odd_data(self.model, args, kwargs):
            raise ValueError(fault)

        def model() -> Program:  # which is another once the guide is set up
            return program_for(elbo, self.model, self.guide)

        def look() -> None:
            if goes_through_draws(self.guide) and hasattr(self.guide, "setup"):
                with self.minibatches.as_start():
                    self.guide.setup(*args, **kwargs)  # outside no_grad, as training needs it
            with torch.no_grad():
                elbo.loss(model(), self.guide, *args, **kwargs)

        with poutine.trace(param_only=True) as capture:
            try:
                look()
            except Mismatch:
                raise
            except Exception as error:
                if type(elbo) in RECORDABLE:  # other ELBOs enumerate latents, which guides lack
                    check_latents(self.model, self.guide, args, kwargs)
                if not isinstance(error, ValueError) or "log_prob shape" in str(error):
                    raise
                if fault := impossible_data(model(), self.guide, args, kwargs):
                    raise ValueError(fault) from error
                try:  # again, since only this draw may be at fault
                    with quietly():
                        look()
                except ValueError:
                    raise error from None
        self._make_optimizer(capture.trace)
        if self.elbo is not None:
            found = particles_or_none(self.model, self.guide, args, kwargs)
            if found is not None:
                self.minibatches.see_all(found)
            self.particles = found if isinstance(self.schedule, Rounds) else None
            self._make_certificate()
            return TraceLoss(model(), self.guide, self.elbo)
        self.particles = particles = WeightedParticles(self.model, self.guide, args, kwargs)
        self.minibatches.see_all(particles)
        self._make_certificate()
        if not particles.at_once and self.num_particles > 1:
            warn(
                "fit runs its particles one after the other: vectorised over particles, the model "
                "fails, or its log density changes or is random. If that takes long, write sites "
                "with plates, count dimensions from the right, and index by Vindex(x)[..., k]."
            )
        if isinstance(self.guide, ScoredGuide):
            joint = particles.log_joint()
            return LatentLoss(model(), self.guide, self.num_particles, joint)
        elbo = (TraceSTL_ELBO if goes_through_draws(self.guide) else Trace_ELBO)(
            num_particles=self.num_particles,
            vectorize_particles=particles.broadcasts,
            max_plate_nesting=particles.nesting if particles.broadcasts else math.inf,
        )
        return TraceLoss(model(), self.guide, elbo)

    def _make_certificate(self) -> None:
        if isinstance(self.schedule, Rounds):
            if (whole := self.minibatches.whole) is None or not can_judge(whole):
                self.schedule = self.schedule.all_at_once()
            else:
                has_own_loss = self.elbo is not None or not isinstance(self.guide, ScoredGuide)
                self.certificate = Certificate(
                    whole,
                    lambda: self.loss.adjust_tails(),
                    self.num_particles,
                    self.averages,
                    self.schedule,
                    has_own_loss,
                )

    def _make_optimizer(self, seen: poutine.Trace) -> None:
        self.optimizer = Adam(len(RATES))
        self.rows = RowAdam(context_tables_of(self.guide))
        self._add(seen)

    def _add(self, seen: poutine.Trace) -> None:
        """Adds the parameters of a trace that are new to the optimiser."""
        of_networks = {id(p) for net in networks_of(self.guide) for p in net.parameters()}
        tables = {id(table) for table in self.rows.tables}
        for name, param in unconstrained_params(seen).items():
            is_known = self.params.get(name) is param or id(param) in tables
            if param.requires_grad and not is_known:
                self.params[name] = param
                self.optimizer.groups[id(param) in of_networks].append(param)

    # Steps

    def _take_some(self, bar: tqdm[Any]) -> None:
        """Takes one eager step, or several compiled ones."""
        args, kwargs = self.waiting.pop() if self.waiting else self._next()
        with self.interrupts.open():
            built = self.steps.step_for(self.step, args, kwargs, bar)
        with quietly():
            if built is None:
                self._take_step(args, kwargs)
            else:
                self._replay(built, args, kwargs)

    def _next(self) -> Batch:
        """The next batch; a checkpoint written during its step resumes before it."""
        self.checkpoint.note_place()
        with self.interrupts.open():
            return self.batches.next()

    def _take_step(self, args: Args, kwargs: Kwargs) -> None:
        self.backend = "eager"
        self.steps.stop()
        rate, weight, mass_covering, _ = self._numbers(self.step)
        self.minibatches.step()
        self.optimizer.zero_grad()
        self.loss.mass_covering = bool(mass_covering)
        ess = self.loss.relative_ess
        try:
            with self.interrupts.open(), poutine.trace(param_only=True) as capture:
                loss = self.loss(args, kwargs, weight)
            if capture.trace.nodes.keys() - self.params.keys():
                self._add(capture.trace)
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]  # for example of a matrix that is not finite
            loss = torch.tensor(math.nan)
        except BaseException:
            self.loss.relative_ess = ess
            raise
        trained = [*self.params.values(), *self.rows.gradients()]
        norm = nn.utils.clip_grad_norm_(trained, self.clip_norm)
        value, size = torch.stack([loss.detach(), norm.to(loss)]).tolist()
        self.is_consistent = False
        if math.isfinite(value) and math.isfinite(size):
            self.optimizer.step([rate * factor for factor in RATES])
            self.rows.step(rate * RATE_OF_ROWS)
        self.averages.update(self.step + 1, self.params, self.schedule)
        self._record([(value, size)], args, kwargs)
        self.is_consistent = True

    def _replay(self, built: Built, args: Args, kwargs: Kwargs) -> None:
        """Takes compiled steps, as many as :meth:`_num_uninterrupted` says."""
        began = time.perf_counter()
        self.backend = built.backend
        adam = self.steps.start(built)
        params = dict(zip(built.live, adam.views, strict=True))
        steps = range(self.step, self.step + self._num_uninterrupted())
        settings = adam.state.new_tensor([self._numbers(k) for k in steps])
        take = self.steps.bind(built, args, kwargs)
        pairs: list[Tensor] = []
        try:
            with torch.no_grad():
                for step, numbers in zip(steps, settings.unbind(), strict=True):
                    if pairs and self.batches.change:
                        self.step = step
                        with torch.enable_grad():  # as when the step was recorded
                            batch = self._next()
                            is_same = self.steps.is_for(built, *batch)
                        if not is_same:
                            self.waiting.append(batch)
                            break
                        take = self.steps.bind(built, *batch)
                    self.is_consistent = False
                    self.minibatches.step()
                    pairs.append(take(numbers))
                    self.averages.update(step + 1, params, self.schedule)
                    self.is_consistent = True
        finally:  # after an error, too, the steps that were taken count
            self.step = steps.start
            if pairs:
                adam.store()
                results = torch.stack(pairs).tolist()
                affordable = SECONDS_A_CHUNK * len(pairs) / (time.perf_counter() - began)
                self.chunk = max(1, min(int(affordable), 2 * self.chunk, LARGEST_CHUNK))
                self._record(results, args, kwargs)

    def _num_uninterrupted(self) -> int:
        """How many steps may run without a look at losses, schedule or checkpoint."""
        schedule = self.schedule
        ends = [self.step + self.chunk, schedule.end, _next_multiple(self.step, schedule.stretch)]
        if self.checkpoint.path:
            ends.append(_next_multiple(self.step, self.checkpoint.every))
        return min(ends) - self.step

    def _record(self, results: Iterable[Sequence[float]], args: Args, kwargs: Kwargs) -> None:
        """Records the losses and gradient norms of steps; raises if too many are not finite."""
        for value, size in results:
            self.step += 1
            if math.isfinite(value) and math.isfinite(size):
                self.losses.append(value)
                self.skipped_in_a_row = 0
            else:
                self.skipped += 1
                self.skipped_in_a_row += 1
                too_many = self.step >= 100 and self.skipped > MAX_SHARE_SKIPPED * self.step
                if too_many or self.skipped_in_a_row > MAX_SKIPPED:
                    self._give_up(args, kwargs)
            if self.step % self.schedule.stretch == 0 and self.rows.visits >= FEWEST_VISITS:
                self.schedule.settle(self.step, self.losses)
                self.minibatches.follow()

    def _give_up(self, args: Args, kwargs: Kwargs) -> None:
        fault = describe_nonfinite(self.model, self.guide, args, kwargs, self.params)
        raise FloatingPointError(
            f"{self.skipped} of {self.step} steps, the last {self.skipped_in_a_row} of them in a "
            f"row, had a loss or a gradient that is not finite. At fault: {fault}. Look at the "
            "scales there and at the precision (torch.float64 has a larger range), or take a "
            "smaller lr. A log density of -inf means a value outside the support: write a support "
            "that depends on another latent, as Uniform(0, z), as z * Uniform(0, 1)."
        )

    def _numbers(self, step: int) -> tuple[float, float, float, float]:
        """A step's learning rate, KL weight, whether it is mass-covering, and largest norm."""
        schedule = self.schedule
        mass_covering = step >= schedule.falls_at and not self.batches.change
        return schedule.rate(step), schedule.weight(step), float(mass_covering), self.clip_norm


def _next_multiple(step: int, size: int) -> int:
    return (step // size + 1) * size
