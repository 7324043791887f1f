"""Refined draws are from the posterior, whatever the guide; what has not converged is told."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import (
    AutoDelta,
    AutoDiagonalNormal,
    AutoIAFNormal,
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
    AutoNormal,
)
from torch.testing import assert_close

import pyro_iaf
from pyro_iaf import AutoHierarchicalIAF, AutoIAF, fit, refine, to_arviz
from pyro_iaf.diagnostics.noise import NoiseCoordinates
from pyro_iaf.diagnostics.refine import Refined
from pyro_iaf.models.weighted import WeightedParticles

QUIET = {"seed": 0, "progress": False}


def gamma():
    """A rate and a row of effects; the posterior of each is known."""
    rate = pyro.sample("rate", dist.Gamma(3.0, 2.0))
    pyro.sample("counts", dist.Poisson(rate).expand([2]).to_event(1), obs=torch.tensor([4.0, 7.0]))
    with pyro.plate("rows", 3):
        effect = pyro.sample("effect", dist.Normal(1.0, 2.0))
        pyro.sample("y", dist.Normal(effect, 1.0), obs=torch.tensor([0.0, 2.0, -1.0]))


def by_hand():
    pyro.sample("rate", dist.LogNormal(1.0, 0.4))
    with pyro.plate("rows", 3):
        pyro.sample("effect", dist.Normal(0.5, 1.2))


GUIDES = {
    "AutoIAF": lambda: AutoIAF(gamma, start="init", hidden_dims=[8]),
    "two components": lambda: AutoIAF(gamma, start="init", hidden_dims=[8], num_components=2),
    "AutoHierarchicalIAF": lambda: AutoHierarchicalIAF(gamma, hidden_dims=[8]),
    "AutoDiagonalNormal": lambda: AutoDiagonalNormal(gamma, init_scale=0.5),
    "AutoMultivariateNormal": lambda: AutoMultivariateNormal(gamma, init_scale=0.5),
    "AutoLowRank": lambda: AutoLowRankMultivariateNormal(gamma, init_scale=0.5),
    "AutoIAFNormal": lambda: AutoIAFNormal(gamma),
    "AutoNormal": lambda: AutoNormal(gamma, init_scale=0.5),
    "by hand": lambda: by_hand,
}


@pytest.mark.parametrize("make", GUIDES.values(), ids=GUIDES)
def test_draws_are_from_the_posterior(make):
    guide = make()
    fit(gamma, guide, num_steps=150, **QUIET)
    refined = refine(gamma, guide, **QUIET)
    assert refined.converged, str(refined)
    draws = {name: value.flatten(0, 1).double() for name, value in refined.chains.items()}
    known = dist.Gamma(14.0, 4.0)
    error = 4 / math.sqrt(min(refined.ess.values()))  # in standard deviations
    assert abs(draws["rate"].mean() - known.mean) < error * known.stddev
    assert draws["rate"].std() / known.stddev == pytest.approx(1.0, abs=error)
    mean = torch.tensor([0.2, 1.8, -0.6]).double()
    assert ((draws["effect"].mean(0) - mean).abs() < error * math.sqrt(0.8)).all()
    assert_close(
        draws["effect"].std(0) / math.sqrt(0.8), torch.ones(3).double(), atol=error, rtol=0
    )


@pytest.mark.parametrize("make", GUIDES.values(), ids=GUIDES)
def test_the_density_of_noise_is_that_by_which_draws_are_weighted(make):
    guide = make()
    particles = WeightedParticles(gamma, guide, (), {})
    target = NoiseCoordinates(particles)
    found = target.at(*target.draw(5))
    joint = particles.log_joint()
    of_model = joint(found.found.latent)
    pieces = torch.autograd.functional.jacobian(
        lambda x: target.latents(x, found.component)[0].sum(0), found.noise
    ).movedim(1, 0)
    log_det = pieces.det().abs().log()
    assert_close(target.latents(found.noise, found.component)[1], log_det, rtol=1e-4, atol=1e-4)
    share = target.log_share(found.found.latent, found.component)
    normal = dist.Normal(0.0, 1.0).log_prob(found.noise).sum(-1)
    of_guide = normal - log_det - share
    if target.mixture is not None:
        of_guide = target.mixture.log_prob(found.found.latent)
    assert_close(found.log_weight, of_model - of_guide, rtol=1e-4, atol=1e-3)


def test_recorded_gradients_are_those_of_the_code():
    guide = AutoIAF(gamma, start="init", hidden_dims=[8], num_components=2)
    target = NoiseCoordinates(WeightedParticles(gamma, guide, (), {}))
    x, component = torch.randn(6, 4), torch.tensor([0, 1, 1, 0, 1, 0])
    by_code = target.evaluate(x, component)
    target.record(x, component)
    target.compile(10)
    assert target.backend == "graph"
    assert_close(target.evaluate(x, component), by_code, rtol=1e-4, atol=1e-4)


def funnel():
    v = pyro.sample("v", dist.Normal(0.0, 3.0))
    pyro.sample("x", dist.Normal(torch.zeros(9), (v / 2).exp().unsqueeze(-1)).to_event(1))


def test_a_funnel_that_the_guide_does_not_hold():
    guide = AutoIAF(funnel)
    fit(funnel, guide, num_steps=600, **QUIET)
    refined = refine(funnel, guide, **QUIET)
    v = refined.chains["v"].flatten()
    error = 4 / math.sqrt(refined.ess["v"])
    assert abs(v.mean() / 3) < 0.05 + error
    assert v.std() / 3 == pytest.approx(1.0, abs=0.05 + error)


def two_modes():
    x = pyro.sample("x", dist.Normal(0.0, 10.0))
    parts = [dist.Normal(loc, 0.5).log_prob(x) + math.log(w) for loc, w in ((4, 0.7), (-4, 0.3))]
    pyro.factor("modes", torch.logaddexp(*parts) - dist.Normal(0.0, 10.0).log_prob(x))


def test_shares_of_modes_are_right_whatever_the_weights_of_the_guide():
    guide = AutoIAF(two_modes)
    fit(two_modes, guide, **QUIET)
    with torch.no_grad():
        guide.mixture.logits.zero_()
    refined = refine(two_modes, guide, **QUIET)
    assert refined.converged
    assert (refined.chains["x"] > 0).double().mean() == pytest.approx(0.7, abs=0.03)


def test_chains_that_miss_a_mode_have_not_converged():
    guide = AutoIAF(two_modes, num_components=1)
    fit(two_modes, guide, num_steps=100, **QUIET)
    refined = refine(two_modes, guide, **QUIET)
    assert max(refined.rhat.values()) < 1.01  # which alone tells nothing
    assert not refined.converged
    assert refined.stopped == "the chains miss modes"
    assert "mass is in modes that the chains did not reach" in str(refined)


def test_it_is_the_same_under_a_seed_and_leaves_the_setting_of_threads():
    before = torch.get_num_threads()
    guide = AutoIAF(gamma, hidden_dims=[8])
    first, second = (refine(gamma, guide, num_samples=50, **QUIET) for _ in range(2))
    assert_close(first.samples, second.samples, rtol=0, atol=0)
    assert first.samples["effect"].shape == (50, 3)
    assert torch.get_num_threads() == before


def test_samples_come_from_all_chains():
    refined = refine(gamma, AutoIAF(gamma, hidden_dims=[8]), num_samples=201, **QUIET)
    found = refined.samples["rate"].unsqueeze(-1) == refined.chains["rate"].flatten()
    chains = found.nonzero()[:, 1] // refined.chains["rate"].shape[1]
    assert len(chains.unique()) > 50


def test_where_the_gradient_is_not_finite_the_density_counts():
    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        loc = torch.where(z > 0, z.sqrt(), torch.zeros_like(z))  # its slope is NaN below zero
        pyro.sample("y", dist.Normal(loc, 1.0), obs=torch.tensor(0.0))

    refined = refine(model, AutoIAF(model, start="init", init_scale=1.0), **QUIET)
    z = refined.chains["z"].flatten()
    grid = torch.linspace(-6, 6, 4001)
    weight = dist.Normal(0.0, 1.0).log_prob(grid).exp() * (-grid.clamp(min=0) / 2).exp()
    mean = (weight * grid).sum() / weight.sum()
    assert z.mean() == pytest.approx(mean.item(), abs=4 / math.sqrt(refined.ess["z"]))


def test_a_point_of_a_guide_by_hand_states_how_it_is_made():
    def model():
        pyro.sample("z", dist.Normal(0.0, 1.0))

    def guide():
        a = pyro.sample("a", dist.Normal(0.0, 1.0), infer={"is_auxiliary": True})
        pyro.sample("z", dist.Delta(a.sinh(), log_density=-a.cosh().log()))

    z = refine(model, guide, **QUIET).chains["z"]
    assert z.std() == pytest.approx(1.0, abs=0.05)


def test_masked_entries_are_drawn_from_their_prior_for_any_guide():
    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", 2):
            y, mask = torch.tensor([1.0, 0.0]), torch.tensor([True, False])
            pyro.sample("y", dist.Normal(z, 0.7), obs=y, obs_mask=mask)

    refined = refine(model, AutoNormal(model), **QUIET)
    assert refined.converged
    assert refined.chains["y_unobserved"].abs().max() < 10


def test_sites_without_numbers_and_of_many_events_are_taken():
    def model():
        pyro.sample("none", dist.Normal(torch.zeros(0), 1.0).to_event(1))
        pyro.sample("z", dist.LogNormal(torch.zeros(2), 1.0).to_event(1))

    def guide():
        pyro.sample("none", dist.Normal(torch.zeros(0), 1.0).to_event(1))
        pyro.sample("z", dist.LogNormal(torch.ones(2), 0.8).to_event(1))

    refined = refine(model, guide, **QUIET)
    assert refined.rhat.keys() == {"z"}
    assert refined.samples["none"].shape == (1000, 0)
    assert refined.chains["z"].log().std() == pytest.approx(1.0, abs=0.05)


def test_more_draws_come_from_longer_chains():
    refined = refine(gamma, AutoIAF(gamma, hidden_dims=[8]), num_samples=10_000, **QUIET)
    assert refined.samples["rate"].shape == (10_000,)
    assert refined.chains["rate"].shape[1] >= 157


def test_arviz_has_the_chains():
    arviz = pytest.importorskip("arviz", reason="it takes pip install '.[arviz]'")
    refined = refine(gamma, AutoIAF(gamma, hidden_dims=[8]), **QUIET)
    data = to_arviz(gamma, refined)
    assert data.posterior["effect"].dims == ("chain", "draw", "rows")
    assert_close(torch.as_tensor(data.posterior["rate"].values), refined.chains["rate"])
    found = arviz.rhat(data.posterior)
    for name, known in refined.rhat.items():
        assert float(found[name].max()) == pytest.approx(known, rel=1e-6)


def test_discrete_latents_are_summed_out_and_drawn_for_arviz():
    pytest.importorskip("arviz", reason="it takes pip install '.[arviz]'")

    def model(y):
        share = pyro.sample("share", dist.Beta(2.0, 2.0))
        with pyro.plate("rows", len(y)):
            z = pyro.sample("z", dist.Bernoulli(share))
            pyro.sample("y", dist.Normal(2 * z, 1.0), obs=y)

    y = torch.tensor([0.1, 2.2, 1.9, -0.4])
    guide = AutoIAF(model, hidden_dims=[8])
    refined = refine(model, guide, (y,), **QUIET)
    assert refined.samples.keys() == {"share"}
    assert to_arviz(model, refined, (y,)).posterior["z"].shape == (
        *refined.chains["share"].shape,
        4,
    )


@pytest.mark.parametrize("most", [1, 20])
def test_an_interrupted_run_returns_what_there_is(monkeypatch, most):
    steps = []

    def step(self, adapt):
        steps.append(adapt)
        if steps.count(False) > most:
            raise KeyboardInterrupt
        return original(self, adapt)

    original = pyro_iaf.diagnostics.chains.Chains.step
    monkeypatch.setattr(pyro_iaf.diagnostics.chains.Chains, "step", step)
    refined = refine(gamma, AutoIAF(gamma, hidden_dims=[8]), num_samples=100, **QUIET)
    assert refined.chains["rate"].shape[1] == most
    assert not refined.converged
    assert refined.stopped == "it was interrupted"
    assert refined.samples["rate"].shape == (min(100, 64 * most),)


def test_densities_that_are_not_finite_are_counted():
    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.factor("cut", torch.where(z > 1.0, torch.nan, 0.0))

    refined = refine(model, AutoIAF(model, start="init", init_scale=1.0), **QUIET)
    assert refined.num_lost > 0
    assert "proposals without a finite density were rejected" in str(refined)
    assert refined.chains["z"].max() <= 1.0


def test_what_has_not_converged_says_so():
    refined = Refined(
        {}, {"a": 1.2, "b": math.nan}, {"a": 90.0, "b": 500.0}, False, "it was interrupted", 2.0, {}
    )
    lines = str(refined).splitlines()
    assert lines[0].startswith("Not converged: R-hat at most nan ('b'), effective sample size at ")
    assert lines[1:] == ["  stopped as it was interrupted"]
    chains = {"a": torch.zeros(2, 100), "b": torch.zeros(2, 100)}
    refined = Refined({}, {"a": 1.2, "b": 1.1}, {"a": 9.0, "b": 5.0}, False, "all", 2.0, chains)
    assert "train it longer, as by fit(model, guide), and refine again" in str(refined)


# Refusals


def test_a_point_and_a_subsampled_model_are_refused():
    with pytest.raises(ValueError, match="this one is a point"):
        refine(gamma, AutoDelta(gamma), progress=False)

    def rows():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", 10, subsample_size=2):
            pyro.sample("y", dist.Normal(z, 1.0), obs=torch.zeros(2))

    with pytest.raises(ValueError, match="this model subsamples"):
        refine(rows, AutoIAF(rows), progress=False)


def test_a_guide_that_is_not_made_of_normal_noise_is_refused():
    def model():
        pyro.sample("z", dist.Gamma(2.0, 1.0))

    def guide():
        pyro.sample("z", dist.Gamma(3.0, 1.5))

    with pytest.raises(ValueError, match=r"made of normal noise.*draws from Gamma"):
        refine(model, guide, progress=False)


def test_a_guide_that_takes_one_draw_at_a_time_is_refused():
    def guide():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        assert float(z) < 100

    def model():
        pyro.sample("z", dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match="takes one draw at a time"):
        refine(model, guide, progress=False)


def test_a_model_that_takes_one_draw_at_a_time_is_refined_all_the_same(monkeypatch):
    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        assert float(z.detach()) < 100

    monkeypatch.setattr("pyro_iaf.diagnostics.refine.NUM_CHAINS", 4)
    monkeypatch.setattr("pyro_iaf.diagnostics.refine.NUM_DRAWS", 20)
    monkeypatch.setattr("pyro_iaf.diagnostics.refine.MOST", 20)
    monkeypatch.setattr("pyro_iaf.diagnostics.refine.FEWEST", 20)
    refined = refine(model, AutoIAF(model, hidden_dims=[8]), num_samples=20, **QUIET)
    assert refined.backend == "eager"
    assert refined.samples["z"].shape == (20,)
    assert refined.stopped == "20 steps of each chain were taken"


def test_a_model_without_a_density_anywhere_is_refused():
    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.factor("nowhere", z * torch.tensor(math.nan))

    with pytest.raises(RuntimeError, match="no finite density at any of 2000 draws"):
        refine(model, AutoIAF(model, start="init"), progress=False)
