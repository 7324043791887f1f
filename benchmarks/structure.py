"""Fits that find structure among the latents, beside dense ones and beside NUTS.

The series, maps, rows and groups below have up to 10,000 latents. Of each contender there is a row,
from a process of its own: ``structure``, a fit at the defaults; ``dense``, one with
``structure=False``; and ``numpyro``, NUTS as in `benchmarks.refine`. Seconds are from the model to
the verdict, compilation included and imports not; those of NUTS are to 1,000 effective draws.

``mean_error`` and ``sd_error`` are the largest, in standard deviations and relative, of 20,000
draws. They hold if means are within 0.05 and three Monte Carlo errors, and deviations within 5 %
and three. Local levels, seasons, counts and funnels have exact answers. For the others
``--references`` draws them by NumPyro's NUTS, up to about 4,000 effective draws, whose own error no
row is forgiven for. ``megabytes`` is the peak of the process up to the verdict.

A second table has the milliseconds of a training step of 16 particles for local levels with D
latents, as code and compiled, and the exponent by which they grow.

With ``--only`` rows of one contender are made anew, or those of steps, and others are kept.
"""

import argparse
import json
import math
import os
import resource
import sys
import threading
import time
import warnings
from itertools import pairwise

import numpy as np
import pyro
import torch
from scipy.optimize import minimize

from benchmarks import hard, models, refine
from benchmarks.common import RESULTS, rows_of_fresh_processes, save

REFERENCES = "references_structure"
# References are drawn up to this effective size, this relative error of an sd, and so many blocks.
LIMITS = {"size": 4000, "error_of_sd": 0.02, "max_blocks": 4}

NUM_DRAWS = 20_000
# A dense guide has at most so many latents.
MOST_DENSE = 470
# A row is given up after so many seconds, and a guide that takes so many bytes.
SECONDS, BYTES = 900, 12 * 2**30

# Steps are timed at so many latents.
SIZES = (100, 1000, 3000)
NUM_STEPS, ROUNDS = 100, 3


class Exact(models.Posterior):
    """A posterior whose moments ``moments(*arrays)`` computes."""

    def __init__(self, simulate, latent_dim, note, moments):
        super().__init__(simulate, latent_dim, note, ())
        self.moments = moments

    @property
    def summary(self):
        return self.moments(*self.arrays)


class Level(Exact):
    """Scales are judged by their logarithms."""

    def quantities(self, chains):
        scales = {"step", "noise", "season"} & set(chains)
        return {k: np.log(np.asarray(v)) if k in scales else v for k, v in chains.items()}


def named(name, simulate):
    simulate.__name__ = name
    return simulate


# Local levels

# The logarithm of each scale is normal with this mean and sd.
SCALE = (-1.0, 1.0)


def level(size):
    """A random walk by its steps, seen with noise."""

    def simulate(rng):
        y = np.cumsum(0.3 * rng.normal(size=size)) + 0.5 * rng.normal(size=size)

        def model(p, y):
            step = p.sample("step", p.dist.LogNormal(*SCALE))[..., None]
            noise = p.sample("noise", p.dist.LogNormal(*SCALE))[..., None]
            z = p.sample("z", p.dist.Normal(p.xp.zeros(size), 1.0).to_event(1))
            mean = p.xp.cumsum(step * z, -1)
            p.sample("y", p.dist.Normal(mean, noise).to_event(1), obs=y)

        return model, [y]

    return Level(named(f"level_{size}", simulate), size + 2, "a local level", moments_of_level)


def moments_of_level(y):
    """By the Kalman filter and the smoother of its disturbances, on a grid of both scales."""
    points, weights = grid(lambda logs: smoothed(logs, y, False)[0], 2, num=81)
    _, mean, variance = smoothed(points, y, True)
    return {
        **moments_of_logs(["step", "noise"], points, weights),
        "z": mixed(weights, mean, variance),
    }


def smoothed(logs, y, with_moments):
    """Log densities at rows of log scales, and there the moments of steps, of shape ``(M, T)``."""
    step, noise = np.exp(2 * logs).T
    log_p = log_prior(logs)
    a, P, kept = np.zeros(len(logs)), step, []
    for value in y:
        v, F = value - a, P + noise
        log_p = log_p - 0.5 * (np.log(F) + v * v / F)
        gain = P / F
        kept.append((v / F, 1 / F, 1 - gain))
        a, P = a + gain * v, P * (1 - gain) + step
    if not with_moments:
        return log_p, None, None
    r, N = np.zeros(len(logs)), np.zeros(len(logs))
    mean, variance = np.empty((2, len(y), len(logs)))
    for t in reversed(range(len(y))):
        v, precision, rest = kept[t]
        r, N = v + rest * r, precision + rest**2 * N
        mean[t], variance[t] = np.sqrt(step) * r, 1 - step * N
    return log_p, mean.T, variance.T


def log_prior(logs):
    return -0.5 * (((logs - SCALE[0]) / SCALE[1]) ** 2).sum(-1)


def grid(log_density, size, num, width=9.0):
    """Points around the mode of a density of a few numbers, of shape ``(M, size)``, and weights."""

    def loss(x):
        return -log_density(x[None])[0]

    mode = minimize(loss, np.full(size, SCALE[0]), method="Nelder-Mead", tol=1e-6).x
    h, index = 0.05 * np.eye(size), np.arange(size)
    hessian = np.array(
        [
            [loss(mode + h[j] + h[k]) - loss(mode + h[j] - h[k]) for k in index]
            - np.array([loss(mode - h[j] + h[k]) - loss(mode - h[j] - h[k]) for k in index])
            for j in index
        ]
    ) / (4 * 0.05**2)
    root = np.linalg.cholesky(np.linalg.inv(hessian))
    axis = np.linspace(-width, width, num)
    points = (
        mode + np.stack(np.meshgrid(*size * [axis], indexing="ij"), -1).reshape(-1, size) @ root.T
    )
    log_p = np.concatenate([log_density(part) for part in np.array_split(points, 20)])
    weights = np.exp(log_p - log_p.max())
    return points, weights / weights.sum()


def mixed(weights, mean, variance):
    """Moments of a mixture whose components are rows."""
    centre = weights @ mean
    return {"mean": centre, "sd": np.sqrt(weights @ (variance + (mean - centre) ** 2))}


def moments_of_logs(sites, points, weights):
    found = mixed(weights, points, 0.0 * points)
    return {s: {key: v[k : k + 1] for key, v in found.items()} for k, s in enumerate(sites)}


# Seasons


def seasonal(rng):
    size = 120
    month = np.arange(size) % 12
    y = np.cumsum(0.2 * rng.normal(size=size)) + rng.normal(size=12)[month]
    y += 0.5 * rng.normal(size=size)

    def model(p, month, y):
        step = p.sample("step", p.dist.LogNormal(*SCALE))[..., None]
        season = p.sample("season", p.dist.LogNormal(*SCALE))[..., None]
        noise = p.sample("noise", p.dist.LogNormal(*SCALE))[..., None]
        z = p.sample("z", p.dist.Normal(p.xp.zeros(size), 1.0).to_event(1))
        of_month = p.dist.Normal(p.xp.zeros(12), season).to_event(1)
        months = p.sample("months", of_month)
        mean = p.xp.cumsum(step * z, -1) + months[..., month]
        p.sample("y", p.dist.Normal(mean, noise).to_event(1), obs=y)

    return model, [month, y]


def moments_of_seasonal(month, y):
    """By normals on a grid of the three scales."""
    size = len(y)
    walk, season = np.tril(np.ones((size, size))), np.eye(12)[month]
    parts = walk @ walk.T, season @ season.T, np.eye(size)

    def factor(logs):
        return np.linalg.cholesky(
            sum(
                np.exp(2 * log)[:, None, None] * part
                for log, part in zip(logs.T, parts, strict=True)
            )
        )

    def log_density(logs):
        tril = factor(logs)
        white = np.linalg.solve(tril, np.broadcast_to(y[:, None], (len(logs), size, 1)))[..., 0]
        log_det = np.log(tril.diagonal(axis1=1, axis2=2)).sum(-1)
        return log_prior(logs) - log_det - 0.5 * (white**2).sum(-1)

    points, weights = grid(log_density, 3, num=25, width=6.0)
    points, weights = points[weights > 1e-9], weights[weights > 1e-9]
    means, variances = [], []
    for logs in np.array_split(points, 50):
        tril = factor(logs)
        known = np.concatenate([y[:, None], walk, season], -1)
        white = np.linalg.solve(tril, np.broadcast_to(known, (len(logs), *known.shape)))
        # A latent is a scale times standard noise, whose covariance with y is scale times a column.
        scale = np.exp(np.repeat(logs[:, :2], [size, 12], -1))
        own = np.repeat([[1.0, 0.0], [0.0, 1.0]], [size, 12], -1)
        unit = own[0] + own[1] * scale  # steps are standard, and months have their scale
        covariance = (white[..., 1:] * white[..., :1]).sum(1) * scale
        means.append(unit * covariance)
        variances.append(unit**2 * (1 - scale**2 * (white[..., 1:] ** 2).sum(1)))
    weights = weights / weights.sum()
    found = mixed(weights, np.concatenate(means), np.concatenate(variances))
    return {
        **moments_of_logs(["step", "season", "noise"], points, weights),
        "z": {key: v[:size] for key, v in found.items()},
        "months": {key: v[size:] for key, v in found.items()},
    }


# Rows and groups


def counts(size):
    """Independent rates."""

    def simulate(rng):
        y = rng.poisson(np.exp(1.0 + rng.normal(size=size))).astype(float)

        def model(p, y):
            z = p.sample("z", p.dist.Normal(p.xp.ones(size), 1.0).to_event(1))
            p.sample("y", p.dist.Poisson(p.xp.exp(z)).to_event(1), obs=y)

        return model, [y]

    return Exact(named(f"counts_{size}", simulate), size, "independent", moments_of_counts)


def moments_of_counts(y):
    z = np.linspace(-9.0, 11.0, 4001)
    seen, places = np.unique(y, return_inverse=True)
    log_p = -0.5 * (z - 1.0) ** 2 + seen[:, None] * z - np.exp(z)
    p = np.exp(log_p - log_p.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    mean = p @ z
    sd = np.sqrt((p * (z - mean[:, None]) ** 2).sum(-1))
    return {"z": {"mean": mean[places], "sd": sd[places]}}


def slopes(is_centred):
    """Correlated intercepts and slopes of 40 groups, with an LKJ prior."""
    num, each = 40, 9

    def simulate(rng):
        group = np.repeat(np.arange(num), each)
        x = np.concatenate([np.ones((num * each, 1)), rng.normal(size=(num * each, 2))], -1)
        tril = np.array([[1.5, 0, 0], [-0.5, 0.6, 0], [0.0, 0.4, 1.0]])
        b = np.array([1.0, -1.0, 2.0]) + rng.normal(size=(num, 3)) @ tril.T
        y = (b[group] * x).sum(-1) + rng.normal(size=num * each)

        def model(p, group, x, y):
            mean = p.sample("mean", p.dist.Normal(p.xp.zeros(3), 5.0).to_event(1))[..., None, :]
            scales = p.sample("scales", p.dist.HalfNormal(2.0 * p.xp.ones(3)).to_event(1))
            cholesky = p.sample("cholesky", p.dist.LKJCholesky(3, 2.0))
            sigma = p.sample("sigma", p.dist.HalfNormal(5.0))
            tril = (scales[..., None] * cholesky)[..., None, :, :]
            if is_centred:
                each_mean = mean + p.xp.zeros((num, 3))
                of_group = p.dist.MultivariateNormal(each_mean, scale_tril=tril)
                b = p.sample("b", of_group.to_event(1))
            else:
                z = p.sample("z", p.dist.Normal(p.xp.zeros((num, 3)), 1.0).to_event(2))
                b = mean + (z[..., None, :] * tril).sum(-1)
            fitted = (b[..., group, :] * x).sum(-1)
            p.sample("y", p.dist.Normal(fitted, sigma[..., None]).to_event(1), obs=y)

        return model, [group, x, y]

    name, note = "slopes_centred" if is_centred else "slopes", "groups with an LKJ prior"
    return models.Posterior(named(name, simulate), 3 * num + 10, note, (), REFERENCES)


def items(rng):
    persons, number = 400, 30
    discrimination = np.exp(0.3 * rng.normal(size=number))
    ability, difficulty = rng.normal(size=(persons, 1)), 0.5 + rng.normal(size=number)
    logits = discrimination * (ability - difficulty)
    y = (rng.logistic(size=(persons, number)) < logits).astype(float)

    def model(p, y):
        mean = p.sample("mean", p.dist.Normal(0.0, 2.0))[..., None]
        spread = p.sample("spread", p.dist.HalfNormal(2.0))[..., None]
        of_item = p.dist.Normal(mean + p.xp.zeros(number), spread)
        difficulty = p.sample("difficulty", of_item.to_event(1))
        positive = p.dist.LogNormal(p.xp.zeros(number), 0.5)
        discrimination = p.sample("discrimination", positive.to_event(1))
        ability = p.sample("ability", p.dist.Normal(p.xp.zeros(persons), 1.0).to_event(1))
        logits = ability[..., :, None] - difficulty[..., None, :]
        logits = discrimination[..., None, :] * logits
        p.sample("y", p.dist.Bernoulli(logits=logits).to_event(2), obs=y)

    return model, [y]


# Series and maps in coordinates of their own


def volatility(size):
    """Log variances that follow an autoregression."""

    def simulate(rng):
        h, y = 0.0, []
        for _ in range(size):
            h = 0.95 * h + 0.3 * rng.normal()
            y.append(math.exp(h / 2) * rng.normal())

        def model(p, y):
            mu = p.sample("mu", p.dist.Normal(0.0, 2.0))[..., None]
            phi = p.sample("phi", p.dist.Beta(20.0, 1.5))[..., None]
            step = p.sample("step", p.dist.LogNormal(-1.5, 0.5))[..., None]
            h = unnormalised(p, "h", size)
            before = mu + phi * (h[..., :-1] - mu)
            first = p.dist.Normal(mu, step * (1 - phi**2) ** -0.5).log_prob(h[..., :1])
            others = p.dist.Normal(before, step).log_prob(h[..., 1:])
            p.factor("autoregression", first.sum(-1) + others.sum(-1))
            p.sample("y", p.dist.Normal(0.0, p.xp.exp(h / 2)).to_event(1), obs=y)

        return model, [np.array(y)]

    name, note = f"volatility_{size}", "an autoregression of log variances, centred"
    return models.Posterior(named(name, simulate), size + 3, note, (), REFERENCES)


def unnormalised(p, name, size):
    """Latents whose prior is a factor: a normal that can be drawn, and is taken out again."""
    wide = p.dist.Normal(p.xp.zeros(size), 3.0).to_event(1)
    value = p.sample(name, wide)
    p.factor(f"{name}_flat", -wide.log_prob(value))
    return value


def areas(is_proper):
    """Counts on a map of 10 x 10 areas, whose risks are smooth in part (BYM2)."""
    side, number = 10, 100

    def simulate(rng):
        place = np.arange(number).reshape(side, side)
        right = np.stack([place[:, :-1].ravel(), place[:, 1:].ravel()])
        down = np.stack([place[:-1].ravel(), place[1:].ravel()])
        one, other = np.concatenate([right, down], -1)
        laplacian = np.zeros((number, number))
        for j, k in zip(one, other, strict=True):
            laplacian[[j, k], [j, k]] += 1.0
            laplacian[[j, k], [k, j]] -= 1.0
        # The share of a neighbour; without it the mean is held at zero.
        pull = 0.05 if is_proper else 0.0
        held = 0.0 if is_proper else 1.0
        precision = laplacian + pull * np.eye(number) + held * np.ones((number, number)) / number
        covariance = np.linalg.inv(precision)
        scale = np.exp(0.5 * np.log(covariance.diagonal()).mean())
        smooth = np.linalg.cholesky(covariance) @ rng.normal(size=number) / scale
        rough, expected = rng.normal(size=number), rng.uniform(3.0, 20.0, number)
        risk = np.exp(0.5 * (math.sqrt(0.7) * smooth + math.sqrt(0.3) * rough))
        y = rng.poisson(expected * risk).astype(float)

        def model(p, one, other, expected, y):
            mu = p.sample("mu", p.dist.Normal(0.0, 1.0))[..., None]
            sigma = p.sample("sigma", p.dist.HalfNormal(1.0))[..., None]
            share = p.sample("share", p.dist.Beta(1.0, 1.0))[..., None]
            rough = p.sample("rough", p.dist.Normal(p.xp.zeros(number), 1.0).to_event(1))
            smooth = unnormalised(p, "smooth", number)
            squares = ((smooth[..., one] - smooth[..., other]) ** 2).sum(-1)
            if is_proper:
                squares = squares + pull * (smooth**2).sum(-1)
            else:
                squares = squares + (smooth.sum(-1) / (0.001 * number)) ** 2
            p.factor("neighbours", -0.5 * squares)
            both = p.xp.sqrt(share) * smooth / scale + p.xp.sqrt(1 - share) * rough
            rate = expected * p.xp.exp(mu + sigma * both)
            p.sample("y", p.dist.Poisson(rate).to_event(1), obs=y)

        return model, [one, other, expected, y]

    name = "areas" if is_proper else "areas_intrinsic"
    note = "a proper CAR" if is_proper else "an intrinsic CAR whose sum is softly zero"
    return models.Posterior(named(name, simulate), 2 * number + 3, note, (), REFERENCES)


def build():
    found = [
        *map(level, (100, 400, 1000)),
        Level(seasonal, 135, "a local level and 12 months", moments_of_seasonal),
        *map(counts, (1000, 10_000)),
        slopes(False),
        slopes(True),
        models.Posterior(items, 462, "400 persons and 30 items", (), REFERENCES),
        *map(volatility, (100, 500)),
        areas(True),
        areas(False),
        *(hard.POSTERIORS[f"funnel_of_{size}"] for size in (10, 100)),
    ]
    return {posterior.name: posterior for posterior in found}


POSTERIORS = build()


# Contenders


def ours(posterior, seed, **settings):
    from pyro_iaf import AutoIAF, fit

    resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES))
    began = time.perf_counter()
    guide = AutoIAF(posterior.model, **settings)
    result = fit(posterior.model, guide, seed=seed, progress=False)
    text = str(result)
    seconds = time.perf_counter() - began
    print(text, file=sys.stderr)
    more = {
        "steps": result.num_steps,
        "structure": str(guide.structure) if guide.structure else None,
        "parameters": sum(param.numel() for param in guide.parameters()),
        "verdict": result.diagnosis.verdict,
        "khat": round(result.diagnosis.khat, 2),
        "megabytes": megabytes(),
    }
    return seconds, more | errors(posterior, guide)


def errors(posterior, guide):
    """The largest errors of draws of a guide, and whether they hold."""
    known = {
        site: [np.asarray(moments[key]).reshape(-1) for key in ("mean", "sd")]
        for site, moments in posterior.summary.items()
    }
    sums, num_parts = {site: 0.0 for site in known}, 20
    for _ in range(num_parts):  # draws of 10,000 latents do not fit in memory
        draws = guide.sample_posterior(NUM_DRAWS // num_parts)
        draws = posterior.quantities({site: value.numpy() for site, value in draws.items()})
        for site, (mean, sd) in known.items():
            values = np.asarray(draws[site]).reshape(NUM_DRAWS // num_parts, -1)[:, sd > 0]
            units = (values - mean[sd > 0]) / sd[sd > 0]
            sums[site] += np.stack([units.sum(0), (units**2).sum(0)])
    mean, square = np.concatenate(list(sums.values()), -1) / NUM_DRAWS
    of_mean, of_sd = np.abs(mean).max(), np.abs(np.sqrt(square - mean**2) - 1).max()
    return {
        "mean_error": round(float(of_mean), 3),
        "sd_error": round(float(of_sd), 3),
        "holds": all(bool(refine.are_small(e, NUM_DRAWS)) for e in (of_mean, of_sd)),
    }


def dense(posterior, seed):
    return ours(posterior, seed, structure=False)


def numpyro(posterior, seed):
    chains, seconds, _ = refine.numpyro(posterior, seed)
    found = {"megabytes": megabytes()} | refine.judged(posterior, chains)
    found.pop("rhat")
    return seconds * max(1.0, refine.WANTED / max(found["ess"], 1)), found


CONTENDERS = {"structure": ours, "dense": dense, "numpyro": numpyro}


def megabytes():
    """The peak of this process."""
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def row(posterior, seed, contender):
    found = {"posterior": posterior.name, "contender": contender, "seed": seed}
    found["latents"] = posterior.latent_dim
    keys = "seconds steps structure parameters verdict khat mean_error sd_error holds ess"
    found |= dict.fromkeys([*keys.split(), "megabytes", "failed"])

    def give_up():
        print(json.dumps(found | {"failed": f"no end after {SECONDS} s"}), flush=True)
        os._exit(0)  # also from compiled loops

    timer = threading.Timer(SECONDS, give_up)
    timer.daemon = True
    timer.start()
    try:
        seconds, more = CONTENDERS[contender](posterior, seed)
    except Exception as error:
        lines = str(error).splitlines() or [""]
        more = {"failed": f"{type(error).__name__}: {lines[0][:200]}", "megabytes": megabytes()}
        return found | more
    finally:
        timer.cancel()
    return found | {"seconds": round(seconds, 1)} | more


def step(size):
    """Milliseconds of a step for a local level of so many latents."""
    from pyro_iaf import AutoIAF, fit
    from pyro_iaf.elbo.objectives import LatentLoss

    # Adjusting the guide's tails after the last step is no part of a step.
    LatentLoss.adjust_tails = lambda self, batch: None
    posterior = level(size - 2)
    guide = AutoIAF(posterior.model)
    began = time.perf_counter()
    pyro.set_rng_seed(0)
    guide()
    found = {"latents": size, "start_seconds": round(time.perf_counter() - began, 1)}
    found["structure"] = str(guide.structure) if guide.structure else None
    settings = {"progress": False, "early_stop": False}

    def seconds(num_steps, how):
        result = fit(posterior.model, guide, num_steps=num_steps, compile=how, **settings)
        return result.seconds

    for name, how in (("eager", False), ("compiled", True)):
        seconds(1, how)
        num = NUM_STEPS if name == "eager" else 10 * NUM_STEPS
        # The work before the first step is in both.
        taken = [seconds(num + 20, how) - seconds(20, how) for _ in range(ROUNDS)]
        found[f"{name}_ms"] = round(1e3 * sorted(taken)[ROUNDS // 2] / num, 2)
    return found | {"megabytes": megabytes()}


def exponents(steps):
    """By which the milliseconds of a step grow from each size to the next."""
    found = {}
    for one, two in pairwise(steps):
        growth = {
            key: round(math.log(two[key] / one[key]) / math.log(two["latents"] / one["latents"]), 2)
            for key in ("eager_ms", "compiled_ms")
        }
        found[f"{one['latents']} to {two['latents']}"] = growth
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--only", choices=[*CONTENDERS, "steps"], help="keep the others' rows")
    parser.add_argument("--names", nargs="*", help="posteriors, else all")
    parser.add_argument("--references", action="store_true", help="draw them by NUTS")
    parser.add_argument("--one", nargs=2, metavar=("NAME", "SEED"), help="a row, in this process")
    options = parser.parse_args()
    if options.one:
        name, contender = options.one[0].split(":")
        if contender == "steps":
            print(json.dumps(step(int(name))))
            return
        POSTERIORS[name].model()  # reads the data
        print(json.dumps(row(POSTERIORS[name], int(options.one[1]), contender)))
        return
    if options.references:
        drawn = {n: p for n, p in POSTERIORS.items() if p.references == REFERENCES}
        models.write(drawn, REFERENCES, options.names or list(drawn), **LIMITS)
        return
    order = [
        (name, contender)
        for name, posterior in POSTERIORS.items()
        for contender in CONTENDERS
        if contender != "dense" or posterior.latent_dim <= MOST_DENSE
    ]
    wanted = [
        pair
        for pair in order
        if options.only in (None, pair[1]) and (not options.names or pair[0] in options.names)
    ]
    steps = []
    if options.only == "steps" or not (options.only or options.names):
        names = [f"{size}:steps" for size in SIZES]
        steps = rows_of_fresh_processes("benchmarks.structure", names, 1)
    names = [":".join(pair) for pair in wanted]
    rows = rows_of_fresh_processes("benchmarks.structure", names, options.seeds)
    file = RESULTS / "structure.json"
    known = json.loads(file.read_text()) if file.exists() else {"about": {}, "rows": []}
    rows += [r for r in known["rows"] if (r["posterior"], r["contender"]) not in wanted]
    steps = steps or known["about"].get("steps", [])
    rows.sort(key=lambda found: order.index((found["posterior"], found["contender"])))
    note = "float64; fits at the defaults, dense ones, and NUTS"
    save("structure", note, rows, steps=steps, exponents=exponents(steps))


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_default_dtype(torch.float64)
    main()
