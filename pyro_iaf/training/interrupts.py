"""Ctrl-C and SIGTERM end a run between two steps, when its state is consistent."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

__all__ = ["Interrupts", "Terminated"]

# A signal with another handler than these keeps it.
DEFAULTS = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}


class Terminated(BaseException):
    """Raised for SIGTERM."""


class Interrupts:
    """Delays both signals within a ``with``, until the next :meth:`open` or :meth:`check`.

    On exit the previous handlers return. A signal that is still pending is raised again then, and
    so is SIGTERM after :class:`Terminated`.

    Example:
        >>> with Interrupts() as interrupts:
        ...     with interrupts.open():  # Ctrl-C raises KeyboardInterrupt here
        ...         pass
        ...     pass  # and is delayed here
    """

    def __init__(self) -> None:
        self._pending: int | None = None
        self._is_open = False
        self._before: dict[int, Any] = {}
        self._process = os.getpid()

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():  # other threads get no signals
            for number, default in DEFAULTS.items():
                if signal.getsignal(number) is default:
                    self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self._restore_handlers()
        if isinstance(error, Terminated):
            signal.raise_signal(signal.SIGTERM)
        if error is None and self._pending is not None:
            signal.raise_signal(self._pending)

    @contextmanager
    def open(self) -> Iterator[None]:
        """Lets signals raise, for code of the user that may take long and changes no state."""
        try:
            self._is_open = True
            self.check()
            yield
        finally:
            self._is_open = False

    def check(self) -> None:
        """Raises if a signal is pending."""
        pending, self._pending = self._pending, None
        if pending == signal.SIGINT:
            raise KeyboardInterrupt
        if pending == signal.SIGTERM:
            raise Terminated

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # a forked one, for example of a data loader
            self._restore_handlers()
            signal.raise_signal(number)
            return
        self._pending = number
        if self._is_open:
            self.check()

    def _restore_handlers(self) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)
        self._before = {}
