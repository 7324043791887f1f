"""Files from which a training run resumes, however it was interrupted."""

from __future__ import annotations

import hashlib
import io
import os
import re
import socket
import stat
import threading
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyro
import torch
from torch import nn

from .._validation import warn
from ..models.arguments import Args, Kwargs
from .digests import Digests, differing, digest, digests_of_sites, in_words

if TYPE_CHECKING:
    from .run import Run

__all__ = ["Checkpoint", "load", "prepare", "save", "settings_of"]

FORMAT = "pyro_iaf.fit 7"

# The length of the hash at the end of a file, in bytes.
LENGTH_OF_HASH = 64

# The entries of every checkpoint, besides the states of modules.
PARTS = (
    "averages", "backend", "batches", "batches_before", "data", "generators", "generators_before",
    "kept", "looks", "losses", "minibatches", "observed", "optimizer", "params", "place",
    "progress", "recordings", "relative_ess", "rows", "settings", "sites", "stage", "weights",
)  # fmt: skip


class Checkpoint:
    """The checkpoint of a run, every so many steps; without a path it does nothing."""

    def __init__(self, run: Run, path: Path | None, every: int) -> None:
        self.run, self.path, self.every = run, path, every
        self.saved_at, self.could_save = 0, True
        self._place: dict[str, Any] = {"step": -1}  # no step yet
        self._before: dict[str, Any] = {}  # the generators before the first batch
        self._digests: dict[str, Digests] = {}

    def open(self) -> dict[str, Any] | None:
        """The state in the file, if it exists; sets the generators to those before the first batch.

        Raises:
            ValueError: If the file is damaged, or of a run with other settings.
        """
        if self.path is None:
            return None
        run, batches, saved = self.run, self.run.batches, load(self.path)
        if saved is not None:
            self._check_settings(saved)
            if saved["stage"]["number"] < run.stage.number:
                saved = None
        if saved is not None:
            # So that the first batch is the same.
            set_generators(saved["generators_before"])
            batches.set_generators(saved["batches_before"])
        self._before = {"generators_before": generators(), "batches_before": batches.generators()}
        return saved

    def compute_digests(self, args: Args, kwargs: Kwargs) -> None:
        """Computes the digests of data, model and guide, at the first batch."""
        if self.path is None:
            return
        run, batches = self.run, self.run.batches
        before = generators()
        try:
            simulated = set(batches.simulate.values())
            observed, sites = digests_of_sites(run.model, run.guide, args, kwargs, simulated)
        except Exception:  # whatever a model may raise at some draw
            observed, sites = {}, {}
        finally:
            set_generators(before)
        for name, module in self._modules().items():
            sites[f"the {name}"] = [digest(in_words(module))]
        data: Digests = {
            "args": [digest(batches.args)],
            "kwargs": [digest(batches.kwargs)],
            "the first minibatch": [digest(batches.without_simulated(args, kwargs))],
        }
        self._digests = {"data": data, "sites": sites, "observed": observed}

    def note_place(self) -> None:
        """Notes the states of generators, data and recordings, between two steps."""
        if self.path is None:
            return
        cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
        self._place = {
            "step": self.run.step,
            "generators": {"torch": torch.get_rng_state(), "cuda": cuda},
            "batches": self.run.batches.state(),
            "minibatches": self.run.minibatches.state(),
            "recordings": self.run.steps.state(),
        }

    def save(self) -> None:
        """Writes the state after the last step, if it is new; warns once if it can't be written."""
        run, schedule = self.run, self.run.schedule
        if self.path is None or run.step == self.saved_at:
            return
        run.steps.stop()
        # Noted before, if the batch of the next step is already drawn.
        if self._place["step"] != run.step:
            self.note_place()
        progress = run.step, run.skipped, run.skipped_in_a_row
        state = {
            **{name: module.state_dict() for name, module in self._modules().items()},
            **self._digests,
            **self._before,
            "settings": self._settings,
            "stage": vars(run.stage),
            "params": {name: param.detach() for name, param in run.params.items()},
            "optimizer": run.optimizer.state_dict(),
            "rows": run.rows.state(),
            "averages": run.averages.values,
            "kept": run.averages.kept,
            "minibatches": self._place["minibatches"],
            "losses": torch.tensor(run.losses, dtype=torch.float64),
            "relative_ess": run.loss.relative_ess.item(),
            "backend": run.backend,
            "recordings": self._place["recordings"],
            "progress": list(progress),
            "place": schedule.place,
            "looks": [[]] if run.certificate is None else run.certificate.state(),
            "weights": {k: weight for k, weight in schedule.weights.items() if k < run.step},
            "generators": {**generators(), **self._place["generators"]},
            "batches": self._place["batches"],
        }
        try:
            save(self.path, state)
            self.saved_at = run.step
        except OSError as error:
            if self.could_save:
                warn(
                    f"fit can't write its checkpoint {self.path}: {error}. It trains on, "
                    "keeps the last one that it wrote, and tries again. Make room there."
                )
            self.could_save = False

    def restore(self, saved: dict[str, Any]) -> None:
        """Sets the run to a saved state.

        Raises:
            ValueError: If that is of other data, or of another guide or model.
        """
        for part, digests in self._digests.items():
            if name := differing(saved[part], digests):
                other = "another guide or model" if part == "sites" else "a run on other data"
                raise ValueError(
                    f"{self.path} is of {other}: what differs is {name}. Give the same to "
                    "go on, or another path to begin anew."
                )
        try:
            self._restore(saved)
        except (LookupError, RuntimeError, TypeError) as error:
            raise ValueError(
                f"{self.path} is of another guide or model, or is damaged: {error}. Give "
                "another path to begin anew."
            ) from error
        self.saved_at = self.run.step

    def _restore(self, saved: dict[str, Any]) -> None:
        run, schedule = self.run, self.run.schedule
        theirs, ours = (
            {name: f"{value.dtype} of shape {tuple(value.shape)}" for name, value in params.items()}
            for params in (saved["params"], run.params)
        )
        if theirs != ours:
            name = min(dict(theirs.items() ^ ours.items()))
            raise ValueError(
                f"{self.path} is of another guide or model: parameter {name} is "
                f"{theirs.get(name, 'missing')} there and {ours.get(name, 'missing')} here. Give "
                "another path to begin anew."
            )
        for name, module in self._modules().items():
            if name in saved:
                module.load_state_dict(saved[name])
        with torch.no_grad():
            for name, value in saved["params"].items():
                run.params[name].copy_(value)
        run.optimizer.load_state_dict(saved["optimizer"])
        run.rows.restore(saved["rows"])
        for values, name in ((run.averages.values, "averages"), (run.averages.kept, "kept")):
            values.update({n: v.to(run.params[n]) for n, v in saved[name].items()})
        run.minibatches.restore(saved["minibatches"])
        run.losses = saved["losses"].tolist()
        run.step, run.skipped, run.skipped_in_a_row = saved["progress"]
        schedule.place = saved["place"]
        if run.certificate is not None:
            run.certificate.go_on(saved["looks"])
        run.loss.relative_ess = run.loss.relative_ess.new_tensor(saved["relative_ess"])
        run.backend = saved["backend"]
        schedule.weights = dict(saved["weights"])
        run.batches.restore(saved["batches"])
        set_generators(saved["generators"])

    def _modules(self) -> dict[str, nn.Module]:
        pair = {"model": self.run.model, "guide": self.run.guide}
        return {name: thing for name, thing in pair.items() if isinstance(thing, nn.Module)}

    @property
    def _settings(self) -> dict[str, Any]:
        run, schedule = self.run, self.run.schedule
        return {
            "num_steps": schedule.asked,
            "num_particles": run.num_particles,
            "lr": schedule.lr,
            "clip_norm": run.clip_norm,
            "early_stop": schedule.early_stop,
            "annealing": "a function" if callable(schedule.annealing) else schedule.annealing,
            "loss": settings_of(run.elbo),
            "simulate": run.batches.simulate,
            "anchor": run.anchor,
            "seed": run.seed,
            "default dtype": str(torch.get_default_dtype()),
        }

    def _check_settings(self, saved: dict[str, Any]) -> None:
        for name, value in self._settings.items():
            if (before := saved["settings"].get(name)) != value:
                raise ValueError(
                    f"{self.path} is of a run with {name}={before!r}; this one has {value!r}. "
                    "Give the same settings to go on, or another path to begin anew."
                )
        schedule = self.run.schedule
        for step, before in saved["weights"].items() if callable(schedule.annealing) else ():
            if (now := schedule.weight(step)) != before:
                raise ValueError(
                    f"{self.path} is of a run with another annealing: its weight at step "
                    f"{step} was {before!r}, and this one's is {now!r}. Give the same to go "
                    "on, or another path to begin anew."
                )


def settings_of(elbo: Any) -> str:
    """The class of a loss and those of its settings that its values depend on."""
    settings = [
        f"{name}={value!r}"
        for name, value in sorted(getattr(elbo, "__dict__", {}).items())
        if isinstance(value, bool | int | float | str)
        and not name.startswith("_")
        and name not in ("backend", "max_plate_nesting")  # which Pyro may find out while it runs
    ]
    return f"{type(elbo).__name__}({', '.join(settings)})"


# The file


def prepare(path: str | os.PathLike[str]) -> Path:
    """The absolute path of a checkpoint, checked to be writable; makes its folder.

    Removes temporary files beside it whose processes were killed.

    Raises:
        ValueError: If this is no path, or not that of a file.
        OSError: If it can't be written.
    """
    if not isinstance(path, str | os.PathLike) or not os.fspath(path) or "\0" in str(path):
        raise ValueError(f"checkpoint should be the path of a file, as 'run.pt'; got {path!r}.")
    # The target of a link, so that the link is not replaced.
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
        with _writing:  # another thread may write there
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
    """Writes a state completely or not at all, by a temporary file beside it."""
    archive = io.BytesIO()  # in memory first, so that a full disk raises an OSError
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
        ValueError: If the file is damaged, or no checkpoint.
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
    if missing := [part for part in PARTS if part not in state]:
        raise ValueError(f"{damaged} It lacks {missing[0]!r}.")
    if archive != _sealed(archive[: -LENGTH_OF_HASH - 2] + b"\0\0"):
        raise ValueError(damaged)
    return state


def _sealed(archive: bytes) -> bytes:
    """A zip archive with its hash as its comment, so that any changed bit is found.

    The archive's own checksums leave its tables out, and torch.load does not check them.
    """
    comment = hashlib.sha256(archive).hexdigest().encode()
    return archive[:-2] + len(comment).to_bytes(2, "little") + comment  # where a zip archive ends


# Temporary files

_writing = threading.Lock()  # a process has one temporary file for each checkpoint


def _write(path: Path, content: bytes) -> Path:
    """Writes a temporary file of this process beside another, completely or not at all."""
    beside = path.parent / f"{_prefix(path)}{os.getpid()}"
    try:
        # Not by tempfile, whose files ignore the umask and are private.
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
    """The prefix of the names of temporary files beside another, on this machine.

    A hash, since a name that contains the file's could be too long.
    """
    of = hashlib.sha256(f"{socket.gethostname()} {path.name}".encode()).hexdigest()
    return f".checkpoint-{of[:16]}-"


def _clear(path: Path) -> None:
    """Removes temporary files beside another whose processes have ended."""
    pattern = re.compile(re.escape(_prefix(path)) + r"(\d+)")
    for name in os.listdir(path.parent):
        found = pattern.fullmatch(name)
        if found and not _is_running(int(found[1])):
            with suppress(OSError):
                (path.parent / name).unlink()


def _is_running(process: int) -> bool:
    """Whether another process with this number runs."""
    if process == os.getpid():  # an earlier process had our number
        return False
    if os.name != "posix":  # elsewhere os.kill(process, 0) sends a real signal
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
    """Sets the generators to these states."""
    name, numbers, *rest = state["numpy"]
    numbers = numbers.numpy().astype(np.uint32)
    pyro.util.set_rng_state({**state, "numpy": (name, numbers, *rest)})
    for device, numbers in enumerate(state["cuda"][: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(numbers, device)
