"""What a fit found."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

__all__ = ["AVERAGED", "FitResult"]

# The share of steps, the last ones, whose parameters are averaged.
AVERAGED = 0.2


@dataclass
class FitResult:
    """What :func:`~pyro_iaf.fit` did.

    Attributes:
        losses: The loss of every step that was taken, the negative ELBO in nats.
        num_steps: How many steps were tried.
        stopped: Whether the ELBO had settled before the steps that were asked for were over.
        skipped: How many steps had a loss or a gradient that was not finite, and were not taken.
        seconds: How long it took, without what an earlier process did before a checkpoint.
        backend: What took the last step: ``"inductor"``, ``"graph"`` or, uncompiled, ``"eager"``.
        resumed_at: The step from which a checkpoint went on; 0 where there was none.

    Example:
        >>> result = FitResult(torch.full((100,), 2.5), 100, False, 0, 1.0)
        >>> result.settled
        (2.5, 0.0)
        >>> print(result)
        ELBO -2.50 +/- 0 nats after 100 steps; 1.0 s
    """

    losses: Tensor = field(repr=False)
    num_steps: int
    stopped: bool
    skipped: int
    seconds: float
    backend: str = "eager"
    resumed_at: int = 0

    @property
    def settled(self) -> tuple[float, float]:
        """The mean loss while parameters were averaged, and its standard error."""
        last = self.losses[-max(1, int(AVERAGED * self.num_steps)) :]
        return last.mean().item(), (last.var(correction=0) / len(last)).sqrt().item()

    def __str__(self) -> str:
        loss, error = self.settled
        text = f"ELBO {-loss:.2f} +/- {error:.1g} nats after {self.num_steps} steps"
        if self.stopped:
            text += ", where it had settled"
        if self.skipped:
            text += f"; {self.skipped} of them were skipped, since they were not finite"
        if self.resumed_at:
            text += f"; the first {self.resumed_at} are of a checkpoint"
        return text + f"; {self.seconds:.1f} s"
