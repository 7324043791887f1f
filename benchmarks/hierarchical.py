"""A step of AutoHierarchicalIAF with a thousand to a million rows: its time and memory.

Each number of rows and way of training has a process of its own; they run one after the other.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time

from .common import save

ROWS = [1_000, 100_000, 1_000_000]
WAYS = ["fit", "SVI, sparse", "SVI, dense"]
BATCH, ROUNDS, STEPS = 100, 5, 100


def work(way, rows):
    """The measurement of one process: milliseconds per step, and megabytes beyond the import."""
    import pyro
    import pyro.distributions as dist
    import torch

    from pyro_iaf import AutoHierarchicalIAF, fit

    pyro.set_rng_seed(0)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    y = torch.randn(rows)

    def model():
        mean = pyro.sample("mean", dist.Normal(0.0, 3.0))
        with pyro.plate("rows", rows, subsample_size=BATCH) as index:
            effect = pyro.sample("effect", dist.Normal(mean, 2.0))
            pyro.sample("y", dist.Normal(effect, 0.7), obs=y[index])

    sparse = way == "SVI, sparse"
    guide = AutoHierarchicalIAF(model, embedding_grad="sparse" if sparse else "dense")
    if way == "fit":

        def run(steps):
            settings = {"num_particles": 1, "early_stop": False, "progress": False}
            fit(model, guide, num_steps=steps, **settings)

    else:
        optimizer = (pyro.optim.SparseAdam if sparse else pyro.optim.Adam)({"lr": 1e-3})
        svi = pyro.infer.SVI(model, guide, optimizer, pyro.infer.Trace_ELBO())

        def run(steps):
            for _ in range(steps):
                svi.step()

    def seconds(steps):
        began = time.perf_counter()
        run(steps)
        return time.perf_counter() - began

    seconds(20)
    # Both fits include the work before the first step; the difference is the time of the steps.
    taken = [seconds(STEPS + 20) - seconds(20) for _ in range(ROUNDS)]
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps([1000 * statistics.median(taken) / STEPS, (after - before) / 1024]))


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        work(args.work[0], int(args.work[1]))
        return
    rows = []
    for way in WAYS:
        for size in ROWS:
            command = [sys.executable, "-m", "benchmarks.hierarchical", "--work", way, str(size)]
            out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            milliseconds, megabytes = json.loads(out.splitlines()[-1])
            rows.append(
                {
                    "way": way,
                    "rows": size,
                    "milliseconds": round(milliseconds, 2),
                    "megabytes": round(megabytes),
                }
            )
            print(rows[-1], flush=True)
    save("hierarchical", "a step of AutoHierarchicalIAF, 100 rows at a time", rows)


if __name__ == "__main__":
    main()
