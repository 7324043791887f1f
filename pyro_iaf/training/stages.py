"""The stages of a fit: the guide as it was made, each component that a search adds, and all.

A guide that can grow is trained until it is certified, and searched. Where modes are missing, it
gets a component at each, which is trained alone from there. The weights of the components are their
shares of the posterior by importance sampling. If that is not good, all are trained together.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..diagnostics.diagnose import Diagnosis
from ..elbo.objectives import LatentLoss
from ..models.log_joint import LogJoint
from ..models.traces import quietly
from ..models.weighted import WeightedParticles
from . import checkpoints
from .certificate import UNCHANGED, Certificate
from .result import FitResult
from .run import Run

__all__ = ["Stage", "Stages"]

# A mode gets a component if it holds more of the posterior than this.
SMALLEST_SHARE = 0.02


@dataclass
class Stage:
    """What a run trains, and what comes after it.

    Attributes:
        number: How many stages came before.
        component: The component that it trains alone; None for the whole guide.
        starts: Where further components begin: a share and a point in unconstrained space each.
        losses: The losses of the stages before.
        skipped: The number of their steps that were skipped.
    """

    number: int = 0
    component: int | None = None
    starts: Sequence[Sequence[float]] = ()
    losses: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))
    skipped: int = 0

    @property
    def is_alone(self) -> bool:
        """Whether one of several components is trained alone."""
        return self.component is not None

    def state(self) -> dict[str, Any]:
        """The state for a checkpoint."""
        return {**vars(self), "starts": [list(start) for start in self.starts]}

    def total(self, result: FitResult) -> FitResult:
        """The result of this stage and of those before."""
        before = len(self.losses) + self.skipped
        return replace(
            result,
            losses=torch.cat([self.losses, result.losses]),
            num_steps=before + result.num_steps,
            skipped=self.skipped + result.skipped,
            resumed_at=before + result.resumed_at if result.resumed_at else 0,
        )


class Stages:
    """All stages of one call of :func:`~pyro_iaf.fit`.

    Args:
        make: Makes the run of a stage.
        guide: The guide.
        path: The checkpoint, or None.
    """

    def __init__(self, make: Callable[[Stage], Run], guide: Any, path: Path | None) -> None:
        self.make, self.guide, self.path = make, guide, path

    def to_the_end(self, progress: bool) -> FitResult:
        """Runs all stages; an error gets the result so far as its attribute ``result``."""
        began = time.perf_counter()
        stage: Stage | None = self._saved()
        while stage is not None:
            alone = self.guide.alone(stage.component) if stage.is_alone else nullcontext()
            with alone:
                run = self.make(stage)
                try:
                    result = stage.total(run.to_the_end(progress))
                except BaseException as error:
                    if hasattr(error, "result"):
                        error.result = stage.total(error.result)
                    raise
            stage = self._after(stage, run, result)
        result.seconds = time.perf_counter() - began
        return result

    def _saved(self) -> Stage:
        """The stage of the checkpoint, whose components the guide gets; else the first."""
        saved = None if self.path is None else checkpoints.load(self.path)
        if saved is None or not saved["stage"]["number"]:
            return Stage()
        try:
            self.guide.load_state_dict(saved["guide"])
        except (AttributeError, LookupError, RuntimeError) as error:
            raise ValueError(
                f"{self.path} is of another guide or model, or is damaged: {error}. Give another "
                "path to begin anew."
            ) from error
        return Stage(**saved["stage"])

    def _after(self, stage: Stage, run: Run, result: FitResult) -> Stage | None:
        """The stage that comes next, if one does; judges a guide whose components are trained."""
        can_grow = run.certificate is not None and isinstance(run.loss, LatentLoss)
        if not (can_grow and hasattr(self.guide, "add_component")):
            return None
        assert run.particles is not None
        following = replace(
            stage,
            number=stage.number + 1,
            component=None,
            losses=result.losses,
            skipped=result.skipped,
        )
        joint = run.particles.log_joint()
        if stage.is_alone and not stage.starts:
            result.diagnosis, result.stopped = self._judged(run), UNCHANGED
        found = result.diagnosis
        starts = list(stage.starts)
        if not starts and found is not None:
            starts = self._starts(found, joint)
        if starts and self.guide.can_grow:
            self._add(joint, starts.pop(0))
            number = len(self.guide.component_weights) - 1
            return replace(following, component=number, starts=starts)
        is_good = found is not None and found.verdict == "good"
        peaks: Sequence[Tensor] = ()
        if not is_good and found is not None and found.peaks is not None:
            peaks = self.guide.without_component(found.peaks)
        for peak in peaks:
            if self.guide.can_grow:
                share = 1 / (1 + len(self.guide.component_weights))
                self._add(joint, [share, *peak.tolist()])
        has_changed = stage.is_alone or len(peaks) > 0
        return replace(following, starts=()) if has_changed and not is_good else None

    @staticmethod
    def _starts(found: Diagnosis, joint: LogJoint) -> list[Sequence[float]]:
        """Where components are to begin, each with its share: in modes that the guide misses."""
        starts: list[Sequence[float]] = []
        for mode in found.modes:
            if mode.share > SMALLEST_SHARE:
                sites = {name: value.unsqueeze(0) for name, value in mode.sites.items()}
                starts.append([mode.share, *joint.unconstrained(sites)[0].tolist()])
        return starts

    def _add(self, joint: LogJoint, start: Sequence[float]) -> None:
        share, *point = start
        like = next(iter(joint.latents.values()))["value"]
        with quietly():
            place = torch.tensor(point, dtype=like.dtype, device=like.device)
            self.guide.add_component(joint, place, share)

    def _judged(self, run: Run) -> Diagnosis:
        """The diagnosis of the whole guide, after its weights are fitted."""
        assert run.particles is not None
        args, kwargs = run.particles.args, run.particles.kwargs
        with torch.random.fork_rng():  # the same draws if resumed here
            particles = WeightedParticles(run.model, self.guide, args, kwargs)
            with quietly():
                self.guide.fit_weights(particles.log_joint())
            return Certificate(particles, lambda: None, run.num_particles).conclude(run.step)
