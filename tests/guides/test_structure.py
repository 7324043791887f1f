"""Guides that find structure: what they find, where they start, and that they are like others.

Truth comes from dense linear algebra: a model that is normal given its scales has an exact
posterior for each value of them, and a sum over a grid of scales has the rest.
"""

import copy
import functools
import io
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.reparam import NeuTraReparam
from torch.testing import assert_close

from pyro_iaf import (
    AutoIAF,
    CompiledTrace_ELBO,
    TraceSTL_ELBO,
    diagnose,
    fit,
    refine,
    to_arviz,
)
from pyro_iaf.flows.sparse_step import SparseStep, features
from pyro_iaf.guides.nested_laplace import nested_laplace
from pyro_iaf.guides.structure import find_structure
from pyro_iaf.guides.structured_transform import StructuredTransform
from pyro_iaf.models.log_joint import LogJoint

T = 60


def series_data(num=T):
    generator = torch.Generator().manual_seed(3)
    draws = torch.randn(2, num, generator=generator, dtype=torch.float64)
    return (0.4 * draws[0]).cumsum(0) + 0.5 * draws[1]


Y = series_data()


def local_level(y=Y):
    """A random walk, whose latents are its steps, seen with noise."""
    a = pyro.sample("a", dist.LogNormal(torch.tensor(-1.0).to(y), 0.5)).unsqueeze(-1)
    b = pyro.sample("b", dist.LogNormal(torch.tensor(-0.5).to(y), 0.5)).unsqueeze(-1)
    steps = pyro.sample("steps", dist.Normal(torch.zeros_like(y), a).to_event(1))
    pyro.sample("y", dist.Normal(steps.cumsum(-1), b).to_event(1), obs=y)


def walk():
    """The same with levels as latents, so a chain as it stands."""
    a = pyro.sample("a", dist.LogNormal(-1.0, 0.5)).unsqueeze(-1)
    level = pyro.sample("level", dist.Normal(torch.zeros(T), 10.0).to_event(1))
    walk = dist.Normal(0.0, a).log_prob(level.diff(dim=-1)).sum(-1)
    pyro.factor("walk", walk - dist.Normal(0.0, 10.0).log_prob(level[..., 1:]).sum(-1))
    pyro.sample("y", dist.Normal(level, 0.5).to_event(1), obs=Y)


def rows(num=30):
    """Rows of a plate with several sites, of which one is a vector."""
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    tau = pyro.sample("tau", dist.LogNormal(0.0, 0.3))
    with pyro.plate("rows", num):
        slope = pyro.sample("slope", dist.Normal(mu, tau))
        loc = pyro.sample("loc", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        x = torch.linspace(-1.0, 1.0, num)
        mean = slope * x + loc.sum(-1)
        pyro.sample("y", dist.Normal(mean, 0.5), obs=x.sin())


def independent(num=50):
    z = pyro.sample("z", dist.Normal(torch.zeros(num), 1.0).to_event(1))
    counts = torch.arange(float(num)) % 4
    pyro.sample("y", dist.Poisson(z.exp()).to_event(1), obs=counts)


def item_response(persons=80, items=6):
    """Two ways of a table: each person meets each item."""
    difficulty = pyro.sample("difficulty", dist.Normal(torch.zeros(items), 1.0).to_event(1))
    ability = pyro.sample("ability", dist.Normal(torch.zeros(persons), 1.0).to_event(1))
    logits = ability.unsqueeze(-1) - difficulty.unsqueeze(-2)
    right = (torch.arange(persons).unsqueeze(-1) * 7 + torch.arange(items) * 3) % 5 < 2
    pyro.sample("right", dist.Bernoulli(logits=logits).to_event(2), obs=right.double())


def dense_normal(num=50):
    factor = torch.randn(num, num, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    covariance = torch.eye(num, dtype=torch.float64) + factor @ factor.T / num
    pyro.sample("z", dist.MultivariateNormal(torch.zeros(num), covariance))


SIDE = 8
CELLS = torch.arange(SIDE * SIDE).view(SIDE, SIDE)
PAIRS = torch.cat(
    [
        torch.stack([CELLS[:, :-1].flatten(), CELLS[:, 1:].flatten()], 1),
        torch.stack([CELLS[:-1].flatten(), CELLS[1:].flatten()], 1),
    ]
)


def disease_map():
    """Counts on a grid, whose log rates differ little between neighbours."""
    tau = pyro.sample("tau", dist.LogNormal(0.5, 0.5)).unsqueeze(-1)
    phi = pyro.sample("phi", dist.Normal(torch.zeros(SIDE * SIDE), 1.0).to_event(1))
    apart = phi[..., PAIRS[:, 0]] - phi[..., PAIRS[:, 1]]
    rank = SIDE * SIDE - 1
    icar = rank * tau.log().squeeze(-1) - (tau * apart).square().sum(-1) / 2
    pyro.factor("icar", icar)
    counts = (torch.arange(float(SIDE * SIDE)) * 5) % 7
    pyro.sample("y", dist.Poisson((0.5 + phi).exp()).to_event(1), obs=counts)


# Model, number of globals, words about the others.
MODELS = {
    "series of steps": (local_level, 2, "60 latents in chains, in cumulative sums"),
    "walk": (walk, 1, "60 latents in chains,"),
    "plate": (rows, 2, "90 latents in rows of at most 3"),
    "independent": (independent, 0, "50 latents independent of each other"),
    "item response": (item_response, 6, "80 latents independent of each other"),
    "map": (disease_map, 1, "64 latents in a graph, each given at most"),
}


def log_joint(model, *args):
    trace = poutine.trace(model).get_trace(*args)
    return LogJoint(model, trace, args, {})


def made(model=local_level, *args, **settings):
    if not args and not settings and torch.get_default_dtype() == torch.float64:
        return copy.deepcopy(_first_made(model))
    return _set_up(model, *args, **settings)


def _set_up(model, *args, **settings):
    pyro.set_rng_seed(0)
    guide = AutoIAF(model, **settings)
    guide.setup(*args)
    return guide


_first_made = functools.cache(_set_up)


def shaken(guide, by=0.1):
    """A guide whose parameters are not those of its start."""
    with torch.no_grad():
        for param in guide.parameters():
            param.add_(by * torch.randn_like(param))
    return guide


def same_draws(a, b):
    found = []
    for guide in (a, b):
        guide.setup()
        pyro.set_rng_seed(5)
        found.append(guide.sample_posterior(5))
    return found[0].keys() == found[1].keys() and all(
        torch.allclose(value, found[1][name]) for name, value in found[0].items()
    )


@pytest.fixture(params=MODELS)
def case(request):
    model, num_globals, words = MODELS[request.param]
    return model, num_globals, words


# What is found


def test_globals_and_others_are_told_apart(case):
    model, num_globals, words = case
    guide = made(model)
    found = guide.structure
    assert isinstance(guide.transform, StructuredTransform)
    assert len(found.globals) == num_globals
    assert words in str(found)
    assert str(found).startswith(f"{num_globals} global{'s' * (num_globals != 1)}; ")
    everything = torch.cat([found.globals, found.others]).sort().values
    assert torch.equal(everything, torch.arange(guide.latent_dim))
    assert torch.equal(torch.cat([found.globals, found.others])[found.place], everything)


def test_all_dependences_of_the_others_are_edges(case):
    """Second derivatives in the coordinates that were found, by autograd at another point."""
    model, *_ = case
    guide, joint = made(model), log_joint(model)
    coordinates, found = guide.transform.parts[-1], guide.structure
    G = len(found.globals)
    u = coordinates.inv(0.3 * torch.randn(guide.latent_dim))
    hessian = torch.autograd.functional.hessian(
        lambda u: joint(coordinates._call(u).unsqueeze(0)).squeeze(0), u
    )[G:, G:]
    size = hessian.diagonal().abs().sqrt()
    touches = hessian.abs() > 1e-6 * torch.outer(size, size)
    allowed = torch.eye(len(u) - G, dtype=torch.bool)
    place = torch.full((len(u),), -1)
    place[found.others] = torch.arange(len(u) - G)
    i, j = place[found.edges].T
    allowed[i, j] = allowed[j, i] = True
    assert not (touches & ~allowed).any()


def hinge(num=30):
    """Pairs that touch each other only where their sum is large, as the data tell that it is."""
    scale = pyro.sample("scale", dist.HalfNormal(2.0)).unsqueeze(-1)
    y = 8 + torch.arange(num * 3).remainder(7).view(3, num) / 3.0
    with pyro.plate("rows", num, dim=-1):
        a = pyro.sample("a", dist.Normal(0.0, 4.0))
        b = pyro.sample("b", dist.Normal(0.0, 4.0))
        mean = (a + (a + b - 6.0).relu()).unsqueeze(-2)
        with pyro.plate("seen", 3, dim=-2):
            pyro.sample("y", dist.Normal(mean, scale.unsqueeze(-1)), obs=y)


def test_dependences_that_begin_far_from_the_start_are_edges():
    guide = made(hinge)
    pairs = [(1 + i, 31 + i) for i in range(30)]
    assert sorted(map(tuple, guide.structure.edges.sort(1).values.tolist())) == pairs


@pytest.mark.parametrize(("name", "value"), [("structured_start", None), ("has_all_edges", False)])
def test_structure_without_a_start_is_told(monkeypatch, name, value):
    monkeypatch.setattr(f"pyro_iaf.guides.structured_guide.{name}", lambda *args: value)
    guide = AutoIAF(local_level)
    with pytest.warns(UserWarning, match=r"found structure \(2 globals; .* no start that has it"):
        guide.setup()
    assert guide.structure is None


def test_a_chain_is_drawn_in_few_rounds():
    words = str(made(local_level).structure)
    assert "2 globals; 60 latents in chains, in cumulative sums, drawn in" in words
    assert int(words.split()[-2]) <= 9
    assert str(made(independent).structure).endswith("drawn in 1 round")


NONE = {
    "dense": dense_normal,
    "few latents": lambda: rows(1),  # 5 of them
    "balanced table": lambda: item_response(30, 30),
}


def pairs_with_a_scale():
    """Rows of a location and a scale, without a global."""
    with pyro.plate("rows", 30, dim=-1):
        mean = pyro.sample("mean", dist.Normal(0.0, 10.0))
        scale = pyro.sample("scale", dist.Gamma(2.0, 2.0))
        with pyro.plate("seen", 2, dim=-2):
            pyro.sample("y", dist.Normal(mean, scale), obs=Y.view(2, 30))


def test_rows_of_a_location_and_a_scale_are_fitted_as_well_as_by_a_flow_over_all():
    found = []
    for structure in ("auto", False):
        guide = AutoIAF(pairs_with_a_scale, structure=structure)
        fit(pairs_with_a_scale, guide, num_steps=1000, seed=0, progress=False)
        found.append(diagnose(pairs_with_a_scale, guide).elbo)
        assert (guide.structure is None) == (not structure)
    # With normal conditionals it would stay three nats below; 1,000 steps leave 0.2 of one.
    assert found[0] > found[1] - 0.4


@pytest.mark.parametrize("model", NONE.values(), ids=NONE)
def test_where_there_is_none_the_guide_is_dense(model):
    guide = made(model)
    assert guide.structure is None
    assert not isinstance(guide.transform, StructuredTransform)
    assert find_structure(log_joint(model), guide.transform.origin, [torch.Size([38])]) is None


@pytest.mark.parametrize("num", [7, 8])
def test_it_is_looked_for_among_eight_or_more(num):
    assert (made(lambda: independent(num)).structure is not None) == (num >= 8)


def test_without_structure_the_guide_is_dense():
    guide = made(local_level, structure=False)
    assert guide.structure is None
    assert [flow.network.input_dim for flow in guide.transform.parts[:-1]] == [62, 62]


def test_before_the_first_call_nothing_is_known():
    assert AutoIAF(local_level).structure is None


@pytest.mark.parametrize("bad", ["yes", True, None, "chain", 2, "False"])
def test_other_settings_of_structure_are_refused(bad):
    with pytest.raises(ValueError, match='structure should be "auto" or False; got'):
        AutoIAF(local_level, structure=bad)


def test_other_starts_and_several_components_are_dense():
    for settings in ({"start": "init"}, {"init_scale": 0.1}, {"num_components": 2}):
        guide = made(local_level, **settings)
        assert guide.structure is None
        assert guide.sample_posterior(3)["steps"].shape == (3, T)


def test_a_guide_with_an_encoder_is_dense():
    guide = AutoIAF(local_level, encoder=lambda y=Y: y[:3])
    guide.setup(Y)
    assert guide.structure is None
    assert guide.sample_posterior(3, Y)["steps"].shape == (3, T)


def test_a_model_that_does_not_broadcast_has_a_dense_guide():
    def model():
        z = pyro.sample("z", dist.Normal(torch.zeros(45), 1.0).to_event(1))
        if z.dim() > 1:
            raise RuntimeError("one at a time")
        pyro.sample("y", dist.Normal(z, 1.0).to_event(1), obs=torch.ones(45))

    guide = made(model)
    assert guide.sample_posterior(3)["z"].shape == (3, 45)


# Where it starts


def linear(mu_scale=1.0):
    """Rows about a mean, all scales known: the posterior is normal."""
    mu = pyro.sample("mu", dist.Normal(0.5, mu_scale))
    with pyro.plate("rows", 45):
        z = pyro.sample("z", dist.Normal(mu, 0.7))
        pyro.sample("y", dist.Normal(2 * z, 0.4), obs=torch.linspace(-1.0, 2.0, 45))


def known_walk():
    """A random walk by its steps, all scales known."""
    steps = pyro.sample("steps", dist.Normal(torch.zeros(T), 0.3).to_event(1))
    pyro.sample("y", dist.Normal(steps.cumsum(-1), 0.5).to_event(1), obs=Y)


def normal_posterior(joint):
    """Mean and covariance where the log density is quadratic."""
    zero = torch.zeros(1, joint.latent_dim)
    hessian = torch.autograd.functional.hessian(lambda z: joint(z.unsqueeze(0))[0], zero[0])
    slope = torch.autograd.functional.jacobian(lambda z: joint(z.unsqueeze(0))[0], zero[0])
    covariance = (-hessian).inverse()
    return covariance @ slope, covariance


@pytest.mark.parametrize("model", [linear, known_walk])
def test_the_start_is_exact_where_the_posterior_is_normal(model):
    joint = log_joint(model)
    mean, covariance = normal_posterior(joint)
    shapes = [torch.Size([size]) for size in joint.sizes_of_sites]
    structure = find_structure(joint, torch.zeros(len(mean)), shapes)
    start = next(nested_laplace(joint, structure, torch.randn(len(mean))))
    step = SparseStep(structure.elimination, *start)
    coordinates = made(model).transform.parts[-1]

    def draw(x):
        return coordinates._call(step._call(x))

    spread = covariance.diagonal().sqrt()
    slope = torch.autograd.functional.jacobian(draw, torch.zeros(len(mean)))
    units = torch.outer(spread, spread)
    assert_close((slope @ slope.T) / units, covariance / units, atol=1e-4, rtol=0)
    # The search for the globals ends where a step promises less than 0.001 nats.
    away = (draw(torch.zeros(len(mean))) - mean) / spread
    bound = 0.05 if len(structure.globals) else 1e-5
    assert away.abs().max() < bound
    # Given the globals there is no search.
    G = len(structure.globals)
    g, others = structure.globals, structure.others
    if G:
        v = torch.randn(G)
        z = draw(torch.cat([v, torch.zeros(len(others))]))
        gain = covariance[others][:, g] @ covariance[g][:, g].inverse()
        assert_close(z[others], mean[others] + gain @ (z[g] - mean[g]), atol=1e-5, rtol=0)


def test_means_and_scales_of_the_others_follow_the_globals():
    """At values of the globals, against the exact conditional of the series there."""
    joint = log_joint(local_level)
    structure = made(local_level).structure
    start = next(nested_laplace(joint, structure, torch.zeros(62)))
    step = SparseStep(structure.elimination, *start)
    coordinates = made(local_level).transform.parts[-1]
    for v in (torch.zeros(2), torch.tensor([1.0, -1.0]), torch.tensor([-1.5, 0.5])):
        log_scales = start.loc + start.scale_tril @ v
        mean, covariance = steps_given(*log_scales.exp())

        def draw(noise, v=v):
            return coordinates._call(step._call(torch.cat([v, noise])))[2:]

        spread = covariance.diagonal().sqrt()
        assert ((draw(torch.zeros(T)) - mean) / spread).abs().max() < 0.03
        slope = torch.autograd.functional.jacobian(draw, torch.zeros(T))
        found = (slope @ slope.T).diagonal().sqrt()
        assert_close(found / spread, torch.ones(T), atol=0.02, rtol=0)


def steps_given(a, b):
    """Mean and covariance of the steps for known scales."""
    sums = torch.ones(T, T).tril()
    precision = torch.eye(T) / a**2 + sums.T @ sums / b**2
    covariance = precision.inverse()
    return covariance @ (sums.T @ Y) / b**2, covariance


@pytest.fixture(scope="module")
def truth():
    """Means and standard deviations of all latents of the series, by a grid over its scales."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    sums = torch.ones(T, T).tril()
    ends = torch.linspace(-4.5, 4.5, 61)
    grid = torch.cartesian_prod(-1.6 + 0.6 * ends, -0.9 + 0.35 * ends)
    a, b = grid.exp().T
    eye = torch.eye(T)
    marginal = a.view(-1, 1, 1) ** 2 * (sums @ sums.T) + b.view(-1, 1, 1) ** 2 * eye
    log_weight = dist.MultivariateNormal(torch.zeros(T), marginal).log_prob(Y)
    log_weight = log_weight + dist.Normal(torch.tensor([-1.0, -0.5]), 0.5).log_prob(grid).sum(-1)
    weight = log_weight.softmax(0)
    edge = (grid - grid.mean(0)).abs() / (grid.max(0).values - grid.mean(0)) > 0.99
    assert weight[edge.any(-1)].sum() < 1e-5  # the grid holds all
    gain = a.view(-1, 1, 1) ** 2 * torch.linalg.solve(marginal, sums).mT  # cov(steps, y) / var(y)
    means = (gain @ Y.unsqueeze(-1)).squeeze(-1)
    variances = a.unsqueeze(-1) ** 2 - a.unsqueeze(-1) ** 2 * (gain @ sums).diagonal(0, 1, 2)

    def moments(first, second):
        mean = (weight.unsqueeze(-1) * first).sum(0)
        return mean, ((weight.unsqueeze(-1) * second).sum(0) - mean**2).sqrt()

    found = {
        "steps": moments(means, variances + means**2),
        "log scales": moments(grid, grid**2),
        "scales": moments(grid.exp(), grid.exp() ** 2),
        "log evidence": log_weight.logsumexp(0)
        + 2 * (ends[1] - ends[0]).log()
        + torch.tensor(0.6 * 0.35).log(),
    }
    torch.set_default_dtype(before)
    return found


def assert_moments(draws, mean, spread, shift, share):
    assert ((draws.mean(0) - mean) / spread).abs().max() < shift
    assert (draws.std(0) / spread - 1).abs().max() < share


def free(draws):
    return torch.stack([draws["a"], draws["b"]], -1).log()


def test_a_series_starts_near_the_posterior(truth):
    draws = made(local_level).sample_posterior(20_000)
    assert_moments(free(draws), *truth["log scales"], 0.15, 0.15)
    assert_moments(draws["steps"], *truth["steps"], 0.1, 0.1)


@pytest.fixture(scope="module")
def fitted():
    """A guide after a short fit."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    guide = AutoIAF(local_level, name="fitted")
    result = fit(local_level, guide, num_steps=300, compile=False, seed=0, progress=False)
    torch.set_default_dtype(before)
    pyro.clear_param_store()
    return guide, result


def test_a_short_fit_finds_the_posterior(fitted, truth):
    guide, result = fitted
    draws = guide.sample_posterior(40_000)
    # A standard error is 0.005 sd.
    assert_moments(draws["steps"], *truth["steps"], 0.05, 0.05)
    assert_moments(free(draws), *truth["log scales"], 0.05, 0.05)
    assert len(result.losses) == 300
    elbo = -result.losses[-20:].mean().item()
    assert truth["log evidence"] - 0.3 < elbo < truth["log evidence"] + 0.05


def test_a_hundred_steps_keep_what_is_found(truth):
    guide = AutoIAF(local_level)
    fit(local_level, guide, num_steps=100, compile=False, seed=0, progress=False)
    draws = guide.sample_posterior(40_000)
    assert_moments(draws["steps"], *truth["steps"], 0.05, 0.05)
    assert_moments(free(draws), *truth["log scales"], 0.1, 0.1)  # its scales take longer


def test_medians_and_quantiles_are_those_of_the_posterior(fitted, truth):
    guide, _ = fitted
    mean, spread = truth["log scales"]
    quantiles = guide.quantiles([0.16, 0.5, 0.84])
    low, middle, high = torch.stack([quantiles["a"], quantiles["b"]], -1).log()
    assert_close(high - low, 2 * spread, atol=0, rtol=0.1)  # nearly normal
    assert ((middle - mean).abs() < 0.15 * spread).all()
    median = guide.median()
    assert median["steps"].shape == (T,)
    assert_close(median["a"].log(), middle[0], atol=1e-3, rtol=0)


def test_it_is_diagnosed_and_handed_on(fitted, truth):
    guide, _ = fitted
    found = diagnose(local_level, guide)
    assert abs(found.iw_elbo - truth["log evidence"]) < 0.05
    pytest.importorskip("arviz")
    data = to_arviz(local_level, guide, num_samples=50)
    assert data.posterior["steps"].shape[-1] == T


def test_it_is_refined(fitted, truth):
    guide, _ = fitted
    refined = refine(local_level, guide, num_samples=2000, seed=0, progress=False)
    assert refined.converged
    # At least 400 effective draws: 0.05 sd is a standard error, and 60 numbers are looked at.
    assert_moments(refined.samples["steps"], *truth["steps"], 0.25, 0.2)


def test_importance_weights_bring_it_nearer(fitted, truth):
    guide, _ = fitted
    draws = guide.sample_posterior(4000, resample=True)
    assert_moments(free(draws), *truth["log scales"], 0.1, 0.1)


def test_counts_on_a_map_start_near_their_posterior():
    """The ELBO of the start is within a nat of the importance-weighted one."""
    guide = made(disease_map)
    joint = log_joint(disease_map)
    posterior = guide.get_posterior()
    with torch.no_grad():
        z = posterior.sample((4000,))
        log_weights = joint(z) - posterior.log_prob(z)
    bound = log_weights.logsumexp(0) - torch.tensor(4000.0).log()
    assert bound - log_weights.mean() < 1.0


def narrow_walk():
    """Levels whose steps are a ten-thousandth of the spread of all together."""
    a = pyro.sample("a", dist.LogNormal(torch.tensor(1e-4).log(), 0.3)).unsqueeze(-1)
    level = pyro.sample("level", dist.Normal(torch.zeros(T), 10.0).to_event(1))
    pyro.factor("walk", dist.Normal(0.0, a).log_prob(level.diff(dim=-1)).sum(-1))
    pyro.sample("y", dist.Normal(level, 1.0).to_event(1), obs=torch.zeros(T))


def test_a_fit_does_not_spoil_a_start_with_narrow_conditionals():
    guide = AutoIAF(narrow_walk)
    result = fit(narrow_walk, guide, num_steps=100, compile=False, seed=0, progress=False)
    assert guide.structure is not None
    assert result.losses.max() < result.losses[0] + 20


# Densities and losses


def test_scores_are_those_computed_by_hand(case):
    model, *_ = case
    guide = shaken(made(model), 0.05)
    transform = guide.get_transform()
    x = torch.randn(guide.latent_dim)
    y = transform._call(x).detach()
    slope = torch.autograd.functional.jacobian(transform._call, x)
    normal = dist.Normal(torch.zeros_like(x), 1.0).to_event(1)
    by_hand = normal.log_prob(x) - slope.slogdet().logabsdet
    assert_close(guide.get_posterior().log_prob(y), by_hand)


def test_draws_come_with_their_density_and_score(case):
    model, *_ = case
    guide = shaken(made(model), 0.05)
    draws = guide.sample_with_score(6)
    leaf = draws.value.detach().clone().requires_grad_()
    log_prob = guide.get_posterior().log_prob(leaf)
    (score,) = torch.autograd.grad(log_prob.sum(), leaf)
    assert_close(draws.log_prob.detach(), log_prob.detach())
    assert_close(draws.score, score, atol=1e-7, rtol=1e-7)


def test_losses_and_gradients_are_finite(case):
    model, *_ = case
    guide = made(model)
    for Elbo in (Trace_ELBO, TraceSTL_ELBO):
        guide.zero_grad()
        elbo = Elbo(num_particles=3, vectorize_particles=True, max_plate_nesting=1)
        elbo.loss_and_grads(model, guide)
        for name, parameter in guide.named_parameters():
            if parameter.numel():
                assert parameter.grad is not None, name
                assert parameter.grad.isfinite().all(), name


def test_a_step_costs_one_network_call_per_flow():
    guide = made(local_level)
    calls = []
    for network in guide.networks():
        network.register_forward_hook(lambda *_: calls.append(1))
    Trace_ELBO().loss_and_grads(local_level, guide)
    assert len(calls) == 2


@pytest.mark.parametrize("model", [local_level, rows, disease_map, independent])
def test_a_recorded_loss_is_the_eager_one(model):
    found = []
    for kind, settings in ((Trace_ELBO, {}), (CompiledTrace_ELBO, {"backend": "graph"})):
        pyro.clear_param_store()
        guide = shaken(made(model, name="guide"), 0.02)
        elbo = kind(num_particles=4, vectorize_particles=True, max_plate_nesting=1, **settings)
        svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), elbo)
        pyro.set_rng_seed(1)
        found.append([svi.step() for _ in range(5)])
    assert found[1] == pytest.approx(found[0], rel=1e-9)


def test_a_recorded_fit_has_the_losses_of_an_eager_one():
    found = []
    for setting in (False, "graph"):
        pyro.clear_param_store()
        guide = AutoIAF(local_level, name="guide")
        result = fit(local_level, guide, num_steps=20, compile=setting, seed=0, progress=False)
        found.append(result.losses)
    assert_close(found[1], found[0])


def means_of_rows(y):
    """Rows of three latents whose means and scale touch all of them."""
    mean, scale = pyro.sample("m", dist.Normal(0.0, 1.0)), pyro.sample("s", dist.LogNormal(0, 0.3))
    with pyro.plate("rows", len(y)):
        x = pyro.sample("x", dist.Normal(mean.unsqueeze(-1), scale.unsqueeze(-1)))
        w = pyro.sample(
            "w", dist.Normal(torch.zeros_like(y).unsqueeze(-1), torch.ones(2)).to_event(1)
        )
        pyro.sample("y", dist.Normal(x + w.sum(-1), 0.5), obs=y)


def test_single_precision_finds_the_structure_of_double():
    torch.set_default_dtype(torch.float32)  # which a fixture sets back
    generator = torch.Generator().manual_seed(0)
    guide = made(means_of_rows, 30 * torch.randn(200, generator=generator))
    assert str(guide.structure).startswith("2 globals; 600 latents in rows of at most 3")


def test_single_precision_follows_the_model():
    guide = made(local_level, Y.float())
    assert guide.structure is not None
    assert {p.dtype for p in guide.parameters()} == {torch.float32}
    assert guide.sample_posterior(3)["steps"].dtype == torch.float32
    loss = Trace_ELBO().loss_and_grads(local_level, guide, Y.float())
    assert torch.tensor(loss).isfinite()


def test_a_conversion_counts_before_and_after_the_first_call():
    for before in (True, False):
        pyro.clear_param_store()
        guide = AutoIAF(local_level)
        if before:
            guide.float()
        guide.setup()
        if not before:
            guide.float()
        step = guide.transform.sparse
        assert step.start_frame.dtype == torch.float32
        assert step.elimination.order.dtype == step.edges_frame.dtype == torch.int64
        x = torch.randn(3, 62, dtype=torch.float32)
        assert guide.get_transform()(x).dtype == torch.float32


def test_one_seed_gives_one_start(case):
    model, *_ = case
    assert same_draws(made(model), made(model))


def test_neutra_keeps_the_density(fitted):
    guide, _ = fitted
    neutra = NeuTraReparam(guide)
    model = neutra.reparam(local_level)
    trace = poutine.trace(model).get_trace()
    (shared,) = (s["value"] for n, s in trace.nodes.items() if n.endswith("_shared_latent"))
    transform, joint = guide.get_transform(), log_joint(local_level)
    value = transform(shared)
    expected = joint(value.unsqueeze(0))[0] + transform.log_abs_det_jacobian(shared, value)
    sites = neutra.transform_sample(shared)
    assert sites["steps"].shape == (T,)
    assert_close(trace.log_prob_sum(), expected)


def test_tails_are_widened_and_that_can_be_undone():
    guide = shaken(made(local_level), 0.02)
    before = copy.deepcopy(guide.state_dict())
    far = torch.full((2, 62), 4.0) * torch.tensor([[1.0], [-1.0]])
    narrow = guide.get_transform()(far).detach().diff(dim=0).abs()
    undo = guide.widen_tails(0.1)
    wide = guide.get_transform()(far).detach().diff(dim=0).abs()
    assert (wide[:, :2] > narrow[:, :2]).all()
    undo()
    after = guide.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


# State and copies


def trained(model=local_level, num_steps=3, **settings):
    guide = made(model, name="trained", **settings)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    for _ in range(num_steps):
        svi.step()
    return guide


def by_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("settings", [{}, {"structure": "auto"}], ids=["default", "auto"])
def test_a_state_loads_into_a_guide_that_was_never_called(case, settings):
    model, num_globals, _ = case
    guide = trained(model, num_flows=3, hidden_dims=[8])
    fresh = AutoIAF(model, name="fresh", **settings)
    fresh.load_state_dict(by_file(guide.state_dict()), strict=True)
    assert str(fresh.structure) == str(guide.structure)
    assert same_draws(guide, fresh)
    assert str(fresh.structure) == str(guide.structure)
    if num_globals:
        assert fresh.num_flows == 3
        assert list(fresh.hidden_dims) == [8]
    z = guide.get_posterior().sample((3,))
    assert_close(fresh.get_posterior().log_prob(z), guide.get_posterior().log_prob(z.clone()))
    svi = SVI(model, fresh, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    assert torch.tensor([svi.step() for _ in range(2)]).isfinite().all()


def test_a_state_without_globals_leaves_the_number_of_flows():
    fresh = AutoIAF(independent, name="fresh")
    fresh.load_state_dict(trained(independent).state_dict(), strict=True)
    assert fresh.num_flows == 2


def test_a_state_loads_into_a_guide_that_was_set_up(case):
    model, *_ = case
    guide = trained(model)
    for state in (guide.state_dict(), by_file(guide.state_dict())):
        other = made(model, name="other")
        other.load_state_dict(state, strict=True)
        assert same_draws(guide, other)


def test_a_state_with_structure_is_no_state_of_a_dense_guide():
    guide = trained()
    dense = made(local_level, structure=False, name="dense")
    before = copy.deepcopy(dense.state_dict())
    with pytest.raises(RuntimeError):
        dense.load_state_dict(guide.state_dict(), strict=True)
    with pytest.raises(RuntimeError):
        guide.load_state_dict(before, strict=True)
    assert same_draws(dense, made(local_level, structure=False, name="again"))


def test_a_dense_state_makes_a_fresh_guide_dense():
    dense = trained(structure=False)
    fresh = AutoIAF(local_level, name="fresh")
    fresh.load_state_dict(dense.state_dict(), strict=True)
    assert fresh.structure is None
    assert same_draws(dense, fresh)


ORDER = torch.tensor([(7 * k) % 50 for k in range(50)])


def chain_along(order):
    """A chain along an order of the same site."""

    def model():
        z = pyro.sample("z", dist.Normal(torch.zeros(50), 1.0).to_event(1))
        apart = z[..., order].diff(dim=-1) - 0.3
        pyro.factor("chain", -2 * apart.square().sum(-1) - 0.1 * z.exp().sum(-1))

    return model


@pytest.mark.parametrize("how", ["set up", "loaded before"])
def test_a_state_of_other_structure_is_not_mixed_with_ones_own(how):
    """Both have as many edges and coefficients, so shapes don't tell them apart."""
    first, second = chain_along(torch.arange(50)), chain_along(ORDER)
    theirs, own = made(first, name="theirs"), made(second, name="own")
    shapes = [{n: v.shape for n, v in g.state_dict().items()} for g in (theirs, own)]
    assert shapes[0] == shapes[1]
    guide = own
    if how == "loaded before":
        guide = AutoIAF(first, name="guide")
        guide.load_state_dict(own.state_dict(), strict=True)
    try:
        guide.load_state_dict(theirs.state_dict(), strict=True)
    except RuntimeError:
        return
    assert same_draws(theirs, guide)
    assert torch.equal(theirs.structure.edges, guide.structure.edges)
    z = theirs.get_posterior().sample((3,))
    assert_close(guide.get_posterior().log_prob(z), theirs.get_posterior().log_prob(z.clone()))


def test_copies_draw_as_the_original_does(case):
    model, *_ = case
    guide = trained(model)
    for twin in (copy.deepcopy(guide), pickle.loads(pickle.dumps(guide))):
        twin._pyro_name = "twin"
        assert same_draws(guide, twin)
        assert str(twin.structure) == str(guide.structure)
        assert not set(map(id, guide.parameters())) & set(map(id, twin.parameters()))


def through_a_file(path):
    pyro.get_param_store().save(path)
    pyro.clear_param_store()
    pyro.get_param_store().load(path)


def test_a_store_from_a_file_has_the_structure(case, tmp_path, monkeypatch):
    model, *_ = case
    guide = trained(model)
    through_a_file(tmp_path / "store")
    monkeypatch.setattr("pyro_iaf.guides.structured_guide.find_structure", None)  # it is not asked
    again = AutoIAF(model, name="trained")
    again()
    assert str(again.structure) == str(guide.structure)
    assert same_draws(guide, again)


def test_a_store_from_a_file_has_the_structure_of_all_components(tmp_path):
    guide = grown()
    guide()
    through_a_file(tmp_path / "store")
    again = AutoIAF(local_level, name="grown")
    again()
    assert same_draws(guide, again)


def test_a_store_with_another_structure_is_refused(tmp_path):
    guide = trained()
    again = AutoIAF(local_level, name="trained")
    path = tmp_path / "store"
    pyro.get_param_store().save(path)
    state = torch.load(path, weights_only=False)
    (name,) = (name for name in state["params"] if name.endswith("before_frame"))
    state["params"][name].data = state["params"][name].data.roll(1)
    torch.save(state, path)
    pyro.clear_param_store()
    pyro.get_param_store().load(path)
    with pytest.raises(ValueError, match="before_frame has other values"):
        guide()
    expected = guide.structure.before.roll(1)
    again()  # a guide that has none yet takes it
    assert torch.equal(again.structure.before, expected)


def test_a_store_is_of_the_structure_that_was_loaded_last(tmp_path):
    first, second = chain_along(torch.arange(50)), chain_along(ORDER)
    theirs, own = made(first, name="theirs"), made(second, name="own")
    own()
    own.load_state_dict(theirs.state_dict(), strict=True)
    own()
    through_a_file(tmp_path / "store")
    again = AutoIAF(second, name="own")
    again()
    assert same_draws(theirs, again)
    assert torch.equal(again.structure.edges, theirs.structure.edges)


def test_a_store_of_another_size_is_refused(tmp_path):
    guide = trained()
    through_a_file(tmp_path / "store")
    again = AutoIAF(local_level, name=guide._pyro_name)
    with pytest.raises(ValueError, match="of another make"):
        again(Y[:50])


def test_a_store_with_structure_is_refused_by_a_guide_with_an_encoder(tmp_path):
    guide = trained()
    through_a_file(tmp_path / "store")
    again = AutoIAF(local_level, name=guide._pyro_name, encoder=lambda: torch.zeros(2))
    with pytest.raises(ValueError, match="of another make"):
        again()


def test_words_name_its_parameters():
    guide = made(local_level)
    assert "num_flows=2" in repr(guide)
    assert "2 globals" in repr(guide.transform.sparse)


# Components


def grown():
    guide = made(local_level, name="grown")
    guide.add_component(log_joint(local_level), torch.zeros(62), 0.3)
    return guide


def test_a_component_is_added_and_the_density_is_that_of_both():
    guide = grown()
    assert_close(guide.component_weights, torch.tensor([0.7, 0.3]))
    transforms = [guide.transform, *guide.mixture.others]
    assert all(isinstance(transform, StructuredTransform) for transform in transforms)
    shaken(guide, 0.05)
    z = guide.get_posterior().sample((4,)).detach()
    parts = []
    for transform in transforms:
        x = transform._inverse(z).detach()
        slopes = torch.stack(
            [torch.autograd.functional.jacobian(transform._call, row) for row in x]
        )
        normal = dist.Normal(torch.zeros(62), 1.0).to_event(1)
        parts.append(normal.log_prob(x) - slopes.slogdet().logabsdet)
    expected = (torch.stack(parts, -1) + guide.component_weights.log()).logsumexp(-1)
    assert_close(guide.get_posterior().log_prob(z), expected)


def test_a_guide_with_components_trains_and_keeps_its_state():
    guide = grown()
    draws = guide.sample_with_score(20)
    assert_close(draws.weights.sum().item(), 1.0)
    svi = SVI(local_level, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    assert torch.tensor([svi.step() for _ in range(3)]).isfinite().all()
    fresh = AutoIAF(local_level, name="fresh")
    fresh.load_state_dict(by_file(guide.state_dict()), strict=True)
    assert len(fresh.component_weights) == 2
    assert same_draws(guide, fresh)
    built = made(local_level, name="built")
    built.load_state_dict(guide.state_dict(), strict=True)
    assert same_draws(guide, built)


def test_a_component_without_globals_is_added():
    guide = made(independent)
    guide.add_component(log_joint(independent), torch.ones(50), 0.3)
    assert_close(guide.component_weights, torch.tensor([0.7, 0.3]))
    assert guide.sample_posterior(5)["z"].shape == (5, 50)


def test_features_of_the_start_are_those_of_the_step():
    step = made(local_level).transform.sparse
    assert step.start_frame.shape[0] == features(torch.zeros(2)).shape[-1]
    assert len(step.changes) == step.start_frame.shape[0] + len(step.weight)
