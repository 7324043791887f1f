# %% [markdown]
# # Was the bird there?
#
# An ornithologist visits 50 woods four times each, and notes whether a shy bird was seen. A wood
# where it was never seen may be empty, or the bird was there and hid. So each wood has a latent
# that is 0 or 1: is it occupied? Flows can't draw such latents, and need not: the guide draws the
# continuous ones, the others are summed out, and are drawn afterwards if they are wanted.
#
# It takes a minute on two cores. `--smoke` runs every line in seconds, only to check that it runs.

# %%
import argparse
import pathlib

import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import MCMC, NUTS

from pyro_iaf import AutoIAF, fit

plt.switch_backend("Agg")  # writes files, opens no window
parser = argparse.ArgumentParser(description="Occupancy of woods by a bird that hides.")
parser.add_argument("--smoke", action="store_true", help="run every line in seconds")
parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("tutorials/output"))
args, _ = parser.parse_known_args()

pyro.set_rng_seed(0)
torch.set_default_dtype(torch.float64)

# %% [markdown]
# ## The model
#
# The share of old trees makes a wood more likely to be occupied, and rain makes the bird harder to
# see. The model says so in Pyro's words: `occupied` is a Bernoulli latent in the plate of woods.

# %%
WOODS, VISITS = 50, 4
old_trees = torch.randn(WOODS)
rain = torch.randn(WOODS, VISITS)


def model(seen=None):
    intercept = pyro.sample("intercept", dist.Normal(0.0, 1.5))
    slope = pyro.sample("slope", dist.Normal(0.0, 1.5))
    shyness = pyro.sample("shyness", dist.Normal(0.0, 1.5))
    hiding = pyro.sample("hiding", dist.Normal(0.0, 1.5))
    with pyro.plate("woods", WOODS, dim=-2):
        logits = intercept + slope * old_trees.unsqueeze(-1)
        occupied = pyro.sample("occupied", dist.Bernoulli(logits=logits))
        with pyro.plate("visits", VISITS, dim=-1):
            visible = torch.sigmoid(shyness + hiding * rain)
            return pyro.sample("seen", dist.Bernoulli(occupied * visible), obs=seen)


truth = {"intercept": 0.3, "slope": 1.2, "shyness": -0.8, "hiding": -1.0}
known = pyro.condition(model, {name: torch.tensor(value) for name, value in truth.items()})
with pyro.poutine.trace() as trace:
    seen = known()
really = trace.trace.nodes["occupied"]["value"].squeeze(-1)
never = seen.sum(-1) == 0
print(f"Seen in {int((~never).sum())} woods; in truth {int(really.sum())} of {WOODS} are occupied")

# %% [markdown]
# ## The fit
#
# Nothing has to be marked, and nothing to be told to the guide. The diagnosis is of the continuous
# latents, with the discrete ones summed out exactly.

# %%
guide = AutoIAF(model)
print(fit(model, guide, (seen,), seed=0, num_steps=20 if args.smoke else None, progress=False))

# %% [markdown]
# ## Each wood's probability
#
# `discrete=True` draws them too, each time given the other latents of the draw and the data. The
# mean over draws is the probability that a wood is occupied. `discrete="map"` would give the most
# probable values.

# %%
draws = guide.sample_posterior(200 if args.smoke else 10_000, seen, discrete=True)
probability = draws["occupied"].mean(0).squeeze(-1)
share = draws["occupied"].mean((1, 2))
low, high = share.quantile(torch.tensor([0.05, 0.95])).tolist()
print(f"Between {low:.0%} and {high:.0%} of the woods are occupied, in nine of ten draws")

# %% [markdown]
# ## By hand
#
# An occupied wood has the product of its visits' probabilities, an empty one was never seen. So the
# sum has two terms, and NUTS can be run on what is left.


# %%
def log_terms(intercept, slope, shyness, hiding):
    """The log density of each wood's visits with the bird, and without it."""
    logits = intercept + slope * old_trees
    visits = dist.Bernoulli(logits=shyness + hiding * rain).log_prob(seen).sum(-1)
    empty = dist.Bernoulli(logits=logits).log_prob(torch.tensor(0.0))
    without = torch.where(never, empty, -torch.inf)
    return dist.Bernoulli(logits=logits).log_prob(torch.tensor(1.0)) + visits, without


def by_hand():
    values = [pyro.sample(name, dist.Normal(0.0, 1.5)) for name in truth]
    pyro.factor("seen", torch.logaddexp(*log_terms(*values)).sum())


num_samples, warmup = (20, 20) if args.smoke else (1000, 200)
mcmc = MCMC(NUTS(by_hand), num_samples=num_samples, warmup_steps=warmup, disable_progbar=True)
mcmc.run()
chain = mcmc.get_samples()
each = [
    torch.sigmoid(present - absent)
    for values in zip(*(chain[name] for name in truth), strict=True)
    for present, absent in [log_terms(*values)]
]
exact = torch.stack(each).mean(0)
for name, value in truth.items():
    ours, theirs = draws[name], chain[name]
    print(
        f"{name:9} truth {value:5.1f}, guide {ours.mean():5.2f} +/- {ours.std():.2f}, "
        f"NUTS {theirs.mean():5.2f} +/- {theirs.std():.2f}"
    )
print(f"Largest difference of a wood's probability: {(probability - exact).abs().max():.3f}")

# %% [markdown]
# Where it was never seen, a wood is the likelier occupied the more old trees it has, and the more
# it rained.

# %%
args.output.mkdir(parents=True, exist_ok=True)
figure, panels = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
points = panels[0].scatter(
    old_trees[never], probability[never], c=rain.mean(-1)[never], cmap="viridis", s=45
)
figure.colorbar(points, ax=panels[0], label="rain at its visits")
panels[0].set(
    xlabel="old trees",
    ylabel="probability that it is occupied",
    title="Woods where the bird was never seen",
    ylim=(-0.03, 1.03),
)
panels[1].plot([0, 1], [0, 1], color="0.8", zorder=0)
panels[1].plot(exact, probability, ".", color="tab:red")
panels[1].set(xlabel="by hand, by NUTS", ylabel="drawn by the guide", title="All woods")
picture = args.output / "09_discrete_latents.png"
figure.savefig(picture, dpi=120)
print(f"The picture is in {picture}")

# %% [markdown]
# ## Is it right?
#
# Means should be within 0.15 standard deviations of those of NUTS, and each wood's probability
# within 0.03.

# %%
if not args.smoke:
    for name in truth:
        assert abs(draws[name].mean() - chain[name].mean()) < 0.15 * chain[name].std()
    assert (probability - exact).abs().max() < 0.03

# %% [markdown]
# ## Limitations
#
# A discrete latent needs finitely many values, and its rows have to be in plates: a Poisson latent
# has to be truncated, or summed out by hand. A chain of discrete latents goes into `pyro.markov`,
# and a step then costs time in proportion to its length; a chain of hundreds is faster as
# `dist.DiscreteHMM`, which is one site. A model whose labels can be swapped has several equal
# modes: `fit` adds a component for each, up to eight.
