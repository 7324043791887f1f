"""Time, gradient and memory of the inverse, beside Pyro, Zuko and nflows.

All have one flow with two hidden layers of max(64, 2 D) and ReLU. The other libraries take D passes
for any weights. Ours takes a number of sweeps that depends on the weights, so they are moved from
their initial values by noise on each weight matrix: gently (0.5 N(0, 1) / sqrt(fan-in)), and hard
(1.0).
"""

import pathlib
import re
import subprocess
import sys
from functools import partial

import torch
from pyro.distributions import transforms
from pyro.nn import AutoRegressiveNN

from benchmarks.common import RESULTS, race, save
from pyro_iaf import inverse_autoregressive_flow

SIZES = [8, 32, 128, 512, 1024]
NOISE = {"gentle": 0.5, "hard": 1.0}
OURS = [f"pyro_iaf, {kind}" for kind in NOISE]
PEERS = ["Pyro", "Zuko", "nflows"]


def width(D):
    return max(64, 2 * D)


@torch.no_grad()
def ours(D, noise):
    flow = inverse_autoregressive_flow(D, 2 * [width(D)], activation="relu")
    network = flow.network
    *masks, _ = network.matrices(network.mask)
    weights = list(network.weights)
    weights = network.matrices(weights[0]) if len(weights) == 1 else weights
    for weight, mask in zip(weights, masks, strict=False):
        # The layer multiplies by weight * mask: this moves the product, except where the mask is 0.
        moved = noise * torch.randn_like(mask) / mask.shape[1] ** 0.5
        weight.view(mask.shape).add_(torch.where(mask == 0, mask, moved / mask))
    return flow


def peer(name, D):
    H = width(D)
    if name == "Pyro":
        flow = transforms.AffineAutoregressive(AutoRegressiveNN(D, [H, H]))
        return flow, lambda x: flow(x.clone()), lambda y: flow.inv(y.clone())
    if name == "Zuko":
        from zuko.flows.autoregressive import MaskedAutoregressiveTransform

        flow = MaskedAutoregressiveTransform(D, hidden_features=(H, H))
        return flow, lambda x: flow()(x), lambda y: flow().inv(y)
    from nflows.transforms import MaskedAffineAutoregressiveTransform

    flow = MaskedAffineAutoregressiveTransform(D, H, num_blocks=1, use_residual_blocks=False)
    return flow, lambda x: flow(x)[0], lambda y: flow.inverse(y)[0]


def contender(name, D):
    """The module, its forward map and its inverse; both without a cache."""
    if name not in OURS:
        return peer(name, D)
    flow = ours(D, NOISE[name.removeprefix("pyro_iaf, ")])
    return flow, flow, lambda y: flow.inv(y.clone())


def contenders(D, batch, names):
    """The flows, each with its own values."""
    found = {name: contender(name, D) for name in names}
    with torch.no_grad():
        values = {name: forward(torch.randn(batch, D)) for name, (_, forward, _) in found.items()}
    return {name: (*things, values[name].clone()) for name, things in found.items()}


def milliseconds(runs, rounds):
    times = race(runs, rounds=rounds, seconds=0.05)
    return {name: taken["microseconds"] / 1000 for name, taken in times.items()}


def with_gradient(flow, run, argument):
    for parameter in flow.parameters():
        parameter.grad = None
    run(argument.clone().requires_grad_()).square().sum().backward()


def timings():
    rows = []
    for D in SIZES:
        rounds = {512: 5, 1024: 3}.get(D, 11)
        for batch in (1, 128):
            flows = contenders(D, batch, [*OURS, *PEERS])
            with torch.no_grad():
                forward = {n: partial(f, y) for n, (_, f, _, y) in flows.items()}
                inverse = {n: partial(f, y) for n, (_, _, f, y) in flows.items()}
                tasks = {
                    "forward": milliseconds(forward, 11),
                    "inverse": milliseconds(inverse, rounds),
                }
            # The other libraries keep D graphs, which are many gigabytes at D = 512.
            slope = {
                n: partial(with_gradient, flow, f, y)
                for n, (flow, _, f, y) in flows.items()
                if D <= 128 or n not in PEERS
            }
            tasks["inverse and gradient"] = milliseconds(slope, min(rounds, 9))
            for task, times in tasks.items():
                peers = [times[name] for name in PEERS if name in times]
                for name, taken in times.items():
                    speedup = round(min(peers) / taken, 2) if peers else None
                    rows.append(
                        {
                            "D": D,
                            "batch": batch,
                            "task": task,
                            "library": name,
                            "ms": round(taken, 3),
                            "times_the_fastest_peer": speedup,
                        }
                    )
                print(D, batch, task, {n: round(t, 2) for n, t in times.items()}, flush=True)
    return rows


@torch.no_grad()
def num_sweeps(flow, y, eps):
    """Number of sweeps over all coordinates until they change by rounding only."""
    x, D = torch.zeros_like(y), y.shape[-1]
    for sweep in range(1, D + 1):
        x, last = flow.univariate.inverse(y, *flow.params_at(x))[0], x
        if ((x - last).abs() <= eps * (1 + x.abs())).all():
            return sweep
    return D


@torch.no_grad()
def exactness():
    rows = []
    for D in SIZES:
        for kind, noise in NOISE.items():
            flow = ours(D, noise)
            row = {"D": D, "flow": kind}
            for dtype, eps in ((torch.float32, 1e-6), (torch.float64, 1e-14)):
                name = str(dtype).removeprefix("torch.")
                flow.to(dtype)
                x = torch.randn(128, D, dtype=dtype)
                y = flow(x).clone()
                found = flow.inv(y)
                again = flow(found.clone())
                row[f"sweeps_{name}"] = num_sweeps(flow, y, eps)
                row[f"residual_{name}"] = f"{((again - y).abs() / (1 + y.abs())).max():.0e}"
                row[f"error_{name}"] = f"{((found - x).abs() / (1 + x.abs())).max():.0e}"
            rows.append(row)
    return rows


def high_water():
    """Peak memory of this process in megabytes, from Linux."""
    status = pathlib.Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 1024


def peak_memory(name, D):
    """Megabytes of an inverse with gradient beyond those of a forward pass with gradient."""
    torch.manual_seed(0)
    flow, forward, inverse, y = contenders(D, 128, [name])[name]
    with_gradient(flow, forward, y)
    before = high_water()
    with_gradient(flow, inverse, y)
    return high_water() - before


def memory():
    def measure(name, D):
        if D > 128 and name in PEERS:
            return None
        command = [sys.executable, "-m", "benchmarks.inverse", "--memory", name, str(D)]
        return float(subprocess.check_output(command, text=True).split()[-1])

    return [{"D": D} | {name: measure(name, D) for name in [*OURS, *PEERS]} for D in SIZES[1:]]


def plot(rows):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
    for axis, batch in zip(axes, (1, 128), strict=True):
        for name in [*OURS, *PEERS]:
            line = [r for r in rows if (r["batch"], r["library"]) == (batch, name)]
            times = [r["ms"] for r in line if r["task"] == "inverse"]
            style = "o-" if name.startswith("pyro_iaf") else "s--"
            axis.loglog(SIZES, times, style, label=name, markersize=4)
            if name == "pyro_iaf, gentle":
                times = [r["ms"] for r in line if r["task"] == "forward"]
                axis.loglog(SIZES, times, "k:", label="one forward pass")
        axis.set(xlabel="D", title=f"batch {batch}", xticks=SIZES, xticklabels=SIZES)
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("milliseconds for an inverse")
    axes[1].legend()
    figure.savefig(RESULTS / "inverse.png", dpi=120)


def main():
    if "--memory" in sys.argv:
        *_, name, D = sys.argv
        print(peak_memory(name, int(D)))
        return
    torch.manual_seed(0)
    about = "one flow, two hidden layers of max(64, 2 D), ReLU, CPU, float32"
    save("inverse_exactness", f"{about} and float64, batch 128", exactness())
    save("inverse_memory", f"{about}, batch 128: megabytes beyond a forward pass", memory())
    rows = timings()
    save("inverse", about, rows)
    plot(rows)


if __name__ == "__main__":
    main()
