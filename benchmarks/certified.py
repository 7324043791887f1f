"""Fits without a number of steps, each in a fresh process: how long until the printed diagnosis?

Twenty posteriors with known answers: seven with reference draws by Stan, from the folder
``--data``, and the thirteen of `benchmarks.models`. ``seconds`` is from the model to its printed
diagnosis, without imports; ``again`` is the same for a second guide in the process. As machines
differ, ``operation`` tells the microseconds of a small operation of PyTorch there and then.
"""

import argparse
import json
import statistics
import sys
import time
import warnings
from pathlib import Path

import pyro
import torch

from benchmarks import models
from benchmarks.common import rows_of_fresh_processes, save
from benchmarks.posteriors import compare, load
from pyro_iaf import AutoIAF, fit
from pyro_iaf.models.weighted import WeightedParticles

NUM_DRAWS = 30_000

# A guide holds up to these errors of a mean and of a standard deviation, and is wrong beyond those.
HOLDS, WRONG = (0.1, 0.07), (0.15, 0.15)


def microseconds():
    """The time of a small operation of PyTorch called from Python, in a median of rounds."""
    x, rounds = torch.ones(16, 16), []
    for _ in range(9):
        began = time.perf_counter()
        for _ in range(1000):
            x = x * 1.0
        rounds.append(1e3 * (time.perf_counter() - began))
    return statistics.median(rounds)


def run(posterior, seed):
    """A row for one posterior and seed, in this process."""
    posterior.model()  # reads the data
    seconds = []
    for k in range(2):
        pyro.clear_param_store()
        began = time.perf_counter()
        guide = AutoIAF(posterior.model)
        result = fit(posterior.model, guide, progress=False, seed=seed + 100 * k)
        text = str(result)
        seconds.append(time.perf_counter() - began)
        if k == 0:
            first, words, num = result, text, len(guide.component_weights)
            particles = WeightedParticles(posterior.model, guide, (), {})
            errors, ratios = compare(particles.weighted(NUM_DRAWS).sites, posterior.summary)
            mean_error, sd_error = max(errors), max(abs(ratio - 1) for ratio in ratios)
    print(words, file=sys.stderr)
    found = first.diagnosis
    return {
        "posterior": posterior.name,
        "seed": seed,
        "seconds": round(seconds[0], 2),
        "again": round(seconds[1], 2),
        "operation": round(microseconds(), 2),
        "steps": first.num_steps,
        "backend": first.backend,
        "components": num,
        "verdict": found.verdict,
        "khat": round(found.khat, 2),
        "mean_error": round(mean_error, 3),
        "sd_error": round(sd_error, 3),
        "holds": mean_error < HOLDS[0] and sd_error < HOLDS[1],
        "wrong": mean_error > WRONG[0] or sd_error > WRONG[1],
        "stopped": first.stopped,
    }


def summary_of(rows):
    """Medians over posteriors of the medians over seeds, and counts over all fits."""
    names = dict.fromkeys(row["posterior"] for row in rows)
    by_name = [[row for row in rows if row["posterior"] == name] for name in names]
    medians = {
        key: [statistics.median(row[key] for row in group) for group in by_name]
        for key in ("seconds", "again")
    }
    summary = {f"median {key}": statistics.median(found) for key, found in medians.items()}
    summary |= {f"largest {key}": max(found) for key, found in medians.items()}
    summary["median operation"] = statistics.median(row["operation"] for row in rows)
    summary["good though wrong"] = sum(r["verdict"] == "good" and r["wrong"] for r in rows)
    summary["good"] = sum(r["verdict"] == "good" for r in rows)
    summary["more components"] = sum(r["components"] > 1 for r in rows)
    summary["hold"] = sum(r["holds"] for r in rows)
    summary["fits"] = len(rows)
    return summary


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("../shared/posteriors"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--one", nargs=2, metavar=("NAME", "SEED"), help="a row, in this process")
    options = parser.parse_args()
    posteriors = load(options.data) | models.POSTERIORS
    if options.one:
        name, seed = options.one
        print(json.dumps(run(posteriors[name], int(seed))))
        return
    more = "--data", str(options.data)
    rows = rows_of_fresh_processes("benchmarks.certified", posteriors, options.seeds, *more)
    summary = summary_of(rows)
    print(summary)
    save("certified", "float64; errors in reference sd, and relative to it", rows, summary=summary)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_default_dtype(torch.float64)
    main()
