"""The stages of a fit: the guide as it was made, and with each set of components that it gains.

A guide that can grow is trained until it is certified, and searched. Where modes are missing, it
gets a component at each; or if it is not good, at peaks that share a component. Their weights are
found by importance sampling, and then all components are trained together.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..models.log_joint import LogJoint
from ..models.traces import quietly
from . import checkpoints
from .certificate import missing_modes, shared_peaks
from .result import FitResult
from .run import Run

__all__ = ["Stage", "Stages"]


@dataclass
class Stage:
    """What came before a run.

    Attributes:
        number: The number of earlier stages.
        losses: The losses of their steps.
        skipped: The number of their steps that were skipped.
    """

    number: int = 0
    losses: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))
    skipped: int = 0

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

    def following(self, result: FitResult) -> Stage:
        """The next stage, after this total."""
        return Stage(self.number + 1, result.losses, result.skipped)


class Stages:
    """All stages of one call of :func:`~pyro_iaf.fit`.

    Args:
        make: Makes the run of a stage.
        guide: The guide.
        path: The checkpoint, or None.
    """

    def __init__(self, make: Callable[[Stage], Run], guide: Any, path: Path | None) -> None:
        self.make, self.guide, self.path = make, guide, path
        self.before: dict[str, Any] = {}  # the guide's state before that of a checkpoint

    def to_the_end(self, progress: bool) -> FitResult:
        """Runs all stages; an error gets the result so far as its attribute ``result``."""
        began, resumed_at = time.perf_counter(), 0
        stage, has_more = self._saved(), True
        while has_more:
            run = self.make(stage)
            try:
                result = stage.total(run.to_the_end(progress))
            except BaseException as error:
                if hasattr(error, "result"):
                    error.result = stage.total(error.result)
                if self.before and not hasattr(run, "steps"):  # the checkpoint was refused
                    self.guide.load_state_dict(self.before, strict=False)
                raise
            resumed_at = resumed_at or result.resumed_at
            try:
                stage, has_more = stage.following(result), self._has_grown(run)
            except BaseException as error:
                error.result = result  # type: ignore[attr-defined]
                raise
        return replace(result, resumed_at=resumed_at, seconds=time.perf_counter() - began)

    def _saved(self) -> Stage:
        """The stage of the checkpoint, whose components the guide gets; else the first."""
        saved = None if self.path is None else checkpoints.load(self.path)
        if saved is None:
            return Stage()
        theirs, has_components = saved.get("guide", {}), hasattr(self.guide, "add_component")
        ours = self.guide.state_dict() if has_components else {}
        is_other = "mixture.logits" in ours and ours.keys() != theirs.keys()
        if saved["stage"]["number"] or is_other:
            try:
                self.before = copy.deepcopy(ours)
                self.guide.load_state_dict(theirs)
            except (AttributeError, LookupError, RuntimeError) as error:
                raise ValueError(
                    f"{self.path} is of another guide or model, or is damaged: {error}. Give "
                    "another path to begin anew."
                ) from error
        return Stage(**saved["stage"])

    def _has_grown(self, run: Run) -> bool:
        """Adds components after a run; whether there is something to add."""
        guide = self.guide
        certificate = run.certificate
        if certificate is None or certificate.diagnosis is None or not certificate.may_grow:
            return False
        found, joint = certificate.diagnosis, certificate.particles.log_joint()
        modes = missing_modes(found)
        peaks = [] if modes else shared_peaks(guide, found)
        with quietly():
            for mode in modes:
                sites = {name: value.unsqueeze(0) for name, value in mode.sites.items()}
                self._add(joint, joint.unconstrained(sites)[0], mode.share)
            if modes:
                guide.fit_weights(joint)
            for peak in peaks:  # with a share to be trained with, as the component there has all
                self._add(joint, peak, 1 / (1 + len(guide.component_weights)))
        return bool(modes or peaks)

    def _add(self, joint: LogJoint, point: Tensor, share: float) -> None:
        if self.guide.can_grow:
            self.guide.add_component(joint, point, share)
