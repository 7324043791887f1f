"""Fits on minibatches against the posterior of all rows, beside fits on all rows and peers.

Four regressions with 30,000 to 100,000 rows, one of them with 1,000 groups. Each row is from a
process of its own: ``plate`` and ``data``, fits at the defaults on minibatches of 500 by a plate's
``subsample_size`` and by a ``DataLoader``; ``all rows``, a fit at the defaults without minibatches;
``pyro`` and ``numpyro``, their multivariate normal guides (a diagonal one over the groups) with
Adam on minibatches of 500, for ``--seconds``, with the error after each half of that time.

``mean_error`` and ``sd_error`` are the largest over all latents, in standard deviations and
relative, against NUTS on all rows (``--references`` draws them by NumPyro). ``noise`` is the
variance of the gradient over minibatches without an anchor and with it. A second table has the
milliseconds of a step of 16 particles, as code and compiled.
"""

import argparse
import json
import time
import warnings

import numpy as np
import pyro
import torch
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.common import RESULTS, rows_of_fresh_processes, save
from pyro_iaf import AutoIAF, fit

SIZE, NUM_DRAWS = 500, 20_000
REFERENCES = RESULTS / "references_minibatches.json"
HOLDS = (0.1, 0.07)
CONTENDERS = ("plate", "data", "all rows", "pyro", "numpyro")
GROUPS = 1000


class Logistic:
    """50,000 answers by 10 covariates."""

    num_rows = 50_000

    def arrays(self, rng):
        x = rng.standard_normal((self.num_rows, 10))
        p = 1 / (1 + np.exp(-x @ np.linspace(-1, 1, 10)))
        return x, (rng.random(self.num_rows) < p).astype(float)

    def prior(self, p):
        return (p.sample("w", p.dist.Normal(p.zeros(10), 1.0).to_event(1)),)

    def data(self, p, latents, x, y):
        return p.dist.Bernoulli(logits=latents[0] @ x.T)


class Poisson:
    """30,000 counts by 8 covariates."""

    num_rows = 30_000

    def arrays(self, rng):
        x = 0.3 * rng.standard_normal((self.num_rows, 8))
        return x, rng.poisson(np.exp(0.5 + x @ np.linspace(-1, 1, 8))).astype(float)

    def prior(self, p):
        level = p.sample("level", p.dist.Normal(p.zeros(1), 5.0).to_event(1))
        return level, p.sample("w", p.dist.Normal(p.zeros(8), 1.0).to_event(1))

    def data(self, p, latents, x, y):
        level, w = latents
        return p.dist.Poisson(p.exp(level + w @ x.T))


class Student:
    """30,000 measurements with outliers by 8 covariates, scale and tails unknown."""

    num_rows = 30_000

    def arrays(self, rng):
        x = 0.3 * rng.standard_normal((self.num_rows, 8))
        return x, x @ np.linspace(-1, 1, 8) + 0.5 * rng.standard_t(4, self.num_rows)

    def prior(self, p):
        w = p.sample("w", p.dist.Normal(p.zeros(8), 1.0).to_event(1))
        scale = p.sample("scale", p.dist.HalfNormal(1.0))
        return w, scale, p.sample("tails", p.dist.Gamma(2.0, 0.1))

    def data(self, p, latents, x, y):
        w, scale, tails = latents
        return p.dist.StudentT(tails, w @ x.T, scale)


class Hierarchy:
    """100,000 rows in 1,000 groups, each with a level of its own."""

    num_rows = 100_000

    def arrays(self, rng):
        group = np.arange(self.num_rows) % GROUPS
        x, level = rng.standard_normal(self.num_rows), 0.5 * rng.standard_normal(GROUPS)
        y = 0.3 + 0.7 * x + level[group] + rng.standard_normal(self.num_rows)
        return np.stack([x, group], 1), y

    def prior(self, p):
        mean, tau = (
            p.sample("mean", p.dist.Normal(0.0, 2.0)),
            p.sample("tau", p.dist.HalfNormal(1.0)),
        )
        slope = p.sample("slope", p.dist.Normal(0.0, 1.0))
        scale = p.sample("scale", p.dist.HalfNormal(1.0))
        with p.plate("groups", GROUPS):
            level = p.sample("level", p.dist.Normal(mean, tau))
        return slope, scale, level

    def data(self, p, latents, x, y):
        slope, scale, level = latents
        return p.dist.Normal(level[p.integers(x[:, 1])] + slope * x[:, 0], scale)


MODELS = {m.__name__.lower(): m() for m in (Logistic, Poisson, Student, Hierarchy)}


class OfPyro:
    """What models need of Pyro."""

    dist, sample, plate = pyro.distributions, staticmethod(pyro.sample), pyro.plate
    zeros, exp = staticmethod(torch.zeros), staticmethod(torch.exp)

    @staticmethod
    def integers(x):
        return x.long()


def of_numpyro():
    """The same of NumPyro."""
    import jax.numpy as jnp
    import numpyro

    class OfNumPyro:
        dist, sample, plate = numpyro.distributions, staticmethod(numpyro.sample), numpyro.plate
        zeros, exp = staticmethod(jnp.zeros), staticmethod(jnp.exp)

        @staticmethod
        def integers(x):
            return x.astype(int)

    return OfNumPyro


def arrays_of(name):
    return MODELS[name].arrays(np.random.default_rng(0))


def by_plate(p, name, x, y, size):
    """The model whose plate takes the rows of a minibatch, or all."""
    model = MODELS[name]

    def run():
        latents = model.prior(p)
        with p.plate("rows", len(y), subsample_size=size) as rows:
            part = (x, y) if rows is None else (x[rows], y[rows])
            p.sample("y", model.data(p, latents, *part), obs=part[1])

    return run


def by_minibatch(name):
    """The model that is given a minibatch."""
    model = MODELS[name]

    def run(x, y):
        latents = model.prior(OfPyro)
        with pyro.plate("rows", model.num_rows, subsample_size=len(y)):
            pyro.sample("y", model.data(OfPyro, latents, x, y), obs=y)

    return run


def errors(name, draws):
    """The largest errors of means and standard deviations, of draws by site."""
    reference = json.loads(REFERENCES.read_text())["moments"][name]
    mean_error = sd_error = 0.0
    for site, (mean, sd) in reference.items():
        values = np.asarray(draws[site]).reshape(len(draws[site]), -1)
        mean, sd = np.array(mean), np.array(sd)
        mean_error = max(mean_error, float(np.abs((values.mean(0) - mean) / sd).max()))
        sd_error = max(sd_error, float(np.abs(values.std(0) / sd - 1).max()))
    return {"mean_error": round(mean_error, 3), "sd_error": round(sd_error, 3)}


def ours(name, contender, seed):
    x, y = map(torch.as_tensor, arrays_of(name))
    args = {}
    if contender == "data":
        model = by_minibatch(name)
        args = {"data": DataLoader(TensorDataset(x, y), batch_size=SIZE, shuffle=True)}
    else:
        model = by_plate(OfPyro, name, x, y, SIZE if contender == "plate" else None)
    began = time.perf_counter()
    guide = AutoIAF(model)
    result = fit(model, guide, seed=seed, progress=False, **args)
    seconds = time.perf_counter() - began
    found = result.diagnosis
    draws = guide.sample_posterior(NUM_DRAWS)
    return {
        "seconds": round(seconds, 1),
        "steps": result.num_steps,
        "verdict": None if found is None else found.verdict,
        "khat": None if found is None else round(found.khat, 2),
        "noise": None if result.noise is None else [float(f"{v:.2g}") for v in result.noise],
        **errors(name, draws),
    }


def by_pyro(name, seed, seconds):
    from pyro.infer import SVI, Trace_ELBO
    from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal

    pyro.set_rng_seed(seed)
    x, y = map(torch.as_tensor, arrays_of(name))
    model = by_plate(OfPyro, name, x, y, SIZE)
    guide = (AutoNormal if name == "hierarchy" else AutoMultivariateNormal)(model)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.005}), Trace_ELBO())

    def draws():
        with torch.no_grad():
            found = [guide() for _ in range(2000)]
        return {site: torch.stack([each[site] for each in found]) for site in found[0]}

    return timed(name, seconds, svi.step, draws)


def by_numpyro(name, seed, seconds):
    import jax
    from numpyro.infer import SVI, Trace_ELBO
    from numpyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
    from numpyro.optim import Adam

    jax.config.update("jax_enable_x64", True)
    x, y = map(jax.numpy.asarray, arrays_of(name))
    model = by_plate(of_numpyro(), name, x, y, SIZE)
    guide = (AutoNormal if name == "hierarchy" else AutoMultivariateNormal)(model)
    svi = SVI(model, guide, Adam(0.005), Trace_ELBO())
    state = [svi.init(jax.random.PRNGKey(seed))]
    update = jax.jit(lambda state: jax.lax.fori_loop(0, 100, lambda _, s: svi.update(s)[0], state))

    def step():
        state[0] = jax.block_until_ready(update(state[0]))

    def draws():
        params = svi.get_params(state[0])
        return guide.sample_posterior(jax.random.PRNGKey(1), params, sample_shape=(2000,))

    return timed(name, seconds, step, draws, steps=100)


def timed(name, seconds, step, draws, steps=1):
    """Errors after each half of the time, draws not counted."""
    spent, num, row = 0.0, 0, {}
    for limit, suffix in ((seconds / 2, "_half_way"), (seconds, "")):
        while spent < limit:
            began = time.perf_counter()
            step()
            spent, num = spent + time.perf_counter() - began, num + steps
        found = {
            site: value for site, value in draws().items() if site in dict.fromkeys(sites(name))
        }
        row |= {key + suffix: value for key, value in errors(name, found).items()}
    return {"seconds": round(spent, 1), "steps": num, **row}


def sites(name):
    return json.loads(REFERENCES.read_text())["moments"][name]


def run(name, contender, seed, seconds):
    if contender == "pyro":
        row = by_pyro(name, seed, seconds)
    elif contender == "numpyro":
        row = by_numpyro(name, seed, seconds)
    else:
        row = ours(name, contender, seed)
    holds = row["mean_error"] < HOLDS[0] and row["sd_error"] < HOLDS[1]
    return {"posterior": name, "contender": contender, "seed": seed, **row, "holds": holds}


def time_steps():
    """Milliseconds of a step on minibatches, as code and compiled."""
    rows = []
    for name in MODELS:
        x, y = map(torch.as_tensor, arrays_of(name))
        model, row = by_plate(OfPyro, name, x, y, SIZE), {"posterior": name}
        guide = AutoIAF(model)
        guide.setup()
        for label, how in (("eager", False), ("graph", "graph"), ("compiled", True)):
            taken = []
            for num in (200, 200, 1000, 200, 1000, 200, 1000):
                began = time.perf_counter()
                settings = {"num_steps": num, "early_stop": False, "compile": how}
                fit(model, guide, seed=0, progress=False, **settings)
                taken.append((num, time.perf_counter() - began))
            few, many = (sorted(t for n, t in taken[1:] if n == k) for k in (200, 1000))
            row[f"{label}_ms"] = round(1e3 * (many[1] - few[1]) / 800, 2)
        rows.append(row)
        print(row, flush=True)
    return rows


def draw_references():
    import jax
    from numpyro.infer import MCMC, NUTS

    jax.config.update("jax_enable_x64", True)
    moments, notes = {}, {}
    for name in MODELS:
        x, y = map(jax.numpy.asarray, arrays_of(name))
        began = time.perf_counter()
        mcmc = MCMC(
            NUTS(by_plate(of_numpyro(), name, x, y, None)),
            num_warmup=500,
            num_samples=4000,
            progress_bar=False,
        )
        mcmc.run(jax.random.PRNGKey(0))
        found = {site: np.asarray(v).reshape(4000, -1) for site, v in mcmc.get_samples().items()}
        moments[name] = {s: [v.mean(0).tolist(), v.std(0).tolist()] for s, v in found.items()}
        notes[name] = round(time.perf_counter() - began, 1)
        print(name, notes[name], flush=True)
    REFERENCES.write_text(json.dumps({"nuts seconds": notes, "moments": moments}) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=20.0, help="of Pyro's and NumPyro's fits")
    parser.add_argument("--references", action="store_true", help="draw them by NUTS")
    parser.add_argument("--one", nargs=2, metavar=("NAME", "SEED"), help="a row, in this process")
    options = parser.parse_args()
    if options.references:
        return draw_references()
    if options.one:
        name, contender = options.one[0].split(":")
        print(json.dumps(run(name, contender, int(options.one[1]), options.seconds)))
        return None
    names = [f"{name}:{contender}" for name in MODELS for contender in CONTENDERS[:2]]
    more = "--seconds", str(options.seconds)
    rows = rows_of_fresh_processes("benchmarks.minibatches", names, options.seeds, *more)
    others = [f"{name}:{contender}" for name in MODELS for contender in CONTENDERS[2:]]
    rows += rows_of_fresh_processes("benchmarks.minibatches", others, 1, *more)
    columns = dict.fromkeys(key for row in rows for key in row)
    rows = [{key: row.get(key) for key in columns} for row in rows]
    note = f"float64; minibatches of {SIZE}; errors in reference sd, and relative to it"
    save("minibatches", note, rows, steps=time_steps())
    return None


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_default_dtype(torch.float64)
    main()
