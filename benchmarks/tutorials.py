"""Runs code of the tutorials for benchmarks, in several processes."""

import concurrent.futures
import json
import os
import pathlib
import subprocess
import sys
from itertools import pairwise

__all__ = ["in_processes", "shown", "tutorial"]

FOLDER = pathlib.Path(__file__).parent.parent / "tutorials"


def tutorial(name, settings, until):
    """The names that a tutorial's code before this text defines, with these settings."""
    path = FOLDER / name
    code, found, _ = path.read_text().partition(until)
    assert found, f"{name} has no {until!r} any more"
    sys.argv = [str(path), *settings]
    space = {"__name__": path.stem}
    exec(compile(code, str(path), "exec"), space)
    return space


def in_processes(module, jobs, settings):
    """Runs ``python -m module --work *job`` for each job; returns their last lines, as JSON."""

    def run(job):
        command = [sys.executable, "-m", module, "--work", *map(str, job), *settings]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
        found = json.loads(done.stdout.splitlines()[-1])
        print(*job, *(f"{number:9.3f}" for number in found), flush=True)
        return found

    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(jobs, pool.map(run, jobs), strict=True))


def shown(settings):
    """Settings for the results, without paths of this machine."""
    paths = {"--mnist": "FOLDER", "--data": "FILE"}
    return " ".join(paths.get(before, s) for before, s in pairwise(["", *settings]))
