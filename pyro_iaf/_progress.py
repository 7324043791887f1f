"""A progress bar whose output may fail without ending the run."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from statistics import fmean
from typing import Any

from tqdm.auto import tqdm

__all__ = ["progress_bar", "show"]

# How many steps there are between two updates of the ELBO that is shown.
STEPS_BETWEEN = 50


class _Stream:
    """A stream that ignores all writes after one has failed."""

    def __init__(self, stream: Any) -> None:
        self._stream, self._is_broken = stream, False

    def write(self, text: str) -> None:
        self._do("write", text)

    def flush(self) -> None:
        self._do("flush")

    def _do(self, what: str, *args: str) -> None:
        try:
            if not self._is_broken:
                getattr(self._stream, what)(*args)
        except Exception:  # a closed pipe, a full disk, an encoding, or stderr is None
            self._is_broken = True

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class _Bar(tqdm):  # type: ignore[misc]
    """A bar that releases its lock if drawing raises."""

    def refresh(self, *_: Any, **__: Any) -> None:
        # tqdm releases the lock of all its bars only if drawing succeeds.
        with self.get_lock():
            super().refresh(nolock=True)


def progress_bar(num_steps: int, first: int, shown: bool) -> tqdm[Any]:
    """A bar over a run's steps on stderr."""
    stream = _Stream(sys.stderr)
    return _Bar(
        total=num_steps,
        initial=first,
        disable=not shown,
        unit="step",
        file=stream,
        dynamic_ncols=True,
    )


def show(bar: tqdm[Any], step: int, end: int, losses: Sequence[float], skipped: int) -> None:
    """Moves a bar to a step, and shows the ELBO and its trend now and then."""
    if bar.disable:
        return
    is_due = losses and step // STEPS_BETWEEN > bar.n // STEPS_BETWEEN
    bar.total = end
    bar.update(step - bar.n)
    if is_due:
        last, before = losses[-100:], losses[-200:-100]
        shown = {"ELBO": f"{-fmean(last):.2f}"}
        if before:
            shown["trend"] = f"{fmean(before) - fmean(last):+.2f}/100 steps"
        if skipped:
            shown["skipped"] = str(skipped)
        bar.set_postfix(shown, refresh=False)
