# %% [markdown]
# # A guide by hand
#
# Eight schools coach their pupils for a test. Each reports an effect with a standard error. How
# much is coaching worth, and how much do schools differ? The posterior of this small model is a
# funnel: the less the schools differ, the closer their effects are to each other. A mean-field
# guide can't represent that. Can a flow?
#
# It takes a minute and a half on two cores. `--smoke` runs every line in seconds, only to check
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

from pyro_iaf import AutoIAF, DiagonalNormal, inverse_autoregressive_flow

plt.switch_backend("Agg")  # writes files, opens no window
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
# event dimension, and the model also runs on a batch of particles.

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
# A long run of NUTS serves as the truth here. It samples the same posterior with `theta` written as
# `mu + tau * noise`, which mixes better.

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
# The noise has ten coordinates, from a normal with diagonal covariance. Two flows transform it, and
# their result is shifted and scaled into the units of the problem. All of it is *one* distribution
# over vectors: its `event_shape` is 10 and its log density a single number, so nothing is counted
# once per coordinate.
#
# Pyro needs one value for each site of the model. So the vector is an auxiliary sample, and the
# sites are deltas at its parts. `tau` is positive: it is the exponential of its coordinate, and
# `log_density` has the change of the density by that, minus the log of the slope.
#
# The affine transform is PyTorch's, which by default does not cache what it transformed. With
# `cache_size=1` it returns the flow's own tensor to the flow, which recognises it: scoring a draw
# costs no network pass.
#
# Each flow takes the coordinates in the reverse order of the one before it. The last flow should
# take them in the model's order, causes before effects: `theta` depends on `tau`. So the first of
# two flows has the reversed order.

# %%
flow = inverse_autoregressive_flow(10, hidden_dims=[64, 64], num_flows=2, order=range(9, -1, -1))


def by_hand():
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
# ## One number for each vector
#
# Is anything counted once per coordinate after all? The event of the flow is the whole vector, and
# its log determinant is summed over it. So the density is the same on a base of ten univariate
# normals and on bases over vectors, and it is the density of one vector.
#
# Pyro's first inverse autoregressive flow returned ten numbers here, with an event of a single
# number. A base over vectors adds these up, and the density is right. For a base of univariate
# normals look at the fourth line: ten numbers, as if for ten independent draws, which plates, masks
# and subsamples may separate. They are no such densities, because each scale depends on other
# coordinates; only their sum is a log density.

# %%
one = flow.parts[0]


class NumberByNumber(dist.transforms.Transform):
    domain = codomain = dist.constraints.real
    bijective = True

    def _call(self, x):
        return one(x)

    def _inverse(self, y):
        return one.inv(y)

    def log_abs_det_jacobian(self, x, y):
        jacobian = torch.func.vmap(torch.func.jacfwd(one))(x)
        return jacobian.diagonal(dim1=-2, dim2=-1).log()


x = torch.randn(3, 10)
value = one(x).detach()
assert one.log_abs_det_jacobian(one.inv(value), value).shape == (3,)
bases = {
    "univariate": dist.Normal(torch.zeros(10), torch.ones(10)),
    "to_event(1)": dist.Normal(torch.zeros(10), torch.ones(10)).to_event(1),
    "DiagonalNormal": DiagonalNormal(torch.zeros(10), torch.ones(10)),
}
expected = bases["DiagonalNormal"].log_prob(x) - one.log_abs_det_jacobian(x, value)
for transform in (one, NumberByNumber()):
    for title, base in bases.items():
        q = dist.TransformedDistribution(base, [transform])
        log_q = q.log_prob(value)
        total = log_q if log_q.dim() == 1 else log_q.sum(-1)
        torch.testing.assert_close(total, expected)
        shapes = f"batch {tuple(q.batch_shape)!s:6} event {tuple(q.event_shape)!s:6}"
        print(f"{title:15} {shapes} log q of shape {tuple(log_q.shape)}")

# %% [markdown]
# ## The automatic guide
#
# You need not write this for each model. `AutoIAF` finds the sites, their shapes and constraints,
# and does the same for any model.

# %%
auto = AutoIAF(model)

# %% [markdown]
# ## The fit
#
# Each step has sixteen draws, all at once. The loss is the negative evidence lower bound, in nats.

# %%
num_steps = 20 if args.smoke else 4000
elbo = Trace_ELBO(num_particles=16, vectorize_particles=True, max_plate_nesting=0)
losses = {}
for title, guide in [("Flow by hand", by_hand), ("AutoIAF", auto)]:
    optimizer = pyro.optim.ClippedAdam({"lr": 0.01, "lrd": 0.01 ** (1 / num_steps)})
    svi = SVI(model, guide, optimizer, elbo)
    losses[title] = []
    steps = trange(num_steps, desc=title, mininterval=0.5)
    for _ in steps:
        losses[title].append(svi.step())
        if len(losses[title]) % 50 == 0:
            steps.set_postfix(elbo=f"{-sum(losses[title][-50:]) / 50:.2f}")

# %% [markdown]
# ## What they found
#
# A guide by hand is sampled like any Pyro program, and `AutoIAF` by `sample_posterior`.

# %%
num_draws = 100 if args.smoke else 10_000
with torch.no_grad(), pyro.plate("draws", num_draws):
    trace = pyro.poutine.trace(by_hand).get_trace()
draws = {
    "NUTS": exact,
    "Flow by hand": {name: trace.nodes[name]["value"] for name in exact},
    "AutoIAF": auto.sample_posterior(num_draws),
}


def rows(draws):
    columns = torch.cat([draws["mu"][:, None], draws["tau"][:, None], draws["theta"]], -1)
    return columns.mean(0), columns.std(0)


names = ["mu", "tau", *(f"theta[{i}]" for i in range(8))]
print(f"{'':10}" + "".join(f"{title:>18}" for title in draws))
print(f"{'':10}" + f"{'mean':>10}{'sd':>8}" * len(draws))
columns = [column for found in draws.values() for column in rows(found)]
for name, *row in zip(names, *columns, strict=True):
    print(f"{name:10}" + ("{:10.2f}{:8.2f}" * len(draws)).format(*row))

# %% [markdown]
# Look for the funnel in the picture: at small `tau` the effect in the first school has a narrow
# range, at large `tau` a wide one. The guides' dots should spread and narrow as those of NUTS do;
# see how far down the neck they reach.

# %%
colors = {"NUTS": "0.35", "Flow by hand": "tab:orange", "AutoIAF": "tab:red"}
figure, axes = plt.subplots(1, 4, figsize=(15, 4), layout="constrained")
for axis, (title, found) in zip(axes, draws.items(), strict=False):
    theta, log_tau = found["theta"][:2000, 0], found["tau"][:2000].log()
    axis.scatter(theta, log_tau, s=6, alpha=0.4, color=colors[title], linewidths=0)
    axis.set(xlabel="effect in the first school", xlim=(-20, 40), ylim=(-4, 4), title=title)
axes[0].set_ylabel("log tau")
window = max(1, num_steps // 80)
for title, history in losses.items():
    smooth = torch.tensor(history).unfold(0, window, window).mean(-1)
    steps = range(window, window * len(smooth) + 1, window)
    axes[3].plot(steps, smooth, color=colors[title], label=title)
lowest = smooth.min().item()
axes[3].set(xlabel="step", ylabel="loss, nats", ylim=(lowest - 0.2, lowest + 4), title="The fit")
axes[3].legend()
args.output.mkdir(parents=True, exist_ok=True)
picture = args.output / "01_guide_by_hand.png"
figure.savefig(picture, dpi=120)
print(f"The picture is in {picture}")

# %% [markdown]
# ## Is it right?
#
# Means should be within a quarter of a posterior standard deviation of NUTS, and standard
# deviations within a quarter of those of NUTS. `tau` has a heavy tail, and both runs estimate its
# standard deviation only roughly.

# %%
exact_mean, exact_sd = rows(exact)
for title in losses:
    mean, sd = rows(draws[title])
    worst_mean = ((mean - exact_mean) / exact_sd).abs().max().item()
    worst_sd = (sd / exact_sd).log().abs().max().item()
    worst = f"of a mean: {worst_mean:.2f} sd; of a spread: {math.exp(worst_sd) - 1:.0%}"
    print(f"{title:14} Largest error {worst}")
    if not args.smoke:
        assert worst_mean < 0.25
        assert worst_sd < math.log(1.25)

# %% [markdown]
# ## Limitations
#
# A guide reaches into the neck of the funnel only as far as its flows can contract, and the ELBO is
# only a little lower for that. More flows help slowly. Writing the model with `theta` decentred, as
# for NUTS above, helps at once. The ELBO alone can't tell how far a guide is from the posterior:
# compare it with something else, as here.
