# %% [markdown]
# # NUTS in the guide's coordinates
#
# A guide is an approximation, and NUTS is exact in the limit, if it mixes. In Neal's funnel it
# doesn't: where `v` is small, the other coordinates have small scales, and a step size for the
# mouth is too large for the neck. In the coordinates of a fitted flow the posterior is nearly a
# standard normal, where NUTS mixes best: "neural transport", NeuTra (Hoffman et al. 2019). How much
# larger is the effective sample size per second?
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
from pyro.infer import MCMC, NUTS
from pyro.infer.reparam import NeuTraReparam
from pyro.ops.stats import effective_sample_size

from pyro_iaf import AutoIAF, fit

plt.switch_backend("Agg")  # writes files, opens no window
parser = argparse.ArgumentParser(description="NUTS preconditioned by a fitted guide.")
parser.add_argument("--smoke", action="store_true", help="run every line in seconds")
parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("tutorials/output"))
args, _ = parser.parse_known_args()

pyro.set_rng_seed(0)
torch.set_default_dtype(torch.float64)

# %% [markdown]
# ## The model
#
# `v` is normal with standard deviation 3, and the nine others have standard deviation `exp(v / 2)`.
# There are no data: the posterior is the prior, and `v` is known to the last digit.


# %%
def funnel():
    v = pyro.sample("v", dist.Normal(0.0, 3.0))
    x_scale = (v / 2).exp().unsqueeze(-1)
    pyro.sample("x", dist.Normal(torch.zeros(9), x_scale).to_event(1))


# %% [markdown]
# ## The guide
#
# It is fitted as usual. However good it is, its draws are the guide's and not the posterior's.

# %%
guide = AutoIAF(funnel)
start = time.perf_counter()
print(fit(funnel, guide, num_steps=20 if args.smoke else 3000, progress=False))
fitting = time.perf_counter() - start

# %% [markdown]
# ## Two chains
#
# `NeuTraReparam` is Pyro's: it samples the noise, and computes the latents from it by the guide's
# transform. A step of NUTS then costs a pass through the flows besides the model. The guide is not
# trained any more, so its parameters need no gradient.

# %%
neutra = NeuTraReparam(guide.requires_grad_(False))
models = {"NUTS": funnel, "NUTS in the guide's coordinates": neutra.reparam(funnel)}
num_samples, warmup = (20, 20) if args.smoke else (1000, 300)
draws, seconds = {}, {}
for name, model in models.items():
    pyro.set_rng_seed(1)
    mcmc = MCMC(
        NUTS(model, jit_compile=True, ignore_jit_warnings=True),
        num_samples=num_samples,
        warmup_steps=warmup,
        disable_progbar=True,
    )
    start = time.perf_counter()
    mcmc.run()
    seconds[name] = time.perf_counter() - start
    draws[name] = mcmc.get_samples()
    if model is not funnel:
        draws[name] = neutra.transform_sample(draws[name]["v_shared_latent"])

# %% [markdown]
# ## Effective sample size
#
# The effective sample size is the number of independent draws that would estimate the mean of `v`
# equally well. The time of the fit is added to that of the chain that uses it.

# %%
rates = {}
print(f"{'':34}{'mean of v':>10}{'sd of v':>9}{'effective':>11}{'seconds':>9}{'a second':>10}")
for name, found in draws.items():
    v = found["v"].reshape(-1)
    effective = effective_sample_size(v[None]).item()
    time_taken = seconds[name] + (0 if name == "NUTS" else fitting)
    rates[name] = effective / time_taken
    print(
        f"{name:34}{v.mean():10.2f}{v.std():9.2f}{effective:11.0f}{time_taken:9.0f}"
        f"{rates[name]:10.2f}"
    )
print(f"{rates[name] / rates['NUTS']:.0f} times as many effective draws a second; sd of v is 3")

# %% [markdown]
# The picture has `v` against one of the nine. On the left NUTS stays in the mouth of the funnel, or
# in its neck, for hundreds of steps, as its path on the right shows. In the guide's coordinates
# successive draws are nearly independent, and cover the funnel from top to bottom.

# %%
colors = {"NUTS": "tab:blue", "NUTS in the guide's coordinates": "tab:red"}
figure, axes = plt.subplots(1, 3, figsize=(14, 4.2), layout="constrained")
for axis, (name, found) in zip(axes, draws.items(), strict=False):
    v, x = found["v"].reshape(-1), found["x"].reshape(-1, 9)[:, 0]
    axis.plot(x, v, ".", markersize=4, alpha=0.5, color=colors[name])
    edge = torch.linspace(-9, 9, 100)
    for side in (-2, 2):
        axis.plot(side * (edge / 2).exp(), edge, color="0.6", linewidth=1)
    axis.set(xlim=(-30, 30), ylim=(-10, 10), xlabel="x[0]", title=name)
    top = 1.0 if name == "NUTS" else 0.45
    axes[2].plot(v, color=colors[name], linewidth=0.8, alpha=top, zorder=2 + top)
axes[0].set_ylabel("v")
axes[2].set(xlabel="draw", ylim=(-10, 10), title="The paths of v")
args.output.mkdir(parents=True, exist_ok=True)
picture = args.output / "04_neutra.png"
figure.savefig(picture, dpi=120)
print(f"The picture is in {picture}")

# %% [markdown]
# ## Is it right?
#
# `v` is normal with mean 0 and standard deviation 3. In the guide's coordinates both estimates
# should be within a few standard errors.

# %%
v = draws["NUTS in the guide's coordinates"]["v"].reshape(-1)
print(f"off by {v.mean().item():+.2f} in the mean and {v.std().item() - 3:+.2f} in the sd")
if not args.smoke:
    assert v.mean().abs() < 0.4
    assert (v.std() - 3).abs() < 0.3
    assert rates["NUTS in the guide's coordinates"] > 10 * rates["NUTS"]

# %% [markdown]
# ## Limitations
#
# NeuTra removes only the difficulty that the flow has learnt; the rest is as hard as before, and
# each step costs passes through the flows. If `diagnose` calls the guide good, use the guide's own
# draws, which cost nothing more. NeuTra is for the cases between, where k-hat is high and the
# answer has to be exact. `pyro_iaf.refine(funnel, guide)` does it in one call: 64 chains at once,
# with draws of the guide as further proposals, until they agree. NUTS is here to show why it works.
