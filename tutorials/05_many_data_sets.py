# %% [markdown]
# # One fit for many data sets
#
# A laboratory measures ten specimens of everything that comes in, and wants for each batch its mean
# and its spread, with honest intervals. Fitting each anew takes seconds. An encoder reads the data
# and tells the guide what to draw, so one fit on simulated batches serves all that will ever come:
# amortised inference. Are its intervals as honest as they look?
#
# It takes a minute and a half on two cores. `--smoke` runs every line in seconds, to no purpose but
# to show that it runs.

# %%
import argparse
import pathlib
import time

import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch
from torch import nn

from pyro_iaf import AutoIAF, fit

plt.switch_backend("Agg")  # a file, no window
parser = argparse.ArgumentParser(description="Amortised inference, with its calibration.")
parser.add_argument("--smoke", action="store_true", help="run every line in seconds")
parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("tutorials/output"))
args, _ = parser.parse_known_args()

pyro.set_rng_seed(0)
N = 10

# %% [markdown]
# ## The model
#
# It takes the data as an argument, and draws them itself where there are none. The prior is
# conjugate, so that there is an exact posterior to compare with: the precision has a gamma
# distribution, and the mean a Student's t.

# %%
SHAPE, RATE = 3.0, 3.0


def model(y=None):
    precision = pyro.sample("precision", dist.Gamma(torch.tensor(SHAPE), RATE))
    mean = pyro.sample("mean", dist.Normal(0.0, precision.rsqrt()))
    with pyro.plate("specimens", N):
        return pyro.sample("y", dist.Normal(mean, precision.rsqrt()), obs=y)


def exact(y, num_draws):
    """Draws from the posterior of each row of ``y``."""
    middle = y.sum(-1) / (N + 1)
    rate = RATE + 0.5 * (y.square().sum(-1) - (N + 1) * middle.square())
    precision = dist.Gamma(SHAPE + N / 2, rate).sample((num_draws,))
    mean = dist.Normal(middle, ((N + 1) * precision).rsqrt()).sample()
    return {"precision": precision, "mean": mean}


# %% [markdown]
# ## The guide
#
# The encoder is called as the model is, and makes a context of the data: here of each specimen and
# its square, summed. `simulate=["y"]` draws the data afresh from the model at each step.


# %%
class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.each = nn.Sequential(nn.Linear(1, 32), nn.ELU(), nn.Linear(32, 32), nn.ELU())
        self.all = nn.Sequential(nn.Linear(34, 32), nn.ELU(), nn.Linear(32, 16))

    def forward(self, y=None):
        moments = torch.stack([y.mean(-1), (y.var(-1) + 1e-6).log()], -1)
        each = self.each(y.unsqueeze(-1)).mean(-2)
        return self.all(torch.cat([each, moments], -1))


guide = AutoIAF(model, encoder=Encoder())
num_steps = 20 if args.smoke else 5000
start = time.perf_counter()
print(fit(model, guide, num_steps=num_steps, num_particles=16, simulate=["y"], progress=False))
fitting = time.perf_counter() - start

# %% [markdown]
# ## Against the exact posterior
#
# Batches that the guide never saw, and for each of them draws: no fitting any more.

# %%
num_sets, num_draws = (20, 99) if args.smoke else (400, 999)
start = time.perf_counter()
traces = [pyro.poutine.trace(model).get_trace() for _ in range(num_sets)]
batches = [trace.nodes["y"]["value"] for trace in traces]
drawn = [guide.sample_posterior(num_draws, y=y) for y in batches]
each = 1000 * (time.perf_counter() - start) / num_sets
print(f"The fit took {fitting:.0f} s, draws for one more batch {each:.1f} ms")
truth = exact(torch.stack(batches), 20_000)
found = {site: torch.stack([draws[site] for draws in drawn], 1) for site in truth}
for site, values in found.items():
    off = (values.mean(0) - truth[site].mean(0)) / truth[site].std(0)
    spread = values.std(0) / truth[site].std(0)
    print(
        f"{site:10} error of a mean {off.abs().median():.2f} sd, in one of twenty "
        f"{off.abs().quantile(0.95):.2f}; spreads {spread.quantile(0.05):.2f} "
        f"to {spread.quantile(0.95):.2f} of the exact"
    )

# %% [markdown]
# ## Calibration, without an exact posterior
#
# Mostly there is none. But each batch came from parameters that we know, since we drew them. If
# the posterior is right, they are to its draws as one more draw: their rank among them is uniform
# (Talts et al. 2018). A guide that is too sure of itself has too many at both ends, one that is
# biased leans.

# %%
NUM_BINS = 20
ranks = {
    site: (values < torch.stack([trace.nodes[site]["value"] for trace in traces])).sum(0)
    for site, values in found.items()
}
counts = {
    site: torch.bincount(rank * NUM_BINS // (num_draws + 1), minlength=NUM_BINS)
    for site, rank in ranks.items()
}
expected = num_sets / NUM_BINS
chi_squared = {site: ((n - expected) ** 2 / expected).sum().item() for site, n in counts.items()}
for site, value in chi_squared.items():
    print(f"{site:10} chi squared {value:.1f}; uniform ranks stay below 43.8 in 999 of 1000 runs")

# %% [markdown]
# Left and middle, dots should lie on the diagonal. Right, the ranks of each should stay in the grey
# band: all twenty bars of exact posteriors do, nineteen times of twenty.

# %%
figure, axes = plt.subplots(1, 3, figsize=(14, 4.2), layout="constrained")
for axis, (site, values) in zip(axes, found.items(), strict=False):
    a, b = truth[site].mean(0), values.mean(0)
    axis.plot(a, b, ".", color="tab:red", alpha=0.6)
    ends = [a.min(), a.max()]
    axis.plot(ends, ends, color="0.6", zorder=0)
    axis.set(xlabel="exact", ylabel="the guide's", title=f"Posterior mean of {site}")
uniform = dist.Multinomial(num_sets, torch.ones(NUM_BINS) / NUM_BINS).sample((20_000,))
reach = (uniform - expected).abs().amax(-1).quantile(0.95)
axes[2].axhspan(expected - reach, expected + reach, color="0.9")
for (site, n), color in zip(counts.items(), ("tab:blue", "tab:red"), strict=True):
    axes[2].stairs(n, color=color, label=site)
axes[2].set(xlabel="rank of the truth, in twentieths", ylabel="batches", title="Calibration")
axes[2].set_ylim(0)
axes[2].legend()
args.output.mkdir(parents=True, exist_ok=True)
picture = args.output / "05_many_data_sets.png"
figure.savefig(picture, dpi=120)
print(f"The picture is in {picture}")

# %% [markdown]
# ## Is it right?
#
# Means within a tenth of a posterior standard deviation in half of the batches and within three
# tenths in nineteen of twenty, and ranks that may well be uniform.

# %%
if not args.smoke:
    for site, values in found.items():
        off = ((values.mean(0) - truth[site].mean(0)) / truth[site].std(0)).abs()
        assert off.median() < 0.1
        assert off.quantile(0.95) < 0.3
        assert chi_squared[site] < 43.8

# %% [markdown]
# ## Where it bends
#
# The guide knows data as the prior draws them. A batch far from all that it saw gets an answer all
# the same, and `diagnose(model, guide, kwargs={"y": y})` tells for that one batch whether to trust
# it. Uniform ranks are no proof either: a guide that ignores the data and draws from the prior has
# them too, so look at both.
