"""Fits without a number of steps, each in a fresh process: how long until the printed diagnosis?

Twenty posteriors with known answers: seven with reference draws by Stan, from the folder
``--data``, and the thirteen of `benchmarks.models`. ``seconds`` is from the model to its printed
diagnosis, without imports; ``is_again`` marks a second fit in the process, with another guide and
seed. As machines differ, ``operation`` tells the microseconds of a small operation of PyTorch there
and then.
"""

import argparse
import json
import statistics
import time
import warnings
from pathlib import Path

import torch

from benchmarks import models
from benchmarks.common import rows_of_fresh_processes, save, timed_fit
from benchmarks.posteriors import compare, load
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


def run(posterior, seed, is_again):
    """A row for one fit of a posterior, in this process."""
    guide, result, seconds = timed_fit(posterior.model, seed)
    particles = WeightedParticles(posterior.model, guide, (), {})
    errors, ratios = compare(particles.weighted(NUM_DRAWS).sites, posterior.summary)
    mean_error, sd_error = max(errors), max(abs(ratio - 1) for ratio in ratios)
    found = result.diagnosis
    return {
        "posterior": posterior.name,
        "seed": seed,
        "is_again": is_again,
        "seconds": round(seconds, 2),
        "operation": round(microseconds(), 2),
        "steps": result.num_steps,
        "backend": result.backend,
        "components": len(guide.component_weights),
        "verdict": found.verdict,
        "khat": round(found.khat, 2),
        "mean_error": round(mean_error, 3),
        "sd_error": round(sd_error, 3),
        "holds": mean_error < HOLDS[0] and sd_error < HOLDS[1],
        "wrong": mean_error > WRONG[0] or sd_error > WRONG[1],
        "stopped": result.stopped,
    }


def summary_of(rows):
    """Medians over posteriors of the medians over seeds, and counts over all fits."""
    summary = {}
    for key, is_again in (("seconds", False), ("again", True)):
        seconds = {}
        for row in rows:
            if row["is_again"] == is_again:
                seconds.setdefault(row["posterior"], []).append(row["seconds"])
        medians = list(map(statistics.median, seconds.values()))
        summary |= {f"median {key}": statistics.median(medians), f"largest {key}": max(medians)}
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
        posteriors[name].model()  # reads the data
        for k in range(2):
            print(json.dumps(run(posteriors[name], int(seed) + 100 * k, bool(k))))
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
