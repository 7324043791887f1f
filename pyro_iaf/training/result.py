"""The result of a fit."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from torch import Tensor

from ..diagnostics.diagnose import Diagnosis

__all__ = ["AVERAGED", "FitResult"]

# The parameters of this share of the steps, the last ones, are averaged.
AVERAGED = 0.2


@dataclass
class FitResult:
    """The losses of a :func:`~pyro_iaf.fit`, and how it went; ``print(result)`` says it in words.

    Attributes:
        losses: The loss of every step that was taken, the negative ELBO in nats.
        num_steps: The number of steps, with those that were skipped.
        stopped: Why the run stopped, in words.
        skipped: The number of steps whose loss or gradient was not finite, which changed nothing.
        seconds: The duration, without that of earlier processes before a checkpoint.
        backend: How the last step ran: ``"inductor"``, ``"graph"`` or, uncompiled, ``"eager"``.
        resumed_at: The step of the checkpoint from which the run resumed, or 0.
        num_averaged: The number of steps, the last ones, whose parameters were averaged; None means
            a fifth of all.
        diagnosis: How good the guide is, if the run went on until that was known, or None.
        noise: The variance of the gradient over minibatches, first without an anchor and then with
            it: in each latent, in units of the guide's standard deviation, averaged over latents.
            None without minibatches, or where no anchor could be placed.

    Example:
        >>> result = FitResult(torch.full((100,), 2.5), 100, "all steps were taken", 0, 1.0)
        >>> result.settled
        (2.5, 0.0)
        >>> print(result)
        ELBO -2.50 +/- 0 nats after 100 steps: all steps were taken; 1.0 s
    """

    losses: Tensor = field(repr=False)
    num_steps: int
    stopped: str
    skipped: int
    seconds: float
    backend: str = "eager"
    resumed_at: int = 0
    num_averaged: int | None = None
    diagnosis: Diagnosis | None = None
    noise: tuple[float, float] | None = None

    @property
    def settled(self) -> tuple[float, float]:
        """The negative ELBO and its standard error.

        By the draws of the diagnosis, or the mean loss while parameters were averaged.
        """
        if self.diagnosis is not None and math.isfinite(self.diagnosis.elbo):
            return -self.diagnosis.elbo, self.diagnosis.elbo_se
        averaged = self.num_averaged
        if averaged is None:
            averaged = int(AVERAGED * self.num_steps)
        last = self.losses[-max(1, averaged) :]
        return last.mean().item(), (last.var(correction=0) / len(last)).sqrt().item()

    def __str__(self) -> str:
        loss, error = self.settled
        text = f"ELBO {-loss:.2f} +/- {error:.1g} nats after {self.num_steps} steps: {self.stopped}"
        if self.skipped:
            text += f"; {self.skipped} of them were skipped, since they were not finite"
        if self.resumed_at:
            text += f"; the first {self.resumed_at} are from a checkpoint"
        text += f"; {self.seconds:.1f} s"
        return text if self.diagnosis is None else f"{text}\n{self.diagnosis}"
