"""Eight posteriors that a guide alone hardly holds, with known answers.

``POSTERIORS`` are as those of :mod:`benchmarks.models`. Four have known moments, one by sums over a
grid. For the others NUTS of NumPyro draws the references, as `python -m benchmarks.hard`.

Where the variance of draws is infinite their logarithms are judged, or values of their distribution
function: ``quantities`` of a posterior says what.
"""

import math

import numpy as np
from scipy.stats import t as student

from benchmarks import models

REFERENCES = "references_hard"


class Known(models.Posterior):
    """A posterior without data, of known moments."""

    def __init__(self, simulate, latent_dim, note, summary):
        super().__init__(simulate, latent_dim, note, ())
        self.summary = summary


class StudentT(Known):
    def quantities(self, chains):
        return {"t": student.cdf(np.asarray(chains["t"]), 1.5)}


class Horseshoe(models.Posterior):
    """Its scales have no variance, so their logarithms are judged, and the slopes."""

    def quantities(self, chains):
        tau, local, z, sigma = (np.asarray(chains[s]) for s in ("tau", "local", "z", "sigma"))
        slopes = z * local * tau[..., None]
        return {"slopes": slopes, "tau": np.log(tau), "local": np.log(local), "sigma": sigma}


def funnel(size):
    def simulate(rng):
        def model(p):
            v = p.sample("v", p.dist.Normal(0.0, 3.0))
            x = p.dist.Normal(p.xp.zeros(size - 1), p.xp.exp(v / 2)[..., None])
            p.sample("x", x.to_event(1))

        return model, []

    simulate.__name__ = f"funnel_of_{size}"
    return Known(simulate, size, "Neal's funnel", {"v": {"mean": [0.0], "sd": [3.0]}})


def banana(rng):
    def model(p):
        a = p.sample("a", p.dist.Normal(0.0, 1.0))
        b = p.sample("b", p.dist.Normal(0.0, 3.0))
        p.factor("ridge", -50.0 * (b - a * a) ** 2)

    return model, []


def moments_of_banana():
    """By sums over a grid."""
    a, b = np.meshgrid(np.linspace(-6, 6, 2401), np.linspace(-4, 20, 4801), indexing="ij")
    log_p = -a * a / 2 - b * b / 18 - 50.0 * (b - a * a) ** 2
    p = np.exp(log_p - log_p.max())
    p /= p.sum()
    found = {}
    for name, x in (("a", a), ("b", b)):
        mean = (p * x).sum()
        found[name] = {"mean": [mean], "sd": [math.sqrt((p * (x - mean) ** 2).sum())]}
    return found


def student_t(rng):
    def model(p):
        p.sample("t", p.dist.StudentT(1.5, p.xp.zeros(5), 1.0).to_event(1))

    return model, []


def two_modes(rng):
    def model(p):
        x = p.sample("x", p.dist.Normal(p.xp.zeros(2), 10.0).to_event(1))
        parts = [
            math.log(share) - 2 * math.log(sd) - (((x - loc) / sd) ** 2).sum(-1) / 2
            for loc, sd, share in ((3.0, 0.5, 0.7), (-3.0, 0.3, 0.3))
        ]
        p.factor("modes", p.xp.logaddexp(*parts) + (x * x).sum(-1) / 200.0)

    return model, []


def schools_near_zero(rng):
    y = 4.0 + rng.normal(0.0, 1.0, 8) * np.array([15.0, 10, 16, 11, 9, 11, 10, 18]) / 3

    def model(p, y, sigma):
        mu = p.sample("mu", p.dist.Normal(0.0, 5.0))
        tau = p.sample("tau", p.dist.HalfCauchy(5.0))
        of_school = p.dist.Normal(mu[..., None] + p.xp.zeros(8), tau[..., None])
        theta = p.sample("theta", of_school.to_event(1))
        p.sample("y", p.dist.Normal(theta, sigma).to_event(1), obs=y)

    return model, [y, np.array([15.0, 10, 16, 11, 9, 11, 10, 18])]


def horseshoe(rng):
    x = rng.normal(size=(60, 10))
    y = x[:, :2] @ [2.0, -1.5] + rng.normal(size=60)

    def model(p, x, y):
        tau = p.sample("tau", p.dist.HalfCauchy(0.3))
        local = p.sample("local", p.dist.HalfCauchy(p.xp.ones(10)).to_event(1))
        z = p.sample("z", p.dist.Normal(p.xp.zeros(10), 1.0).to_event(1))
        sigma = p.sample("sigma", p.dist.HalfNormal(2.0))
        mean = (z * local * tau[..., None]) @ x.T
        p.sample("y", p.dist.Normal(mean, sigma[..., None]).to_event(1), obs=y)

    return model, [x, y]


def volatility(rng):
    size, h, y = 200, 0.0, []
    for _ in range(size):
        h = 0.95 * h + 0.3 * rng.normal()
        y.append(math.exp(h / 2) * rng.normal())

    def model(p, y):
        mu = p.sample("mu", p.dist.Normal(0.0, 2.0))[..., None]
        phi = p.sample("phi", p.dist.Beta(20.0, 1.5))[..., None]
        step = p.sample("step", p.dist.LogNormal(-1.5, 0.5))[..., None]
        z = p.sample("z", p.dist.Normal(p.xp.zeros(size), 1.0).to_event(1))
        # h[t] = phi h[t - 1] + z[t], summed by doubling; the first step is stationary.
        h = p.xp.concatenate([z[..., :1] * (1 - phi**2) ** -0.5, z[..., 1:] + 0.0 * phi], -1)
        lag = 1
        while lag < size:
            h = p.xp.concatenate([h[..., :lag], h[..., lag:] + phi**lag * h[..., :-lag]], -1)
            lag *= 2
        scale = p.xp.exp((mu + step * h) / 2)
        p.sample("y", p.dist.Normal(0.0, scale).to_event(1), obs=y)

    return model, [np.array(y)]


def build():
    mean = 3.0 * 0.7 - 3.0 * 0.3
    sd = math.sqrt(0.7 * (9 + 0.25) + 0.3 * (9 + 0.09) - mean**2)
    uniform = {"t": {"mean": [0.5] * 5, "sd": [12**-0.5] * 5}}
    found = [
        funnel(10),
        funnel(100),
        Known(banana, 2, "a ridge", moments_of_banana()),
        StudentT(student_t, 5, "tails of 1.5 degrees of freedom", uniform),
        Known(two_modes, 2, "0.7 and 0.3", {"x": {"mean": [mean] * 2, "sd": [sd] * 2}}),
        models.Posterior(schools_near_zero, 10, "centred, a scale near 0", ("theta",), REFERENCES),
        Horseshoe(horseshoe, 22, "a regression with many slopes near 0", (), REFERENCES),
        models.Posterior(volatility, 203, "a series of 200", (), REFERENCES),
    ]
    return {posterior.name: posterior for posterior in found}


POSTERIORS = build()


if __name__ == "__main__":
    models.main({name: p for name, p in POSTERIORS.items() if not isinstance(p, Known)}, REFERENCES)
