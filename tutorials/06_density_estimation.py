# %% [markdown]
# # Density estimation
#
# In a guide a flow draws. Its inverse is a masked autoregressive flow (Papamakarios et al. 2017):
# scoring a point takes one pass, so it can be fitted to data by maximum likelihood, and drawing
# takes an inverse. The data are three variables on a curve, with noise that grows along it. How
# much better is a flow than a normal?
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

from pyro_iaf import DiagonalNormal, inverse_autoregressive_flow

plt.switch_backend("Agg")  # writes files, opens no window
parser = argparse.ArgumentParser(description="A masked autoregressive flow, fitted to data.")
parser.add_argument("--smoke", action="store_true", help="run every line in seconds")
parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("tutorials/output"))
args, _ = parser.parse_known_args()

pyro.set_rng_seed(0)

# %% [markdown]
# ## The data
#
# The data are simulated, so their density is known, and with it the best mean score that any model
# can have: the negative entropy, in nats.


# %%
def conditionals(data):
    """The three variables, each given those before it."""
    a, b = data[..., 0], data[..., 1]
    return [
        dist.StudentT(5.0, torch.zeros_like(a), 1.0),
        dist.Normal(a.square() / 2 - 1, 0.4),
        dist.Normal(torch.sin(2 * a) + b / 2, (0.3 + 0.2 * b.abs())),
    ]


def draw(n):
    data = torch.zeros(n, 3)
    for k in range(3):
        data[:, k] = conditionals(data)[k].sample()
    return data


def true_log_prob(data):
    return sum(fn.log_prob(data[..., k]) for k, fn in enumerate(conditionals(data)))


train, held_out = draw(200 if args.smoke else 20_000), draw(200 if args.smoke else 20_000)
best = true_log_prob(held_out).mean().item()

# %% [markdown]
# ## The density
#
# `flow.inv` is the inverse flow, a module and a transform like the flow. In a
# `TransformedDistribution` its density of a value takes one pass, and no inverse. Standardise the
# data first: the change of units is a transform too, with a constant log determinant.
#
# The order of the coordinates matters less than for a guide, because several flows are stacked and
# each reverses the order.

# %%
flow = inverse_autoregressive_flow(3, hidden_dims=[64, 64], num_flows=4)
base = DiagonalNormal(torch.zeros(3), torch.ones(3))
units = dist.transforms.AffineTransform(train.mean(0), train.std(0), event_dim=1)
density = dist.TransformedDistribution(base, [flow.inv, units])

# %% [markdown]
# ## The fit
#
# Maximum likelihood is plain PyTorch. In a Pyro program you would write
# `pyro.sample("data", density, obs=data)`.

# %%
num_steps = 20 if args.smoke else 4000
optimizer = torch.optim.Adam(flow.parameters(), lr=5e-3)
schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_steps)
history = []
for _ in range(num_steps):
    rows = train[torch.randint(len(train), (500,))]
    loss = -density.log_prob(rows).mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    schedule.step()
    history.append(loss.item())

# %% [markdown]
# ## Scores
#
# The mean log density of new points, in nats: of a normal with the covariance of the data, of the
# flow, and of the true density, which no model can exceed except by chance.

# %%
with torch.no_grad():
    found = density.log_prob(held_out).mean().item()
normal = dist.MultivariateNormal(train.mean(0), train.T.cov())
for name, score in {
    "a normal": normal.log_prob(held_out).mean().item(),
    "the flow": found,
    "the truth": best,
}.items():
    print(f"{name:10}{score:8.3f} nats a point")

# %% [markdown]
# Drawing inverts the flows. Other libraries take a pass for each coordinate; here several are
# solved at once. In the picture the flow's draws should lie where the data do, along the curve and
# in the fan.

# %%
with torch.no_grad():
    drawn = density.sample((len(held_out),))
figure, axes = plt.subplots(1, 3, figsize=(14, 4.2), layout="constrained")
for axis, k in zip(axes, (1, 2), strict=False):
    axis.plot(held_out[:3000, 0], held_out[:3000, k], ".", color="0.35", markersize=2, label="data")
    axis.plot(drawn[:3000, 0], drawn[:3000, k], ".", color="tab:red", markersize=2, label="flow")
    axis.set(xlim=(-4, 4), xlabel="first", ylabel=("second", "third")[k - 1])
axes[0].set_ylim(-3, 8)
axes[1].set_ylim(-4, 6)
axes[0].legend(markerscale=5)
window = max(1, num_steps // 80)
smooth = torch.tensor(history).unfold(0, window, window).mean(-1)
axes[2].plot(torch.arange(1, len(smooth) + 1) * window, smooth, color="tab:red", label="flow")
axes[2].axhline(-best, color="0.35", label="truth")
axes[2].set(xlabel="step", ylabel="loss, nats", ylim=(-best - 0.1, -best + 1.5), title="The fit")
axes[2].legend()
args.output.mkdir(parents=True, exist_ok=True)
picture = args.output / "06_density_estimation.png"
figure.savefig(picture, dpi=120)
print(f"The picture is in {picture}")

# %% [markdown]
# ## Is it right?
#
# The flow's score should be within a twentieth of a nat of the truth's. Scores mean something only
# if the density integrates to one: we estimate the integral by the mean of `p(x) / q(x)` over draws
# from a wider `q`.

# %%
wide = dist.MultivariateStudentT(torch.tensor(4.0), normal.loc, 1.5 * normal.scale_tril)
points = wide.sample((1000 if args.smoke else 200_000,))
with torch.no_grad():
    mass = (density.log_prob(points) - wide.log_prob(points)).exp()
error = (mass.std() / len(mass) ** 0.5).item()
print(f"The density adds up to {mass.mean():.3f} ± {error:.3f}")
if not args.smoke:
    assert best - 0.05 < found < best + 0.02
    assert abs(mass.mean() - 1) < 4 * error + 0.001

# %% [markdown]
# ## Limitations
#
# A continuous map can't separate clusters: it leaves thin bridges between them, and smooths the
# edges of a support. The tails are those of the base, stretched. The fit maximises the score of
# points; a good score does not mean that draws look right, nor that a posterior is right.
