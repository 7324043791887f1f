r"""A training run, step by step: how fast, until when, and what becomes of it on the way.

.. math::
    \max_\phi \; \mathbb{E}_{z \sim q_\phi} \bigl[ \log p(x, z) - \log q_\phi(z) \bigr]

by Adam, until the ELBO has settled; then at a falling rate, with the last iterates averaged.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from pyro import poutine
from pyro.infer import Trace_ELBO
from pyro.poutine import runtime
from torch import Tensor, nn
from tqdm.auto import tqdm

from .._validation import warn
from ..compiler.capture import Refused
from ..elbo.objectives import RECORDABLE, LatentLoss, Loss, TraceLoss
from ..elbo.stl import TraceSTL_ELBO
from ..guides.auto_hierarchical import AutoHierarchicalIAF
from ..guides.auto_iaf import AutoIAF
from ..guides.base import FlowGuide
from ..guides.hierarchical import row_gradients, tables_of
from ..models.arguments import Batch
from ..models.log_joint import LogJoint
from ..models.matching import Mismatch
from ..models.nonfinite import at_fault, impossible_data
from ..models.param_store import stated
from ..models.particles import Particles, check_latents
from ..models.traces import quietly
from ..nn.made import MaskedAutoregressiveNetwork
from ..solvers.score_kernel import load_kernel
from . import checkpoints
from .batches import Batches, odd_data
from .compiled_step import Built, CompiledSteps
from .digests import Digests, differing, digest, digests_of_sites, in_words
from .interrupts import Interrupts
from .optimizers import BETAS, EPS, RowAdam
from .progress import progress_bar
from .result import AVERAGED, FitResult
from .schedule import Schedule

__all__ = ["Run"]

# A weight of our networks counts one over the square root of its unit's inputs, so it may move by
# more than a loc or a scale.
RATES = (1.0, 4.0)

# That of a table's rows, which steps come by rarely.
RATE_OF_ROWS = 10.0

# In how many steps each row of a table has been, in the mean, before all has settled.
FEWEST_VISITS = 30

# Steps that may fail in a row, and the share of all that may.
MAX_SKIPPED, MAX_SHARE_SKIPPED = 25, 0.2

# Compiled steps between two looks at the losses and the parameters: the first time, and the most;
# it should not take more seconds.
FIRST_CHUNK, LARGEST_CHUNK, SECONDS_A_CHUNK = 50, 500, 0.2


class Run:
    """One call of :func:`~pyro_iaf.fit`, step by step."""

    def __init__(
        self,
        *,
        model: Callable[..., Any],
        guide: Callable[..., Any],
        batches: Batches,
        num_steps: int,
        num_particles: int,
        lr: float,
        clip_norm: float,
        elbo: Any,
        annealing: int | Callable[[int], float] | None,
        early_stop: bool,
        compile: bool | str,  # noqa: A002
        seed: int | None,
        checkpoint: Path | None,
        checkpoint_every: int,
    ) -> None:
        self.model, self.guide, self.batches = model, guide, batches
        self.num_particles, self.clip_norm, self.elbo = num_particles, clip_norm, elbo
        self.schedule = Schedule(num_steps, lr, annealing, early_stop)
        self.compile, self.seed = compile, seed
        self.checkpoint, self.checkpoint_every = checkpoint, checkpoint_every
        self.step, self.resumed_at, self.saved_at = 0, 0, 0
        self.place: dict[str, Any] = {"step": -1}  # of none yet
        self.is_whole = True  # False within a step, while it changes the state
        self.could_save = True
        self.losses: list[float] = []
        self.skipped, self.skipped_in_a_row = 0, 0
        self.params: dict[str, Tensor] = {}
        self.averages: dict[str, Tensor] = {}
        self.backend = "eager"
        self.flow_dim = 0
        self.chunk = FIRST_CHUNK
        self.next_shown = 50

    def to_the_end(self, progress: bool) -> FitResult:
        """Takes all steps."""
        self.began = time.perf_counter()
        handlers = list(runtime._PYRO_STACK)
        try:
            with torch.enable_grad(), row_gradients(self.guide):
                return self._take_all(progress)
        except BaseException as error:
            runtime._PYRO_STACK[:] = handlers  # Ctrl-C may come just as one of them leaves
            error.result = self._result()  # type: ignore[attr-defined]
            raise

    def _take_all(self, progress: bool) -> FitResult:
        first, saved = self._begin()
        self.waiting = [first] if saved is None else []  # else the run goes on with what follows
        bar = progress_bar(self.schedule.num_steps, self.step, progress)
        with bar, Interrupts() as self.interrupts:
            try:
                while self.step < self.schedule.end:
                    self._take_some(bar)
                    if self.step % self.checkpoint_every == 0:
                        self._save()
                    self._show(bar)
                if self.skipped > max(MAX_SHARE_SKIPPED * self.step, 1):
                    self._give_up(*first)
                if self.backend != "eager":  # a recording does not notice what comes or goes
                    with torch.random.fork_rng([]):
                        check_latents(self.model, self.guide, *first)
                self._save()
                self.interrupts.check()
            except BaseException as error:
                self.steps.stop()
                # What is not finite is not worth keeping, and a broken step can't be.
                if self.is_whole and not isinstance(error, FloatingPointError):
                    self._save()
                raise
            self.steps.stop()
            bar.total = self.step
        self._average()
        if isinstance(self.loss, LatentLoss) and not self.batches.change:
            self.loss.see_to_tails(self.batches.next)
        return self._result()

    def _begin(self) -> tuple[Batch, dict[str, Any] | None]:
        """The first batch and a checkpoint's state, with all that steps need in place."""
        saved = None if self.checkpoint is None else checkpoints.load(self.checkpoint)
        if saved is not None:
            self._check_settings(saved)
            # The same first batch as then, whatever was drawn in this process before.
            checkpoints.set_generators(saved["generators_before"])
            self.batches.set_generators(saved["batches_before"])
        if self.checkpoint is not None:
            self.generators_before = checkpoints.generators()
            self.batches_before = self.batches.generators()
        first = self.batches.next()
        self.batches.check(*first)
        self.loss = self._first_look(*first)
        if self.rows.tables and self.compile is not False:
            if self.compile != "auto":
                raise Refused(
                    "A guide that learns a table of contexts takes its steps uncompiled, since "
                    "each has its own rows. Give compile=False, or an encoder."
                )
            self.compile = False
        if self.checkpoint is not None:
            self._look(*first)
        if saved is not None:
            self._check_digests(saved)
            try:
                self._restore(saved)
            except (LookupError, RuntimeError, TypeError) as error:
                raise ValueError(
                    f"{self.checkpoint} is of another guide or model, or is damaged: {error}. Give "
                    "another path to begin anew."
                ) from error
        self.resumed_at = self.saved_at = self.step
        self.steps = CompiledSteps(
            self.loss,
            self.params,
            self.optimizer,
            factors=RATES,
            weighted=self.schedule.annealing is not None,
            settings=(self.num_particles, self._settings["loss"]),
            compile=self.compile,
            num_steps=self.schedule.num_steps,
            change=self.batches.change,
            flow_dim=self.flow_dim,
            prepare=load_kernel,
            before=None if saved is None else saved["recordings"],
        )
        return first, saved

    def _result(self) -> FitResult:
        end = self.schedule.end
        return FitResult(
            losses=torch.tensor(self.losses, dtype=torch.float64),
            num_steps=self.step,
            stopped=self.step >= end and end < self.schedule.num_steps,
            skipped=self.skipped,
            seconds=time.perf_counter() - self.began,
            backend=self.backend,
            resumed_at=self.resumed_at,
        )

    # Before the first step

    def _first_look(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Loss:
        """Runs model and guide once, with all checks; finds the parameters and the loss."""
        elbo = Trace_ELBO() if self.elbo is None else self.elbo
        if fault := odd_data(self.model, args, kwargs):
            raise ValueError(fault)

        def look() -> None:
            if isinstance(self.guide, FlowGuide):  # with gradients, as for training
                self.guide.setup(*args, **kwargs)
            with torch.no_grad():
                elbo.loss(self.model, self.guide, *args, **kwargs)

        with poutine.trace(param_only=True) as capture:
            try:
                look()
            except Mismatch:
                raise
            except Exception as error:
                if type(elbo) in RECORDABLE:  # others have latents that the guide has not
                    check_latents(self.model, self.guide, args, kwargs)
                if not isinstance(error, ValueError) or "log_prob shape" in str(error):
                    raise
                if fault := impossible_data(self.model, self.guide, args, kwargs):
                    raise ValueError(fault) from error
                try:  # once more, as it may be of this draw
                    with quietly():
                        look()
                except ValueError:
                    raise error from None
        self._make_optimizer(capture.trace)
        if self.elbo is not None:
            return TraceLoss(self.model, self.guide, self.elbo)
        particles = Particles(self.model, self.guide, args, kwargs)
        if not particles.at_once and self.num_particles > 1:
            warn(
                "fit runs its particles one after the other: run for several at once the model "
                "fails, or its density is another one, or is random. If that takes long, write "
                "sites with plates, and dimensions counted from the right."
            )
        if type(self.guide) is AutoIAF:
            latents = self.guide._latent_sites()
            model = self.guide.with_priors(self.model)
            joint = LogJoint(model, particles.first_model, args, kwargs, latents)
            joint.at_once = particles.at_once
            self.flow_dim = self.guide.latent_dim
            return LatentLoss(self.model, self.guide, self.num_particles, joint)
        # Flows come so near the posterior that the gradient through the draws has the less noise.
        through_the_draws = isinstance(self.guide, AutoHierarchicalIAF)
        elbo = (TraceSTL_ELBO if through_the_draws else Trace_ELBO)(
            num_particles=self.num_particles,
            vectorize_particles=particles.at_once,
            max_plate_nesting=particles.nesting if particles.at_once else math.inf,
        )
        return TraceLoss(self.model, self.guide, elbo)

    def _make_optimizer(self, seen: poutine.Trace) -> None:
        self.params = {}
        params = stated(seen).values()
        fused = all(p.device.type in ("cpu", "cuda") and p.is_floating_point() for p in params)
        self.optimizer = torch.optim.Adam(
            [{"params": []}, {"params": []}],
            lr=self.schedule.lr,
            betas=BETAS,
            eps=EPS,
            fused=fused,
        )
        self.rows = RowAdam(tables_of(self.guide))
        self._add(seen)

    def _add(self, seen: poutine.Trace) -> None:
        """Takes in the parameters of a run that are not there yet."""
        owner = getattr(self.guide, "__self__", self.guide)  # of a guide that is a method
        modules = owner.modules() if isinstance(owner, nn.Module) else ()
        networks = [m for m in modules if isinstance(m, MaskedAutoregressiveNetwork)]
        of_networks = {id(p) for network in networks for p in network.parameters()}
        tables = {id(table) for table in self.rows.tables}
        for name, param in stated(seen).items():
            is_known = self.params.get(name) is param or id(param) in tables
            if param.requires_grad and not is_known:
                self.params[name] = param
                group = self.optimizer.param_groups[id(param) in of_networks]
                group["params"].append(param)

    # Steps

    def _take_some(self, bar: tqdm[Any]) -> None:
        """Takes one step, or as many compiled ones as there are until something else is to do."""
        args, kwargs = self.waiting.pop() if self.waiting else self._next()
        with self.interrupts.open():
            built = self.steps.step_for(self.step, args, kwargs, bar)
        with quietly():
            if built is None:
                self._take_step(args, kwargs)
            else:
                self._replay(built, args, kwargs)

    def _next(self) -> Batch:
        """The next batch. A step that fails from here on is taken anew, with the same numbers."""
        self.place = self._place()
        with self.interrupts.open():
            return self.batches.next()

    def _take_step(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.backend = "eager"
        self.steps.stop()
        rate, weight, covers, _ = self._numbers(self.step)
        for group, factor in zip(self.optimizer.param_groups, RATES, strict=True):
            group["lr"] = rate * factor
        self.optimizer.zero_grad()
        self.loss.covers = bool(covers)
        health = self.loss.health
        try:
            with self.interrupts.open(), poutine.trace(param_only=True) as capture:
                loss = self.loss(args, kwargs, weight)
            if capture.trace.nodes.keys() - self.params.keys():
                self._add(capture.trace)
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]  # of a matrix that is not finite, say
            loss = torch.tensor(math.nan)
        except BaseException:
            self.loss.health = health
            raise
        trained = [*self.params.values(), *self.rows.gradients()]
        norm = nn.utils.clip_grad_norm_(trained, self.clip_norm)
        value, size = torch.stack([loss.detach(), norm.to(loss)]).tolist()
        self.is_whole = False
        if math.isfinite(value) and math.isfinite(size):
            self.optimizer.step()
            self.rows.step(rate * RATE_OF_ROWS)
        self._average_in(self.step + 1, self.params)
        self._account([(value, size)], args, kwargs)
        self.is_whole = True

    def _replay(self, built: Built, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Takes compiled steps until there is something to see to."""
        began = time.perf_counter()
        self.backend = built.backend
        adam = self.steps.start(built)
        params = dict(zip(built.live, adam.views, strict=True))
        steps = range(self.step, self.step + self._num_undisturbed())
        rows = torch.tensor([self._numbers(k) for k in steps], dtype=torch.float64)
        rows = rows.to(adam.values.device)
        take = self.steps.bind(built, args, kwargs)
        pairs: list[Tensor] = []
        try:
            with torch.no_grad():
                for step, numbers in zip(steps, rows.unbind(), strict=True):
                    if pairs and self.batches.change:
                        self.step = step
                        with torch.enable_grad():  # as it was when the step was built
                            batch = self._next()
                            is_same = self.steps.is_for(built, *batch)
                        if not is_same:
                            self.waiting.append(batch)
                            break
                        take = self.steps.bind(built, *batch)
                    self.is_whole = False
                    pairs.append(take(numbers))
                    self._average_in(step + 1, params)
                    self.is_whole = True
        finally:  # whatever ends it, what was taken counts
            self.step = steps.start
            if pairs:
                adam.store()
                results = torch.stack(pairs).tolist()
                affordable = SECONDS_A_CHUNK * len(pairs) / (time.perf_counter() - began)
                self.chunk = max(1, min(int(affordable), 2 * self.chunk, LARGEST_CHUNK))
                self._account(results, args, kwargs)

    def _num_undisturbed(self) -> int:
        """How many steps there are to the next that something hangs on."""
        schedule = self.schedule
        ends = [self.step + self.chunk, schedule.end, _next_multiple(self.step, schedule.stretch)]
        if self.checkpoint:
            ends.append(_next_multiple(self.step, self.checkpoint_every))
        return min(ends) - self.step

    def _account(
        self, results: Iterable[Sequence[float]], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Notes what came of steps: the loss of each, and the norm of its gradient."""
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

    def _give_up(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        fault = at_fault(self.model, self.guide, args, kwargs, self.params)
        raise FloatingPointError(
            f"{self.skipped} of {self.step} steps, the last {self.skipped_in_a_row} of them in a "
            f"row, had a loss or a gradient that is not finite. At fault: {fault}. Look at the "
            "scales there and at the precision (torch.float64 reaches farther), or take a smaller "
            "lr. A density of -inf is of a value outside a support: one that hangs on another "
            "latent, as Uniform(0, z), is written z * Uniform(0, 1)."
        )

    def _numbers(self, step: int) -> tuple[float, float, float, float]:
        """A step's rate, weight of the KL divergence, whether to cover, and largest norm."""
        schedule = self.schedule
        covers = step >= schedule.falls_at and not self.batches.change
        return schedule.rate(step), schedule.weight(step), float(covers), self.clip_norm

    def _average_in(self, done: int, params: Mapping[str, Tensor]) -> None:
        """Takes the parameters after so many steps into the averages, if these are the last."""
        end = self.schedule.end
        taken = done - (end - int(AVERAGED * end))
        if taken <= 0:
            return
        for name, param in params.items():
            value = param.detach()
            if name in self.averages:
                self.averages[name].lerp_(value, 1 / taken)
            else:
                self.averages[name] = value.clone()

    @torch.no_grad()
    def _average(self) -> None:
        for name, average in self.averages.items():
            self.params[name].copy_(average)

    def _show(self, bar: tqdm[Any]) -> None:
        bar.update(self.step - bar.n)
        if self.step >= self.next_shown and self.losses:
            self.next_shown = self.step + 50
            last, before = self.losses[-100:], self.losses[-200:-100]
            shown = {"ELBO": f"{-_mean(last):.2f}"}
            if before:
                shown["trend"] = f"{_mean(before) - _mean(last):+.2f}/100 steps"
            if self.skipped:
                shown["skipped"] = str(self.skipped)
            bar.set_postfix(shown, refresh=False)

    # Checkpoints

    @property
    def _settings(self) -> dict[str, Any]:
        schedule = self.schedule
        return {
            "num_steps": schedule.num_steps,
            "num_particles": self.num_particles,
            "lr": schedule.lr,
            "clip_norm": self.clip_norm,
            "early_stop": schedule.early_stop,
            "annealing": "a function" if callable(schedule.annealing) else schedule.annealing,
            "loss": settings_of(self.elbo),
            "simulate": self.batches.simulate,
            "seed": self.seed,
            "default dtype": str(torch.get_default_dtype()),
        }

    def _look(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Notes what tells this run's data, model and guide from another's."""
        batches = self.batches
        self.data: Digests = {
            "args": [digest(batches.args)],
            "kwargs": [digest(batches.kwargs)],
            "the first minibatch": [digest(batches.without_simulated(args, kwargs))],
        }
        generators = checkpoints.generators()
        try:
            simulated = set(batches.simulate.values())
            observed, sites = digests_of_sites(self.model, self.guide, args, kwargs, simulated)
        except Exception:  # whatever a model may raise at some draw
            observed, sites = {}, {}
        finally:
            checkpoints.set_generators(generators)
        self.observed, self.sites = observed, sites
        for what, thing in (("the model", self.model), ("the guide", self.guide)):
            if isinstance(thing, nn.Module):
                self.sites[what] = [digest(in_words(thing))]

    def _place(self) -> dict[str, Any]:
        """Where random numbers, data and recordings are, between two steps."""
        if self.checkpoint is None:
            return {"step": self.step}
        cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
        generators = {"torch": torch.get_rng_state(), "cuda": cuda}
        return {
            "step": self.step,
            "generators": generators,
            "batches": self.batches.state(),
            "recordings": self.steps.state(),
        }

    def _save(self) -> None:
        """Writes the state of the steps that were taken, if any were and it can be written."""
        if self.checkpoint is None or self.step == self.saved_at:
            return
        modules = {
            name: module.state_dict()
            for name, module in (("model", self.model), ("guide", self.guide))
            if isinstance(module, nn.Module)
        }
        self.steps.stop()
        schedule = self.schedule
        progress = self.step, schedule.end, schedule.falls_at, self.skipped, self.skipped_in_a_row
        # The batch of a step that was not taken may be drawn already.
        place = self.place if self.place["step"] == self.step else self._place()
        state = {
            **modules,
            "settings": self._settings,
            "data": self.data,
            "sites": self.sites,
            "observed": self.observed,
            "params": {name: param.detach() for name, param in self.params.items()},
            "optimizer": self.optimizer.state_dict(),
            "rows": self.rows.state(),
            "averages": self.averages,
            "losses": torch.tensor(self.losses, dtype=torch.float64),
            "health": self.loss.health.item(),
            "backend": self.backend,
            "recordings": place["recordings"],
            "progress": list(progress),
            "weights": {k: weight for k, weight in schedule.weights.items() if k < self.step},
            "generators": {**checkpoints.generators(), **place["generators"]},
            "batches": place["batches"],
            "generators_before": self.generators_before,
            "batches_before": self.batches_before,
        }
        try:
            checkpoints.save(self.checkpoint, state)
            self.saved_at = self.step
        except OSError as error:
            if self.could_save:
                warn(
                    f"fit can't write its checkpoint {self.checkpoint}: {error}. It trains on, "
                    "keeps the last one that it wrote, and tries again. Make room there."
                )
            self.could_save = False

    def _check_settings(self, saved: dict[str, Any]) -> None:
        theirs, ours = saved["settings"], self._settings
        for name, value in ours.items():
            if theirs.get(name) != value:
                raise ValueError(
                    f"{self.checkpoint} is of a run with {name}={theirs.get(name)!r}; this one has "
                    f"{value!r}. Give the same settings to go on, or another path to begin anew."
                )
        if callable(self.schedule.annealing):
            for step, before in saved["weights"].items():
                if (now := self.schedule.weight(step)) != before:
                    raise ValueError(
                        f"{self.checkpoint} is of a run with another annealing: its weight at step "
                        f"{step} was {before!r}, and this one's is {now!r}. Give the same to go "
                        "on, or another path to begin anew."
                    )

    def _check_digests(self, saved: dict[str, Any]) -> None:
        others = "a run on other data", "another guide or model", "a run on other data"
        for part, other in zip(("data", "sites", "observed"), others, strict=True):
            if name := differing(saved[part], getattr(self, part)):
                raise ValueError(
                    f"{self.checkpoint} is of {other}: what differs is {name}. Give the same to "
                    "go on, or another path to begin anew."
                )

    def _restore(self, saved: dict[str, Any]) -> None:
        theirs = {name: _kind(value) for name, value in saved["params"].items()}
        ours = {name: _kind(value) for name, value in self.params.items()}
        if theirs != ours:
            name = min(dict(theirs.items() ^ ours.items()))
            raise ValueError(
                f"{self.checkpoint} is of another guide or model: parameter {name} is "
                f"{theirs.get(name, 'missing')} there and {ours.get(name, 'missing')} here. Give "
                "another path to begin anew."
            )
        for name in ("model", "guide"):
            if name in saved:
                getattr(self, name).load_state_dict(saved[name])
        with torch.no_grad():
            for name, value in saved["params"].items():
                self.params[name].copy_(value)
        self.optimizer.load_state_dict(saved["optimizer"])
        self.rows.restore(saved["rows"])
        self.averages = {n: v.to(self.params[n]) for n, v in saved["averages"].items()}
        self.losses = saved["losses"].tolist()
        self.step, end, falls_at, self.skipped, self.skipped_in_a_row = saved["progress"]
        self.schedule.end, self.schedule.falls_at = end, falls_at
        self.loss.health = self.loss.health.new_tensor(saved["health"])
        self.backend = saved["backend"]
        self.schedule.weights = dict(saved["weights"])
        self.batches.restore(saved["batches"])
        checkpoints.set_generators(saved["generators"])


def settings_of(elbo: Any) -> str:
    """A loss and what it was made with, as far as that decides its numbers."""
    given = {
        name: value
        for name, value in sorted(getattr(elbo, "__dict__", {}).items())
        if isinstance(value, bool | int | float | str)
        and not name.startswith("_")
        and name not in ("backend", "max_plate_nesting")  # which Pyro may find out while it runs
    }
    words = ", ".join(f"{name}={value!r}" for name, value in given.items())
    return f"{type(elbo).__name__}({words})"


def _kind(tensor: Tensor) -> str:
    return f"{tensor.dtype} of shape {tuple(tensor.shape)}"


def _next_multiple(step: int, size: int) -> int:
    return (step // size + 1) * size


def _mean(numbers: list[float]) -> float:
    return math.fsum(numbers) / len(numbers)
