# %% [markdown]
# # Moving over from Pyro's flows
#
# You have a guide with `AffineAutoregressive` or `AutoIAFNormal`. What is to be renamed, what can
# stay, and what changes? The table has the names. The changes of behaviour are shown below it, and
# then both guides are fitted to a regression whose exact answer is known.
#
# | In Pyro | Here |
# |---|---|
# | `AutoIAFNormal(model, num_transforms=2)` | `AutoIAF(model)` |
# | `hidden_dim=[64, 64]` | `hidden_dims=[64, 64]` |
# | `affine_autoregressive(D, hidden_dims)` | `inverse_autoregressive_flow(D, hidden_dims)` |
# | `conditional_affine_autoregressive(D, C)` | `conditional_inverse_autoregressive_flow(D, C)` |
# | `iterated(2, affine_autoregressive, D)` | `inverse_autoregressive_flow(D, num_flows=2)` |
# | `AffineAutoregressive(network)` | `InverseAutoregressiveFlow(network)` |
# | `stable=True, sigmoid_bias=2.0` | `univariate=Gated(bias=2.0)` |
# | `log_scale_min_clip`, `log_scale_max_clip` | nothing |
# | `AutoRegressiveNN(D, [H], permutation=p)` | `MaskedAutoregressiveNetwork(D, [H], order=p)` |
# | `Normal(zeros, ones).to_event(1)` | `DiagonalNormal(zeros, ones)`, or the same |
# | `transform.clear_cache()` | nothing |
# | `SVI(model, guide, Adam(...), Trace_ELBO())` | the same, or `fit(model, guide)` |
#
# What changes: a guide has two flows by default, with the order reversed between them, and a last
# loc and scale that are found before the first step. Networks have two layers of `max(64, 2 D)` by
# default, in a guide `max(64, D)`; Pyro's have one of `3 D + 1`, with a context `10 D`.
# Arguments after the sizes are given by keyword: `num_flows=2`, `univariate="gated"`. A fresh flow
# is nearly the identity; a gated one contracts, so put a scale after it. Scales are bounded
# smoothly and not clipped, so gradients are exact. A context brings its batch shape. A cached draw
# is dropped when a parameter changes, so you never need to clear a cache.
#
# It takes a minute on two cores. `--smoke` runs every line in seconds, only to check that it runs.

# %%
import argparse
import pathlib
import time

import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch
from pyro.distributions.transforms import AffineAutoregressive, affine_autoregressive, iterated
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoIAFNormal
from pyro.nn import AutoRegressiveNN
from sklearn.datasets import load_diabetes

from pyro_iaf import (
    AutoIAF,
    DiagonalNormal,
    Gated,
    InverseAutoregressiveFlow,
    MaskedAutoregressiveNetwork,
    conditional_inverse_autoregressive_flow,
    diagnose,
    fit,
    inverse_autoregressive_flow,
)

plt.switch_backend("Agg")  # writes files, opens no window
parser = argparse.ArgumentParser(description="From Pyro's flows to these.")
parser.add_argument("--smoke", action="store_true", help="run every line in seconds")
parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("tutorials/output"))
args, _ = parser.parse_known_args()

pyro.set_rng_seed(0)
torch.set_default_dtype(torch.float64)

# %% [markdown]
# ## The network may stay
#
# A network that was trained under Pyro's transform keeps its weights under ours. Values agree up to
# the smooth bound on scales: `10 tanh(s / 10)` for `s`, a third of a per cent at `s = 1`.

# %%
network = AutoRegressiveNN(5, [16])
theirs, ours = AffineAutoregressive(network), InverseAutoregressiveFlow(network)
x = torch.randn(1000, 5)
gap = (theirs(x) - ours(x)).abs().max().item()
print(f"Pyro's transform and ours, of one network: {gap:.1e} apart at most")
assert gap < 0.05
stable = AffineAutoregressive(network, stable=True, sigmoid_bias=2.0)
gated = InverseAutoregressiveFlow(network, univariate=Gated(bias=2.0))
torch.testing.assert_close(gated(x), stable(x), rtol=0.01, atol=0.01)

# %% [markdown]
# A permutation is an order: `order[k]` is the coordinate that comes k-th.

# %%
order = torch.tensor([2, 0, 4, 1, 3])
slopes = torch.func.vmap(torch.func.jacrev(AutoRegressiveNN(5, [40], permutation=order)))
reached = slopes(x)[0].ne(0).any(0)
slopes = torch.func.vmap(torch.func.jacrev(MaskedAutoregressiveNetwork(5, [40], order=order)))
assert torch.equal(reached, slopes(x)[0].ne(0).any(0))

# %% [markdown]
# ## Shapes
#
# Both act on vectors and sum their log determinant over them. Ours takes its batch shape from its
# context alone, and the base distribution is expanded to it: no `expand`, no plate.

# %%
flow = inverse_autoregressive_flow(5, [16], num_flows=2)
for transform in (theirs, ours, flow):
    assert transform.log_abs_det_jacobian(x, transform(x)).shape == (1000,)
conditional = conditional_inverse_autoregressive_flow(5, 3)
base = DiagonalNormal(torch.zeros(5), torch.ones(5))
posterior = dist.ConditionalTransformedDistribution(base, [conditional])
print(f"batch shape of its context: {tuple(posterior.condition(torch.randn(7, 3)).batch_shape)}")

# %% [markdown]
# ## Scoring earlier draws
#
# Pyro's transform caches its last draw. To score an earlier one, it inverts coordinate by
# coordinate. Ours caches every draw that is still alive.

# %%
wide = dist.Normal(torch.zeros(200), torch.ones(200)).to_event(1)
transforms = {
    "Pyro": iterated(2, affine_autoregressive, 200),
    "here": [inverse_autoregressive_flow(200, num_flows=2)],
}
for name, transform in transforms.items():
    q = dist.TransformedDistribution(wide, list(transform))
    draws = [q.rsample((16,)) for _ in range(3)]
    start = time.perf_counter()
    scores = [q.log_prob(draw) for draw in draws]
    milliseconds = 1000 * (time.perf_counter() - start)
    print(f"{name}: three draws of 200 coordinates scored in {milliseconds:.1f} ms")

# %% [markdown]
# ## A regression
#
# Ten measurements of 442 diabetes patients (Efron et al. 2004), two of which are nearly the same.
# With known noise, the posterior is a normal, and the evidence has a closed form.

# %%
features, response = map(torch.tensor, load_diabetes(return_X_y=True, scaled=False))
x = (features - features.mean(0)) / features.std(0)
y = (response - response.mean()) / response.std()
NOISE = 0.7


def model():
    w = pyro.sample("w", dist.Normal(torch.zeros(10), 1.0).to_event(1))
    with pyro.plate("patients", len(y)):
        pyro.sample("y", dist.Normal((w * x).sum(-1), NOISE), obs=y)


precision = torch.eye(10) + x.mT @ x / NOISE**2
exact = dist.MultivariateNormal(
    torch.linalg.solve(precision, x.mT @ y) / NOISE**2, precision_matrix=precision
)
covariance = x @ x.mT + NOISE**2 * torch.eye(len(y))
evidence = dist.MultivariateNormal(torch.zeros(len(y)), covariance).log_prob(y).item()

# %% [markdown]
# Three fits: `AutoIAFNormal` by SVI at a falling learning rate; `AutoIAF` in its place, with
# nothing else changed; and `AutoIAF` by `fit`.

# %%
num_steps = 20 if args.smoke else 2000
elbo = Trace_ELBO(num_particles=16, vectorize_particles=True, max_plate_nesting=1)
guides = {
    "AutoIAFNormal, SVI": AutoIAFNormal(model, num_transforms=2, hidden_dim=[64, 64]),
    "AutoIAF, SVI": AutoIAF(model, name="by_svi"),
    "AutoIAF, fit": AutoIAF(model, name="by_fit"),
}
histories = {}
for name, guide in guides.items():
    start = time.perf_counter()
    if name.endswith("fit"):
        histories[name] = fit(model, guide, num_steps=num_steps, progress=False).losses
    else:
        settings = {"lr": 0.01, "lrd": 0.01 ** (1 / num_steps)}
        svi = SVI(model, guide, pyro.optim.ClippedAdam(settings), elbo)
        histories[name] = torch.tensor([svi.step() for _ in range(num_steps)])
    print(f"{name:20}{time.perf_counter() - start:5.0f} s")

# %% [markdown]
# ## What they found
#
# The gap between evidence and ELBO is KL(q | p), the guide's distance from the posterior in nats.

# %%
many = Trace_ELBO(num_particles=10_000, vectorize_particles=True, max_plate_nesting=1)
gaps = {}
for name, guide in guides.items():
    with torch.no_grad():
        gaps[name] = evidence + many.loss(model, guide)
    print(f"{name:20}{gaps[name]:8.3f} nats from the evidence, {evidence:.2f}")
print(diagnose(model, guides["AutoIAF, fit"], num_samples=200 if args.smoke else 4000))

# %% [markdown]
# The picture has the two weights that trade off, and the losses. `AutoIAF` starts close to the
# posterior, so its flows have little left to learn.

# %%
colors = dict(zip(guides, ("tab:blue", "tab:orange", "tab:red"), strict=True))
figure, axes = plt.subplots(1, 2, figsize=(11, 4.4), layout="constrained")
reference = exact.sample((1500,))
axes[0].plot(reference[:, 4], reference[:, 5], ".", color="0.35", markersize=3, label="exact")
for name in ("AutoIAFNormal, SVI", "AutoIAF, fit"):
    with torch.no_grad(), pyro.plate("draws", 1500, dim=-2):
        w = guides[name]()["w"].reshape(1500, 10)
    axes[0].plot(w[:, 4], w[:, 5], ".", color=colors[name], markersize=3, alpha=0.6, label=name)
axes[0].set(xlabel="weight of total cholesterol", ylabel="weight of LDL")
axes[0].legend(markerscale=4)
for name, history in histories.items():
    axes[1].plot(history + evidence, color=colors[name], label=name, linewidth=0.8)
axes[1].set(xlabel="step", ylabel="nats from the evidence", yscale="symlog", title="The fit")
axes[1].legend()
args.output.mkdir(parents=True, exist_ok=True)
picture = args.output / "07_from_pyro.png"
figure.savefig(picture, dpi=120)
print(f"The picture is in {picture}")

# %% [markdown]
# ## Is it right?
#
# `AutoIAF` should be within 0.05 nats of the evidence by `fit`, and within 0.2 by SVI.

# %%
if not args.smoke:
    assert -0.02 < gaps["AutoIAF, fit"] < 0.05  # no bound is above it, but for noise
    assert -0.02 < gaps["AutoIAF, SVI"] < 0.2

# %% [markdown]
# ## Limitations
#
# A guide saved by Pyro's classes does not load here: the entries of the file have other names. Wrap
# its networks as above, or fit anew. Pyro's networks work, but are slower to invert: the fast
# inverse is only for our own networks.
