"""A step of ``fit`` on models with discrete latents, beside the same with sums written by hand.

Each runs in a process of its own, with an empty cache of compiled code. ``start`` is what a fit of
two steps takes beyond uncompiled ones: recording, and compilation. Steps are timed by the
difference of a long and a short fit, in turns.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time

import pyro
import pyro.distributions as dist
import torch
from pyro.contrib.funsor import vectorized_markov

from benchmarks.common import save
from pyro_iaf import AutoIAF, fit
from pyro_iaf.elbo.objectives import LatentLoss

LENGTHS = (60, 500)
WAYS = {"eager": False, "graph": "graph", "compiled": True}
NUM_PARTICLES, ROUNDS, SECONDS, MOST_SECONDS = 16, 3, 2.0, 300


def signal(length):
    torch.manual_seed(0)
    state, y = 0, torch.randn(length)
    for t in range(length):
        state = state if torch.rand(()) < 0.85 else 1 - state
        y[t] = 0.9 * y[t] + 1.8 * state
    return y


def chain(y):
    stay = pyro.sample("stay", dist.Beta(6.0, 2.0))
    gap = pyro.sample("gap", dist.LogNormal(0.5, 0.5))
    z = torch.tensor(0.0)
    for t in pyro.markov(range(len(y))):
        z = pyro.sample(f"z_{t}", dist.Bernoulli(torch.where(z > 0, stay, 1 - stay)))
        pyro.sample(f"y_{t}", dist.Normal(gap * z, 0.9), obs=y[t])


def chain_at_once(y):
    stay = pyro.sample("stay", dist.Beta(6.0, 2.0))
    gap = pyro.sample("gap", dist.LogNormal(0.5, 0.5))
    z = torch.tensor(0.0)
    for t in vectorized_markov(name="time", size=len(y), dim=-1):
        z = pyro.sample(f"z_{t}", dist.Bernoulli(torch.where(z > 0, stay, 1 - stay)))
        pyro.sample(f"y_{t}", dist.Normal(gap * z, 0.9), obs=y[t])


def chain_by_hand(y):
    stay = pyro.sample("stay", dist.Beta(6.0, 2.0)).unsqueeze(-1)
    gap = pyro.sample("gap", dist.LogNormal(0.5, 0.5)).unsqueeze(-1)
    first = torch.cat([stay, 1 - stay], -1)
    matrix = torch.stack([first, first.flip(-1)], -2).log()
    start = torch.cat([torch.zeros_like(stay), torch.full_like(stay, -torch.inf)], -1)
    means = torch.cat([torch.zeros_like(gap), gap], -1).unsqueeze(-2)
    hmm = dist.DiscreteHMM(start, matrix.unsqueeze(-3), dist.Normal(means, 0.9), duration=len(y))
    pyro.sample("y", hmm, obs=y)


def mixture(y):
    share = pyro.sample("share", dist.Beta(2.0, 2.0))
    gap = pyro.sample("gap", dist.LogNormal(0.5, 0.5))
    with pyro.plate("rows", len(y)):
        z = pyro.sample("z", dist.Bernoulli(share))
        pyro.sample("y", dist.Normal(gap * z, 0.9), obs=y)


def mixture_by_hand(y):
    share = pyro.sample("share", dist.Beta(2.0, 2.0)).unsqueeze(-1)
    gap = pyro.sample("gap", dist.LogNormal(0.5, 0.5)).unsqueeze(-1)
    parts = dist.Categorical(torch.cat([1 - share, share], -1).unsqueeze(-2))
    means = torch.cat([torch.zeros_like(gap), gap], -1).unsqueeze(-2)
    each = dist.MixtureSameFamily(parts, dist.Normal(means, 0.9)).expand([*gap.shape[:-1], len(y)])
    pyro.sample("y", each.to_event(1), obs=y)


MODELS = {
    **{
        f"chain of {length}": (
            length,
            {"enumerated": chain, "at once": chain_at_once, "by hand": chain_by_hand},
        )
        for length in LENGTHS
    },
    "mixture of 500 rows": (500, {"enumerated": mixture, "by hand": mixture_by_hand}),
}


def work(name, how, way):
    """Prints the seconds of the start, milliseconds a step, and how many nodes a graph has."""
    # Adjusting the guide's tails after the last step is no part of a step.
    LatentLoss.adjust_tails = lambda self, batch: None
    length, models = MODELS[name]
    model, y = models[how], signal(length)
    guide = AutoIAF(model, start="init", hidden_dims=[64, 64])
    guide.setup(y)
    nodes = count_nodes()
    settings = {"num_particles": NUM_PARTICLES, "progress": False, "early_stop": False}

    def seconds_of(num_steps, way):
        began = time.perf_counter()
        fit(model, guide, (y,), num_steps=num_steps, compile=way, **settings)
        return time.perf_counter() - began

    seconds_of(2, False)
    plain = seconds_of(2, False)
    first = seconds_of(2, WAYS[way])
    short = seconds_of(2, WAYS[way])  # what is recorded is kept
    num_steps = 10
    while (taken := seconds_of(num_steps + 2, WAYS[way]) - short) < SECONDS / 4:
        num_steps *= 3
    times = [taken] + [
        seconds_of(num_steps + 2, WAYS[way]) - seconds_of(2, WAYS[way]) for _ in range(ROUNDS - 1)
    ]
    return {
        "start, s": round(max(0.0, first - plain), 1),
        "ms a step": round(1e3 * statistics.median(times) / num_steps, 3),
        "nodes": max(nodes, default=None),
    }


def count_nodes():
    """The numbers of nodes of all graphs that are recorded from now on."""
    from pyro_iaf.training import compiled_step

    record, nodes = compiled_step.record, []

    def recorded(*args, **settings):
        graph = record(*args, **settings)
        nodes.append(len(graph.module.graph.nodes))
        return graph

    compiled_step.record = recorded
    return nodes


def measured(name, how, way):
    """What a new process measures; None where it takes longer than MOST_SECONDS."""
    command = [sys.executable, "-m", "benchmarks.enumeration", "--one", name, how, way]
    with tempfile.TemporaryDirectory() as cache:
        settings = {"env": {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache}}
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=MOST_SECONDS, **settings
            )
        except subprocess.TimeoutExpired:
            return {"start, s": None, "ms a step": None, "nodes": None}
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(work(*options.one)))
        return
    rows = []
    for name in MODELS:
        for how in MODELS[name][1]:
            for way in WAYS:
                row = {"model": name, "written": how, "way": way}
                row |= measured(name, how, way)
                print(row, flush=True)
                rows.append(row)
    save("enumeration", "16 particles, two flows of width 64, float32", rows)


if __name__ == "__main__":
    main()
