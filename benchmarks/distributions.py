"""DiagonalNormal beside Normal(...).to_event(1), validation on and off."""

import pyro
import pyro.distributions as dist
import torch

from benchmarks.common import race, save
from pyro_iaf import DiagonalNormal


def tasks(make, loc, scale, value):
    d = make(loc, scale)
    batch = value.shape[:-1]

    def step():
        for leaf in (loc, scale):
            leaf.grad = None
        d = make(loc, scale).expand(batch)
        d.log_prob(d.rsample()).sum().backward()

    return {
        "construct": lambda: make(loc, scale),
        "rsample": lambda: d.rsample(batch),
        "log_prob": lambda: d.log_prob(value),
        "entropy": d.entropy,
        "expand and score": lambda: d.expand(batch).log_prob(value),
        "draw, score, backward": step,
    }


def main():
    torch.manual_seed(0)
    rows = []
    for validate in (True, False):
        pyro.enable_validation(validate)
        for batch, D in [((), 10), ((16,), 10), ((128,), 100), ((1024,), 1000)]:
            loc = torch.randn(D, requires_grad=True)
            scale = (torch.rand(D) + 0.5).requires_grad_()
            value = torch.randn(*batch, D)
            ours = tasks(DiagonalNormal, loc, scale, value)
            theirs = tasks(lambda m, s: dist.Normal(m, s).to_event(1), loc, scale, value)
            for task in ours:
                result = race({"ours": ours[task], "theirs": theirs[task]})
                rows.append(
                    {
                        "validation": "on" if validate else "off",
                        "batch": batch[0] if batch else 1,
                        "D": D,
                        "task": task,
                        "ours_us": result["ours"]["microseconds"],
                        "theirs_us": result["theirs"]["microseconds"],
                        "ratio": result["ours"]["ratio"],
                    }
                )
    save("distributions", "DiagonalNormal over Normal.to_event(1), CPU, float32", rows)


if __name__ == "__main__":
    main()
