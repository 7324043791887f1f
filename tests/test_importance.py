import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from example_models import MODELS, make, one_latent, seeded
from pyro import poutine
from pyro.infer.autoguide import AutoNormal
from pyro.infer.importance import psis_diagnostic, vectorized_importance_weights
from pyro.poutine.util import site_is_subsample
from torch.testing import assert_close

from pyro_iaf.importance import pareto_k, resampled, smoothed
from pyro_iaf.models.traces import quietly
from pyro_iaf.models.weighted import WeightedParticles

EVIDENCE = dist.Normal(0.0, math.sqrt(1.25)).log_prob(torch.tensor(1.0)).item()


def by_ours(name):
    return make(name, hidden_dims=[16], start="init")


def by_pyros(name):
    model, arguments = (make() for make in MODELS[name])
    return AutoNormal(model, init_scale=0.3), model, arguments


GUIDES = {"AutoIAF": by_ours, "AutoNormal": by_pyros}
# Pyro's guides can't start on improper priors.
PYROS = [name for name in MODELS if "improper" not in name and name != "ordered"]
CASES = {
    f"{name}, {kind}": (GUIDES[kind], name)
    for kind in GUIDES
    for name in (MODELS if kind == "AutoIAF" else PYROS)
}


@pytest.fixture(params=CASES.values(), ids=CASES)
def case(request):
    make_case, name = request.param
    guide, model, arguments = make_case(name)
    return WeightedParticles(model, guide, arguments, {})


# Properties of every model and guide


def test_weights_at_once_are_pyros(case):
    assert case.at_once
    case.subsampled = False  # each draw has a subsample of its own otherwise
    found = seeded(case.weighted, 50)
    with quietly():
        settings = {"num_samples": 50, "max_plate_nesting": case.nesting}
        arguments = (case.model, case.guide, *case.args)
        expected, _, guide = seeded(lambda: vectorized_importance_weights(*arguments, **settings))
    assert_close(found.log_weights.to(expected), expected)
    for name, draws in found.sites.items():
        assert torch.equal(draws.flatten(), guide.nodes[name]["value"].flatten())


def test_weights_one_by_one_are_those_of_single_traces(case):
    case.at_once = False
    found = seeded(case.weighted, 4)
    pyro.set_rng_seed(1)
    for k in range(4):
        guide = poutine.trace(case.guide).get_trace(*case.args)
        model = poutine.trace(poutine.replay(case.model, guide)).get_trace(*case.args)
        for trace in (guide, model):
            trace.compute_log_prob(lambda _, site: not site_is_subsample(site))
        log_p, log_q = (
            sum(s["log_prob_sum"] for s in trace.nodes.values() if "log_prob_sum" in s)
            for trace in (model, guide)
        )
        assert_close(found.log_weights[k], (log_p - log_q).detach(), check_dtype=False)
        for name, draws in found.sites.items():
            assert torch.equal(draws[k], guide.nodes[name]["value"])


def test_draws_have_the_shapes_of_the_sites(case):
    at_once = case.weighted(6)
    case.at_once = False
    one_by_one = case.weighted(6)
    assert at_once.log_weights.shape == one_by_one.log_weights.shape == (6,)
    for sites in (at_once.sites, one_by_one.sites):
        assert {name: draws.shape for name, draws in sites.items()} == {
            name: (6, *site["value"].shape) for name, site in case.latents.items()
        }
    assert not at_once.log_weights.requires_grad


@pytest.mark.parametrize("kind", GUIDES)
@pytest.mark.parametrize("name", ["plates", "supports", "mask and scale"])
def test_at_once_and_one_by_one_draw_alike(name, kind):
    guide, model, arguments = GUIDES[kind](name)
    particles = WeightedParticles(model, guide, arguments, {})
    many = particles.weighted(4000)
    particles.at_once = False
    few = particles.weighted(300)
    assert_alike(many.log_weights, few.log_weights)
    for site in many.sites:
        assert_alike(many.sites[site], few.sites[site])


def assert_alike(many, few):
    levels = torch.tensor([0.1, 0.25, 0.5, 0.75, 0.9])
    for level, quantile in zip(levels, many.quantile(levels, 0), strict=True):
        below = (few <= quantile).double().mean(0)
        assert ((below - level).abs() < 0.12).all()  # 4 se of a share of 300 draws


# A model that we know the posterior of


def test_a_guide_that_is_the_posterior_has_one_weight():
    def guide():
        pyro.sample("z", dist.Normal(0.8, math.sqrt(0.2)))

    particles = WeightedParticles(one_latent, guide, (), {})
    for at_once in (True, False):
        particles.at_once = at_once
        weights = particles.weighted(20).log_weights
        assert_close(weights, torch.full((20,), EVIDENCE))


def test_draws_that_take_several_runs_are_all_there(monkeypatch):
    guide, model, arguments = by_ours("plates")
    particles = WeightedParticles(model, guide, arguments, {})
    monkeypatch.setattr("pyro_iaf.models.particles.MAX_NUMBERS", 3 * particles.num_numbers)
    assert particles.num_at_once == 3
    draws = particles.weighted(7)
    assert draws.log_weights.unique().shape == (7,)
    assert draws.sites["z"].shape == (7, 3)


@pytest.mark.parametrize("total", [torch.sum, lambda w: float(w.sum())], ids=["mapped", "alone"])
def test_models_that_take_no_particles_are_mapped_or_weighted_one_by_one(total):
    def model():
        w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(total(w), 1.0), obs=torch.tensor(1.0))

    def guide():
        pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))

    particles = WeightedParticles(model, guide, (), {})
    assert particles.at_once == particles.mapped == (total is torch.sum)
    log_weights, sites, _ = particles.weighted(9)
    expected = dist.Normal(sites["w"].sum(-1), 1.0).log_prob(torch.tensor(1.0))
    assert_close(log_weights, expected)


def test_a_line_of_two_points_is_no_pair_of_draws():
    def model():  # as many numbers as draws in a trial run, where no density shows it
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.deterministic("line", z * torch.tensor([1.0, 2.0]))

    particles = WeightedParticles(model, AutoNormal(model), (), {})
    assert particles.weighted(5).log_weights.shape == (5,)


# Tails


def test_k_hat_is_pyros():
    guide, model, _ = by_pyros("plates")
    particles = WeightedParticles(model, guide, (), {})
    log_weights = seeded(particles.weighted, 1000).log_weights
    with quietly():
        expected = seeded(lambda: psis_diagnostic(model, guide, max_plate_nesting=1))
    assert pareto_k(log_weights) == pytest.approx(expected)


@pytest.mark.parametrize("num_draws", [25, 400, 4000])
@pytest.mark.parametrize("k", [0.1, 0.5, 0.7, 1.0, 3.0])
def test_k_hat_and_smoothed_weights_are_arvizs(k, num_draws):
    arviz = pytest.importorskip("arviz")
    log_weights = -k * torch.rand(num_draws).log() + 5.0
    expected, khat = arviz.psislw(log_weights.numpy())
    assert pareto_k(log_weights) == pytest.approx(float(khat))
    assert_close(smoothed(log_weights).log(), torch.as_tensor(expected))


@pytest.mark.parametrize("k", [0.2, 0.5, 0.7, 1.0])
def test_k_hat_is_the_tails_shape(k):
    log_weights = -k * torch.rand(200_000).log()
    assert pareto_k(log_weights) == pytest.approx(k, abs=0.15)  # 4 se, 1,342 in the tail
    assert pareto_k(log_weights - 2000.0) == pytest.approx(pareto_k(log_weights))


@pytest.mark.parametrize("num_draws", [1, 2, 5])
def test_few_draws_tell_nothing_of_a_tail(num_draws):
    log_weights = torch.randn(num_draws)
    assert num_draws == 1 or pareto_k(log_weights) == math.inf
    assert_close(smoothed(log_weights), log_weights.softmax(0))


@pytest.fixture
def elsewhere():
    """Tensors are made on another device than those that are at hand, by default."""
    torch.set_default_device("meta")
    yield
    torch.set_default_device(None)


def test_tails_and_resampling_stay_with_the_weights_whatever_the_default_device(elsewhere):
    generator = torch.Generator("cpu").manual_seed(0)
    log_weights = torch.randn(1000, generator=generator, device="cpu")
    assert 0 < pareto_k(log_weights) < 0.7
    assert smoothed(log_weights).device.type == "cpu"
    assert resampled(log_weights, 100).device.type == "cpu"


@pytest.mark.parametrize("size", [1e3, 1e5, 1e7])
def test_weights_that_differ_by_rounding_have_no_tail(size):
    noise = torch.randn(4000)
    for log_weights, rounding in [
        ((size + 0.1 * noise / 1e7 * size).float(), 0.0),  # of a density in single precision
        (0.1 * noise / 1e7 * size, size * torch.finfo(torch.float32).eps),
    ]:
        assert pareto_k(log_weights, rounding) == 0.0
        assert_close(smoothed(log_weights, rounding), log_weights.double().softmax(0))


def test_a_tail_that_rises_above_rounding_is_seen():
    log_weights = -1.5 * torch.rand(4000).log()
    assert pareto_k(log_weights, rounding=1e-2) == pareto_k(log_weights) > 1.2
    assert pareto_k((log_weights + 1e4).float()) == pytest.approx(pareto_k(log_weights), abs=0.01)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5])
def test_a_largest_weight_that_many_draws_have_is_no_heavy_tail(share):
    log_weights = torch.zeros(4000)
    log_weights[: int(4000 * share)] = -3.0
    assert pareto_k(log_weights) == 0.0


# Models that raise errors


def test_an_error_at_each_draw_is_the_models_and_at_some_is_no_density():
    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        if model.fails_above < z.max():
            raise KeyError("a mistake of the model")
        pyro.factor("f", -z)

    def guide():
        pyro.sample("z", dist.Normal(0.0, 1.0))

    model.fails_above = math.inf
    particles = WeightedParticles(model, guide, (), {})
    for at_once in (True, False):
        particles.at_once = at_once
        model.fails_above = 0.0
        found = particles.weighted(40)
        assert torch.equal(found.log_weights.isfinite(), found.sites["z"] <= 0)
        model.fails_above = -math.inf
        with pytest.raises(RuntimeError, match=r"at each of 40, .*a mistake") as caught:
            particles.weighted(40)
        assert isinstance(caught.value.__cause__, KeyError)


def test_an_error_at_the_first_draw_is_not_one_at_all():
    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        model.num_failing -= 1
        if model.num_failing >= 0:
            raise torch.linalg.LinAlgError("no Cholesky factor")
        pyro.factor("f", -z)

    model.num_failing = 3
    assert (
        WeightedParticles(model, AutoNormal(one_latent), (), {})
        .weighted(10)
        .log_weights.isfinite()
        .all()
    )
    model.num_failing = 10**9
    with pytest.raises(torch.linalg.LinAlgError):
        WeightedParticles(model, AutoNormal(one_latent), (), {})


# Resampling


@pytest.mark.parametrize("num_draws", [1, 10, 1000])
def test_each_draw_is_taken_as_often_as_its_weight_says(num_draws):
    log_weights = 0.5 * torch.randn(400)
    index = resampled(log_weights, num_draws)
    assert index.shape == (num_draws,)
    assert num_draws == 1 or (index.diff() < 0).any()  # in random order
    counts = index.bincount(minlength=400)
    assert ((counts - num_draws * smoothed(log_weights)).abs() < 1 + 1e-9).all()


def test_resampled_draws_of_a_wide_proposal_are_those_of_the_target():
    z = 3 * torch.randn(40_000)
    target = dist.Normal(1.0, 0.5)
    draws = z[resampled(target.log_prob(z) - dist.Normal(0.0, 3.0).log_prob(z), 10_000)]
    assert draws.mean().item() == pytest.approx(1.0, abs=0.03)  # 4 se of 8,000 weighted draws
    assert draws.std().item() == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize("lost", [-math.inf, math.nan])
def test_draws_without_a_density_are_never_taken(lost):
    log_weights = 0.1 * torch.randn(100)
    log_weights[[3, 50, 99]] = lost
    index = resampled(log_weights, 1000)
    assert index.unique().tolist() == [i for i in range(100) if i not in (3, 50, 99)]
