"""Seven real posteriors with known answers, and Neal's funnel: AutoIAF at its defaults beside Pyro.

``--data`` is a folder with a ``posteriors.py``, whose POSTERIORS have a model, data and a summary
of reference draws by Stan.
"""

import argparse
import importlib
import math
import statistics
import sys
import time
import warnings
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoIAFNormal, AutoMultivariateNormal, AutoNormal

from benchmarks.common import save
from pyro_iaf import AutoIAF, fit
from pyro_iaf.importance import pareto_k
from pyro_iaf.models.weighted import WeightedParticles

NUM_STEPS, NUM_PARTICLES, NUM_DRAWS = 3000, 16, 10_000

PYRO = {
    "AutoNormal": AutoNormal,
    "AutoMultivariateNormal": AutoMultivariateNormal,
    "AutoIAFNormal": lambda model: AutoIAFNormal(model, num_transforms=2, hidden_dim=[64, 64]),
}


def train(name, model, seed):
    """A trained guide, and the seconds of building and training it."""
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    start = time.perf_counter()
    if name == "AutoIAF":
        guide = AutoIAF(model)
        fit(model, guide, num_steps=NUM_STEPS, num_particles=NUM_PARTICLES, progress=False)
    else:
        guide = PYRO[name](model)
        elbo = Trace_ELBO(
            num_particles=NUM_PARTICLES, vectorize_particles=True, max_plate_nesting=0
        )
        decay = 0.01 ** (1 / NUM_STEPS)
        svi = SVI(model, guide, pyro.optim.ClippedAdam({"lr": 1e-2, "lrd": decay}), elbo)
        for _ in range(NUM_STEPS):
            svi.step()
    return guide, time.perf_counter() - start


def load(folder):
    """The posteriors by name; exits if the folder has none."""
    if not (folder / "posteriors.py").exists():
        sys.exit(f"There is no posteriors.py in {folder}: give its folder with --data.")
    sys.path.insert(0, str(folder))
    return importlib.import_module("posteriors").POSTERIORS


def compare(sites, summary):
    """Errors of means, in standard deviations, and ratios of deviations, of numbers that vary."""
    errors, ratios = [], []
    for site, reference in summary.items():
        if site not in sites or "mean" not in reference:  # a quantity derived from sites
            continue
        mean, sd = (torch.as_tensor(reference[key]).reshape(-1) for key in ("mean", "sd"))
        draws, varies = sites[site].reshape(-1, len(mean)), sd > 0
        errors += ((draws.mean(0) - mean) / sd)[varies].abs().tolist()
        ratios += (draws.std(0) / sd)[varies].tolist()
    return errors, ratios


def quality(model, guide, summary):
    """ELBOs, k-hat, and errors of means and standard deviations against the reference draws."""
    particles = WeightedParticles(model, guide, (), {})
    runs = [particles.weighted(NUM_DRAWS) for _ in range(3)]
    log_weights = torch.cat([run.log_weights for run in runs])
    sites = {site: torch.cat([run.sites[site] for run in runs]) for site in runs[0].sites}
    errors, ratios = compare(sites, summary)
    return {
        "elbo": round(log_weights.mean().item(), 2),
        "iw_elbo": round((log_weights.logsumexp(0) - math.log(len(log_weights))).item(), 2),
        "khat": round(statistics.median(pareto_k(run.log_weights) for run in runs), 2),
        "mean_error": round(max(errors), 3),
        "smallest_spread": round(min(ratios), 3),
        "largest_spread": round(max(ratios), 3),
    }


def funnel():
    v = pyro.sample("v", dist.Normal(0.0, 3.0))
    scale = (v / 2).exp().unsqueeze(-1)
    pyro.sample("x", dist.Normal(torch.zeros(9), scale).to_event(1))


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("../shared/posteriors"))
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    posteriors = load(options.data)
    models = {name: (p.model, p.summary, p.data) for name, p in posteriors.items()}
    models["funnel, D=10"] = funnel, {"v": {"mean": 0.0, "sd": 3.0}}, None
    rows = []
    for name, (model, summary, _) in models.items():
        for seed in range(options.seeds):
            for guide_name in ["AutoIAF", *PYRO]:
                row = {"posterior": name, "guide": guide_name, "seed": seed, "failed": False}
                try:
                    guide, seconds = train(guide_name, model, seed)
                    row |= quality(model, guide, summary) | {"seconds": round(seconds, 1)}
                except (ValueError, RuntimeError):  # Pyro's checks found NaN
                    row["failed"] = True
                print(row, flush=True)
                rows.append(row)
    # None stands for numbers that are not finite, and for those of failed guides.
    columns = list(max(rows, key=len))
    rows = [{c: _finite_or_none(row.get(c)) for c in columns} for row in rows]
    save("posteriors", "3000 steps of 16 particles, float64; in reference sd", rows)


def _finite_or_none(value):
    return None if isinstance(value, float) and not math.isfinite(value) else value


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_default_dtype(torch.float64)
    main()
