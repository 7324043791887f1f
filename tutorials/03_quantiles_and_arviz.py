# %% [markdown]
# # Quantiles, better draws, and ArviZ
#
# Twenty animals got one of four doses of a poison, and some died (Racine et al. 1986). Which dose
# kills half of them, and how certain is that? There are only two parameters, so a grid over the
# plane gives the exact posterior, including its long tail. What can you ask of a fitted guide, and
# how accurate are its answers?
#
# It takes a minute on two cores. `--smoke` runs every line in seconds, only to check that it runs.

# %%
import argparse
import pathlib

import arviz
import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch
from pyro.infer.autoguide import AutoNormal

from pyro_iaf import AutoIAF, diagnose, fit, to_arviz

plt.switch_backend("Agg")  # writes files, opens no window
parser = argparse.ArgumentParser(description="Quantiles, resampled draws and ArviZ.")
parser.add_argument("--smoke", action="store_true", help="run every line in seconds")
parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("tutorials/output"))
args, _ = parser.parse_known_args()

pyro.set_rng_seed(0)
torch.set_default_dtype(torch.float64)

# %% [markdown]
# ## The data and the model
#
# Doses are logarithms of grams per millilitre, with five animals each. The probability of death is
# logistic in the dose, and the prior is wide.

# %%
dose = torch.tensor([-0.86, -0.30, -0.05, 0.73])
deaths = torch.tensor([0.0, 1.0, 3.0, 5.0])
PRIOR_SD = 10.0


def model():
    alpha = pyro.sample("alpha", dist.Normal(0.0, PRIOR_SD))
    beta = pyro.sample("beta", dist.Normal(10.0, PRIOR_SD))
    with pyro.plate("doses", 4):
        logits = alpha + beta * dose
        pyro.sample("deaths", dist.Binomial(5, logits=logits), obs=deaths)


# %% [markdown]
# ## The answer
#
# The density is computed on a fine grid, and draws come from its cells. `-alpha / beta` is the dose
# that kills half of the animals. It is not a latent of the model, but a function of the two.

# %%
side = 200 if args.smoke else 1000
a, b = torch.linspace(-6, 14, side), torch.linspace(-12, 60, side)
A, B = torch.meshgrid(a, b, indexing="ij")
log_p = dist.Normal(0.0, PRIOR_SD).log_prob(A) + dist.Normal(10.0, PRIOR_SD).log_prob(B)
logits = A[..., None] + B[..., None] * dose
log_p = log_p + dist.Binomial(5, logits=logits).log_prob(deaths).sum(-1)
num_draws = 1000 if args.smoke else 100_000
cells = dist.Categorical(logits=log_p.reshape(-1)).sample((num_draws,))
jitter = torch.rand(2, num_draws) - 0.5
exact = {
    "alpha": A.reshape(-1)[cells] + jitter[0] * (a[1] - a[0]),
    "beta": B.reshape(-1)[cells] + jitter[1] * (b[1] - b[0]),
}


def half_killing(draws):
    return -draws["alpha"] / draws["beta"]


# %% [markdown]
# ## The fit
#
# `AutoNormal` is for comparison. `AutoIAF` is fitted twice: once for 2,000 steps, and once for a
# single step, so it is hardly more than the normal that it starts from. The next sections show what
# its draws are still good for.

# %%
num_steps = 20 if args.smoke else 2000
guides = {
    "AutoNormal": AutoNormal(model),
    "AutoIAF, stopped": AutoIAF(model, name="stopped"),
    "AutoIAF": AutoIAF(model),
}
for name, guide in guides.items():
    steps = 1 if "stopped" in name else num_steps
    print(f"{name:18}{fit(model, guide, num_steps=steps, progress=False)}")

# %% [markdown]
# ## Quantiles
#
# `quantiles` takes levels and returns, for each site, a tensor with the levels along its first
# axis. They are quantiles of draws, so they are in the model's units and never cross. `median` is
# the quantile at 0.5.

# %%
levels = [0.025, 0.25, 0.5, 0.75, 0.975]
auto = guides["AutoIAF"]
found = auto.quantiles(levels)
for site in ("alpha", "beta"):
    true = exact[site].quantile(torch.tensor(levels))
    print(f"{site:6} exact  " + "".join(f"{q:8.2f}" for q in true))
    print(f"{'':6} AutoIAF" + "".join(f"{q:8.2f}" for q in found[site]))

# %% [markdown]
# A function of the sites has quantiles too: compute it for the draws.

# %%
draws = {name: guides[name].sample_posterior(num_draws) for name in ("AutoIAF, stopped", "AutoIAF")}
with torch.no_grad(), pyro.plate("draws", num_draws):
    draws["AutoNormal"] = guides["AutoNormal"]()
true = half_killing(exact).quantile(torch.tensor(levels))
dead = half_killing(draws["AutoIAF"]).quantile(torch.tensor(levels))
print("dose   exact  " + "".join(f"{q:8.3f}" for q in true))
print("       AutoIAF" + "".join(f"{q:8.3f}" for q in dead))

# %% [markdown]
# ## Better draws from a bad guide
#
# The density of every draw is known: exactly under the guide, and up to a constant under the
# posterior. Their ratio is the draw's importance weight. `resample=True` chooses draws from a
# larger number of draws by these weights, after smoothing the largest ones. This corrects a guide
# whose draws cover the posterior. `diagnose` checks that by k-hat: below 0.7 the weights are
# reliable. Here it is above, so `resample=True` warns. The draws are much better than the guide's
# own, but their tails are too thin.

# %%
print(diagnose(model, guides["AutoIAF, stopped"], num_samples=200 if args.smoke else 4000))
stopped = guides["AutoIAF, stopped"]
draws["resampled"] = stopped.sample_posterior(num_draws // 10, resample=True)


def errors(draws):
    """How far means and spreads are off: in standard deviations, and as a share."""
    return {
        site: (
            ((draws[site].mean() - true.mean()) / true.std()).item(),
            (draws[site].std() / true.std() - 1).item(),
        )
        for site, true in exact.items()
    }


order = ["AutoNormal", "AutoIAF, stopped", "resampled", "AutoIAF"]
for name in order:
    found = errors(draws[name]).items()
    cells = (f"{site}: mean {mean:+.2f} sd, spread {sd:+.0%}" for site, (mean, sd) in found)
    print(f"{name:18}" + "   ".join(cells))

# %% [markdown]
# ## ArviZ
#
# `to_arviz` returns the draws, predictions of the data, the log likelihood of each observation and
# the data. With that you can use all of ArviZ: tables, leave-one-out checks, plots.

# %%
data = to_arviz(model, auto, num_samples=200 if args.smoke else 4000)
print(arviz.summary(data, kind="stats", round_to=2))
predicted, seen = data.posterior_predictive["deaths"], data.observed_data["deaths"]
chances = (predicted >= seen).mean(("chain", "draw")).values
print("Chance of at least as many deaths: " + "".join(f"{p:6.2f}" for p in chances))

# %% [markdown]
# In the picture the posterior is tilted and has a long tail to the upper right. `AutoNormal` is an
# upright ellipse at the mode, and has no draws in the tail. The dots of the other guides should
# thin out as the grey does.

# %%
figure, axes = plt.subplots(1, 4, figsize=(15, 4), layout="constrained")
for axis, name in zip(axes, order[:1] + order[2:], strict=False):
    density = (log_p - log_p.max()).exp().T
    axis.contourf(a, b, density, levels=[0.01, 0.05, 0.2, 0.5, 1], cmap="Greys")
    dots = draws[name]["alpha"][:1500], draws[name]["beta"][:1500]
    axis.plot(*dots, ".", color="tab:red", markersize=3, alpha=0.5)
    axis.set(xlabel="alpha", xlim=(-4, 8), ylim=(-5, 45), title=name)
axes[0].set_ylabel("beta")
colors = {"exact": "0.35", "AutoNormal": "tab:blue", "AutoIAF": "tab:red"}
bins = torch.linspace(-0.6, 0.5, 60).tolist()
for name, color in colors.items():
    values = half_killing(exact if name == "exact" else draws[name])
    axes[3].hist(values, bins, density=True, histtype="step", color=color, label=name)
axes[3].set(xlabel="dose that kills half", yticks=[])
axes[3].legend()
args.output.mkdir(parents=True, exist_ok=True)
picture = args.output / "03_quantiles_and_arviz.png"
figure.savefig(picture, dpi=120)
print(f"The picture is in {picture}")

# %% [markdown]
# ## Is it right?
#
# Medians should be within a tenth of a posterior standard deviation, and the ends of the middle 95
# % within a quarter. Where the guide stopped early, resampling should take away at least half of
# what its means are off.

# %%
for site, true in exact.items():
    off = (auto.quantiles(levels)[site] - true.quantile(torch.tensor(levels))) / true.std()
    print(f"{site:6} quantiles are off by " + "".join(f"{q:6.2f}" for q in off) + " sd")
    if not args.smoke:
        assert off[2].abs() < 0.1
        assert off.abs().max() < 0.25
        before = abs(errors(draws["AutoIAF, stopped"])[site][0])
        assert before > 0.15
        assert abs(errors(draws["resampled"])[site][0]) < before / 2

# %% [markdown]
# ## Limitations
#
# Resampling can't find a mode without any draws near it. If the guide is far from the posterior,
# only a few draws have large weights: `diagnose` reports the effective sample size. Extreme
# quantiles come from few draws, and a fit is least accurate in its tails.
