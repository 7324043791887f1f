"""Seconds to draws of the posterior itself: a short fit and `refine`, beside NumPyro's NUTS.

Where `refine` tells of missing modes, a fit until it is certified and `refine` follow.
Each runs in a process of its own. Seconds are from the model to the draws, compilation included and
imports not, and multiplied where fewer than 1,000 draws are effective. NUTS has NumPyro's defaults
but for its start, with four chains of 1,000 draws. Seven posteriors with reference draws by Stan,
from the folder ``--data``, have no NumPyro model here. The others are those of `benchmarks.models`,
and four with known moments that guides hold badly.

``mean_error`` and ``sd_error`` are the largest, in standard deviations and relative. They hold if
means are within 0.05 and three Monte Carlo errors, and deviations within 5 % and three.
"""

import argparse
import json
import math
import statistics
import time
import warnings
from pathlib import Path

import numpy as np
import torch

from benchmarks import models
from benchmarks.common import RESULTS, rows_of_fresh_processes, save
from benchmarks.posteriors import load

NUM_STEPS = 1000
WANTED = 1000


class Known(models.Posterior):
    """A posterior without data, of known moments."""

    def __init__(self, simulate, latent_dim, note, summary):
        super().__init__(simulate, latent_dim, note, ())
        self.summary = summary


def funnel(size):
    def simulate(rng):
        def model(p):
            v = p.sample("v", p.dist.Normal(0.0, 3.0))
            x = p.dist.Normal(p.xp.zeros(size - 1), p.xp.exp(v / 2)[..., None])
            p.sample("x", x.to_event(1))

        return model, []

    simulate.__name__ = f"funnel_of_{size}"
    return Known(simulate, size, "Neal's funnel", {"v": {"mean": [0.0], "sd": [3.0]}})


def banana(rng):
    def model(p):
        a = p.sample("a", p.dist.Normal(0.0, 1.0))
        b = p.sample("b", p.dist.Normal(0.0, 3.0))
        p.factor("ridge", -50.0 * (b - a * a) ** 2)

    return model, []


def moments_of_banana():
    """By sums over a grid."""
    a, b = np.meshgrid(np.linspace(-6, 6, 2401), np.linspace(-4, 20, 4801), indexing="ij")
    log_p = -a * a / 2 - b * b / 18 - 50.0 * (b - a * a) ** 2
    p = np.exp(log_p - log_p.max())
    p /= p.sum()
    found = {}
    for name, x in (("a", a), ("b", b)):
        mean = (p * x).sum()
        found[name] = {"mean": [mean], "sd": [math.sqrt((p * (x - mean) ** 2).sum())]}
    return found


def two_modes(rng):
    def model(p):
        x = p.sample("x", p.dist.Normal(p.xp.zeros(2), 10.0).to_event(1))
        parts = [
            math.log(share) - 2 * math.log(sd) - (((x - loc) / sd) ** 2).sum(-1) / 2
            for loc, sd, share in ((3.0, 0.5, 0.7), (-3.0, 0.3, 0.3))
        ]
        p.factor("modes", p.xp.logaddexp(*parts) + (x * x).sum(-1) / 200.0)

    return model, []


def own():
    mean = 3.0 * 0.7 - 3.0 * 0.3
    sd = math.sqrt(0.7 * (9 + 0.25) + 0.3 * (9 + 0.09) - mean**2)
    known = [
        funnel(10),
        funnel(100),
        Known(banana, 2, "a ridge", moments_of_banana()),
        Known(two_modes, 2, "0.7 and 0.3", {"x": {"mean": [mean] * 2, "sd": [sd] * 2}}),
    ]
    return {posterior.name: posterior for posterior in known}


def judged(chains, summary):
    """The errors of chains by site against a summary, and the smallest effective sample size."""
    from pyro_iaf.diagnostics.convergence import ess, rhat

    means, spreads, holds, sizes, rhats = [0.0], [0.0], True, [math.inf], [1.0]
    for site, known in summary.items():
        if site not in chains or "mean" not in known:
            continue
        mean, sd = (torch.as_tensor(known[key]).reshape(-1) for key in ("mean", "sd"))
        draws = torch.as_tensor(chains[site]).double().reshape(*chains[site].shape[:2], -1)
        draws, mean, sd = draws[..., sd > 0], mean[sd > 0], sd[sd > 0]
        if not len(sd):
            continue
        size, flat = ess(draws), draws.flatten(0, 1)
        error, ratio = ((flat.mean(0) - mean) / sd).abs(), (flat.std(0) / sd - 1).abs()
        more = 3 / size.sqrt()
        holds &= bool((error < 0.05 + more).all() and (ratio < 0.05 + more).all())
        means.append(error.max().item())
        spreads.append(ratio.max().item())
        sizes.append(size.min().item())
        rhats.append(rhat(draws).max().item())
    return {
        "ess": round(min(sizes)),
        "rhat": round(max(rhats), 4),
        "mean_error": round(max(means), 3),
        "sd_error": round(max(spreads), 3),
        "holds": holds,
    }


def ours(posterior, seed):
    from pyro_iaf import AutoIAF, fit, refine

    began = time.perf_counter()
    guide = AutoIAF(posterior.model)
    fit(posterior.model, guide, num_steps=NUM_STEPS, seed=seed, progress=False)
    fitted = time.perf_counter() - began
    refined = refine(posterior.model, guide, seed=seed, progress=False)
    if refined.modes:  # does what it says
        fit(posterior.model, guide, seed=seed, progress=False)
        refined = refine(posterior.model, guide, seed=seed, progress=False)
    seconds = time.perf_counter() - began
    more = {"converged": refined.converged, "fit": round(fitted, 1)}
    return refined.chains, seconds, more


def numpyro(posterior, seed):
    from jax import block_until_ready, random

    model, library = models.numpyro_model(posterior)
    began = time.perf_counter()
    # The default start, within 2 of zero, is not allowed in some models.
    kernel = library.infer.NUTS(model, init_strategy=library.infer.init_to_median)
    mcmc = library.infer.MCMC(
        kernel, num_warmup=1000, num_samples=1000, num_chains=4, progress_bar=False
    )
    mcmc.run(random.key(seed))
    draws = block_until_ready(mcmc.get_samples(group_by_chain=True))
    seconds = time.perf_counter() - began
    chains = {name: np.array(value) for name, value in draws.items()}
    return chains, seconds, {"converged": None, "fit": None}


def row(posterior, seed, contender):
    chains, seconds, more = (ours if contender == "refine" else numpyro)(posterior, seed)
    found = judged(chains, posterior.summary)
    seconds *= max(1.0, WANTED / max(found["ess"], 1))
    return {
        "posterior": posterior.name,
        "contender": contender,
        "seed": seed,
        "seconds": round(seconds, 1),
        **more,
        **found,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("../shared/posteriors"))
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--only", choices=("refine", "numpyro"), help="keep the other's rows")
    parser.add_argument("--one", nargs=2, metavar=("NAME", "SEED"), help="a row, in this process")
    options = parser.parse_args()
    posteriors = load(options.data) | models.POSTERIORS | own()
    if options.one:
        name, contender = options.one[0].split(":")
        posteriors[name].model()  # reads the data
        print(json.dumps(row(posteriors[name], int(options.one[1]), contender)))
        return
    names = {"refine": posteriors, "numpyro": models.POSTERIORS | own()}
    kept = []
    if options.only:
        known = json.loads((RESULTS / "refine.json").read_text())["rows"]
        kept = [found for found in known if found["contender"] != options.only]
        names = {options.only: names[options.only]}
    names = [f"{name}:{contender}" for contender in names for name in names[contender]]
    more = "--data", str(options.data)
    rows = kept + rows_of_fresh_processes("benchmarks.refine", names, options.seeds, *more)
    pairs = {}
    for found in rows:
        pairs.setdefault(found["posterior"], {}).setdefault(found["contender"], []).append(
            found["seconds"]
        )
    ratios = [
        statistics.median(pair["refine"]) / statistics.median(pair["numpyro"])
        for pair in pairs.values()
        if len(pair) == 2
    ]
    refined = [found for found in rows if found["contender"] == "refine"]
    summary = {
        "median ratio of seconds": round(statistics.median(ratios), 2),
        "median seconds": statistics.median(found["seconds"] for found in refined),
        "hold": sum(found["holds"] for found in refined),
        "converged": sum(found["converged"] for found in refined),
        "converged though wrong": sum(f["converged"] and not f["holds"] for f in refined),
        "posteriors": len(refined),
    }
    print(summary)
    save("refine", "float64; a fit of 1,000 steps, and refine", rows, summary=summary)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_default_dtype(torch.float64)
    main()
