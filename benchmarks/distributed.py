"""Rows per second by one process and by two, at equal rows per step (strong scaling).

The tutorial's own fit in few steps, several times in turns; each process has one thread.
"""

import argparse
import os
import re
import statistics
import subprocess
import sys
import tempfile

from .common import save
from .tutorials import tutorial

STEPS = {1_000: 400, 4_000: 200, 16_000: 80, 64_000: 40}  # by rows per step


def rows_a_second(batch, processes):
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes]
    size = ["--patients", 4 * batch, "--batch", batch, "--epochs", STEPS[batch] // 4]
    with tempfile.TemporaryDirectory() as folder:
        work = ["-m", "benchmarks.distributed", "--work", *size, "--output", folder]
        command = list(map(str, [sys.executable, *torchrun, *work]))
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return int(re.search(r"([\d,]+) rows a second", done.stdout)[1].replace(",", ""))


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--rounds", type=int, default=5)
    args, settings = parser.parse_known_args()
    if args.work:
        tutorial("distributed.py", settings, until="if rank:\n")
        return
    rows = []
    for batch in STEPS:
        rounds = [[rows_a_second(batch, count) for count in (1, 2)] for _ in range(args.rounds)]
        one, two = (statistics.median(own) for own in zip(*rounds, strict=True))
        rows.append(
            {
                "rows a step": batch,
                "one process": round(one),
                "two processes": round(two),
                "times as fast": round(statistics.median(b / a for a, b in rounds), 2),
            }
        )
        print(rows[-1], flush=True)
    save("distributed", "rows a second by one and two processes of one thread each", rows)


if __name__ == "__main__":
    main()
