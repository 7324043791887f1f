"""Guides that score their own draws: whoever has the methods takes the fast step of ``fit``."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from example_models import MODELS
from pyro.infer import Trace_ELBO
from torch import nn
from torch.testing import assert_close

from pyro_iaf import AutoHierarchicalIAF, AutoIAF, TraceSTL_ELBO, fit
from pyro_iaf.elbo import objectives
from pyro_iaf.elbo.objectives import LatentLoss
from pyro_iaf.flows.scored_guide import (
    ScoredDraws,
    ScoredGuide,
    context_tables_of,
    goes_through_draws,
    networks_of,
    row_gradients,
)
from pyro_iaf.models.log_joint import LogJoint
from pyro_iaf.training import run as running


def model(y=torch.tensor([0.5, -1.0, 2.0])):  # noqa: B008
    z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    pyro.sample("y", dist.Normal(z, 0.5).to_event(1), obs=y)


class Toy(nn.Module):
    """Independent normals, of which the loc is a network's output; nothing of ours."""

    def __init__(self):
        super().__init__()
        self.loc = nn.Linear(1, 3)
        self.log_scale = nn.Parameter(torch.full((3,), -0.5))

    def forward(self, *args):
        pyro.module("toy", self)
        scale = self.log_scale.exp()
        pyro.sample("z", dist.Normal(self.loc(torch.ones(1)), scale).to_event(1))

    def sample_with_score(self, num, *args):
        x = torch.randn(num, 3)
        value = self.loc(torch.ones(1)) + self.log_scale.exp() * x
        log_prob = -0.5 * (x.square() + math.log(2 * math.pi)).sum(-1) - self.log_scale.sum()
        return ScoredDraws(value, log_prob, -x / self.log_scale.exp())

    def context_tables(self):
        return []

    def networks(self):
        return [self.loc]


class Narrower(AutoIAF):
    """A subclass, which has the methods from its parent."""


# A line for each kind of guide that draws one vector.
GUIDES = {
    "AutoIAF": lambda: AutoIAF(model, hidden_dims=[8], start="init", init_scale=0.5),
    "a subclass": lambda: Narrower(model, hidden_dims=[8], start="init", init_scale=0.5),
    "with an encoder": lambda: AutoIAF(model, hidden_dims=[8], encoder=lambda *y: torch.ones(2)),
    "a toy": Toy,
}


@pytest.fixture(params=GUIDES.values(), ids=GUIDES)
def guide(request):
    guide = request.param()
    guide()  # builds it
    return guide


def log_prob(guide, value):
    if isinstance(guide, Toy):
        scale = guide.log_scale.exp()
        return dist.Normal(guide.loc(torch.ones(1)), scale).to_event(1).log_prob(value)
    return guide.get_posterior().log_prob(value)


def test_it_qualifies_by_its_methods(guide):
    assert isinstance(guide, ScoredGuide)
    assert goes_through_draws(guide)


def test_draws_are_scored(guide):
    value, density, score = guide.sample_with_score(5)
    assert value.shape == score.shape == (5, 3)
    assert value.requires_grad
    leaf = value.detach().requires_grad_()
    again = log_prob(guide, leaf)
    assert_close(density.detach(), again.detach())
    assert_close(score.detach(), torch.autograd.grad(again.sum(), leaf)[0])


def test_training_finds_its_networks_and_no_tables(guide):
    networks = networks_of(guide)
    assert networks
    own = {id(p) for p in guide.parameters()}
    assert all(id(p) in own for network in networks for p in network.parameters())
    assert context_tables_of(guide) == []


def test_fit_takes_its_fast_step(guide, monkeypatch):
    taken = []
    call = LatentLoss.__call__
    monkeypatch.setattr(LatentLoss, "__call__", lambda *args: taken.append(args[0]) or call(*args))
    result = fit(model, guide, num_steps=20, compile=False, seed=0, progress=False)
    assert len(taken) == 20
    assert result.losses.isfinite().all()


def test_losses_and_gradients_agree_with_those_of_trace_elbo(guide):
    trace = pyro.poutine.trace(model).get_trace()
    joint = getattr(guide, "log_joint", LogJoint)(model, trace, (), {})
    fast = LatentLoss(model, guide, 2000, joint)
    plain = Trace_ELBO(num_particles=2000, vectorize_particles=True, max_plate_nesting=0)
    params = [p for p in guide.parameters() if p.requires_grad]
    found = []
    for _ in range(16):
        pair = []
        for loss in (lambda: fast((), {}, 1.0), lambda: plain.loss_and_grads(model, guide)):
            guide.zero_grad()
            value = float(loss())
            flat = [(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in params]
            pair.append(torch.cat([torch.tensor([value]), *flat]))
        found.append(pair[0] - pair[1])
    differences = torch.stack(found)
    error = differences.std(0) / 16**0.5
    assert (differences.mean(0).abs() <= 6 * error + 1e-9).all()  # 6 se, of some 200 numbers


@pytest.mark.parametrize(("compile", "backend"), [(False, "eager"), ("graph", "graph")])
def test_a_toy_finds_the_posterior_compiled_and_not(compile, backend):  # noqa: A002
    toy = Toy()
    result = fit(model, toy, num_steps=600, seed=0, compile=compile, progress=False)
    assert result.backend == backend
    exact = torch.tensor([0.5, -1.0, 2.0]) * 0.8
    # The gradient has no noise at the posterior, which is a normal: what is left is Adam's.
    assert_close(toy.loc(torch.ones(1)).detach(), exact, atol=0.01, rtol=0)
    assert_close(toy.log_scale.exp().detach(), torch.full((3,), 0.2**0.5), atol=0.01, rtol=0)


def test_a_subclass_may_say_that_it_has_no_score():
    class Other(AutoIAF):
        sample_with_score = None

    assert not isinstance(Other(model), ScoredGuide)
    result = fit(model, Other(model), num_steps=5, progress=False)
    assert result.losses.isfinite().all()


def test_a_guide_that_draws_in_groups_has_tables_and_goes_through_its_draws(monkeypatch):
    hierarchical, arguments = (make() for make in MODELS["plates"])
    guide = AutoHierarchicalIAF(hierarchical, hidden_dims=[8])
    guide.setup(*arguments)
    assert not isinstance(guide, ScoredGuide)
    assert goes_through_draws(guide)
    (table,) = context_tables_of(guide)
    assert table.shape == (3, 8)
    assert len(networks_of(guide)) >= 4
    with row_gradients(guide):
        assert guide.rows_alone
    assert not guide.rows_alone
    made = []

    class Seen(TraceSTL_ELBO):
        def __init__(self, *args, **kwargs):
            made.append(self)
            super().__init__(*args, **kwargs)

    monkeypatch.setattr(running, "TraceSTL_ELBO", Seen)
    monkeypatch.setattr(objectives, "RECORDABLE", (*objectives.RECORDABLE, Seen))
    fit(hierarchical, guide, arguments, num_steps=3, progress=False)
    assert made


def test_guides_by_hand_have_the_networks_of_the_flows_in_them():
    class ByHand(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = AutoIAF(model, start="init")
            self.inner.setup()

        def guide(self):
            return self.inner()

    by_hand = ByHand()
    networks = {id(network) for network in networks_of(by_hand.guide)}
    assert networks == {id(network) for network in by_hand.inner.networks()}
    assert not isinstance(by_hand.guide, ScoredGuide)
    assert not goes_through_draws(by_hand.guide)
    assert networks_of(lambda: None) == context_tables_of(lambda: None) == []
