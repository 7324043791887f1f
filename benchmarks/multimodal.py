"""Fits of posteriors with several modes, each in a fresh process: are all modes there?

Twelve posteriors whose shares are known by closed form, symmetry or a grid, and those of the folder
``--cases``. A fit holds if the share of each mode is within 0.05, means are within 0.1 standard
deviations, these within 7 %, and k-hat is below 0.7. ``good though missing`` counts fits that are
called good though a share is off by more than 0.05.

``POSTERIORS[name]`` has

* ``model``: a Pyro model without arguments
* ``shares``: the share of each mode
* ``mode_of(sites)``: the number of the mode of each draw
* ``quantities(sites)``: scalars by name, whose means and standard deviations are in ``means`` and
  ``sds``

Where a target is a mixture written down by its density, the prior is cancelled by a factor.
"""

import argparse
import functools
import itertools
import json
import math
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch

from benchmarks.common import rows_of_fresh_processes, save, timed_fit

NUM_DRAWS = 40_000

# The largest errors of a share, a mean and a standard deviation, and k-hat, with which a fit holds.
HOLDS = {"share_error": 0.05, "mean_error": 0.1, "sd_error": 0.07, "khat": 0.7}

POSTERIORS: dict[str, Any] = {}
DOUBLE = torch.float64


@dataclass
class Posterior:
    name: str
    model: Any
    shares: list
    mode_of: Any
    quantities: Any
    means: dict = field(default_factory=dict)
    sds: dict = field(default_factory=dict)


def register(make):
    POSTERIORS[make.__name__] = Posterior(make.__name__, *make())
    return make


def moments(weights, values):
    """Means and standard deviations of values of grid points under these weights."""
    means = {name: float((weights * v).sum()) for name, v in values.items()}
    sds = {n: float((weights * (v - means[n]) ** 2).sum().sqrt()) for n, v in values.items()}
    return means, sds


def mixture(weights, locs, scales, wide=10.0):
    """A mixture of normals of one scale each; quantities are its first and last coordinates."""
    weights, locs = torch.tensor(weights), torch.tensor(locs)
    scales = torch.tensor(scales).reshape(-1, 1).expand(locs.shape)
    D = locs.shape[1]

    def model():
        prior = dist.Normal(0.0, wide).expand([D]).to_event(1)
        x = pyro.sample("x", prior)
        parts = dist.Normal(locs.to(x), scales.to(x)).to_event(1).log_prob(x.unsqueeze(-2))
        pyro.factor("target", (weights.to(x).log() + parts).logsumexp(-1) - prior.log_prob(x))

    def mode_of(sites):
        x = sites["x"].unsqueeze(-2).double()
        parts = dist.Normal(locs.double(), scales.double()).to_event(1).log_prob(x)
        return (weights.double().log() + parts).argmax(-1)

    def quantities(sites):
        return {"first": sites["x"][..., 0], "last": sites["x"][..., -1]}

    means = {n: float(weights @ locs[:, k]) for n, k in (("first", 0), ("last", -1))}
    sds = {
        n: float((weights @ (scales[:, k] ** 2 + locs[:, k] ** 2) - means[n] ** 2).sqrt())
        for n, k in (("first", 0), ("last", -1))
    }
    return model, weights.tolist(), mode_of, quantities, means, sds


def valleys(points, weights, smallest=0.01):
    """Where a density on a line is lowest between peaks that hold more than ``smallest``."""
    inner = weights[1:-1]
    lows = ((inner <= weights[:-2]) & (inner < weights[2:])).nonzero().squeeze(-1) + 1
    cuts, edges = [], [0, *lows.tolist(), len(points)]
    held = 0.0
    for a, b in itertools.pairwise(edges):
        held += float(weights[a:b].sum())
        if held > smallest and float(weights[b:].sum()) > smallest:
            cuts.append(points[b])
            held = 0.0
    return torch.tensor(cuts, dtype=points.dtype)


@register
def two_in_ten():
    """Ten dimensions, unequal weights and widths."""
    return mixture([0.65, 0.35], [[2.0] * 10, [-2.0] * 10], [1.0, 0.6])


@register
def three_in_thirty():
    """Thirty dimensions."""
    locs = [[3.0] * 15 + [0.0] * 15, [0.0] * 30, [0.0] * 15 + [-3.0] * 15]
    return mixture([0.5, 0.2, 0.3], locs, [0.8, 0.8, 0.5])


@register
def scales_apart():
    """One mode is ten times as wide as the other."""
    return mixture([0.5, 0.5], [[-4.0] * 2, [6.0] * 2], [0.2, 2.0])


@register
def ring():
    """Six modes on a ring."""
    angles = [2 * math.pi * k / 6 for k in range(6)]
    weights = [0.25, 0.15, 0.2, 0.1, 0.15, 0.15]
    return mixture(weights, [[4 * math.cos(a), 4 * math.sin(a)] for a in angles], [0.5] * 6)


@register
def touching():
    """Two modes three standard deviations apart."""
    return mixture([0.6, 0.4], [[0.0, 0.0, 0.0], [3.0, 0.0, 0.0]], [1.0, 1.0])


@register
def beside_a_funnel():
    """A normal, and a funnel far from it."""

    def parts(v, x):
        own = dist.Normal(8.0, 0.5).log_prob(v) + dist.Normal(6.0, 1.0).log_prob(x).sum(-1)
        neck = dist.Normal(0.0, torch.exp(v / 2).unsqueeze(-1))
        funnel = dist.Normal(0.0, 1.0).log_prob(v) + neck.log_prob(x).sum(-1)
        return torch.stack([own + math.log(0.4), funnel + math.log(0.6)], -1)

    def model():
        v = pyro.sample("v", dist.Normal(0.0, 5.0))
        x = pyro.sample("x", dist.Normal(torch.zeros(3), 10.0).to_event(1))
        prior = dist.Normal(0.0, 5.0).log_prob(v) + dist.Normal(0.0, 10.0).log_prob(x).sum(-1)
        pyro.factor("target", parts(v, x).logsumexp(-1) - prior)

    means = {"v": 0.4 * 8.0}
    sds = {"v": math.sqrt(0.4 * (0.25 + 64) + 0.6 - means["v"] ** 2)}
    return (
        model,
        [0.4, 0.6],
        lambda s: parts(s["v"].double().reshape(-1), s["x"].double()).argmax(-1),
        lambda s: {"v": s["v"].reshape(-1)},
        means,
        sds,
    )


@register
def labels():
    """The locs of a mixture of three components, in any order."""
    generator = torch.Generator().manual_seed(1)
    component = torch.arange(60) % 3
    y = torch.tensor([-3.0, 0.0, 4.0])[component] + 0.7 * torch.randn(60, generator=generator)

    def model():
        loc = pyro.sample("loc", dist.Normal(0.0, 5.0).expand([3]).to_event(1))
        parts = dist.Normal(loc.unsqueeze(-2), 0.7).log_prob(y.to(loc).unsqueeze(-1))
        pyro.factor("rows", (parts.logsumexp(-1) - math.log(3)).sum(-1))

    orders = torch.tensor(list(itertools.permutations(range(3))))

    def mode_of(sites):
        found = sites["loc"].reshape(-1, 3).argsort(-1)
        return (found.unsqueeze(1) == orders).all(-1).int().argmax(-1)

    return model, [1 / 6] * 6, mode_of, lambda s: {}


@register
def lengthscale():
    """A Gaussian process whose data are smooth with noise, or wiggly without."""
    x = torch.tensor([-2.8, -2.1, -1.5, -1.0, -0.3, 0.2, 0.9, 1.6, 2.2, 2.9])
    y = torch.tensor([0.7, -0.6, 0.8, -0.3, 0.5, -0.9, 0.3, -0.8, 0.1, -0.7])

    def log_likelihood(log_length, log_noise):
        eye = torch.eye(10, dtype=log_length.dtype)
        squares = (x[:, None] - x).square().to(log_length)
        cov = torch.exp(-0.5 * squares * torch.exp(-2 * log_length)[..., None, None])
        cov = cov + torch.exp(2 * log_noise)[..., None, None] * eye
        zeros = torch.zeros(10, dtype=log_length.dtype)
        return dist.MultivariateNormal(zeros, cov).log_prob(y.to(log_length))

    def model():
        log_length = pyro.sample("log_length", dist.Normal(0.0, 1.5))
        log_noise = pyro.sample("log_noise", dist.Normal(-1.5, 1.0))
        pyro.factor("rows", log_likelihood(log_length, log_noise))

    length, noise = (
        torch.linspace(-6, 6, 400, dtype=DOUBLE),
        torch.linspace(-6, 3, 300, dtype=DOUBLE),
    )
    L, N = torch.meshgrid(length, noise, indexing="ij")
    log_p = dist.Normal(0.0, 1.5).log_prob(L) + dist.Normal(-1.5, 1.0).log_prob(N)
    weights = (log_p + log_likelihood(L, N)).flatten().softmax(0).reshape(L.shape)
    of_length = weights.sum(1)
    inner = (length > -1.2) & (length < 1.2)
    cut = length[torch.where(inner, of_length, math.inf).argmin()]
    shares = [float(of_length[length < cut].sum()), float(of_length[length >= cut].sum())]

    def quantities(s):
        return {k: s[k].reshape(-1) for k in ("log_length", "log_noise")}

    found = moments(weights, {"log_length": L, "log_noise": N})
    return model, shares, lambda s: (s["log_length"].reshape(-1) >= cut).long(), quantities, *found


@register
def signs():
    """A hierarchical model that sees products only: all signs may change together."""
    generator = torch.Generator().manual_seed(3)
    y = 1.5 * (1.0 + 0.5 * torch.randn(8, generator=generator))

    def model():
        factor = pyro.sample("factor", dist.Normal(0.0, 1.0))
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        with pyro.plate("groups", 8):
            effect = pyro.sample("effect", dist.Normal(mean, 0.5))
            pyro.sample("y", dist.Normal(factor * effect, 0.3), obs=y.to(effect))

    return model, [0.5, 0.5], lambda s: (s["factor"].reshape(-1) > 0).long(), lambda s: {}


@register
def two_clusters():
    """The location of Cauchy noise, whose data lie in two clusters."""
    y = torch.tensor([-4.2, -3.9, -4.0, -3.7, -4.4, 4.8, 5.0, 5.3, 5.1, 4.9])

    def log_joint(loc, log_scale):
        rows = dist.Cauchy(loc.unsqueeze(-1), log_scale.exp().unsqueeze(-1)).log_prob(y.to(loc))
        prior = dist.Normal(0.0, 10.0).log_prob(loc) + dist.Normal(-1.0, 0.5).log_prob(log_scale)
        return prior + rows.sum(-1)

    def model():
        loc = pyro.sample("loc", dist.Normal(0.0, 10.0))
        log_scale = pyro.sample("log_scale", dist.Normal(-1.0, 0.5))
        with pyro.plate("rows", 10):
            pyro.sample("y", dist.Cauchy(loc, log_scale.exp()), obs=y.to(loc))

    loc, log_scale = (
        torch.linspace(-12, 12, 2401, dtype=DOUBLE),
        torch.linspace(-5, 3, 400, dtype=DOUBLE),
    )
    A, B = torch.meshgrid(loc, log_scale, indexing="ij")
    weights = log_joint(A, B).flatten().softmax(0).reshape(A.shape)
    of_loc = weights.sum(1)
    shares = [float(of_loc[loc < 0].sum()), float(of_loc[loc >= 0].sum())]

    def quantities(s):
        return {k: s[k].reshape(-1) for k in ("loc", "log_scale")}

    found = moments(weights, {"loc": A, "log_scale": B})
    return model, shares, lambda s: (s["loc"].reshape(-1) >= 0).long(), quantities, *found


@register
def moons():
    """Two bananas."""

    def log_density(a, b):
        def banana(a, b):
            return dist.Normal(0.0, 1.0).log_prob(a) + dist.Normal(a**2 / 2, 0.3).log_prob(b)

        parts = [banana(a - 1, b + 3) + math.log(0.7), banana(a + 1, 3 - b) + math.log(0.3)]
        return torch.stack(parts, -1)

    def model():
        a = pyro.sample("a", dist.Normal(0.0, 5.0))
        b = pyro.sample("b", dist.Normal(0.0, 5.0))
        prior = dist.Normal(0.0, 5.0).log_prob(a) + dist.Normal(0.0, 5.0).log_prob(b)
        pyro.factor("target", log_density(a, b).logsumexp(-1) - prior)

    g, h = torch.linspace(-8, 8, 1601, dtype=DOUBLE), torch.linspace(-25, 25, 2501, dtype=DOUBLE)
    A, B = torch.meshgrid(g, h, indexing="ij")
    parts = log_density(A, B)
    weights = parts.logsumexp(-1).flatten().softmax(0).reshape(A.shape)
    which = parts.argmax(-1)
    shares = [float(weights[which == k].sum()) for k in range(2)]
    return (
        model,
        shares,
        lambda s: log_density(s["a"].double().reshape(-1), s["b"].double().reshape(-1)).argmax(-1),
        lambda s: {k: s[k].reshape(-1) for k in ("a", "b")},
        *moments(weights, {"a": A, "b": B}),
    )


@register
def period():
    """The period of a wave through a few points."""
    t = torch.tensor([0.0, 3.9, 8.0, 12.0])
    y = torch.tensor([0.0, 0.0, 0.1, -0.2])

    def log_likelihood(w, phase):
        return dist.Normal(
            torch.sin(w.unsqueeze(-1) * t.to(w) + phase.unsqueeze(-1)), 0.25
        ).log_prob(y.to(w))

    def model():
        w = pyro.sample("w", dist.LogNormal(0.0, 0.5))
        phase = pyro.sample("phase", dist.Normal(0.0, 0.5))
        pyro.factor("rows", log_likelihood(w, phase).sum(-1))

    w = torch.linspace(0.05, 6.0, 3001, dtype=DOUBLE)
    phase = torch.linspace(-3, 3, 301, dtype=DOUBLE)
    W, P = torch.meshgrid(w, phase, indexing="ij")
    log_p = dist.LogNormal(0.0, 0.5).log_prob(W) + dist.Normal(0.0, 0.5).log_prob(P)
    weights = (log_p + log_likelihood(W, P).sum(-1)).flatten().softmax(0).reshape(W.shape)
    cuts = valleys(w, weights.sum(1))

    def mode_of(sites):
        return torch.bucketize(sites["w"].double().reshape(-1), cuts)

    where = torch.bucketize(w, cuts)
    shares = [float(weights[where == k].sum()) for k in range(len(cuts) + 1)]

    def quantities(s):
        return {k: s[k].reshape(-1) for k in ("w", "phase")}

    return model, shares, mode_of, quantities, *moments(weights, {"w": W, "phase": P})


@functools.cache
def from_cases(folder):
    """The posteriors of other files of the same form, in a folder."""
    import importlib.util

    found = {}
    for path in sorted(folder.glob("modes_*.py")):
        spec = importlib.util.spec_from_file_location(path.stem, path)
        case = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(case)
        model = functools.partial(case.model, *case.ARGS)
        found[path.stem] = Posterior(
            path.stem, model, case.MODES, case.mode_of, case.quantities, case.MEANS, case.SDS
        )
    return found


def run(posterior, seed):
    """A row for one posterior and seed, in this process."""
    guide, result, seconds = timed_fit(posterior.model, seed)
    sites = guide.sample_posterior(NUM_DRAWS)
    number = posterior.mode_of(sites)
    expected = torch.tensor(posterior.shares, dtype=DOUBLE)
    shares = number.bincount(minlength=len(expected)) / NUM_DRAWS
    drawn = {name: value.double() for name, value in posterior.quantities(sites).items()}
    means, sds = posterior.means, posterior.sds
    errors = [abs(drawn[n].mean().item() - means[n]) / sds[n] for n in means]
    ratios = [abs(drawn[n].std().item() / sds[n] - 1) for n in means]
    found = {
        "share_error": (shares - expected).abs().max().item(),
        "mean_error": max(errors, default=0.0),
        "sd_error": max(ratios, default=0.0),
        "khat": result.diagnosis.khat,
    }
    return {
        "posterior": posterior.name,
        "seed": seed,
        "seconds": round(seconds, 2),
        "steps": result.num_steps,
        "components": len(guide.component_weights),
        "verdict": result.diagnosis.verdict,
        **{name: round(value, 3) for name, value in found.items()},
        "holds": all(found[name] < bound for name, bound in HOLDS.items()),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=Path, default=Path("../shared/cases"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--one", nargs=2, metavar=("NAME", "SEED"), help="a row, in this process")
    options = parser.parse_args()
    posteriors = POSTERIORS | from_cases(options.cases)
    if options.one:
        name, seed = options.one
        print(json.dumps(run(posteriors[name], int(seed))))
        return
    more = "--cases", str(options.cases)
    rows = rows_of_fresh_processes("benchmarks.multimodal", posteriors, options.seeds, *more)
    by_name = {name: [row for row in rows if row["posterior"] == name] for name in posteriors}
    missing = [r["verdict"] == "good" and r["share_error"] > HOLDS["share_error"] for r in rows]
    summary = {
        "fits": len(rows),
        "hold": sum(row["holds"] for row in rows),
        "posteriors": len(posteriors),
        "hold with all seeds": sum(all(r["holds"] for r in group) for group in by_name.values()),
        "good though missing": sum(missing),
    }
    print(summary)
    save("multimodal", "float64; errors in posterior sd, and relative to it", rows, summary=summary)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_default_dtype(DOUBLE)
    main()
