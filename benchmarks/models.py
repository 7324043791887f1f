"""Thirteen posteriors with known answers: simulated data, and references by NumPyro's NUTS.

``POSTERIORS[name]`` has

* ``model``: a Pyro model without arguments. Its data have torch's default dtype.
* ``latent_dim``: the number of unconstrained dimensions
* ``summary``: ``{site: {"mean": [...], "sd": [...]}}``, constrained, each site in row-major order;
  numbers that are fixed, such as the zeros of a Cholesky factor, have an sd of zero
* ``note``: what makes it hard

All are unimodal and have continuous latents only. They have no plates, and batch over leading
dimensions of their latents. Each is written once, in primitives that Pyro and NumPyro share.

The command compares the log joint densities of both at draws from the prior, and then writes the
references, in minutes. It needs NumPyro; reading models and summaries does not.
"""

import argparse
import functools
import importlib.metadata
import json
import math
import sys
import time
from types import SimpleNamespace

import numpy as np
import pyro
import pyro.distributions
import torch

from benchmarks.common import RESULTS, describe

CHAINS, WARMUP, BLOCK, MAX_BLOCKS = 4, 2000, 5000, 20
# Blocks are drawn until the smallest effective sample size and the largest relative error of an sd
# are these. The Monte-Carlo error of a mean is its sd over the root of the size.
SIZE, ERROR_OF_SD = 12_000, 0.012


class Posterior:
    def __init__(self, simulate, latent_dim, note, noncentred, references="references"):
        self.name, self.note, self.latent_dim = simulate.__name__, note, latent_dim
        self.references = references
        self.noncentred = noncentred
        self.body, self.arrays = simulate(np.random.default_rng(0))
        self._data = {}

    def model(self):
        dtype = torch.get_default_dtype()
        if dtype not in self._data:
            self._data[dtype] = [
                torch.as_tensor(a, dtype=dtype if a.dtype.kind == "f" else None)
                for a in self.arrays
            ]
        self.body(PYRO, *self._data[dtype])

    @functools.cached_property
    def summary(self):
        return json.loads((RESULTS / f"{self.references}.json").read_text())["summaries"][self.name]

    def quantities(self, chains):
        """What is judged of its draws: by default all sites."""
        return chains

    def __repr__(self):
        return f"Posterior({self.name!r}, latent_dim={self.latent_dim})"


# What the models use of a language: `xp` is torch or jax.numpy.
PYRO = SimpleNamespace(sample=pyro.sample, factor=pyro.factor, dist=pyro.distributions, xp=torch)
POSTERIORS = {}


def register(latent_dim, note, noncentred=()):
    """Adds a posterior. NUTS draws the sites in ``noncentred`` by their standardised values."""

    def add(simulate):
        POSTERIORS[simulate.__name__] = Posterior(simulate, latent_dim, note, noncentred)
        return simulate

    return add


@register(2, "five observations: a scale with a long tail")
def normal(rng):
    heights = rng.normal(170.0, 8.0, 5)

    def model(p, heights):
        mu = p.sample("mu", p.dist.Normal(150.0, 50.0))[..., None] + p.xp.zeros(5)
        sigma = p.sample("sigma", p.dist.HalfNormal(20.0))[..., None]
        p.sample("heights", p.dist.Normal(mu, sigma).to_event(1), obs=heights)

    return model, [heights]


@register(3, "concentrations below the half-saturation: a curved ridge, a banana")
def michaelis_menten(rng):
    substrate = np.array([5.0, 10, 15, 20, 30, 40, 50, 60, 80, 100])
    velocity = 240.0 * substrate / (160.0 + substrate) + rng.normal(0.0, 4.0, 10)

    def model(p, substrate, velocity):
        largest = p.sample("largest", p.dist.LogNormal(5.0, 1.0))
        half = p.sample("half", p.dist.LogNormal(4.5, 1.0))
        sigma = p.sample("sigma", p.dist.HalfNormal(10.0))
        mean = largest[..., None] * substrate / (half[..., None] + substrate)
        p.sample("velocity", p.dist.Normal(mean, sigma[..., None]).to_event(1), obs=velocity)

    return model, [substrate, velocity]


@register(3, "amplitude, lengthscale and noise of 20 points, all skewed")
def gaussian_process(rng):
    x = np.sort(rng.uniform(0.0, 10.0, 20))
    y = 1.5 * np.sin(0.9 * x) + 0.4 * x**0.5 + rng.normal(0.0, 0.3, 20)

    def model(p, x, y):
        amplitude = p.sample("amplitude", p.dist.HalfNormal(3.0))
        lengthscale = p.sample("lengthscale", p.dist.LogNormal(0.5, 0.7))
        noise = p.sample("noise", p.dist.HalfNormal(1.0))
        amplitude, lengthscale, noise = (
            v[..., None, None] for v in (amplitude, lengthscale, noise)
        )
        distance = (x[:, None] - x) / lengthscale
        cov = amplitude**2 * p.xp.exp(-0.5 * distance**2) + noise**2 * p.xp.eye(20)
        scale_tril = p.xp.linalg.cholesky(cov)
        p.sample("y", p.dist.MultivariateNormal(p.xp.zeros(20), scale_tril=scale_tril), obs=y)

    return model, [x, y]


@register(4, "daily returns: a simplex, and a latent of size 1e-5 on a ridge")
def garch(rng):
    variance, y = 1.2e-4, []
    for _ in range(120):
        y.append(5e-4 + variance**0.5 * rng.normal())
        variance = 8e-6 + 0.18 * (y[-1] - 5e-4) ** 2 + 0.76 * variance

    def model(p, y, first):
        mu = p.sample("mu", p.dist.Normal(0.0, 0.01))[..., None]
        omega = p.sample("omega", p.dist.HalfNormal(5e-5))[..., None]
        # The weights of yesterday's square and variance, and the rest, so that it is stationary.
        weights = p.sample("weights", p.dist.Dirichlet(2.0 * p.xp.ones(3)))
        news = omega + weights[..., :1] * (y[:-1] - mu) ** 2
        variance = p.xp.concatenate([first + 0.0 * omega, news], -1)
        # variance[t] = news[t] + memory * variance[t - 1], summed by doubling.
        memory, lag = weights[..., 1:2], 1
        while lag < 120:
            before = p.xp.concatenate([p.xp.zeros_like(variance[..., :lag]), variance], -1)
            variance = variance + memory * before[..., :120]
            memory, lag = memory**2, 2 * lag
        p.sample("y", p.dist.Normal(mu, p.xp.sqrt(variance)).to_event(1), obs=y)

    return model, [np.array(y), np.array(1.2e-4)]


@register(4, "censored times in days; a shape and an unscaled covariate")
def weibull(rng):
    age, treated = rng.uniform(35.0, 80.0, 60), rng.integers(2, size=60).astype(float)
    scale = np.exp(8.0 - 0.03 * age + 0.6 * treated)
    time, end = scale * rng.weibull(1.4, 60), rng.uniform(200.0, 1500.0, 60)

    def model(p, age, treated, time, seen):
        intercept = p.sample("intercept", p.dist.Normal(6.0, 3.0))
        of_age = p.sample("of_age", p.dist.Normal(0.0, 0.1))
        of_treatment = p.sample("of_treatment", p.dist.Normal(0.0, 1.0))
        shape = p.sample("shape", p.dist.LogNormal(0.0, 0.7))[..., None]
        slopes = of_age[..., None] * age + of_treatment[..., None] * treated
        scale = p.xp.exp(intercept[..., None] + slopes)
        p.sample("time", p.dist.Weibull(scale, shape).mask(seen).to_event(1), obs=time)
        survived = p.xp.where(seen, 0.0, -((time / scale) ** shape))
        p.factor("survived", survived.sum(-1))

    return model, [age, treated, np.minimum(time, end), time < end]


@register(5, "overdispersed counts, covariates in years and in dollars", ["of_age", "of_income"])
def negative_binomial(rng):
    age, income = rng.uniform(20.0, 80.0, 80), rng.lognormal(10.6, 0.5, 80)
    insured = rng.integers(2, size=80).astype(float)
    mean = np.exp(-0.5 + 0.035 * age - 8e-6 * income + 0.5 * insured)
    visits = rng.poisson(mean * rng.gamma(1.5, 1 / 1.5, 80)).astype(float)

    def model(p, age, income, insured, visits):
        intercept = p.sample("intercept", p.dist.Normal(0.0, 5.0))
        of_age = p.sample("of_age", p.dist.Normal(0.0, 0.1))
        of_income = p.sample("of_income", p.dist.Normal(0.0, 1e-4))
        of_insurance = p.sample("of_insurance", p.dist.Normal(0.0, 2.5))
        dispersion = p.sample("dispersion", p.dist.Gamma(2.0, 0.5))[..., None]
        log_mean = intercept[..., None] + of_age[..., None] * age + of_income[..., None] * income
        log_mean = log_mean + of_insurance[..., None] * insured
        rate = dispersion * p.xp.exp(-log_mean)
        p.sample("visits", p.dist.GammaPoisson(dispersion, rate).to_event(1), obs=visits)

    return model, [age, income, insured, visits]


@register(6, "outliers, with their degrees of freedom unknown; covariates of size 10 and 10,000")
def robust(rng):
    area, price = rng.uniform(60.0, 90.0, 40), rng.uniform(15_000.0, 40_000.0, 40)
    rooms = np.round(area / 20.0 + rng.normal(0.0, 0.7, 40))
    rent = 100.0 + 9.0 * area + 0.012 * price + 40.0 * rooms + 45.0 * rng.standard_t(2.5, 40)

    def model(p, x, units, rent):
        intercept = p.sample("intercept", p.dist.Normal(0.0, 1000.0))
        slopes = p.sample("slopes", p.dist.Normal(p.xp.zeros(3), 500.0 / units).to_event(1))
        sigma = p.sample("sigma", p.dist.HalfNormal(200.0))[..., None]
        df = p.sample("df", p.dist.Gamma(2.0, 0.1))[..., None]
        mean = intercept[..., None] + slopes @ x.T
        p.sample("rent", p.dist.StudentT(df, mean, sigma).to_event(1), obs=rent)

    return model, [np.stack([area, price, rooms], -1), np.array([10.0, 1e4, 1.0]), rent]


@register(7, "ordered cutpoints of a five-point scale, one of them rare")
def ordered_logistic(rng):
    units = np.array([1.0, 5.0, 0.2])
    x = rng.normal(size=(70, 3)) * units
    latent = x @ [0.8, -0.25, 3.0] + rng.logistic(size=70)
    answer = np.searchsorted([-3.5, -1.0, 0.5, 2.0], latent)

    def model(p, x, units, answer):
        slopes = p.sample("slopes", p.dist.Normal(p.xp.zeros(3), 1.5 / units).to_event(1))
        base = p.dist.Normal(p.xp.zeros(4), 1.0).to_event(1)
        ordered = p.dist.transforms.OrderedTransform()
        cutpoints = p.sample("cutpoints", p.dist.TransformedDistribution(base, ordered))
        answers = p.dist.OrderedLogistic(slopes @ x.T, cutpoints[..., None, :])
        p.sample("answer", answers.to_event(1), obs=answer)

    return model, [x, units, answer]


@register(8, "correlated columns that nearly separate the classes")
def logistic_separable(rng):
    common = rng.normal(size=(40, 1))
    x = 0.9 * common + 0.45 * rng.normal(size=(40, 7))
    y = (x[:, 0] + x[:, 1] - x[:, 2] + 0.1 * rng.logistic(size=40) > 0).astype(float)

    def model(p, x, y):
        intercept = p.sample("intercept", p.dist.Normal(0.0, 10.0))
        slopes = p.sample("slopes", p.dist.Normal(p.xp.zeros(7), 10.0).to_event(1))
        logits = intercept[..., None] + slopes @ x.T
        p.sample("y", p.dist.Bernoulli(logits=logits).to_event(1), obs=y)

    return model, [x, y]


@register(23, "20 groups of two, centred: a funnel", ["theta"])
def groups_centred(rng):
    theta = rng.normal(60.0, 3.0, 20)
    scores = theta[:, None] + rng.normal(0.0, 8.0, (20, 2))

    def model(p, scores):
        mu = p.sample("mu", p.dist.Normal(50.0, 20.0))
        tau = p.sample("tau", p.dist.HalfCauchy(10.0))
        sigma = p.sample("sigma", p.dist.HalfNormal(20.0))[..., None, None]
        groups = p.dist.Normal(mu[..., None] + p.xp.zeros(20), tau[..., None])
        theta = p.sample("theta", groups.to_event(1))
        of_group = p.dist.Normal(theta[..., None] + p.xp.zeros(2), sigma)
        p.sample("scores", of_group.to_event(2), obs=scores)

    return model, [scores]


@register(34, "varying intercepts and slopes, non-centred, with an LKJ prior")
def varying_slopes(rng):
    group, x = np.repeat(np.arange(8), 9), rng.normal(size=(72, 2)) * [1.0, 0.3]
    tril = np.array([[1.5, 0, 0], [-0.5, 0.6, 0], [0.0, 0.4, 1.0]])
    b = np.array([10.0, -1.0, 2.0]) + rng.normal(size=(8, 3)) @ tril.T
    x = np.concatenate([np.ones((72, 1)), x], -1)
    y = (b[group] * x).sum(-1) + rng.normal(0.0, 1.0, 72)

    def model(p, group, x, y):
        mean = p.sample("mean", p.dist.Normal(p.xp.zeros(3), 10.0).to_event(1))
        scales = p.sample("scales", p.dist.HalfNormal(2.0 * p.xp.ones(3)).to_event(1))
        cholesky = p.sample("cholesky", p.dist.LKJCholesky(3, 2.0))
        z = p.sample("z", p.dist.Normal(p.xp.zeros((8, 3)), 1.0).to_event(2))
        sigma = p.sample("sigma", p.dist.HalfNormal(5.0))
        rows = z[..., None, :] * (scales[..., None] * cholesky)[..., None, :, :]
        b = mean[..., None, :] + rows.sum(-1)
        fitted = (b[..., group, :] * x).sum(-1)
        p.sample("y", p.dist.Normal(fitted, sigma[..., None]).to_event(1), obs=y)

    return model, [group, x, y]


@register(42, "rare deaths in 40 counties: rates near zero")
def beta_binomial(rng):
    people = np.round(rng.lognormal(5.5, 1.2, 40) + 20.0)
    deaths = rng.binomial(people.astype(int), rng.beta(1.5, 118.5, 40)).astype(float)

    def model(p, people, deaths):
        mean = p.sample("mean", p.dist.Beta(2.0, 50.0))[..., None]
        strength = p.sample("strength", p.dist.LogNormal(5.5, 0.7))[..., None]
        ones = p.xp.ones(40)
        rates = p.dist.Beta(mean * strength * ones, (1.0 - mean) * strength * ones)
        rate = p.sample("rate", rates.to_event(1))
        p.sample("deaths", p.dist.Binomial(people, rate).to_event(1), obs=deaths)

    return model, [people, deaths]


@register(130, "64 slopes with a variance each, centred: many funnels", ["slopes"])
def shrinkage(rng):
    x = rng.normal(size=(80, 64))
    y = x[:, :5] @ [3.0, -2.0, 1.5, 1.0, -0.5] + rng.normal(size=80)

    def model(p, x, y):
        scale = p.sample("scale", p.dist.HalfNormal(1.0))
        # The Bayesian lasso: Laplace slopes, as normals with exponential variances.
        exponential = p.dist.Exponential(0.5 * p.xp.ones(64))
        variances = p.sample("variances", exponential.to_event(1))
        spread = scale[..., None] * p.xp.sqrt(variances)
        slopes = p.sample("slopes", p.dist.Normal(0.0 * spread, spread).to_event(1))
        sigma = p.sample("sigma", p.dist.HalfNormal(3.0))
        p.sample("y", p.dist.Normal(slopes @ x.T, sigma[..., None]).to_event(1), obs=y)

    return model, [x, y]


def numpyro_model(posterior):
    """The posterior's model in NumPyro, and NumPyro."""
    try:
        import jax.numpy as jnp
        import numpyro
        import numpyro.distributions
        import numpyro.infer.reparam
    except ImportError:
        sys.exit("References are drawn by NumPyro: pip install numpyro jax")
    numpyro.enable_x64()
    language = SimpleNamespace(
        sample=numpyro.sample, factor=numpyro.factor, dist=numpyro.distributions, xp=jnp
    )
    arrays = [jnp.array(array) for array in posterior.arrays]
    return functools.partial(posterior.body, language, *arrays), numpyro


def check(posterior, num_draws=20):
    """Raises an error unless both languages give draws from the prior the same log density."""
    model, numpyro = numpyro_model(posterior)
    pyro.set_rng_seed(0)
    for _ in range(num_draws):
        trace = pyro.poutine.trace(posterior.model).get_trace()
        latents = {site: trace.nodes[site]["value"].numpy() for site in trace.stochastic_nodes}
        ours = trace.log_prob_sum().item()
        theirs = float(numpyro.infer.util.log_density(model, (), {}, latents)[0])
        if not math.isclose(ours, theirs, rel_tol=1e-6):
            raise ValueError(f"{posterior}: log density {ours} in Pyro, {theirs} in NumPyro.")


def draw(posterior, size=SIZE, error_of_sd=ERROR_OF_SD, max_blocks=MAX_BLOCKS):
    """A row that says how well NUTS ran, and its summary."""
    from jax import random

    model, numpyro = numpyro_model(posterior)
    noncentred = {site: numpyro.infer.reparam.LocScaleReparam(0) for site in posterior.noncentred}
    kernel = numpyro.infer.NUTS(
        numpyro.handlers.reparam(model, config=noncentred),
        target_accept_prob=0.95,
        dense_mass=posterior.latent_dim <= 50,
        init_strategy=numpyro.infer.init_to_median,
    )
    mcmc = numpyro.infer.MCMC(
        kernel,
        num_warmup=WARMUP,
        num_samples=BLOCK,
        num_chains=CHAINS,
        chain_method="vectorized",
        progress_bar=False,
    )
    sites = pyro.poutine.trace(posterior.model).get_trace().stochastic_nodes
    began, blocks, divergences, key = time.perf_counter(), [], 0, random.key(0)
    for _ in range(max_blocks):
        mcmc.run(key, extra_fields=("diverging",))
        mcmc.post_warmup_state = mcmc.last_state
        key = mcmc.last_state.rng_key
        divergences += int(mcmc.get_extra_fields()["diverging"].sum())
        draws = mcmc.get_samples(group_by_chain=True)
        judged = posterior.quantities({site: np.asarray(draws[site]) for site in sites})
        blocks.append([draws.reshape(CHAINS, BLOCK, -1) for draws in judged.values()])
        everything = [np.concatenate(parts, 1) for parts in zip(*blocks, strict=True)]
        values = np.concatenate(everything, -1)
        values = values[..., np.ptp(values, (0, 1)) > 0]  # without those that are fixed
        smallest = numpyro.diagnostics.effective_sample_size(values).min()
        error = largest_error_of_sd(values, numpyro)
        if smallest > size and error < error_of_sd:
            break
    row = {
        "posterior": posterior.name,
        "latents": posterior.latent_dim,
        "draws": values.shape[0] * values.shape[1],
        "rhat": round(float(numpyro.diagnostics.split_gelman_rubin(values).max()), 4),
        "smallest_ess": round(float(smallest)),
        "error_of_sd": round(error, 4),
        "divergences": divergences,
        "seconds": round(time.perf_counter() - began, 1),
    }
    summary = {
        site: {
            "mean": [float(f"{v:.6g}") for v in draws.mean((0, 1))],
            "sd": [float(f"{v:.6g}") for v in draws.std((0, 1))],
        }
        for site, draws in zip(judged, everything, strict=True)
    }
    return row, summary


def largest_error_of_sd(values, numpyro):
    """The largest Monte-Carlo error of a standard deviation, relative to it."""
    squares = (values - values.mean((0, 1))) ** 2
    size = numpyro.diagnostics.effective_sample_size(squares)
    return float((0.5 * squares.std((0, 1)) / squares.mean((0, 1)) / size**0.5).max())


def main(posteriors=POSTERIORS, references="references"):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="the posteriors to draw again")
    write(posteriors, references, parser.parse_args().names or list(posteriors))


def write(posteriors, references, names, **limits):
    """Draws the named posteriors anew, as :func:`draw` does, and keeps what is known of others."""
    torch.set_default_dtype(torch.float64)
    file = RESULTS / f"{references}.json"
    known = json.loads(file.read_text()) if file.exists() else {"rows": [], "summaries": {}}
    rows, summaries = {row["posterior"]: row for row in known["rows"]}, known["summaries"]
    for name in names:
        check(posteriors[name])
        rows[name], summaries[name] = draw(posteriors[name], **limits)
        print(rows[name], flush=True)
        kept = [name for name in posteriors if name in rows]
        note = "NumPyro's NUTS in float64, 4 chains; summaries are of constrained values"
        versions = {package: importlib.metadata.version(package) for package in ("numpyro", "jax")}
        text = {"about": describe(note, **versions), "rows": [rows[name] for name in kept]}
        text["summaries"] = {name: summaries[name] for name in kept}
        file.write_text(json.dumps(text, indent=1) + "\n")


if __name__ == "__main__":
    main()
