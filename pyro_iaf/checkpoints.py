"""Files that a training run goes on from, whenever and however it was ended."""

from __future__ import annotations

import hashlib
import os
import tempfile
from pathlib import Path
from typing import Any

import torch

from .calls import opened

__all__ = ["digest", "load", "save"]

FORMAT = "pyro_iaf.fit 1"


def digest(args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """Tells one call's tensors from another's, by their numbers."""
    found = hashlib.sha256()
    for tensor in opened(args, kwargs)[0]:
        if tensor.layout == torch.strided and not tensor.requires_grad:
            found.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
            found.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def save(path: Path, state: dict[str, Any]) -> None:
    """Writes a state whole or not at all: into a file beside it, which then takes its place."""
    path = path.absolute()
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            torch.save({"format": FORMAT, **state}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def load(path: Path) -> dict[str, Any] | None:
    """The state in a file, on the CPU; None if there is no file.

    Raises:
        ValueError: If it is damaged, or holds something else.
    """
    if not path.exists():
        return None
    if path.is_dir():
        raise ValueError(f"checkpoint should be a file, and {path} is a folder.")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(
            f"{path} can't be read as a checkpoint of fit; it is damaged, or something else. Move "
            "it away to begin anew, or give another path."
        ) from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise ValueError(
            f"{path} holds something else than a checkpoint of fit, or one of another version. "
            "Give another path."
        )
    return state
