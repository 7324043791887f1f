"""Paired timings: contenders take turns, so that noise of the machine affects all of them."""

import json
import pathlib
import platform
import statistics
import subprocess
import sys
import time

import pyro
import torch

from pyro_iaf import AutoIAF, fit

RESULTS = pathlib.Path(__file__).parent / "results"


def race(contenders, *, rounds=15, seconds=0.02):
    """Median time of each contender, and the median over rounds of its ratio to the last one.

    ``contenders`` maps names to functions. Each round runs all of them in turn, each as often as
    fits in ``seconds``.
    """
    repeats = {}
    for name, run in contenders.items():
        run()  # warm up
        start = time.perf_counter()
        run()
        repeats[name] = max(1, int(seconds / (time.perf_counter() - start)))
    times = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, run in contenders.items():
            start = time.perf_counter()
            for _ in range(repeats[name]):
                run()
            times[name].append((time.perf_counter() - start) / repeats[name])
    peer = times[list(contenders)[-1]]
    return {
        name: {
            "microseconds": round(1e6 * statistics.median(taken), 2),
            "ratio": round(statistics.median(a / b for a, b in zip(taken, peer, strict=True)), 3),
        }
        for name, taken in times.items()
    }


def rows_of_fresh_processes(module, names, seeds, *options):
    """The rows that ``python -m module --one NAME SEED`` prints as JSON, each in a new process."""
    rows = []
    for seed in range(seeds):
        for name in names:
            command = [sys.executable, "-m", module, "--one", name, str(seed), *options]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                sys.exit(done.stderr)
            found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
            print(*found, sep="\n", flush=True)
            rows += found
    return rows


def timed_fit(model, seed):
    """A fit at the defaults: its guide, its result, and the seconds from model to printed words."""
    pyro.clear_param_store()
    began = time.perf_counter()
    guide = AutoIAF(model)
    result = fit(model, guide, progress=False, seed=seed)
    text = str(result)
    seconds = time.perf_counter() - began
    print(text, file=sys.stderr)
    return guide, result, seconds


def describe(note, **more):
    """What a file of results says about itself: its command, the versions and ``more``."""
    return {
        "command": f"python -m benchmarks.{pathlib.Path(sys.argv[0]).stem}",
        "note": note,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "pyro": pyro.__version__,
        "threads": torch.get_num_threads(),
        **more,
    }


def save(name, note, rows, **more):
    """Writes the rows as JSON with what :func:`describe` says, and prints a table."""
    RESULTS.mkdir(exist_ok=True)
    text = json.dumps({"about": describe(note, **more), "rows": rows}, indent=1)
    (RESULTS / f"{name}.json").write_text(text + "\n")
    columns = list(rows[0])
    widths = [max(len(str(row[c])) for row in [*rows, {c: c for c in columns}]) for c in columns]
    print(f"\n{name}: {note}")
    for row in [{c: c for c in columns}, *rows]:
        print("  ".join(f"{row[c]!s:>{width}}" for c, width in zip(columns, widths, strict=True)))
