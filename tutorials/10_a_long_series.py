# %% [markdown]
# # The level of a river
#
# A gauge tells the level of a river once a day, and not exactly. The level itself walks: each day
# it goes up or down by a normal step. How large the steps are, and how wrong the gauge is, are
# unknown too. A thousand days are a thousand latents and two scales.
#
# A flow over a thousand latents would have twelve million parameters. `AutoIAF` sees that it needs
# no such thing: two latents touch all others, and given these the others form a chain. For this
# model there is an exact answer to compare with, by a Kalman filter.
#
# It takes half a minute on two cores. `--smoke` runs every line in seconds, only to check that it
# runs.

# %%
import argparse
import pathlib

import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch

from pyro_iaf import AutoIAF, fit

plt.switch_backend("Agg")  # writes files, opens no window
parser = argparse.ArgumentParser(description="A river's level, and its exact posterior.")
parser.add_argument("--smoke", action="store_true", help="run every line in seconds")
parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("tutorials/output"))
args, _ = parser.parse_known_args()

pyro.set_rng_seed(0)
torch.set_default_dtype(torch.float64)

# %% [markdown]
# ## The model
#
# The daily steps are written in units of their scale, and summed up. Written like this every level
# depends on all steps before it.

# %%
DAYS = 60 if args.smoke else 1000
level = (0.3 * torch.randn(DAYS)).cumsum(0)
gauge = level + 0.8 * torch.randn(DAYS)


def model(gauge):
    step = pyro.sample("step", dist.LogNormal(-1.0, 1.0))
    noise = pyro.sample("noise", dist.LogNormal(-0.5, 1.0))
    z = pyro.sample("z", dist.Normal(torch.zeros(DAYS), 1.0).to_event(1))
    level = (step.unsqueeze(-1) * z).cumsum(-1)
    pyro.sample("gauge", dist.Normal(level, noise.unsqueeze(-1)).to_event(1), obs=gauge)


# %% [markdown]
# ## The fit
#
# Nothing has to be told to the guide. It prints what it found: the graph of the daily steps is
# sparse in their sums, so it draws those, in few rounds.

# %%
guide = AutoIAF(model)
print(fit(model, guide, (gauge,), seed=0, num_steps=20 if args.smoke else None, progress=False))
print(guide)

draws = guide.sample_posterior(200 if args.smoke else 10_000)
levels = (draws["step"].unsqueeze(-1) * draws["z"]).cumsum(-1)

# %% [markdown]
# ## The exact answer
#
# For given scales the levels are jointly normal, and a Kalman filter has the density of the data
# and, going back, the mean and the variance of every day. A grid over both scales does the rest. It
# runs for all points of the grid at once.

# %%
GRID = 41
log_step = torch.linspace(-1.7, -0.8, GRID)
log_noise = torch.linspace(-0.4, -0.1, GRID)
steps, noises = (
    axis.exp().flatten() for axis in torch.meshgrid(log_step, log_noise, indexing="ij")
)

mean, variance = torch.zeros(GRID**2), torch.zeros(GRID**2)
log_density = dist.LogNormal(-1.0, 1.0).log_prob(steps) + steps.log()
log_density += dist.LogNormal(-0.5, 1.0).log_prob(noises) + noises.log()
filtered = []
for y in gauge:
    ahead = variance + steps**2
    total = ahead + noises**2
    log_density += dist.Normal(mean, total.sqrt()).log_prob(y)
    mean, variance = mean + ahead / total * (y - mean), ahead * noises**2 / total
    filtered.append((mean, variance))
means, variances = [mean], [variance]
for before, spread in reversed(filtered[:-1]):
    gain = spread / (spread + steps**2)
    means.append(before + gain * (means[-1] - before))
    variances.append(spread + gain**2 * (variances[-1] - spread - steps**2))
share = (log_density - log_density.logsumexp(0)).exp()
means, variances = torch.stack(means[::-1]), torch.stack(variances[::-1])
exact_mean = means @ share
exact_sd = (variances @ share + (means - exact_mean.unsqueeze(-1)) ** 2 @ share).sqrt()

error = ((levels.mean(0) - exact_mean) / exact_sd).abs().max()
ratio = levels.std(0) / exact_sd
print(f"Levels: means within {error:.2f} sd, sd within {ratio.min():.2f} and {ratio.max():.2f}")
for name, log_scale in (("step", steps.log()), ("noise", noises.log())):
    known = share @ log_scale
    spread = (share @ (log_scale - known) ** 2).sqrt()
    found = draws[name].log()
    print(
        f"log {name}: {found.mean():.3f} +/- {found.std():.3f}, exact {known:.3f} +/- {spread:.3f}"
    )

# %% [markdown]
# ## The picture
#
# On the left the last days: the gauge, the guide's mean and 90 % of its draws, and between dashes
# those of the exact answer. On the right both scales: draws of the guide, and the exact density.

# %%
figure, (left, right) = plt.subplots(
    1, 2, figsize=(10, 3.6), width_ratios=(2, 1), layout="constrained"
)
last = slice(max(0, DAYS - 150), DAYS)
days = torch.arange(DAYS)[last]
low, high = levels.quantile(torch.tensor([0.05, 0.95]), 0)
left.plot(days, gauge[last], ".", color="0.7", label="gauge")
left.fill_between(days, low[last], high[last], color="tab:blue", alpha=0.3, label="guide, 90 %")
left.plot(days, levels.mean(0)[last], color="tab:blue", label="guide, mean")
for sign in (-1.645, 1.645):
    exact = exact_mean + sign * exact_sd
    label = "exact, 90 %" if sign > 0 else None
    left.plot(days, exact[last], "--", color="black", linewidth=0.8, label=label)
left.set(xlabel="day", ylabel="level")
left.legend(fontsize="small", ncols=2)
some = draws["step"][:2000], draws["noise"][:2000]
right.plot(*some, ".", markersize=2, color="tab:blue", label="guide")
density = share.view(GRID, GRID).T / share.max()
right.contour(
    log_step.exp(), log_noise.exp(), density, levels=(0.1, 0.5, 0.9), colors="black", linewidths=0.8
)
right.set(xlabel="size of a step", ylabel="error of the gauge")
right.set(xlim=(some[0].min(), some[0].max()), ylim=(some[1].min(), some[1].max()))
right.legend(fontsize="small")
args.output.mkdir(parents=True, exist_ok=True)
picture = args.output / "10_a_long_series.png"
figure.savefig(picture, dpi=150)
print(f"The picture is in {picture}")

# %% [markdown]
# ## Is it right?
#
# Means of all levels should be within 0.1 standard deviations of the exact ones, and standard
# deviations within 7 %; a tenth of that is the error of ten thousand draws.

# %%
if not args.smoke:
    assert error < 0.1
    assert ratio.min() > 0.93
    assert ratio.max() < 1.07

# %% [markdown]
# ## When it is not found
#
# From 8 latents on the guide looks for structure in the second derivatives of the model at a few
# points. A regression with many slopes has none: there each slope touches all others, and the flow
# is over all latents. `guide.structure` is then None.
