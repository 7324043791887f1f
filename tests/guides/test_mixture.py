"""Guides with several components: draws, densities, gradients, state."""

import copy
import io
import math
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import (
    SVI,
    Predictive,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
)
from pyro.infer.reparam import NeuTraReparam
from torch.testing import assert_close

from pyro_iaf import AutoIAF, CompiledTrace_ELBO, TraceSTL_ELBO, diagnose, fit, to_arviz
from pyro_iaf.elbo.objectives import LatentLoss
from pyro_iaf.flows.mixture import MixedPosterior
from pyro_iaf.guides import auto_iaf
from pyro_iaf.models.weighted import WeightedParticles

PEAKS = torch.tensor([[-3.0, 0.0], [3.0, 1.0]], dtype=torch.float64)


def two_modes():
    """A mixture of two normals, of which one holds 30 % of the mass."""
    prior = dist.Normal(torch.zeros(2, dtype=torch.float64), 5.0).to_event(1)
    x = pyro.sample("x", prior)
    parts = dist.Normal(PEAKS, 0.5).to_event(1).log_prob(x.unsqueeze(-2))
    pyro.factor("target", (torch.tensor([0.3, 0.7]).log() + parts).logsumexp(-1))
    pyro.factor("flat", -prior.log_prob(x))


def mixed(x):
    """The log density of :func:`two_modes`."""
    parts = dist.Normal(PEAKS, 0.5).to_event(1).log_prob(x.unsqueeze(-2))
    return (torch.tensor([0.3, 0.7], dtype=torch.float64).log() + parts).logsumexp(-1)


def hard():
    """A positive latent, a plate and a simplex."""
    scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
    with pyro.plate("rows", 3):
        pyro.sample("w", dist.Normal(0.0, scale))
    pyro.sample("p", dist.Dirichlet(torch.ones(3)))


def shaken(guide, *args, by=0.3):
    """A guide whose parameters are not those of its start."""
    guide.setup(*args)
    with torch.no_grad():
        for param in guide.parameters():
            param.add_(by * torch.randn_like(param))
    return guide


@pytest.fixture
def guide():
    torch.manual_seed(0)
    return shaken(AutoIAF(two_modes, num_components=3, hidden_dims=8))


# Starts


def test_components_start_in_the_modes_with_half_the_weight_each():
    torch.manual_seed(0)
    guide = AutoIAF(two_modes, num_components=2)
    guide.setup()
    assert_close(guide.component_weights, torch.full((2,), 0.5, dtype=torch.float64))
    places = torch.stack([t.origin.detach() for t in (guide.transform, *guide.mixture.others)])
    assert_close(places[places[:, 0].argsort()], PEAKS, atol=0.1, rtol=0.0)


def test_components_beyond_the_modes_start_apart():
    def model():
        pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))

    guide = AutoIAF(model, num_components=3)
    guide.setup()
    places = torch.stack([t.origin for t in (guide.transform, *guide.mixture.others)])
    assert (torch.pdist(places) > 0.01).all()
    assert places.abs().max() < 5


def test_one_component_is_as_before():
    guide = AutoIAF(two_modes, num_components=1)
    guide.setup()
    assert guide.component_weights.tolist() == [1.0]
    assert not any(name.startswith("mixture") for name in guide.state_dict())


@pytest.mark.parametrize("number", [0, -1, 1.5, "many", True])
def test_other_numbers_are_refused(number):
    with pytest.raises(ValueError, match="num_components"):
        AutoIAF(two_modes, num_components=number)


def test_an_encoder_has_one_component():
    with pytest.raises(ValueError, match=r"one component.*got num_components=2"):
        AutoIAF(two_modes, num_components=2, encoder=lambda: torch.zeros(2))
    assert AutoIAF(two_modes, num_components="auto", encoder=lambda: torch.zeros(2))


# Densities


def test_the_density_adds_up_to_one_and_is_that_of_the_draws():
    torch.manual_seed(0)
    guide = AutoIAF(two_modes, num_components=2, hidden_dims=8)
    guide.setup()
    with torch.no_grad():
        guide.mixture.logits.copy_(torch.tensor([0.2, -0.9]))
        posterior = guide.get_posterior()
        ends = torch.linspace(-8, 8, 401, dtype=torch.float64)
        grid = torch.cartesian_prod(ends, ends)
        mass = posterior.log_prob(grid).exp() * (ends[1] - ends[0]) ** 2
        draws = posterior.sample((20_000,))
    assert_close(mass.sum().item(), 1.0, atol=1e-3, rtol=0.0)
    on_the_left = mass[grid[:, 0] < 0].sum()
    assert abs((draws[:, 0] < 0).double().mean() - on_the_left) < 0.02


def test_the_sites_of_a_run_have_the_density_of_the_mixture_together(guide):
    trace = poutine.trace(guide).get_trace()
    z = trace.nodes["_AutoIAF_latent"]["value"]
    parts = torch.stack([part.log_prob(z) for part in guide.get_posterior().components], -1)
    expected = (parts + guide.component_weights.log()).logsumexp(-1)
    assert_close(trace.log_prob_sum(), expected)


def test_draws_come_with_their_density_score_and_weight(guide):
    draws = guide.sample_with_score(15)
    leaf = draws.value.detach().requires_grad_()
    log_prob = guide.get_posterior().log_prob(leaf)
    (score,) = torch.autograd.grad(log_prob.sum(), leaf)
    assert_close(draws.log_prob, log_prob.detach())
    assert_close(draws.score, score)
    assert draws.value.shape == (15, 2)
    assert_close(draws.weights.reshape(3, 5).sum(1).detach(), guide.component_weights)
    assert len(guide.sample_with_score(1).value) == 12  # four of each


# Gradients


def exact_gradients(guide):
    """Those of the ELBO of :func:`two_modes`, by a sum over a grid."""
    ends = torch.linspace(-9, 9, 121, dtype=torch.float64)
    grid = torch.cartesian_prod(ends, ends)
    log_q = guide.get_posterior().log_prob(grid)
    terms = log_q.exp() * (mixed(grid) - log_q)
    loss = -terms.sum() * (ends[1] - ends[0]) ** 2
    return torch.autograd.grad(loss, list(guide.parameters()))


def by_elbo(elbo):
    return lambda guide: elbo.loss_and_grads(two_modes, guide)


def by_fit(guide):
    joint = WeightedParticles(two_modes, guide, (), {}).log_joint()
    loss = LatentLoss(two_modes, guide, 300, joint)
    return lambda guide: loss((), {}, 1.0)


@pytest.mark.parametrize(
    "make",
    [
        lambda guide: by_elbo(Trace_ELBO(300, vectorize_particles=True, max_plate_nesting=0)),
        lambda guide: by_elbo(TraceGraph_ELBO(300, vectorize_particles=True, max_plate_nesting=0)),
        lambda guide: by_elbo(TraceSTL_ELBO(300, vectorize_particles=True, max_plate_nesting=0)),
        lambda guide: by_elbo(TraceEnum_ELBO(300, vectorize_particles=True, max_plate_nesting=0)),
        by_fit,
    ],
    ids=["Trace_ELBO", "TraceGraph_ELBO", "TraceSTL_ELBO", "TraceEnum_ELBO", "fit"],
)
@pytest.mark.filterwarnings("ignore:.*keeps the ordinary gradient")
@pytest.mark.filterwarnings("ignore:TraceEnum_ELBO found no sample sites")
def test_gradients_are_unbiased_for_every_parameter(make):
    torch.manual_seed(0)
    guide = shaken(AutoIAF(two_modes, num_components=2, hidden_dims=4, num_flows=1), by=0.1)
    with torch.no_grad():
        guide.mixture.logits.copy_(torch.tensor([0.5, -0.5]))
    exact, step, found = exact_gradients(guide), make(guide), []
    for _ in range(60):
        guide.zero_grad()
        step(guide)
        found.append(torch.cat([p.grad.flatten() for p in guide.parameters()]))
    found = torch.stack(found)
    error = found.std(0) / math.sqrt(len(found))
    away = (found.mean(0) - torch.cat([g.flatten() for g in exact])).abs()
    assert (away < 5 * error + 1e-3).all()
    assert error.max() < 0.5  # or the comparison says nothing


@pytest.mark.parametrize(
    "make",
    [Trace_ELBO, TraceSTL_ELBO, TraceGraph_ELBO, CompiledTrace_ELBO],
    ids=lambda m: m.__name__,
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_svi_trains_all_of_it_and_keeps_the_number(make):
    torch.manual_seed(0)
    guide = AutoIAF(hard, num_components=2, hidden_dims=8)
    guide.setup()
    before = {name: value.clone() for name, value in guide.named_parameters()}
    svi = SVI(hard, guide, pyro.optim.Adam({"lr": 0.01}), make())
    losses = [svi.step() for _ in range(5)]
    assert all(map(math.isfinite, losses))
    assert len(guide.component_weights) == 2
    changed = {n.split(".parts")[0] for n, v in guide.named_parameters() if not v.equal(before[n])}
    assert changed == {"transform", "mixture.others.0", "mixture.logits"}


# What a guide offers


def test_sites_have_their_shapes_alone_and_in_a_plate():
    guide = shaken(AutoIAF(hard, num_components=2, hidden_dims=8))
    assert {n: v.shape for n, v in guide().items()} == {"scale": (), "w": (3,), "p": (3,)}
    for vectorised in (True, False):
        elbo = Trace_ELBO(10, vectorize_particles=vectorised, max_plate_nesting=1)
        assert math.isfinite(elbo.loss(hard, guide))
    draws = guide.sample_posterior(7)
    assert {n: v.shape for n, v in draws.items()} == {"scale": (7,), "w": (7, 3), "p": (7, 3)}
    assert (draws["scale"] > 0).all()
    assert_close(draws["p"].sum(-1), torch.ones(7))
    predicted = Predictive(hard, guide=guide, num_samples=6)()
    assert predicted["w"].shape == (6, 3)


def test_medians_and_quantiles_are_those_of_the_draws(guide):
    torch.manual_seed(1)
    draws = guide.sample_posterior(40_000)["x"]
    levels = [0.1, 0.5, 0.8]
    found = guide.quantiles(levels)["x"]
    ranks = (draws.unsqueeze(0) < found.unsqueeze(1)).double().mean(1)
    assert_close(ranks, torch.tensor(levels).double().unsqueeze(-1).expand(3, 2), atol=0.02, rtol=0)
    assert_close(guide.median()["x"], found[1])
    assert_close(guide.median()["x"], guide.median()["x"], rtol=0, atol=0)


def test_resampled_draws_have_the_shares_of_the_posterior():
    torch.manual_seed(0)
    guide = AutoIAF(two_modes, num_components=2)
    draws = guide.sample_posterior(4000, resample=True)["x"]
    assert abs((draws[:, 0] < 0).double().mean() - 0.3) < 0.03


def test_it_is_diagnosed_and_handed_on():
    torch.manual_seed(0)
    guide = AutoIAF(two_modes, num_components=2)
    guide.setup()
    joint = WeightedParticles(two_modes, guide, (), {}).log_joint()
    guide.fit_weights(joint)
    assert_close(
        guide.component_weights.sort().values, torch.tensor([0.3, 0.7]).double(), atol=0.02, rtol=0
    )
    found = diagnose(two_modes, guide)
    assert found.verdict == "good"
    assert abs(found.iw_elbo) < 0.02  # the target is normalised
    pytest.importorskip("arviz")
    data = to_arviz(two_modes, guide, num_samples=50)
    assert data.posterior["x"].shape[-1] == 2


def test_no_transform_carries_the_noise_of_several(guide):
    with pytest.raises(ValueError, match=r"3 components.*num_components=1"):
        guide.get_transform()
    with pytest.raises(ValueError, match="NeuTraReparam"):
        NeuTraReparam(guide).reparam(two_modes)()


def test_words_name_the_components(guide):
    assert "num_components=3" in repr(guide)
    assert "num_components" not in repr(AutoIAF(two_modes))


# State


def same(a, b):
    b.setup()
    torch.manual_seed(5)
    first = a.sample_posterior(5)
    torch.manual_seed(5)
    return all(torch.equal(first[n], v) for n, v in b.sample_posterior(5).items())


def test_a_state_tells_the_number_of_components(guide):
    fresh = AutoIAF(two_modes, hidden_dims=8)
    fresh.load_state_dict(guide.state_dict(), strict=True)
    assert len(fresh.component_weights) == 3
    assert same(guide, fresh)
    built = AutoIAF(two_modes, hidden_dims=8)
    built.setup()
    built.load_state_dict(guide.state_dict(), strict=True)
    assert same(guide, built)


def test_a_state_of_one_component_brings_a_guide_back_to_one(guide):
    one = AutoIAF(two_modes, hidden_dims=8)
    one.setup()
    grown = AutoIAF(two_modes, hidden_dims=8)
    grown.load_state_dict(guide.state_dict())
    grown.load_state_dict(one.state_dict())
    assert len(grown.component_weights) == 1
    assert same(one, grown)


@pytest.mark.parametrize("built", [True, False])
def test_a_fixed_number_takes_no_other(guide, built):
    fixed = AutoIAF(two_modes, hidden_dims=8, num_components=2)
    if built:
        fixed.setup()
    with pytest.raises(
        RuntimeError, match="guide with 3 components; this one has num_components=2"
    ):
        fixed.load_state_dict(guide.state_dict())


def test_copies_are_the_same_and_apart(guide):
    twin, thawed = copy.deepcopy(guide), pickle.loads(pickle.dumps(guide))
    assert same(guide, twin)
    assert same(guide, thawed)
    with torch.no_grad():
        twin.mixture.logits.zero_()
    assert not torch.equal(twin.component_weights, guide.component_weights)


def test_the_store_brings_the_number(guide):
    file = io.BytesIO()
    guide()
    names = list(pyro.get_param_store().keys())
    assert "AutoIAF.mixture$$$logits" in names
    torch.save(pyro.get_param_store().get_state(), file)
    pyro.clear_param_store()
    file.seek(0)
    pyro.get_param_store().set_state(torch.load(file, weights_only=False))
    fresh = AutoIAF(two_modes, hidden_dims=8)
    fresh()
    assert same(guide, fresh)


def stored(guide):
    """A parameter store as it would come from a file."""
    guide()
    state = copy.deepcopy(pyro.get_param_store().get_state())
    pyro.clear_param_store()
    return state


@pytest.mark.parametrize("settings", [{"num_components": 1}, {}])
def test_a_store_with_other_components_is_refused(guide, settings):
    state = stored(guide)
    other = AutoIAF(two_modes, hidden_dims=8, **settings)
    if not settings:
        other.setup()
    pyro.get_param_store().set_state(state)
    with pytest.raises(ValueError, match="with 3 components; this one has 1"):
        other()


def test_a_state_of_one_component_empties_the_store_of_the_others(guide):
    one = AutoIAF(two_modes, hidden_dims=8, name="one")
    one.setup()
    grown = AutoIAF(two_modes, hidden_dims=8)
    grown.load_state_dict(guide.state_dict())
    grown()
    grown.load_state_dict(one.state_dict())
    grown()
    assert not any("mixture" in name for name in pyro.get_param_store())


def test_a_state_without_transforms_leaves_the_components(guide):
    guide.load_state_dict({}, strict=False)
    assert len(guide.component_weights) == 3


def test_a_guide_without_densities_asks_for_none(guide, monkeypatch):
    def refuse(*_):
        raise AssertionError

    monkeypatch.setattr(MixedPosterior, "log_prob", refuse)
    assert guide()["x"].shape == (2,)


def test_a_draw_that_has_no_density_counts_for_nothing():
    torch.manual_seed(0)
    guide = AutoIAF(two_modes, num_components=2, hidden_dims=8)
    guide.setup()
    posterior = guide.get_posterior()
    far = torch.tensor([[1e200, -1e200]], dtype=torch.float64)
    assert not posterior.log_prob(torch.cat([far, PEAKS])).isnan().any()


def test_no_component_gets_all_or_nothing():
    guide = AutoIAF(two_modes, num_components=2, hidden_dims=8)
    guide.setup()
    for share in (0.0, 1.0, 1.5):
        guide.mixture.append(copy.deepcopy(guide.transform), share)
    assert guide.component_weights.isfinite().all()
    assert (guide.component_weights > 0).all()


def test_one_component_takes_no_further_starts(monkeypatch):
    torch.manual_seed(0)
    AutoIAF(two_modes).setup()
    state = torch.get_rng_state()
    monkeypatch.setattr(auto_iaf, "further_starts", lambda *_: [])
    torch.manual_seed(0)
    AutoIAF(two_modes).setup()
    assert torch.equal(state, torch.get_rng_state())


def test_a_new_guide_leaves_no_components_of_another_in_the_store():
    AutoIAF(two_modes, num_components=2, hidden_dims=8)()
    AutoIAF(two_modes, hidden_dims=8)()
    assert not any("mixture" in name for name in pyro.get_param_store())


def test_conversions_count_before_and_after_the_setup():
    for early in (True, False):
        guide = AutoIAF(hard, num_components=2, hidden_dims=8)
        if early:
            guide.double()
        guide.setup()
        guide.double()
        assert {p.dtype for p in guide.parameters()} == {torch.float64}
        assert guide.component_weights.dtype == torch.float64


def test_fit_trains_a_fixed_number_for_so_many_steps():
    guide = AutoIAF(two_modes, num_components=2)
    result = fit(two_modes, guide, num_steps=60, seed=0, progress=False)
    assert result.num_steps == 60
    assert_close(
        guide.component_weights.sort().values, torch.tensor([0.3, 0.7]).double(), atol=0.03, rtol=0
    )
