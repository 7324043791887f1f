"""Time of each operation of a flow, beside Pyro's AffineAutoregressive of equal widths."""

import pyro.distributions as dist
import torch
from pyro.distributions import transforms
from pyro.nn import AutoRegressiveNN

from benchmarks.common import race, save
from pyro_iaf import DiagonalNormal, inverse_autoregressive_flow

NUM_FLOWS = 2


def ours(D, hidden_dims):
    flow = inverse_autoregressive_flow(D, hidden_dims, num_flows=NUM_FLOWS, activation="relu")
    return flow, DiagonalNormal(torch.zeros(D), torch.ones(D))


def theirs(D, hidden_dims):
    flow = transforms.iterated(
        NUM_FLOWS,
        lambda: transforms.AffineAutoregressive(
            AutoRegressiveNN(D, hidden_dims, skip_connections=True)
        ),
    )
    return flow, dist.Normal(torch.zeros(D), torch.ones(D)).to_event(1)


def tasks(flow, base, batch):
    D = base.event_shape[0]
    posterior = dist.TransformedDistribution(base, [flow])
    foreign = torch.randn(batch, D)
    parameters = list(flow.parameters())

    def step():
        for parameter in parameters:
            parameter.grad = None
        posterior.log_prob(posterior.rsample((batch,))).sum().backward()

    def draw():
        with torch.no_grad():
            posterior.rsample((batch,))

    def draw_and_score():
        with torch.no_grad():
            posterior.log_prob(posterior.rsample((batch,)))

    def draw_ten_and_score():
        with torch.no_grad():
            draws = [posterior.rsample((batch,)) for _ in range(10)]
            for y in draws:
                posterior.log_prob(y)

    def score_foreign():
        with torch.no_grad():
            posterior.log_prob(foreign.clone())

    return {
        "draw": draw,
        "draw and score": draw_and_score,
        "draw, score, backward": step,
        "draw ten, then score them": draw_ten_and_score,
        "score a value from elsewhere": score_foreign,
    }


def main():
    torch.manual_seed(0)
    rows = []
    for batch, D, hidden_dims in [
        (1, 10, [64, 64]),
        (16, 10, [64, 64]),
        (128, 32, [64, 64]),
        (128, 128, [256, 256]),
    ]:
        mine, peer = tasks(*ours(D, hidden_dims), batch), tasks(*theirs(D, hidden_dims), batch)
        for task in mine:
            result = race({"ours": mine[task], "Pyro": peer[task]}, seconds=0.05)
            rows.append(
                {
                    "batch": batch,
                    "D": D,
                    "hidden": hidden_dims[0],
                    "task": task,
                    "ours_us": result["ours"]["microseconds"],
                    "pyro_us": result["Pyro"]["microseconds"],
                    "ratio": result["ours"]["ratio"],
                }
            )
    save("flows", f"stacks of {NUM_FLOWS} flows, two hidden layers, ReLU, CPU, float32", rows)


if __name__ == "__main__":
    main()
