"""Sticking the landing: the time of a step, the variance of gradients, and the quality of fits.

Time and variance compare ``TraceSTL_ELBO`` with Pyro's ``Trace_ELBO``. Fits are of ``AutoIAF`` to
real posteriors with known answers (``--data`` as for ``benchmarks.posteriors``): with either as the
loss of ``fit`` at equal steps, with the first at equal seconds, with the first only after the rate
begins to fall, and with the default, which goes through the draws from the first step and is also
weighted by importance while the rate falls. Further fits are of ``AutoHierarchicalIAF`` to models
with local latents, with either loss at equal steps, and with Pyro's for twice as many.
"""

import argparse
import math
import time
import warnings
from pathlib import Path

import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, Trace_ELBO

from benchmarks.common import RESULTS, race, save
from benchmarks.posteriors import load, quality
from pyro_iaf import AutoHierarchicalIAF, AutoIAF, TraceSTL_ELBO, fit

NUM_STEPS, NUM_PARTICLES = 3000, 16
ELBOS = {"through the draws": TraceSTL_ELBO, "ordinary": Trace_ELBO}


def regression(D):
    """A linear regression with D weights: the posterior is a correlated normal."""
    x = torch.randn(2 * D, D)
    y = torch.randn(2 * D)

    def model():
        w = pyro.sample("w", dist.Normal(torch.zeros(D), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(w @ x.mT, 1.0).to_event(1), obs=y)

    return model


def steps(title, model, kind, num_particles):
    """Milliseconds of a step of SVI with either ELBO."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    contenders = {}
    for name, elbo in ELBOS.items():
        guide = kind(model, init_scale=0.1, name=f"of_{elbo.__name__}")
        loss = elbo(num_particles, vectorize_particles=num_particles > 1, max_plate_nesting=1)
        svi = SVI(model, guide, pyro.optim.Adam({"lr": 1e-3}), loss)
        contenders[name] = svi.step
    times = race(contenders, rounds=15, seconds=0.2)
    row = {name: round(taken["microseconds"] / 1000, 2) for name, taken in times.items()}
    about = {"model": title, "guide": kind.__name__, "particles": num_particles}
    return {**about, **row, "ratio": times["through the draws"]["ratio"]}


def radon():
    """Forty counties whose intercepts and slopes vary: 85 latents, 80 of them local."""
    generator = torch.Generator().manual_seed(0)
    county = torch.arange(40).repeat_interleave(10)
    floor = torch.rand(400, generator=generator)
    intercept, slope, noise = (torch.randn(n, generator=generator) for n in (40, 40, 400))
    y = 1.0 + 0.3 * intercept[county] + (0.2 * slope[county] - 0.6) * floor + 0.7 * noise

    def model():
        loc = [pyro.sample(f"loc_{name}", dist.Normal(0.0, 5.0)) for name in "ab"]
        scale = [pyro.sample(f"scale_{name}", dist.HalfNormal(1.0)) for name in "ab"]
        sigma = pyro.sample("sigma", dist.HalfNormal(2.0))
        with pyro.plate("counties", 40):
            a = pyro.sample("a", dist.Normal(loc[0], scale[0]))
            b = pyro.sample("b", dist.Normal(loc[1], scale[1]))
        with pyro.plate("houses", 400):
            mean = a[..., county] + b[..., county] * floor
            pyro.sample("y", dist.Normal(mean, sigma), obs=y)

    return model


def schools():
    """Eight schools in a plate: two global latents, eight local ones."""
    y = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
    sigma = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])

    def model():
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        tau = pyro.sample("tau", dist.HalfCauchy(5.0))
        with pyro.plate("schools", 8):
            theta = pyro.sample("theta", dist.Normal(mu, tau))
            pyro.sample("y", dist.Normal(theta, sigma), obs=y)

    return model


def fitted(kind, model, loss, num_steps, seed):
    """A fitted guide, and the processor time of its steps in seconds."""
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    guide = kind(model)
    guide.setup()
    began = time.process_time()
    settings = {"num_particles": NUM_PARTICLES, "early_stop": False, "compile": False}
    fit(model, guide, num_steps=num_steps, loss=loss, progress=False, **settings)
    return guide, time.process_time() - began


def hierarchies(seeds):
    """ELBOs of fits of ``AutoHierarchicalIAF``, and their processor time in seconds."""
    torch.set_num_threads(1)
    ways = {
        "ordinary": (Trace_ELBO, NUM_STEPS),
        "ordinary, twice the steps": (Trace_ELBO, 2 * NUM_STEPS),
        "through the draws": (TraceSTL_ELBO, NUM_STEPS),
    }
    rows = []
    for title, make in {"radon": radon, "eight schools": schools}.items():
        for seed in range(seeds):
            for way, (elbo, num_steps) in ways.items():
                model = make()
                settings = {"vectorize_particles": True, "max_plate_nesting": 1}
                loss = elbo(num_particles=8, **settings)
                guide, seconds = fitted(AutoHierarchicalIAF, model, loss, num_steps, seed)
                with torch.no_grad():
                    many = Trace_ELBO(num_particles=2000, **settings)
                    found = -sum(many.loss(model, guide) for _ in range(10)) / 10
                row = {"model": title, "gradient": way, "seed": seed, "steps": num_steps}
                rows.append({**row, "elbo": round(found, 3), "seconds": round(seconds, 1)})
                print(rows[-1], flush=True)
    save("gradients_hierarchical", "AutoHierarchicalIAF, 8 particles, float64", rows)


def noise(D=10, num_draws=300):
    """The variance of both gradients between a fresh guide and a trained one."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    model = regression(D)
    guide = AutoIAF(model, start="init")
    guide.setup()
    fresh = [p.detach().clone() for p in guide.parameters()]
    fit(model, guide, num_steps=5000, num_particles=32, early_stop=False, progress=False)
    trained = [p.detach().clone() for p in guide.parameters()]
    rows = []
    for share in (1.0, 0.7, 0.5, 0.3, 0.2, 0.1, 0.05, 0.02, 0.01, 0.0):
        with torch.no_grad():
            for p, a, b in zip(guide.parameters(), fresh, trained, strict=True):
                p.copy_(share * a + (1 - share) * b)
        row = {"share of the way left": share}
        for name, elbo in ELBOS.items():
            loss, found, losses = elbo(max_plate_nesting=1), [], []
            for _ in range(num_draws):
                guide.zero_grad()
                losses.append(loss.loss_and_grads(model, guide))
                found.append(torch.cat([p.grad.reshape(-1) for p in guide.parameters()]))
            row[name] = torch.stack(found).var(0).sum().item()
            row["loss"] = sum(losses) / num_draws
        rows.append(row)
    best = min(row["loss"] for row in rows)
    return [
        {
            "share of the way left": row["share of the way left"],
            "nats from the end": round(row["loss"] - best, 3),
            **{name: float(f"{row[name]:.4g}") for name in ELBOS},
            "ratio": float(f"{row['through the draws'] / row['ordinary']:.3g}"),
        }
        for row in rows
    ]


def draw(rows):
    """Saves the picture of the variances."""
    plt.switch_backend("Agg")
    figure, panel = plt.subplots(figsize=(6, 4), layout="constrained")
    shares = [row["share of the way left"] for row in rows]
    for name in ELBOS:
        panel.plot(shares, [row[name] for row in rows], "o-", label=name)
    panel.set(xlabel="distance from the optimum (1: a fresh guide)", yscale="log")
    panel.set(ylabel="variance of the gradient", title="Ten weights of a regression, one particle")
    panel.set_xscale("symlog", linthresh=0.01)
    panel.set_xlim(-0.001, 1.2)
    panel.legend(loc="lower right")
    figure.savefig(RESULTS / "gradients.png", dpi=120)


class Late:
    """The ordinary gradient until the rate of ``fit`` begins to fall, then through the draws."""

    def __init__(self, *args, **kwargs):
        self.ordinary, self.late = Trace_ELBO(*args, **kwargs), TraceSTL_ELBO(*args, **kwargs)
        self.loss = self.ordinary.loss
        self.calls = 0

    def loss_and_grads(self, model, guide):
        self.calls += 1
        elbo = self.ordinary if self.calls <= 0.4 * NUM_STEPS else self.late
        return elbo.loss_and_grads(model, guide)


WAYS = {
    "ordinary": Trace_ELBO,
    "through the draws": TraceSTL_ELBO,
    "the same at equal seconds": TraceSTL_ELBO,
    "late": Late,
    "default": None,
}


def fits(folder, seeds):
    torch.set_num_threads(1)
    rows = []
    for name, posterior in load(folder).items():
        for seed in range(seeds):
            seconds = {}
            for way, elbo in WAYS.items():
                num_steps = NUM_STEPS
                loss = elbo and elbo(NUM_PARTICLES, vectorize_particles=True, max_plate_nesting=0)
                if way == "the same at equal seconds":
                    share = seconds["ordinary"] / seconds["through the draws"]
                    num_steps = min(NUM_STEPS, math.ceil(share * NUM_STEPS))
                guide, seconds[way] = fitted(AutoIAF, posterior.model, loss, num_steps, seed)
                row = {"posterior": name, "gradient": way, "seed": seed, "steps": num_steps}
                found = quality(posterior.model, guide, posterior.summary)
                row |= {key: found[key] for key in found if key != "iw_elbo"}
                rows.append({**row, "seconds": round(seconds[way], 1)})
                print(rows[-1], flush=True)
    save("gradients_posteriors", f"{NUM_STEPS} steps of {NUM_PARTICLES} particles, float64", rows)


PARTS = ["steps", "noise", "fits", "hierarchies"]


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("../shared/posteriors"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    options = parser.parse_args()
    if "steps" in options.only:
        models = [
            ("regression, D = 10", regression(10), AutoIAF),
            ("regression, D = 100", regression(100), AutoIAF),
            ("radon", radon(), AutoHierarchicalIAF),
        ]
        rows = [steps(*model, num_particles) for model in models for num_particles in (1, 16)]
        save("gradients_steps", "milliseconds of a step of SVI", rows)
    torch.set_default_dtype(torch.float64)
    if "noise" in options.only:
        rows = noise()
        save("gradients_noise", "total variance of the gradient, one particle", rows)
        draw(rows)
    if "fits" in options.only:
        fits(options.data, options.seeds)
    if "hierarchies" in options.only:
        hierarchies(options.seeds)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main()
