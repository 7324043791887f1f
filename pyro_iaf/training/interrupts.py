"""Ctrl-C and SIGTERM end a run between two steps, where its state is whole."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

__all__ = ["Interrupts", "Terminated"]

# Who sees to a signal himself goes on to do so.
DEFAULTS = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}


class Terminated(BaseException):
    """SIGTERM has come."""


class Interrupts:
    """Holds both signals back within a ``with``, and lets them through where that is open.

    At its end the signals do what they did before. One that is still held back does so then, and so
    does the SIGTERM that a :class:`Terminated` stands for.

    Example:
        >>> with Interrupts() as interrupts:
        ...     with interrupts.open():  # Ctrl-C raises KeyboardInterrupt here,
        ...         pass
        ...     pass  # and here it waits for the next such place
    """

    def __init__(self) -> None:
        self._came: int | None = None
        self._is_open = False
        self._before: dict[int, Any] = {}
        self._process = os.getpid()

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():  # no other gets signals
            for number, default in DEFAULTS.items():
                if signal.getsignal(number) is default:
                    self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._give_back()
        if isinstance(error, Terminated):
            signal.raise_signal(signal.SIGTERM)
        if error is None and self._came is not None:
            signal.raise_signal(self._came)

    @contextmanager
    def open(self) -> Iterator[None]:
        """Where a signal may raise: the user's code, which may take long, and changes no state."""
        try:
            self._is_open = True
            self.check()
            yield
        finally:
            self._is_open = False

    def check(self) -> None:
        """Raises for a signal that came."""
        came, self._came = self._came, None
        if came == signal.SIGINT:
            raise KeyboardInterrupt
        if came == signal.SIGTERM:
            raise Terminated

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # a data loader's, say, that was forked within
            self._give_back()
            signal.raise_signal(number)
            return
        self._came = number
        if self._is_open:
            self.check()

    def _give_back(self) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)
        self._before = {}
