# %% [markdown]
# # A guide by hand
#
# Eight schools coach their pupils for a test. Each reports an effect with a standard error. How
# much is coaching worth, and how much do schools differ? The posterior of this small model is a
# funnel: the less the schools differ, the more tightly their effects are tied together. A
# mean-field guide can't see that. Does a flow?
#
# It takes a minute on two cores. `--smoke` runs every line in seconds, to no purpose but to show
# that it runs.

# %%
import argparse
import math
import pathlib
import time

import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import MCMC, NUTS, SVI, Trace_ELBO
from pyro.infer.reparam import LocScaleReparam
from tqdm.auto import trange

from pyro_iaf import DiagonalNormal, inverse_autoregressive_flow

plt.switch_backend("Agg")  # a file, no window
parser = argparse.ArgumentParser(description="Eight schools with a guide by hand.")
parser.add_argument("--smoke", action="store_true", help="run every line in seconds")
parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("tutorials/output"))
args, _ = parser.parse_known_args()

pyro.set_rng_seed(0)
torch.set_default_dtype(torch.float64)

# %% [markdown]
# ## The model
#
# The data are Rubin's (1981). `mu` is the effect of coaching, `tau` how much schools differ,
# `theta` the effect in each school: ten latents. The effects are one vector, so the site has an
# event dimension; with that, the model runs on a batch of particles as it stands.

# %%
y = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
sigma = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])


def model():
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0)).unsqueeze(-1)
    tau = pyro.sample("tau", dist.HalfCauchy(torch.tensor(5.0))).unsqueeze(-1)
    theta = pyro.sample("theta", dist.Normal(mu.expand(*mu.shape[:-1], 8), tau).to_event(1))
    pyro.sample("y", dist.Normal(theta, sigma).to_event(1), obs=y)


# %% [markdown]
# ## The answer
#
# A long run of NUTS is as good as the truth here. It walks the same model with `theta` written as
# `mu + tau * noise`, which changes how it moves and not where.

# %%
kernel = NUTS(
    pyro.poutine.reparam(model, config={"theta": LocScaleReparam(0.0)}),
    jit_compile=True,
    ignore_jit_warnings=True,
)
mcmc = MCMC(kernel, num_samples=20 if args.smoke else 3000, warmup_steps=20 if args.smoke else 500)
start = time.perf_counter()
mcmc.run()
print(f"NUTS took {time.perf_counter() - start:.0f} s")
noise = mcmc.get_samples()
exact = {
    "mu": noise["mu"],
    "tau": noise["tau"],
    "theta": noise["mu"][:, None] + noise["tau"][:, None] * noise["theta_decentered"],
}

# %% [markdown]
# ## The guide
#
# Ten coordinates of noise, from a normal with diagonal covariance. Two flows bend them, and what
# comes out is shifted and scaled into the units of the problem. All of it is *one* distribution
# over vectors: its `event_shape` is 10 and its log-density a single number, so nothing is counted
# once per coordinate.
#
# Pyro wants one value for each site of the model. So the vector is an auxiliary sample, and the
# sites are deltas on its parts. `tau` is positive: it takes the exponential of its coordinate, and
# `log_density` holds what that does to the density, minus the log of the slope.
#
# The affine transform comes from PyTorch, which forgets what it transformed unless told to keep
# it. With `cache_size=1` it hands the flow's own value back to the flow, which knows it: scoring a
# draw costs no network pass.

# %%
flow = inverse_autoregressive_flow(10, hidden_dims=[64, 64], num_flows=2)


def guide():
    pyro.module("flow", flow)
    loc = pyro.param("loc", torch.zeros(10))
    scale = pyro.param("scale", torch.ones(10), constraint=dist.constraints.positive)
    base = DiagonalNormal(torch.zeros(10), torch.ones(10))
    to_units = dist.transforms.AffineTransform(loc, scale, event_dim=1, cache_size=1)
    posterior = dist.TransformedDistribution(base, [flow, to_units])
    z = pyro.sample("z", posterior, infer={"is_auxiliary": True})
    mu, log_tau, theta = z[..., 0], z[..., 1], z[..., 2:]
    pyro.sample("mu", dist.Delta(mu))
    pyro.sample("tau", dist.Delta(log_tau.exp(), log_density=-log_tau))
    pyro.sample("theta", dist.Delta(theta, event_dim=1))


# %% [markdown]
# ## The fit
#
# Sixteen draws a step, all at once. The loss is the negative evidence lower bound, in nats.

# %%
num_steps = 20 if args.smoke else 4000
optimizer = pyro.optim.ClippedAdam({"lr": 0.01, "lrd": 0.01 ** (1 / num_steps)})
elbo = Trace_ELBO(num_particles=16, vectorize_particles=True, max_plate_nesting=0)
svi = SVI(model, guide, optimizer, elbo)

losses = []
steps = trange(num_steps, desc="SVI", mininterval=0.5)
for _ in steps:
    losses.append(svi.step())
    if len(losses) % 50 == 0:
        steps.set_postfix(elbo=f"{-sum(losses[-50:]) / 50:.2f}")

# %% [markdown]
# ## What it found
#
# Draws come from the guide as from any Pyro program.

# %%
num_draws = 100 if args.smoke else 10_000
with torch.no_grad(), pyro.plate("draws", num_draws):
    trace = pyro.poutine.trace(guide).get_trace()
found = {name: trace.nodes[name]["value"] for name in exact}


def rows(draws):
    columns = torch.cat([draws["mu"][:, None], draws["tau"][:, None], draws["theta"]], -1)
    return columns.mean(0), columns.std(0)


names = ["mu", "tau", *(f"theta[{i}]" for i in range(8))]
print(f"{'':10}{'NUTS':>16}{'flow guide':>18}")
print(f"{'':10}{'mean':>8}{'sd':>8}{'mean':>10}{'sd':>8}")
for row in zip(names, *rows(exact), *rows(found), strict=True):
    print("{:10}{:8.2f}{:8.2f}{:10.2f}{:8.2f}".format(*row))

# %% [markdown]
# Below, look for the funnel: at small `tau` the effect in the first school has little room, at
# large `tau` a lot. The guide's dots should spread and narrow as those of NUTS do; see how far down
# the neck they reach.

# %%
figure, axes = plt.subplots(1, 3, figsize=(12, 4), layout="constrained")
for axis, draws, title, color in [
    (axes[0], exact, "NUTS", "0.35"),
    (axes[1], found, "Flow guide", "tab:red"),
]:
    shown = slice(None, 2000)
    theta, log_tau = draws["theta"][shown, 0], draws["tau"][shown].log()
    axis.scatter(theta, log_tau, s=6, alpha=0.4, color=color, linewidths=0)
    axis.set(xlabel="effect in the first school", xlim=(-20, 40), ylim=(-4, 4), title=title)
axes[0].set_ylabel("log tau")
window = max(1, num_steps // 80)
smooth = torch.tensor(losses).unfold(0, window, window).mean(-1)
lowest = smooth.min().item()
axes[2].plot(range(window, window * len(smooth) + 1, window), smooth, color="tab:red")
axes[2].set(xlabel="step", ylabel="loss, nats", ylim=(lowest - 0.2, lowest + 4), title="The fit")
args.output.mkdir(parents=True, exist_ok=True)
picture = args.output / "01_guide_by_hand.png"
figure.savefig(picture, dpi=120)
print(f"The picture is in {picture}")

# %% [markdown]
# ## Is it right?
#
# Means within a quarter of a posterior standard deviation of NUTS, spreads within a quarter of its
# spreads. `tau` has a heavy tail, and both runs know its spread only roughly.

# %%
(exact_mean, exact_sd), (found_mean, found_sd) = rows(exact), rows(found)
worst_mean = ((found_mean - exact_mean) / exact_sd).abs().max().item()
worst_sd = (found_sd / exact_sd).log().abs().max().item()
print(f"Largest error of a mean: {worst_mean:.2f} sd; of a spread: {math.exp(worst_sd) - 1:.0%}")
if not args.smoke:
    assert worst_mean < 0.25
    assert worst_sd < math.log(1.25)

# %% [markdown]
# ## Where it bends
#
# The guide reaches into the neck of the funnel as far as its flows can contract; below that it
# stops short, and the ELBO says so only by a little. More flows help slowly; writing the model
# with `theta` decentred, as for NUTS above, helps at once. And the ELBO alone can't say how far
# off a guide is: compare it with something, as done here.
