"""Models and checks of results that several libraries of `benchmarks.peers` share.

A library is a class in `torch_libraries` or `jax_libraries`. Each method does one job with that
library's own tools, and returns whether the result is right, or a few words. A library that has no
tools for a job has no method for it.

`flow` builds the library's inverse autoregressive flow as a few functions: `forward` and `inverse`
between noise and values, `draw`, `score` and `draw_and_score` for one vector, and `calls`, the
number of network calls since it was last called.
"""

import inspect
import math
import re

import numpy as np

# A regression in units that differ by a million.
X = np.random.default_rng(0).normal(size=(50, 3)) * np.array([1e-3, 1.0, 1e3])
Y = X @ np.array([800.0, 0.5, -2e-3]) + np.random.default_rng(1).normal(size=50)
PRIOR = np.array([1e3, 1.0, 1e-2])


def log_evidence():
    covariance = np.eye(len(Y)) + (X * PRIOR**2) @ X.T
    _, log_det = np.linalg.slogdet(2 * math.pi * covariance)
    return -0.5 * (log_det + Y @ np.linalg.solve(covariance, Y))


def solves_the_simulated(draws):
    """Five values of 2 with a standard normal prior: mean 10 / 6, deviation 0.41."""
    draws = np.asarray(draws)
    return bool(abs(draws.mean() - 10 / 6) < 0.2 and abs(draws.std() - 0.41) < 0.15)


def python_rests(lib, train):
    """Whether most steps of a run do not call the model's Python code."""
    train(5)
    lib.ran = 0
    train(100)
    return lib.ran < 30


def emptied(calls):
    count = len(calls)
    calls.clear()
    return count


class Programs:
    """Models for Pyro and NumPyro, which have the same primitives."""

    models = True
    rows = np.repeat([-3.0, 3.0], 10)

    def simple(self):
        def model():
            self.ran += 1
            z = self.ppl.sample("z", self.dist.Normal(self.np.zeros(2), 1.0).to_event(1))
            s = self.ppl.sample("s", self.dist.LogNormal(0.0, 1.0))
            self.ppl.sample("y", self.dist.Normal(z.sum(-1), s), obs=self.asarray(1.0))

        return model

    def prior(self):
        """A guide for the simple model: its prior."""
        self.ppl.sample("z", self.dist.Normal(self.np.zeros(2), 1.0).to_event(1))
        self.ppl.sample("s", self.dist.LogNormal(0.0, 1.0))

    def regression(self):
        x, y, sd = map(self.asarray, (X, Y, PRIOR))

        def model():
            w = self.ppl.sample("w", self.dist.Normal(self.np.zeros(3), sd).to_event(1))
            self.ppl.sample("y", self.dist.Normal(w @ x.T, 1.0).to_event(1), obs=y)

        return model

    def plates(self):
        return self.ppl.plate("rows", 20, subsample_size=5)

    def grouped(self):
        """Rows of two kinds, five at a time."""
        y = self.asarray(self.rows)

        def model(_=None):
            with self.plates() as rows:
                z = self.ppl.sample("z", self.dist.Normal(0.0, 2.0))
                self.ppl.sample("y", self.dist.Normal(z, 1.0), obs=y[rows])

        return model

    def shared(self):
        return self.ppl.sample("shared", self.dist.Normal(self.np.zeros(2), 1.0).to_event(1))

    def both(self):
        self.shared()
        self.grouped()()

    def tells_rows_apart(self, mean):
        """Whether the means of short fits are at least half of the exact ones, 2.4 and -2.4."""
        return mean.shape == (20,) and bool((np.asarray(mean) * self.rows > 3 * 1.2).all())

    def encoder(self):
        """Whether an automatic guide has a parameter for an encoder."""
        guides = [getattr(self.autoguide, name) for name in dir(self.autoguide) if "Auto" in name]
        words = {word for guide in guides for word in inspect.signature(guide).parameters}
        return any(re.search("encoder|embed|context|network", word) for word in words)

    def guide_with_flows(self):
        model = self.simple()
        return bool(np.isfinite(self.train(model, self.guide(model), 5)).all())

    def start(self):
        model = self.regression()
        return self.loss(model, self.guide(model)) + log_evidence()
