"""The README's picture: a curved posterior, and draws of two guides."""

import warnings

import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch
from pyro.infer.autoguide import AutoNormal

from benchmarks.common import RESULTS
from pyro_iaf import AutoIAF, diagnose, fit


def model():
    w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    pyro.sample("y", dist.Normal(w[..., 0] ** 2 + w[..., 1], 0.2), obs=torch.tensor(1.0))


def main():
    plt.switch_backend("Agg")
    side = torch.linspace(-2.6, 2.6, 300)
    first, second = torch.meshgrid(side, side - 0.6, indexing="xy")
    log_p = -(first**2 + second**2) / 2 - (first**2 + second - 1) ** 2 / 2 / 0.2**2
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True, layout="constrained")
    for axis, guide in zip(axes, (AutoNormal(model), AutoIAF(model)), strict=True):
        pyro.set_rng_seed(0)
        fit(model, guide, num_steps=3000, progress=False)
        khat = diagnose(model, guide).khat
        with torch.no_grad(), pyro.plate("draws", 1500, dim=-2):
            w = guide()["w"].reshape(1500, 2)
        levels = [-4.5, -2, -0.5]
        axis.contour(first, second, log_p - log_p.max(), levels, colors="0.4", linestyles="-")
        axis.plot(*w.T, ".", color="tab:red", markersize=3, alpha=0.4)
        axis.set(xlabel="w[0]", xlim=(-2.6, 2.6), ylim=(-3.2, 2))
        axis.set_title(f"{type(guide).__name__}: k-hat {khat:.2f}")
    axes[0].set_ylabel("w[1]")
    figure.savefig(RESULTS / "front.png", dpi=120)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main()
