# %% [markdown]
# # One fit for many data sets
#
# A laboratory measures ten specimens of each batch, and needs the mean and standard deviation of
# the batch with correct intervals. Fitting each batch anew takes seconds. With an encoder the guide
# depends on the data, so one fit on simulated batches serves all later ones: amortised inference.
# Are its intervals right?
#
# It takes a minute and a half on two cores. `--smoke` runs every line in seconds, only to check
# that it runs.

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

plt.switch_backend("Agg")  # writes files, opens no window
parser = argparse.ArgumentParser(description="Amortised inference, with its calibration.")
parser.add_argument("--smoke", action="store_true", help="run every line in seconds")
parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("tutorials/output"))
args, _ = parser.parse_known_args()

pyro.set_rng_seed(0)
N = 10

# %% [markdown]
# ## The model
#
# The model takes the data as an argument, and draws them itself if they are not given. The prior is
# conjugate, so there is an exact posterior to compare with: the precision has a gamma distribution,
# and the mean a Student's t.

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
# The encoder takes the arguments of the model, and returns a context: here from the mean and
# variance of the specimens, and from a mean of learned features of each. `simulate=["y"]` draws the
# data from the model anew at each step.


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
# For new batches the guide only draws, without any fitting.

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
# Usually there is no exact posterior. But we have drawn the parameters of each simulated batch, so
# we know them. If the posterior is right, the true parameter is distributed like one more draw: its
# rank among the draws is uniform (Talts et al. 2018). If the guide is too narrow, ranks pile up at
# both ends; if it is biased, at one end.

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
# Left and middle, dots should lie on the diagonal. Right, the ranks should stay in the grey band:
# for exact posteriors all twenty bars do so nineteen times of twenty.

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
# Means should be within a tenth of a posterior standard deviation in half of the batches and within
# three tenths in nineteen of twenty, and the ranks compatible with a uniform distribution.

# %%
if not args.smoke:
    for site, values in found.items():
        off = ((values.mean(0) - truth[site].mean(0)) / truth[site].std(0)).abs()
        assert off.median() < 0.1
        assert off.quantile(0.95) < 0.3
        assert chi_squared[site] < 43.8

# %% [markdown]
# ## Limitations
#
# The guide is trained on data as the prior draws them. It also returns an answer for a batch far
# from all of these; `diagnose(model, guide, kwargs={"y": y})` tells whether to trust it. Uniform
# ranks alone are no proof: a guide that ignores the data and draws from the prior has them too. So
# check both.
