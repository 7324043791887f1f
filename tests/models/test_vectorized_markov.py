"""Chains by ``vectorized_markov`` have the densities of the same chains step by step."""

import functools

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from torch.testing import assert_close

from pyro_iaf import AutoIAF, CompiledTrace_ELBO, fit
from pyro_iaf.models.enumeration import summed_out
from pyro_iaf.models.weighted import WeightedParticles

pytest.importorskip("funsor", reason="it takes pip install funsor")
from pyro.contrib.funsor import vectorized_markov

Y = torch.tensor([-1.3, 0.4, 2.2, 0.9, -0.2, 1.1, 0.3], dtype=torch.float64)


def steps(size, at_once, history=1):
    if at_once:
        return vectorized_markov(name="time", size=size, dim=-1, history=history)
    return pyro.markov(range(size), history=history)


def two():
    return pyro.sample("p", dist.Beta(2.0, 3.0)), pyro.sample("a", dist.Normal(1.0, 1.0))


def chain(y, at_once):
    p, a = two()
    z = 0
    for t in steps(len(y), at_once):
        z = pyro.sample(f"z_{t}", dist.Bernoulli(p * (1 - 0.4 * z)))
        pyro.sample(f"y_{t}", dist.Normal(a * z, 0.8), obs=y[t])


def second_order(y, at_once):
    p, a = two()
    before = (0, 0)
    for t in steps(len(y), at_once, history=2):
        up = p * (1 - 0.4 * before[-1]) * (1 - 0.3 * before[-2])
        z = pyro.sample(f"z_{t}", dist.Bernoulli(up))
        pyro.sample(f"y_{t}", dist.Normal(a * z - before[-2], 0.8), obs=y[t])
        before = (before[-1], z)


def factorial(y, at_once):
    """Two chains, and data that depend on both, and on a latent of each step alone."""
    p, a = two()
    z = w = 0
    for t in steps(len(y), at_once):
        z = pyro.sample(f"z_{t}", dist.Bernoulli(p * (1 - 0.4 * z)))
        w = pyro.sample(f"w_{t}", dist.Bernoulli(0.2 + 0.5 * w + 0.2 * z))
        v = pyro.sample(f"v_{t}", dist.Bernoulli(0.3))
        pyro.sample(f"y_{t}", dist.Normal(a * z + w - 0.5 * v, 0.8), obs=y[t])


def impossible(y, at_once):
    """It can't go back."""
    p, a = two()
    z = 0
    for t in steps(len(y), at_once):
        z = pyro.sample(f"z_{t}", dist.Bernoulli(z + (1.0 - z) * 0.3))
        pyro.sample(f"y_{t}", dist.Normal(a * z, 0.8 + p), obs=y[t])


def shared(y, at_once):
    """A discrete latent of all steps."""
    p, a = two()
    kind = pyro.sample("kind", dist.Bernoulli(0.3))
    z = 0
    for t in steps(len(y), at_once):
        z = pyro.sample(f"z_{t}", dist.Bernoulli(p * (1 - 0.4 * z)))
        pyro.sample(f"y_{t}", dist.Normal(a * z + kind, 0.8), obs=y[t])


def of_two_steps(y, at_once):
    chain(y[:2], at_once)


def seen(y, at_once):
    """Nothing depends on the step before."""
    p, a = two()
    for t in steps(len(y), at_once):
        z = pyro.sample(f"z_{t}", dist.Bernoulli(p))
        pyro.sample(f"y_{t}", dist.Normal(a * z, 0.8), obs=y[t])


def sequences(y, at_once):
    """Plates around the chain and within its steps."""
    p, a = two()
    y = y[:, None, None] + torch.arange(2.0)[:, None] - 0.3 * torch.arange(3.0)  # time, seq., tone
    tones = pyro.plate("tones", 3, dim=-3 if at_once else -1)
    with pyro.plate("sequences", 2, dim=-2):
        z = 0
        for t in steps(len(y), at_once):
            z = pyro.sample(f"z_{t}", dist.Bernoulli(p * (1 - 0.4 * z)))
            with tones:
                rows = y[t]  # of a step or of several: tones are leftmost then
                if at_once:
                    rows = rows.movedim(-1, 0)
                    rows = rows[..., None] if rows.dim() == 2 else rows.transpose(-1, -2)
                pyro.sample(f"y_{t}", dist.Normal(a * z, 0.8), obs=rows)


MODELS = [chain, second_order, factorial, impossible, shared, of_two_steps, seen, sequences]


@pytest.mark.parametrize("model", MODELS)
def test_densities_and_gradients_are_those_of_the_chain_step_by_step(model):
    found = []
    for at_once in (True, False):
        program = functools.partial(model, at_once=at_once)
        guide = AutoIAF(program, start="init", name=f"of_{at_once}")
        guide.setup(Y)
        particles = WeightedParticles(program, guide, (Y,), {})
        assert particles.at_once
        pyro.set_rng_seed(0)
        found.append(particles.log_joint().gradient(torch.randn(5, 2)))
    assert_close(*found, rtol=1e-10, atol=1e-10)
    assert found[0][0].isfinite().all()


def test_recorded_steps_are_those_of_the_code():
    program = functools.partial(chain, at_once=True)
    settings = {"num_steps": 20, "progress": False, "seed": 0}
    found = []
    for way in (False, "graph"):
        pyro.clear_param_store()
        guide = AutoIAF(program, start="init", hidden_dims=[8], name=f"of_{way}")
        found.append(fit(program, guide, (Y,), compile=way, **settings).losses)
    assert_close(*found, rtol=1e-6, atol=1e-6)


def test_the_compiled_elbo_is_that_of_pyro():
    program = functools.partial(chain, at_once=True)
    guide = AutoIAF(program, start="init", hidden_dims=[8])
    guide.setup(Y)
    settings = {"num_particles": 3, "max_plate_nesting": 1, "vectorize_particles": True}
    plain, compiled = Trace_ELBO(**settings), CompiledTrace_ELBO(backend="graph", **settings)
    found = []
    for elbo, model in [(plain, summed_out(program, guide)), *[(compiled, program)] * 3]:
        pyro.set_rng_seed(1)
        found.append(elbo.loss_and_grads(model, guide, Y))
    assert_close(found, [found[0]] * 4, rtol=1e-9, atol=1e-9)


def test_draws_want_a_chain_step_by_step():
    guide = AutoIAF(functools.partial(chain, at_once=True), start="init")
    with pytest.raises(ValueError, match=r"'z_0'.* in vectorized_markov.*pyro.markov"):
        guide.sample_posterior(3, Y, discrete=True)


def test_a_continuous_latent_of_each_step_is_refused():
    def model(y):
        z = 0
        for t in steps(len(y), at_once=True):
            z = pyro.sample(f"z_{t}", dist.Bernoulli(0.3 + 0.4 * z))
            x = pyro.sample(f"x_{t}", dist.Normal(z, 1.0))
            pyro.sample(f"y_{t}", dist.Normal(x, 1.0), obs=y[t])

    with pytest.raises(ValueError, match=r"'x_slice\(0, 6, None\)'.*more than once"):
        AutoIAF(model)(Y)
