"""Files that a training run goes on from, whenever and however it was ended."""

from __future__ import annotations

import hashlib
import io
import os
import random
import re
import socket
import stat
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import torch

__all__ = ["generators", "load", "prepare", "save", "set_generators"]

FORMAT = "pyro_iaf.fit 2"

# What every checkpoint has; a module's state comes on top.
PARTS = (
    "averages",
    "backend",
    "batches",
    "batches_before",
    "data",
    "generators",
    "generators_before",
    "health",
    "losses",
    "observed",
    "optimizer",
    "params",
    "progress",
    "recordings",
    "rows",
    "settings",
    "sites",
    "weights",
)


def prepare(path: str | os.PathLike[str]) -> Path:
    """Where a checkpoint goes, so that it can be written: with its folder, and nothing beside it.

    Clears what writers left there that were killed.

    Raises:
        ValueError: If it is no path, or of something else than a file.
        OSError: If it can't be written.
    """
    if not isinstance(path, str | os.PathLike) or not os.fspath(path) or "\0" in str(path):
        raise ValueError(f"checkpoint should be the path of a file, as 'run.pt'; got {path!r}.")
    # The file that a link leads to, so that the link stays.
    file = Path(os.path.realpath(os.path.expanduser(path)))
    try:
        with suppress(FileNotFoundError):
            if not stat.S_ISREG(file.stat().st_mode):
                what = "a folder" if file.is_dir() else "no file"
                raise ValueError(
                    f"checkpoint should be a file, and {file} is {what}. Give a path in it, or "
                    "another."
                )
        file.parent.mkdir(parents=True, exist_ok=True)
        with _writing:  # another thread may be about to write there
            _clear(file)
            _write(file, b"").unlink()
    except OSError as error:
        raise OSError(
            error.errno,
            f"checkpoint should be a file that can be written, and {file} can't: "
            f"{error.strerror}. Give a path in a folder of yours",
        ) from error
    return file


def save(path: Path, state: dict[str, Any]) -> None:
    """Writes a state whole or not at all: into a file beside it, which then takes its place."""
    archive = io.BytesIO()  # in memory first, so that what a full disk raises is an OSError
    torch.save({"format": FORMAT, **state}, archive)
    path.parent.mkdir(parents=True, exist_ok=True)
    with _writing:
        beside = _write(path, _sealed(archive.getvalue()))
        try:
            os.replace(beside, path)
        except BaseException:
            beside.unlink(missing_ok=True)
            raise


def load(path: Path) -> dict[str, Any] | None:
    """The state in a file, on the CPU; None if there is no file.

    Raises:
        ValueError: If it is damaged, or holds something else.
        OSError: If it can't be read.
    """
    try:
        archive = path.read_bytes()
    except FileNotFoundError:
        return None
    damaged = (
        f"{path} can't be read as a checkpoint of fit; it is damaged, or something else. Move it "
        "away to begin anew, or give another path."
    )
    try:
        state = torch.load(io.BytesIO(archive), map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(damaged) from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise ValueError(
            f"{path} holds something else than a checkpoint of fit, or one of another version. "
            "Give another path."
        )
    missing = [part for part in PARTS if part not in state]
    if missing:
        raise ValueError(f"{damaged} It lacks {missing[0]!r}.")
    if archive != _sealed(archive[: -_LENGTH - 2] + b"\0\0"):
        raise ValueError(damaged)
    return state


_LENGTH = 64


def _sealed(archive: bytes) -> bytes:
    """An archive with its digest as its comment, so that a single bit that changed is found.

    The sums of the archive's own leave its tables out, torch.load looks at none of them, and they
    may be switched off.
    """
    comment = hashlib.sha256(archive).hexdigest().encode()
    return archive[:-2] + len(comment).to_bytes(2, "little") + comment  # a zip archive ends so


# The file beside

_writing = threading.Lock()  # a process has one file beside each


def _write(path: Path, content: bytes) -> Path:
    """Writes a file of this process beside another, whole or not at all."""
    beside = path.parent / f"{_prefix(path)}{os.getpid()}"
    try:
        # Not by tempfile, whose files nobody else may read, whatever the umask says.
        with open(beside, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        with suppress(OSError):
            beside.unlink()
        raise
    return beside


def _prefix(path: Path) -> str:
    """What the names of the files beside another begin with, on this machine.

    Of one length, as the file's name may be as long as names can be.
    """
    of = hashlib.sha256(f"{socket.gethostname()} {path.name}".encode()).hexdigest()
    return f".checkpoint-{of[:16]}-"


def _clear(path: Path) -> None:
    """Removes the files beside another whose writers are gone."""
    pattern = re.compile(re.escape(_prefix(path)) + r"(\d+)")
    for name in os.listdir(path.parent):
        found = pattern.fullmatch(name)
        if found and not _is_running(int(found[1])):
            with suppress(OSError):
                (path.parent / name).unlink()


def _is_running(process: int) -> bool:
    """Whether there is another process of this number."""
    if process == os.getpid():  # it was another's before
        return False
    if os.name != "posix":  # where there is no signal that only asks
        return True
    try:
        os.kill(process, 0)
    except PermissionError:
        return True
    except (OSError, OverflowError):
        return False
    return True


# Random numbers


def generators() -> dict[str, Any]:
    """The states of all generators that :func:`pyro.set_rng_seed` seeds, in plain types."""
    state = pyro.util.get_rng_state()
    name, numbers, *rest = state["numpy"]
    state["numpy"] = [name, torch.from_numpy(numbers.astype(np.int64)), *rest]
    state["cuda"] = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return state


def set_generators(state: dict[str, Any]) -> None:
    """Sets them so."""
    name, numbers, *rest = state["numpy"]
    np.random.set_state((name, numbers.numpy().astype(np.uint32), *rest))
    random.setstate(state["random"])
    torch.set_rng_state(state["torch"])
    for device, numbers in enumerate(state["cuda"][: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(numbers, device)
