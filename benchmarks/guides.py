"""AutoIAF beside Pyro's guides: the time of an SVI step, and the quality of short fits."""

import functools
import statistics
import time
import warnings

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoIAFNormal, AutoMultivariateNormal, AutoNormal

from benchmarks.common import save
from pyro_iaf import AutoIAF


def named(name, guide):
    guide._pyro_name = name  # else Pyro's guides of one class share parameters
    return guide


def steps():
    """A step of SVI, one particle, Adam: two flows each, at default and at equal widths."""
    rows = []
    for D, repeats in [(10, 100), (50, 100), (200, 30), (1000, 3)]:

        def model(D=D):
            z = pyro.sample("z", dist.Normal(torch.zeros(D), 1.0).to_event(1))
            pyro.sample("y", dist.Normal(z, 1.0).to_event(1), obs=torch.ones(D))

        widths = {"default": None, "D": 2 * [max(64, D)], "2 D": 2 * [max(64, 2 * D)]}
        guides = {
            (kind, width): make(model, hidden)
            for width, hidden in widths.items()
            for kind, make in [
                ("ours", lambda model, hidden: AutoIAF(model, hidden_dims=hidden)),
                (
                    "pyro",
                    lambda model, hidden: AutoIAFNormal(model, num_transforms=2, hidden_dim=hidden),
                ),
            ]
        }
        pyro.clear_param_store()
        svis = {}
        for key, guide in guides.items():
            optimizer = pyro.optim.Adam({"lr": 1e-3})
            svis[key] = SVI(model, named(f"{key[0]} {key[1]}", guide), optimizer, Trace_ELBO())
            for _ in range(3):
                svis[key].step()
        times = {key: [] for key in svis}
        for _ in range(11):
            for key, svi in svis.items():
                start = time.perf_counter()
                for _ in range(repeats):
                    svi.step()
                times[key].append((time.perf_counter() - start) / repeats)
        for width in widths:
            pairs = zip(times["ours", width], times["pyro", width], strict=True)
            rows.append(
                {
                    "D": D,
                    "widths": width,
                    "ours_ms": round(1e3 * statistics.median(times["ours", width]), 3),
                    "pyro_ms": round(1e3 * statistics.median(times["pyro", width]), 3),
                    "ratio": round(statistics.median(a / b for a, b in pairs), 3),
                }
            )
    save("guide_steps", "a step of SVI with AutoIAF and AutoIAFNormal, two flows each", rows)


def poisson():
    """Poisson regression: mean loss of the last 50 of 300 steps, one particle, eight seeds."""
    makers = {
        "AutoIAF": AutoIAF,
        "AutoNormal": AutoNormal,
        "AutoMultivariateNormal": AutoMultivariateNormal,
        "AutoIAFNormal": AutoIAFNormal,
    }

    def model(x, y):
        weights = pyro.sample("weights", dist.Normal(torch.zeros(8), 1.0).to_event(1))
        bias = pyro.sample("bias", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            rate = ((weights * x).sum(-1) + bias).exp()
            pyro.sample("y", dist.Poisson(rate), obs=y)

    rows = []
    for spread in (0.1, 0.3):
        for lr in (0.05, 0.01):
            for name, make in makers.items():
                losses, failed = [], 0
                for seed in range(8):
                    pyro.clear_param_store()
                    pyro.set_rng_seed(seed)
                    x = 3 * torch.randn(100, 8)
                    y = torch.poisson((x @ (spread * torch.randn(8))).exp())
                    guide = make(model)
                    svi = SVI(model, guide, pyro.optim.Adam({"lr": lr}), Trace_ELBO())
                    try:
                        history = torch.tensor([svi.step(x, y) for _ in range(300)])
                    except ValueError:  # Pyro's check of a distribution's parameters fails for NaN
                        history = torch.tensor([torch.nan])
                    failed += not history.isfinite().all()
                    losses.append(history[-50:].mean().item())
                rows.append(
                    {
                        "weights_sd": spread,
                        "lr": lr,
                        "guide": name,
                        "median_loss": round(statistics.median(losses), 1) if not failed else None,
                        "worst_loss": round(max(losses), 1) if not failed else None,
                        "seeds_with_nan": failed,
                    }
                )
    save("guide_poisson", "Poisson regression, n=100, 8 covariates of sd 3, 300 steps", rows)


def funnel():
    """Neal's funnel, D=10: standard deviation of v, whose true value is 3, after 1500 steps."""

    def model():
        v = pyro.sample("v", dist.Normal(0.0, 3.0))
        scale = (v / 2).exp().unsqueeze(-1)
        pyro.sample("x", dist.Normal(torch.zeros(9), scale).to_event(1))

    two_flows = functools.partial(AutoIAFNormal, num_transforms=2)
    makers = {
        "AutoIAF": AutoIAF,
        "AutoIAFNormal, two flows": two_flows,
        "AutoIAFNormal": AutoIAFNormal,
        "AutoNormal": AutoNormal,
    }
    elbo = Trace_ELBO(num_particles=16, vectorize_particles=True, max_plate_nesting=0)
    rows = []
    for lr, end in [(0.01, 0.0001), (0.005, 0.005)]:
        for name, make in makers.items():
            spreads = []
            for seed in range(5):
                pyro.clear_param_store()
                pyro.set_rng_seed(seed)
                optimizer = pyro.optim.ClippedAdam({"lr": lr, "lrd": (end / lr) ** (1 / 1500)})
                guide = make(model)
                svi = SVI(model, guide, optimizer, elbo)
                try:
                    for _ in range(1500):
                        svi.step()
                    with torch.no_grad(), pyro.plate("draws", 50_000):
                        spreads.append(guide()["v"].std().item())
                except ValueError:
                    spreads.append(torch.nan)
            rows.append(
                {
                    "lr": lr,
                    "end_lr": end,
                    "guide": name,
                    "median_sd": round(statistics.median(spreads), 2),
                    "smallest_sd": round(min(spreads), 2),
                    "largest_sd": round(max(spreads), 2),
                }
            )
    save("guide_funnel", "Neal's funnel, D=10, 1500 steps of 16 particles; the truth is 3", rows)


if __name__ == "__main__":
    warnings.simplefilter("ignore")  # Pyro warns of the NaNs that are counted here
    for run in (steps, poisson, funnel):
        pyro.clear_param_store()
        run()
