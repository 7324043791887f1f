"""A step of SVI by this library, Pyro and NumPyro: time, compilation time and memory.

Each contender has a process of its own. Those of one row take turns, so that noise of the machine
affects all of them.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time

MODELS = [
    "eight schools",
    "logistic 500 x 50",
    "logistic 500 x 100",
    "logistic 5000 x 200",
    "radon, 400 latents",
]
CONTENDERS = ["fit, eager", "fit, graph", "fit, compiled", "Pyro", "NumPyro"]
PARTICLES = [1, 16, 128]
ROUNDS, SECONDS = 5, 0.4

SCHOOLS = [28.0, 8, -3, 7, -1, 1, 18, 12], [15.0, 10, 16, 11, 9, 11, 10, 18]


def data_of(name):
    import numpy as np

    rng = np.random.default_rng(0)
    if name == "eight schools":
        return [np.array(values, dtype="float32") for values in SCHOOLS]
    if name.startswith("logistic"):
        rows, columns = map(int, name.removeprefix("logistic ").split(" x "))
        x = rng.normal(size=(rows, columns)).astype("float32")
        weights = rng.normal(size=columns) / columns**0.5
        return [x, (rng.random(rows) < 1 / (1 + np.exp(-x @ weights))).astype("float32")]
    county = rng.integers(197, size=900)
    floor, uranium = rng.integers(2, size=900), rng.normal(size=900)
    a, b = 1.3 + 0.3 * rng.normal(size=197), -0.7 + 0.2 * rng.normal(size=197)
    y = a[county] + b[county] * floor + 0.5 * uranium + 0.7 * rng.normal(size=900)
    return [county, *(values.astype("float32") for values in (floor, uranium, y))]


def model_of(name, sample, dist, data, zeros, expand):
    """The model, in primitives that Pyro and NumPyro share."""

    def schools():
        y, error = data
        mu = sample("mu", dist.Normal(0.0, 5.0))
        tau = sample("tau", dist.HalfCauchy(5.0))
        theta = sample("theta", expand(dist.Normal(mu, tau), 8))
        sample("y", dist.Normal(theta, error).to_event(1), obs=y)

    def logistic():
        x, y = data
        weights = sample("weights", dist.Normal(zeros(x.shape[1]), 1.0).to_event(1))
        intercept = sample("intercept", dist.Normal(0.0, 1.0))
        logits = weights @ x.T + intercept[..., None]
        sample("y", dist.Bernoulli(logits=logits).to_event(1), obs=y)

    def radon():
        county, floor, uranium, y = data
        of_uranium = sample("of_uranium", dist.Normal(0.0, 1.0))
        sigma = sample("sigma", dist.HalfNormal(1.0))
        mean, spread = (
            [sample(f"{what}_{k}", prior) for k in "ab"]
            for what, prior in (("mu", dist.Normal(0.0, 2.0)), ("tau", dist.HalfNormal(1.0)))
        )
        a, b = (
            sample(k, expand(dist.Normal(m, s), 197))
            for k, m, s in zip("ab", mean, spread, strict=True)
        )
        mu = a[..., county] + b[..., county] * floor + of_uranium[..., None] * uranium
        sample("y", dist.Normal(mu, sigma[..., None]).to_event(1), obs=y)

    kinds = {"eight": schools, "logistic": logistic, "radon,": radon}
    return kinds[name.split()[0]]


def width_of(name):
    wide = {"logistic 500 x 100": 101, "logistic 5000 x 200": 201, "radon, 400 latents": 400}
    return wide.get(name, 64)


def stepper(contender, name, particles):
    """A function that takes a number of steps and returns their seconds."""
    if contender == "NumPyro":
        return numpyro_stepper(name, particles)
    import pyro
    import pyro.distributions as dist
    import torch
    from pyro.infer import SVI, Trace_ELBO
    from pyro.infer.autoguide import AutoIAFNormal

    import pyro_iaf

    pyro.set_rng_seed(0)
    data = [torch.from_numpy(values) for values in data_of(name)]

    def expand(fn, size):
        batch = fn.batch_shape
        loc, scale = (part[..., None].expand(*batch, size) for part in (fn.loc, fn.scale))
        return dist.Normal(loc, scale).to_event(1)

    model = model_of(name, pyro.sample, dist, data, torch.zeros, expand)
    widths = 2 * [width_of(name)]
    if contender == "Pyro":
        guide = AutoIAFNormal(model, num_transforms=2, hidden_dim=widths)
        settings = {"vectorize_particles": particles > 1, "max_plate_nesting": 0}
        elbo = Trace_ELBO(particles, **settings)
        svi = SVI(model, guide, pyro.optim.Adam({"lr": 1e-3}), elbo)

        def run(num_steps):
            began = time.perf_counter()
            for _ in range(num_steps):
                svi.step()
            return time.perf_counter() - began

        return run
    # Adjusting the guide's tails after the last step is no part of a step.
    pyro_iaf.elbo.objectives.LatentLoss.adjust_tails = lambda self, batch: None
    guide = pyro_iaf.AutoIAF(model, hidden_dims=widths, start="init")
    how = {"eager": False, "graph": "graph", "compiled": True}[contender.removeprefix("fit, ")]

    def fit(num_steps):
        settings = {"num_particles": particles, "progress": False, "early_stop": False}
        result = pyro_iaf.fit(model, guide, num_steps=num_steps, compile=how, **settings)
        return result.seconds

    def run(num_steps):
        # Both fits include the work before the first step; the difference is the time of the steps.
        return max(1e-9, fit(num_steps + 20) - fit(20))

    fit(1)  # builds the guide, and the step
    return run


def numpyro_stepper(name, particles):
    import functools

    import jax
    import numpyro
    import numpyro.distributions as dist
    from jax import numpy as jnp
    from numpyro.infer import SVI, Trace_ELBO
    from numpyro.infer.autoguide import AutoIAFNormal

    data = [jnp.array(values) for values in data_of(name)]

    def expand(fn, size):
        return fn.expand([size]).to_event(1)

    model = model_of(name, numpyro.sample, dist, data, jnp.zeros, expand)
    guide = AutoIAFNormal(model, num_flows=2, hidden_dims=2 * [width_of(name)])
    svi = SVI(model, guide, numpyro.optim.Adam(1e-3), Trace_ELBO(num_particles=particles))
    state = svi.init(jax.random.PRNGKey(0))

    @functools.partial(jax.jit, static_argnums=1)
    def scan(state, num_steps):
        return jax.lax.scan(lambda state, _: svi.update(state), state, None, length=num_steps)

    compiled = set()

    def run(num_steps):
        if num_steps not in compiled:
            jax.block_until_ready(scan(state, num_steps))
            compiled.add(num_steps)
        began = time.perf_counter()
        jax.block_until_ready(scan(state, num_steps))
        return time.perf_counter() - began

    return run


def work(contender, name, particles):
    """The loop of a contender's process, which reads numbers of steps line by line."""
    began = time.perf_counter()
    if contender == "NumPyro":
        import numpyro  # noqa: F401
    else:
        import torch._inductor.compile_fx  # noqa: F401

        import pyro_iaf  # noqa: F401
    imported = time.perf_counter()
    run = stepper(contender, name, particles)
    run(2)
    first = time.perf_counter() - imported
    print(json.dumps({"first": first, "import": imported - began}), flush=True)
    for line in sys.stdin:
        taken = run(int(line))
        kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        print(json.dumps({"seconds": taken, "megabytes": kilobytes / 1024}), flush=True)


class Contender:
    """A contender's process, as its parent uses it."""

    def __init__(self, contender, name, particles, cache):
        command = [sys.executable, "-m", "benchmarks.svi_step", "--work"]
        command += [contender, name, str(particles)]
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache},
        )
        self.first = self.read()["first"]
        self.times = []
        self.megabytes = 0
        self.num_steps = 20
        seconds = self.take()
        self.num_steps = min(3000, max(20, int(20 * SECONDS / max(seconds, 2e-3))))
        self.take()
        self.times.clear()

    def take(self):
        self.process.stdin.write(f"{self.num_steps}\n")
        self.process.stdin.flush()
        found = self.read()
        self.times.append(1e6 * found["seconds"] / self.num_steps)
        self.megabytes = found["megabytes"]
        return found["seconds"]

    def read(self):
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"A contender failed: {self.process.args}")
        return json.loads(line)

    def end(self):
        self.process.stdin.close()
        self.process.wait()


def compare(name, particles, cache):
    """The rows of a model at a number of particles."""
    import statistics

    contenders = {who: Contender(who, name, particles, cache) for who in CONTENDERS}
    again = Contender("fit, compiled", name, particles, cache)
    again.end()
    for _ in range(ROUNDS):
        for contender in contenders.values():
            contender.take()
    times = {who: contender.times for who, contender in contenders.items()}
    rows = []
    for who, contender in contenders.items():
        contender.end()
        speed = [p / t for p, t in zip(times["Pyro"], times[who], strict=True)]
        beside = [t / n for t, n in zip(times[who], times["NumPyro"], strict=True)]
        eager = contenders["fit, eager"]
        row = {
            "model": name,
            "particles": particles,
            "contender": who,
            "microseconds": round(statistics.median(times[who]), 1),
            "times as fast as Pyro": round(statistics.median(speed), 2),
            "of NumPyro's time": round(statistics.median(beside), 2),
            "first steps, s": round(contender.first, 1),
            "cached, s": None,
            "pays after": None,
            "peak MB": round(contender.megabytes),
        }
        if who == "fit, compiled":
            saved = statistics.median(eager.times) - row["microseconds"]
            extra = contender.first - eager.first
            row["cached, s"] = round(again.first, 1)
            row["pays after"] = round(1e6 * extra / saved) if saved > 0 else None
        rows.append(row)
    return rows


def plot(rows):
    from matplotlib import pyplot as plt

    from .common import RESULTS

    shown = ["Pyro", "fit, eager", "fit, graph", "fit, compiled", "NumPyro"]
    models = [name for name in MODELS if any(row["model"] == name for row in rows)]
    figure, panels = plt.subplots(
        1, len(models), figsize=(3.2 * len(models), 3.4), sharey=True, squeeze=False
    )
    for panel, name in zip(panels[0], models, strict=True):
        for who in shown:
            own = [row for row in rows if row["model"] == name and row["contender"] == who]
            x = [str(row["particles"]) for row in own]
            panel.plot(x, [row["microseconds"] for row in own], "o-", label=who)
        panel.set(title=name, yscale="log", xlabel="particles")
    panels[0, 0].set_ylabel("microseconds a step")
    figure.tight_layout()
    lines, names = panels[0, 0].get_legend_handles_labels()
    figure.legend(lines, names, frameon=False, ncol=5, loc="lower center", bbox_to_anchor=(0.5, 1))
    figure.savefig(RESULTS / "svi_step.png", dpi=150, bbox_inches="tight")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--models", nargs="*", default=MODELS)
    parser.add_argument("--particles", nargs="*", type=int, default=PARTICLES)
    arguments = parser.parse_args()
    if arguments.work:
        contender, name, particles = arguments.work
        work(contender, name, int(particles))
        return
    from .common import save

    rows = []
    with tempfile.TemporaryDirectory() as cache:
        for particles in arguments.particles:
            for name in arguments.models:
                rows += compare(name, particles, cache)
                note = "a step of SVI, two flows; widths 64, 64, 101, 201 and 400"
                save("svi_step", note, rows)
    plot(rows)


if __name__ == "__main__":
    main()
