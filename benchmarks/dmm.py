"""The Deep Markov Model of the tutorial: the gain by flows in its guide, and the time of a step.

The gain comes from the tutorial's own code up to its table, run once for each seed and number of
flows. The time of a step is that of the tutorial's model and guide, beside the same networks in the
structure of Pyro's example: a site for each time step in model and guide, and Pyro's flow, which
inverts all draws but the last.
"""

import argparse
import functools
import json
import statistics

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions.transforms import affine_autoregressive
from pyro.infer import SVI, Trace_ELBO
from torch import nn
from torch.nn.functional import softplus

from .common import race, save
from .tutorials import in_processes, shown, tutorial

FLOWS = [0, 1, 2]


def tutorial_dmm(settings):
    return tutorial("dmm_iaf.py", settings, until="guides = {")


def as_in_pyro(base):
    """The tutorial's class in the structure of Pyro's example."""

    class AsInPyro(base):
        def __init__(self, num_flows, latents, flow_width):
            super().__init__(0)
            flows = [affine_autoregressive(latents, [flow_width]) for _ in range(num_flows)]
            self.flows = nn.ModuleList(flows)

        def model(self, rolls, lengths):
            pyro.module("as_in_pyro", self)
            mask = torch.arange(rolls.shape[1]) < lengths.unsqueeze(-1)
            z = self.start.expand(len(rolls), -1)
            with pyro.plate("chorales", len(rolls)):
                for t in pyro.markov(range(rolls.shape[1])):
                    counts = mask[:, t : t + 1]
                    step = self.transition(z)
                    walk = dist.Normal(step.loc, step.scale).mask(counts).to_event(1)
                    z = pyro.sample(f"z_{t}", walk)
                    notes = dist.Bernoulli(torch.sigmoid(self.emission(z))).mask(counts).to_event(1)
                    pyro.sample(f"notes_{t}", notes, obs=rolls[:, t])

        def guide(self, rolls, lengths):
            pyro.module("as_in_pyro", self)
            mask = torch.arange(rolls.shape[1]) < lengths.unsqueeze(-1)
            heard = self.hearing(rolls.flip(1))[0].flip(1)
            z = self.guessed_start.expand(len(rolls), -1)
            with pyro.plate("chorales", len(rolls)):
                for t in pyro.markov(range(rolls.shape[1])):
                    joined = (torch.tanh(self.remembering(z)) + heard[:, t]) / 2
                    loc, spread = self.guess(joined).chunk(2, -1)
                    guess = dist.Normal(loc, softplus(spread))
                    guess = dist.TransformedDistribution(guess, list(self.flows))
                    z = pyro.sample(f"z_{t}", guess.mask(mask[:, t]))

    return AsInPyro


def steps(latents, num_flows, time_steps, rounds):
    """Milliseconds of a step of SVI, ours and in Pyro's structure, and calls of a network."""
    space = tutorial_dmm(["--smoke"])
    args = space["args"]
    args.latents = latents
    args.width = args.flow_width = 100
    rolls = torch.bernoulli(torch.full((20, time_steps, 88), 0.05))
    lengths = torch.arange(20) % 3 + time_steps - 2
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    peer = as_in_pyro(space["Dmm"])(num_flows, latents, args.flow_width)
    ours = space["Dmm"](num_flows)
    contenders, calls = {}, {}
    for name, dmm, network in (
        ("ours", ours, next(m for m in ours.flow.modules() if hasattr(m, "hidden_dims"))),
        ("Pyro", peer, peer.flows[0].arn),
    ):
        svi = SVI(dmm.model, dmm.guide, pyro.optim.Adam({"lr": 1e-3}), Trace_ELBO())
        step = functools.partial(svi.step, rolls, lengths)
        counted = []
        hook = network.register_forward_hook(lambda *_, counted=counted: counted.append(1))
        step()
        hook.remove()
        contenders[name], calls[name] = step, len(counted)
    times = race(contenders, rounds=rounds)
    return {
        "latents": latents,
        "flows": num_flows,
        "time steps": time_steps,
        "calls": calls["ours"],
        "calls, Pyro": calls["Pyro"],
        "ms": round(times["ours"]["microseconds"] / 1000, 1),
        "ms, Pyro": round(times["Pyro"]["microseconds"] / 1000, 1),
        "times as fast": round(1 / times["ours"]["ratio"], 1),
    }


def work(num_flows, seed, settings):
    """The measurement of one process: both bounds of the test chorales."""
    space = tutorial_dmm([*settings, "--seed", seed])
    trained, _ = space["trained"](int(num_flows), int(seed))
    print(json.dumps(space["scores"](trained, *space["test"], space["args"].samples)))


def scores(name, seeds, settings):
    jobs = [(num_flows, seed) for seed in range(seeds) for num_flows in FLOWS]
    found = in_processes("benchmarks.dmm", jobs, settings)
    rows = []
    for num_flows in FLOWS:
        own = [found[num_flows, seed] for seed in range(seeds)]
        gains = [found[0, seed][0] - own[seed][0] for seed in range(seeds)]
        rows.append(
            {
                "flows": num_flows,
                "-ELBO": round(statistics.mean(bound for bound, _ in own), 3),
                "weighted": round(statistics.mean(weighted for _, weighted in own), 3),
                "gain": round(statistics.mean(gains), 3),
                "se of the gain": round(statistics.stdev(gains) / seeds**0.5, 3),
                "seeds": seeds,
                "settings": shown(settings),
            }
        )
    save(name, "nats a chord of the test chorales; gains over no flow, paired by seed", rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--seeds", type=int, default=0, help="train with so many, and score")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--name", default="dmm", help="of the results' file")
    args, settings = parser.parse_known_args()
    if args.work:
        work(*args.work, settings)
    elif args.seeds:
        scores(args.name, args.seeds, settings)
    else:
        cases = [(20, 1, 12), (20, 1, 60), (20, 2, 60), (100, 1, 60), (100, 2, 60)]
        rows = [steps(*case, args.rounds) for case in cases]
        save("dmm_steps", "a step of SVI on 20 sequences, width 100", rows)


if __name__ == "__main__":
    main()
