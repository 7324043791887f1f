"""Seconds to draws of the posterior itself: a fit at the defaults and `refine`, beside NUTS.

Each runs in a process of its own. Seconds are from the model to the draws, compilation included and
imports not, and multiplied where fewer than 1,000 draws are effective. NumPyro's NUTS has its
defaults but for its start, with four chains of 1,000 draws. Pyro's runs one chain of 300 and 1,000
in the noise of a fit of 1,000 steps, by `NeuTraReparam`. Seven posteriors with reference draws by
Stan, from the folder ``--data``, have no NumPyro model here. The others are those of
`benchmarks.models` and `benchmarks.hard`.

``mean_error`` and ``sd_error`` are the largest, in standard deviations and relative. They hold if
means are within 0.05 and three Monte Carlo errors, and deviations within 5 % and three. With
``--only`` rows of one contender are made anew, of the named posteriors or all, and others kept.
"""

import argparse
import json
import math
import statistics
import time
import warnings
from pathlib import Path

import numpy as np
import pyro
import torch

from benchmarks import hard, models
from benchmarks.common import RESULTS, rows_of_fresh_processes, save
from benchmarks.posteriors import load

NUM_STEPS = 1000
WANTED = 1000


def are_small(errors, size):
    """Whether errors of a mean or of a deviation hold, by effective draws of this size."""
    return errors < 0.05 + 3 / size**0.5


def judged(posterior, chains):
    """The errors of chains by site, and the smallest effective sample size."""
    from pyro_iaf.diagnostics.convergence import ess, rhat

    means, spreads, holds, sizes, rhats = [0.0], [0.0], True, [math.inf], [1.0]
    if isinstance(posterior, models.Posterior):
        chains = posterior.quantities(chains)
    for site, known in posterior.summary.items():
        if site not in chains or "mean" not in known:
            continue
        mean, sd = (torch.as_tensor(known[key]).reshape(-1) for key in ("mean", "sd"))
        draws = torch.as_tensor(chains[site]).double().reshape(*chains[site].shape[:2], -1)
        draws, mean, sd = draws[..., sd > 0], mean[sd > 0], sd[sd > 0]
        if not len(sd):
            continue
        size, flat = ess(draws), draws.flatten(0, 1)
        error, ratio = ((flat.mean(0) - mean) / sd).abs(), (flat.std(0) / sd - 1).abs()
        holds &= bool(are_small(error, size).all() and are_small(ratio, size).all())
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
    fit(posterior.model, guide, seed=seed, progress=False)
    fitted = time.perf_counter() - began
    refined = refine(posterior.model, guide, seed=seed, progress=False)
    seconds = time.perf_counter() - began
    return refined.chains, seconds, {"converged": refined.converged, "fit": round(fitted, 1)}


def neutra(posterior, seed):
    from pyro.infer import MCMC, NUTS
    from pyro.infer.reparam import NeuTraReparam

    from pyro_iaf import AutoIAF, fit

    began = time.perf_counter()
    guide = AutoIAF(posterior.model)
    fit(posterior.model, guide, num_steps=NUM_STEPS, seed=seed, progress=False)
    fitted = time.perf_counter() - began
    carried = NeuTraReparam(guide.requires_grad_(False))
    kernel = NUTS(pyro.poutine.reparam(posterior.model, config=lambda _: carried))
    mcmc = MCMC(kernel, num_samples=1000, warmup_steps=300, disable_progbar=True)
    mcmc.run()
    noise = mcmc.get_samples(group_by_chain=True)
    chains = carried.transform_sample(noise[next(iter(noise))])
    seconds = time.perf_counter() - began
    chains = {name: value.detach() for name, value in chains.items()}
    return chains, seconds, {"converged": None, "fit": round(fitted, 1)}


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


CONTENDERS = {"refine": ours, "numpyro": numpyro, "neutra": neutra}


def row(posterior, seed, contender):
    chains, seconds, more = CONTENDERS[contender](posterior, seed)
    found = judged(posterior, chains)
    seconds *= max(1.0, WANTED / max(found["ess"], 1))
    return {
        "posterior": posterior.name,
        "contender": contender,
        "seed": seed,
        "seconds": round(seconds, 1),
        **more,
        **found,
    }


def ratio(rows, peer):
    """The median of ratios of seconds to those of a peer, where both hold, and their number."""
    seconds = {}
    for found in rows:
        if found["holds"]:
            of_posterior = seconds.setdefault(found["posterior"], {})
            of_posterior.setdefault(found["contender"], []).append(found["seconds"])
    ratios = [
        statistics.median(pair["refine"]) / statistics.median(pair[peer])
        for pair in seconds.values()
        if "refine" in pair and peer in pair
    ]
    return (round(statistics.median(ratios), 2), len(ratios)) if ratios else (None, 0)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("../shared/posteriors"))
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--only", choices=CONTENDERS, help="keep the others' rows")
    parser.add_argument("--names", nargs="*", help="posteriors, else all")
    parser.add_argument("--one", nargs=2, metavar=("NAME", "SEED"), help="a row, in this process")
    options = parser.parse_args()
    own = models.POSTERIORS | hard.POSTERIORS
    posteriors = load(options.data) | own
    if options.one:
        name, contender = options.one[0].split(":")
        posteriors[name].model()  # reads the data
        print(json.dumps(row(posteriors[name], int(options.one[1]), contender)))
        return
    wanted = {
        (name, contender)
        for contender in ([options.only] if options.only else CONTENDERS)
        for name in (own if contender == "numpyro" else posteriors)
        if not options.names or name in options.names
    }
    file = RESULTS / "refine.json"
    kept = json.loads(file.read_text())["rows"] if file.exists() else []
    kept = [found for found in kept if (found["posterior"], found["contender"]) not in wanted]
    order = [(name, contender) for contender in CONTENDERS for name in posteriors]
    names = [":".join(pair) for pair in order if pair in wanted]
    more = "--data", str(options.data)
    rows = kept + rows_of_fresh_processes("benchmarks.refine", names, options.seeds, *more)
    rows.sort(key=lambda found: order.index((found["posterior"], found["contender"])))
    refined = [found for found in rows if found["contender"] == "refine"]
    summary = {
        "median ratio of seconds": {peer: ratio(rows, peer) for peer in ("numpyro", "neutra")},
        "median seconds": statistics.median(found["seconds"] for found in refined),
        "hold": sum(found["holds"] for found in refined),
        "converged": sum(found["converged"] for found in refined),
        "converged though wrong": sum(f["converged"] and not f["holds"] for f in refined),
        "posteriors": len(refined),
    }
    print(summary)
    save("refine", "float64; a fit at the defaults, and refine", rows, summary=summary)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_default_dtype(torch.float64)
    main()
