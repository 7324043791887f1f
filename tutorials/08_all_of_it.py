# %% [markdown]
# # Is that all of it?
#
# A star swings back and forth, and was observed on six nights. How often does it swing? When a
# quantity is measured once a night, a swing of 0.3 per night and one of 0.7 give almost the same
# numbers. So the posterior has two modes, and most methods find one of them and say nothing. Does
# the guide find both, does it say so if it has not, and are the shares of the two right?
#
# It takes half a minute on two cores. `--smoke` runs every line in seconds, only to check that it
# runs.

# %%
import argparse
import math
import pathlib

import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch

from pyro_iaf import AutoIAF, diagnose, fit, plot_pairs

plt.switch_backend("Agg")  # writes files, opens no window
parser = argparse.ArgumentParser(description="A posterior with two modes.")
parser.add_argument("--smoke", action="store_true", help="run every line in seconds")
parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("tutorials/output"))
args, _ = parser.parse_known_args()

pyro.set_rng_seed(0)
torch.set_default_dtype(torch.float64)

# %% [markdown]
# ## The data and the model
#
# The velocity of the star is a wave of unknown frequency, with two amplitudes instead of an
# amplitude and a phase. Nights are not quite a day apart, which tells the two answers apart a bit.

# %%
nights = torch.tensor([0.0, 1.0, 2.05, 3.0, 5.1, 6.0])
velocity = torch.tensor([1.0, -1.2, -0.5, 0.8, -0.8, 0.8])
NOISE = 0.35


def model():
    frequency = pyro.sample("frequency", dist.Uniform(0.05, 0.95))
    cosine = pyro.sample("cosine", dist.Normal(0.0, 1.0))
    sine = pyro.sample("sine", dist.Normal(0.0, 1.0))
    angle = 2 * math.pi * frequency * nights
    with pyro.plate("nights", len(nights)):
        mean = cosine * angle.cos() + sine * angle.sin()
        pyro.sample("velocity", dist.Normal(mean, NOISE), obs=velocity)


# %% [markdown]
# ## The answer
#
# Given the frequency, the model is a linear regression, so the amplitudes can be integrated out.
# What is left is a density on a line.

# %%
frequencies = (torch.arange(4000) + 0.5) / 4000 * 0.9 + 0.05
angles = 2 * math.pi * frequencies.unsqueeze(-1) * nights
waves = torch.stack([angles.cos(), angles.sin()], -1)
covariance = waves @ waves.mT + NOISE**2 * torch.eye(len(nights))
exact = dist.MultivariateNormal(torch.zeros(len(nights)), covariance).log_prob(velocity).softmax(0)
share = exact[frequencies > 0.5].sum().item()
print(f"{share:.1%} of the mass is above 0.5 swings a night")

# %% [markdown]
# ## One component
#
# A guide of one flow fits one of the modes. Its draws alone look perfect: they are close to that
# mode, and importance weights of such draws can't tell of another one. So `fit` also searches: it
# climbs the log joint density from many points, and weighs each peak that the guide misses.

# %%
num_steps = 20 if args.smoke else None
one = AutoIAF(model, num_components=1, name="one")
print(fit(model, one, num_steps=num_steps, progress=False))

# %% [markdown]
# The peak that it misses is a cross among the draws, with its share of the mass.

# %%
args.output.mkdir(parents=True, exist_ok=True)
figure = plot_pairs(one.sample_posterior(2000), modes=diagnose(model, one).modes)
figure.savefig(args.output / "08_missing.png", dpi=120)

# %% [markdown]
# ## As many as it takes
#
# By default `fit` adds a component at each mode that the search finds, up to eight, trains all
# together, and searches again. The weight of a component is the share of its mode.

# %%
guide = AutoIAF(model)
print(fit(model, guide, num_steps=num_steps, progress=False))
print(f"Weights of the components: {guide.component_weights.tolist()}")
draws = guide.sample_posterior(4000)
above = (draws["frequency"] > 0.5).double().mean().item()
print(f"{above:.1%} of the draws are above 0.5 swings a night, and {share:.1%} of the mass")

# %% [markdown]
# The two modes differ in the sign of the sine too: seen once a night, 0.7 swings forwards are 0.3
# swings backwards.

# %%
figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
bins = torch.linspace(0.05, 0.95, 91).numpy()
axes[0].plot(frequencies, exact / 0.9 * 4000, color="0.35", label="exact")
for name, of, color in (("one component", one, "tab:orange"), ("by default", guide, "tab:red")):
    found = of.sample_posterior(4000)["frequency"].numpy()
    axes[0].hist(found, bins, density=True, histtype="step", color=color, label=name)
axes[0].set(xlabel="swings a night", ylabel="density")
axes[0].legend()
time = torch.linspace(0, 6.2, 400)
for k in range(60):
    frequency, cosine, sine = (draws[name][k] for name in ("frequency", "cosine", "sine"))
    angle = 2 * math.pi * frequency * time
    color = "tab:blue" if frequency < 0.5 else "tab:red"
    wave = cosine * angle.cos() + sine * angle.sin()
    axes[1].plot(time, wave, color=color, alpha=0.15, linewidth=0.8)
axes[1].plot(nights, velocity, "ko", markersize=4)
axes[1].set(xlabel="night", ylabel="velocity", title="Draws: two waves through the same points")
picture = args.output / "08_all_of_it.png"
figure.savefig(picture, dpi=120)
print(f"The picture is in {picture}")

# %% [markdown]
# ## Is it right?
#
# The share of each mode should be within 0.03.

# %%
if not args.smoke:
    assert len(guide.component_weights) == 2
    assert abs(above - share) < 0.03

# %% [markdown]
# ## Limitations
#
# A search finds a mode if one of its climbs ends there. It misses a narrow mode far out, and one
# among wide ones in many dimensions: see "Modes are missing" on the page of common problems. The
# labels of a mixture give `K!` equal modes. From four labels on there are too many for eight
# components; an order on the labels leaves one of them.
