"""One way to run a model for many draws: a line for each user, and the same promises for all."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoNormal
from torch.testing import assert_close

from pyro_iaf import AutoHierarchicalIAF, AutoIAF, fit, to_arviz
from pyro_iaf.diagnostics.arviz import _groups
from pyro_iaf.models.log_joint import LogJoint
from pyro_iaf.models.particles import Particles, numbers_in
from pyro_iaf.models.traces import compute_log_prob, log_probs_of_particles, plate_nesting, samples
from pyro_iaf.models.weighted import WeightedParticles

runs = []  # how many draws each run of the model or the guide had


def model():
    mean = pyro.sample("mean", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    runs.append(mean.shape[:-1].numel())
    with pyro.plate("rows", 3):
        effect = pyro.sample("effect", dist.Normal(mean.sum(-1), 1.0))
        pyro.sample("y", dist.Normal(effect, 0.5), obs=torch.tensor([0.5, 1.0, -1.0]))


def of_one_draw():
    """Code that asks for the value of one draw."""
    mean = pyro.sample("mean", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    pyro.sample("y", dist.Normal(float(mean.sum()), 0.5), obs=torch.tensor(1.0))


def from_the_left():
    """Code that counts dimensions from the left, where draws are."""
    mean = pyro.sample("mean", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    pyro.sample("y", dist.Normal(mean[0] * mean[1], 0.5), obs=torch.tensor(1.0))


def drawn_anew():
    """A density that is another one at each run."""
    mean = pyro.sample("mean", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    pyro.factor("noise", torch.randn(()) + mean.sum(-1))


class Toy(Particles):
    """Latents from the prior, and their densities; written here alone."""

    def __init__(self, fn):
        self.fn, self.trace = fn, poutine.trace(fn).get_trace()
        super().__init__(plate_nesting(self.trace), numbers_in(self.trace))
        with poutine.block():
            self.latents = {
                name: torch.randn(7, *site["value"].shape)
                for name, site in samples(self.trace).items()
                if not site["is_observed"]
            }
        self.probe(7, self.log_probs)

    def log_probs(self, rows, at_once):
        values = {}
        for name, draws in self.latents.items():
            num_batch = len(samples(self.trace)[name]["fn"].batch_shape)
            shape = self.padded_shape(draws.shape[1:], num_batch)
            values[name] = draws[rows].reshape(len(rows), *shape) if at_once else draws[rows[0]]
        run = self.in_plate(poutine.condition(self.fn, values), len(rows) if at_once else None)
        trace = poutine.trace(run).get_trace()
        compute_log_prob(trace)
        return log_probs_of_particles(trace, len(rows), self.nesting if at_once else None)


def toy(fn):
    particles = Toy(fn)

    def found():
        parts, start = [], 0
        for size in particles.sizes(7):
            rows = list(range(start, start + size))
            parts.append(sum(particles.log_probs(rows, particles.at_once).values()))
            start += size
        return torch.cat(parts)

    return particles, found


def log_joint(fn):
    joint = LogJoint(fn, poutine.trace(fn).get_trace(), (), {})
    size = sum(site["value"].numel() for site in joint.latents.values())  # all of them real
    z = torch.randn(7, size)
    joint.check(z)
    return joint, lambda: joint(z)


def weighted_of(fn):
    guide = AutoNormal(fn)
    guide()
    return WeightedParticles(fn, guide, (), {})


def weighted(fn):
    particles = weighted_of(fn)
    noise = {n: torch.randn(7, *site["value"].shape) for n, site in particles.latents.items()}

    def found():
        parts, start = [], 0
        for size in particles.sizes(7):
            values = {name: draws[start : start + size] for name, draws in noise.items()}
            trace = particles.run_model(values, {}, size)
            compute_log_prob(trace)
            nesting = particles.nesting if particles.at_once else None
            parts.append(sum(log_probs_of_particles(trace, size, nesting).values()))
            start += size
        return torch.cat(parts)

    return particles, found


def arviz(fn):
    particles = weighted_of(fn)
    latents = {
        name: torch.randn(7, *site["value"].shape) for name, site in particles.latents.items()
    }
    return particles, lambda: _groups(particles, latents, (1, 7))[0]["log_likelihood"]["y"]


# A line for each user: a function of a model that gives the user, and what it finds at seven draws.
USERS = {"log joint": log_joint, "weighted": weighted, "to_arviz": arviz, "a toy": toy}


@pytest.fixture(params=USERS.values(), ids=USERS)
def user(request):
    return request.param


def test_a_guide_may_leave_out_dimensions_of_size_one():
    def wide():
        z = pyro.sample("z", dist.Normal(torch.zeros(1, 5), 1.0))
        pyro.sample("y", dist.Normal(z, 0.5), obs=torch.ones(1, 5))

    def narrow():
        pyro.sample("z", dist.Normal(torch.zeros(5), 0.5))

    assert WeightedParticles(wide, narrow, (), {}).at_once


def test_one_probe_finds_out_whether_draws_go_at_once(user):
    assert user(model)[0].at_once
    assert not user(of_one_draw)[0].at_once


@pytest.mark.parametrize("of", [log_joint, weighted_of])
def test_code_that_does_not_broadcast_is_mapped(of):
    particles = of(from_the_left)
    particles = particles[0] if isinstance(particles, tuple) else particles
    assert particles.at_once
    assert particles.mapped
    assert not particles.broadcasts


def test_a_guide_that_runs_the_model_itself_is_not_mapped():
    def model():
        w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        y, mask = torch.tensor([1.0, 2.0]), torch.tensor([True, False])
        with pyro.plate("rows", 2):
            pyro.sample("y", dist.Normal(w[0] * w[1], 0.5), obs=y, obs_mask=mask)

    guide = AutoIAF(model, start="init")
    guide.setup()
    assert guide.lifted
    particles = WeightedParticles(model, guide, (), {})
    assert not particles.at_once
    sites = particles.weighted(5).sites
    assert sites["y_unobserved"].shape == (5, 2)


def test_draws_that_are_mapped_and_one_by_one_agree():
    joint, found = log_joint(from_the_left)
    mapped = found()
    joint.at_once = joint.mapped = False
    assert_close(found(), mapped)


def test_arviz_of_a_mapped_model_runs_one_by_one():
    pytest.importorskip("arviz")
    guide = AutoIAF(from_the_left, start="init")
    data = to_arviz(from_the_left, guide, num_samples=5)
    mean = torch.as_tensor(data.posterior["mean"].values[0])
    expected = dist.Normal(mean.prod(-1), 0.5).log_prob(torch.tensor(1.0))
    assert_close(torch.as_tensor(data.log_likelihood["y"].values[0]), expected)


def test_a_fit_of_a_mapped_model_is_that_of_one_that_broadcasts():
    def broadcast():
        mean = pyro.sample("mean", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(mean.prod(-1), 0.5), obs=torch.tensor(1.0))

    found = []
    for program, way in [(broadcast, False), (from_the_left, False), (from_the_left, "graph")]:
        pyro.clear_param_store()
        guide = AutoIAF(program, start="init", hidden_dims=[8])
        settings = {"num_steps": 20, "compile": way, "progress": False, "seed": 0}
        found.append(fit(program, guide, **settings).losses)
    assert_close(found[1], found[0])
    assert_close(found[2], found[0])


def test_at_once_and_one_by_one_agree(user):
    particles, found = user(model)
    at_once = found()
    particles.at_once = False
    assert_close(found(), at_once)


def test_one_constant_bounds_the_numbers_of_a_run(user, monkeypatch):
    particles, found = user(model)
    whole = found()
    monkeypatch.setattr("pyro_iaf.models.particles.MAX_NUMBERS", 3 * particles.num_numbers)
    assert particles.num_at_once == 3
    assert particles.sizes(7) == [3, 3, 1]
    runs.clear()
    assert_close(found(), whole)
    assert max(runs) == 3
    particles.at_once = False
    assert particles.sizes(7) == [1] * 7


def test_hierarchical_draws_go_through_it(monkeypatch):
    guide = AutoHierarchicalIAF(model, hidden_dims=[8])
    guide.setup()
    drawn = []
    draw = guide._draw
    monkeypatch.setattr(guide, "_draw", lambda *args: drawn.append(draw(*args)) or drawn[-1])
    whole = guide.sample_posterior(7)
    assert len(drawn) == 1
    drawn.clear()
    monkeypatch.setattr("pyro_iaf.models.particles.MAX_NUMBERS", 1)
    one_by_one = guide.sample_posterior(7)
    assert len(drawn) == 7
    shapes = {name: draws.shape for name, draws in whole.items()}
    assert shapes == {name: draws.shape for name, draws in one_by_one.items()}
    assert shapes == {"mean": (7, 2), "effect": (7, 3)}


def test_a_density_that_is_another_one_at_each_run_is_told():
    trace = poutine.trace(drawn_anew).get_trace()
    joint = LogJoint(drawn_anew, trace, (), {})
    assert "changes from one run to the next" in joint.check(torch.randn(7, 2))
    assert not weighted_of(drawn_anew).at_once


def test_values_come_back_as_they_were_placed():
    particles = Particles(nesting=2, num_numbers=6)
    draws = torch.randn(5, 3, 2)  # of a site in one plate, with an event of two numbers
    placed = draws.reshape(5, *particles.padded_shape((3, 2), num_batch=1))
    assert placed.shape == (5, 1, 3, 2)
    assert torch.equal(particles.unpadded(placed, draws.shape[1:], 5), draws)
    same = torch.randn(3, 2)
    assert torch.equal(particles.unpadded(same, same.shape, 5), same.expand(5, 3, 2))
