"""Guides of models with discrete latents: fits, draws of what was summed out, and diagnoses."""

import itertools
import math
import runpy
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Predictive
from torch.testing import assert_close

from pyro_iaf import AutoHierarchicalIAF, AutoIAF, diagnose, fit, to_arviz

Y = torch.tensor([-1.3, 0.4, 2.2, 0.9, -0.2], dtype=torch.float64)


def mixture(y):
    p = pyro.sample("p", dist.Beta(2.0, 3.0))
    a = pyro.sample("a", dist.Normal(1.0, 1.0))
    with pyro.plate("rows", len(y)):
        z = pyro.sample("z", dist.Bernoulli(p))
        pyro.sample("y", dist.Normal(a * z, 0.5), obs=y)


def on_a_grid(y):
    """Means, standard deviations and the logarithm of the evidence, and P(z = 1) of each row."""
    p, a = torch.meshgrid(
        torch.linspace(0.0005, 0.9995, 1000, dtype=torch.float64),
        torch.linspace(-4.0, 5.0, 900, dtype=torch.float64),
        indexing="ij",
    )
    log_p = dist.Beta(2.0, 3.0).log_prob(p) + dist.Normal(1.0, 1.0).log_prob(a)
    ones = []
    for v in y:
        off, on = ((1 - p).log(), 0 * a), (p.log(), a)
        off, on = (log_share + dist.Normal(loc, 0.5).log_prob(v) for log_share, loc in (off, on))
        log_p = log_p + torch.logaddexp(off, on)
        ones.append((on - off).sigmoid())
    weights = log_p.flatten().softmax(0).reshape(p.shape)
    means = {name: (weights * value).sum() for name, value in (("p", p), ("a", a))}
    sds = {n: (weights * (v - means[n]).square()).sum().sqrt() for n, v in (("p", p), ("a", a))}
    evidence = log_p.flatten().logsumexp(0) + math.log(0.001 * 0.01001)
    return means, sds, evidence, torch.stack([(weights * one).sum() for one in ones])


@pytest.fixture(scope="module")
def fitted():
    pyro.set_rng_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    guide = AutoIAF(mixture, name="of_a_mixture")
    result = fit(mixture, guide, (Y,), seed=0, progress=False)
    torch.set_default_dtype(before)
    return guide, result


def test_the_posterior_is_that_of_a_grid(fitted):
    guide, result = fitted
    means, sds, evidence, _ = on_a_grid(Y)
    draws = guide.sample_posterior(20_000)
    for name, mean in means.items():
        assert abs(draws[name].mean() - mean) < 0.1 * sds[name]
        assert draws[name].std() == pytest.approx(sds[name].item(), rel=0.07)
    assert result.diagnosis.verdict == "good"
    assert result.diagnosis.iw_elbo == pytest.approx(evidence.item(), abs=0.02)


def test_discrete_draws_have_the_probabilities_of_a_grid(fitted):
    guide, _ = fitted
    *_, ones = on_a_grid(Y)
    draws = guide.sample_posterior(20_000, Y, discrete=True)
    assert draws["z"].shape == (20_000, 5)
    assert_close(draws["z"].mean(0), ones, rtol=0, atol=0.02)
    resampled = guide.sample_posterior(20_000, Y, discrete=True, resample=True)
    assert_close(resampled["z"].mean(0), ones, rtol=0, atol=0.02)


def test_the_most_probable_values_are_those_of_each_draw(fitted):
    guide, _ = fitted
    draws = guide.sample_posterior(200, Y, discrete="map")
    p, a = draws["p"].unsqueeze(-1), draws["a"].unsqueeze(-1)
    on = p.log() + dist.Normal(a, 0.5).log_prob(Y)
    off = (1 - p).log() + dist.Normal(0.0, 0.5).log_prob(Y)
    assert torch.equal(draws["z"], (on > off).double())


def test_without_being_asked_draws_are_continuous(fitted):
    guide, _ = fitted
    assert guide.sample_posterior(3).keys() == {"p", "a"}
    with pytest.raises(ValueError, match='discrete should be True, False or "map"'):
        guide.sample_posterior(3, Y, discrete="mode")


def test_arviz_has_them_and_the_data_given_them(fitted):
    pytest.importorskip("arviz")
    guide, _ = fitted
    data = to_arviz(mixture, guide, (Y,), num_samples=50)
    assert data.posterior["z"].dims == ("chain", "draw", "rows")
    z, a = (torch.tensor(data.posterior[name].values[0]) for name in "za")
    found = torch.tensor(data.log_likelihood["y"].values[0])
    assert_close(found, dist.Normal(a.unsqueeze(-1) * z, 0.5).log_prob(Y))


def test_predictive_draws_them_from_their_prior_as_in_pyro(fitted):
    guide, _ = fitted
    drawn = Predictive(mixture, guide=guide, num_samples=2000)(Y)
    assert drawn["z"].shape == (2000, 5)
    assert_close(drawn["z"].mean(0), drawn["p"].mean().expand(5), atol=0.05, rtol=0.0)


def test_drawing_them_takes_the_data(fitted):
    guide, _ = fitted
    with pytest.raises(TypeError, match=r"'y'.*sample_posterior\(1000, y, discrete=True\)"):
        guide.sample_posterior(5, discrete=True)


CASES = Path(__file__).parents[3] / "shared" / "cases"


@pytest.mark.parametrize("name", ["discrete_mixture", "discrete_hmm", "discrete_groups"])
def test_known_posteriors_are_found(name):
    path = CASES / f"{name}.py"
    if not path.exists():
        pytest.skip(f"{path} is not here")
    case = runpy.run_path(path)
    guide = AutoIAF(case["model"])
    diagnosis = fit(case["model"], guide, case["ARGS"], seed=0, progress=False).diagnosis
    assert diagnosis.iw_elbo == pytest.approx(case["EVIDENCE"], abs=0.02)
    found = case["quantities"](guide.sample_posterior(20_000))
    for key, mean in case["MEANS"].items():
        assert found[key].mean().item() == pytest.approx(mean, abs=0.1 * case["SDS"][key])
        assert found[key].std().item() == pytest.approx(case["SDS"][key], rel=0.07)


def three_classes(y):
    shares = pyro.sample("shares", dist.Dirichlet(torch.ones(3)))
    with pyro.plate("classes", 3):
        level = pyro.sample("level", dist.Normal(0.0, 3.0))
    with pyro.plate("rows", len(y)):
        z = pyro.sample("z", dist.Categorical(shares))
        pyro.sample("y", dist.Normal(level[z], 0.5), obs=y)  # which picks particles, if they are in


def test_all_orders_of_three_classes_are_found():
    y = torch.cat([torch.linspace(-0.8, 0.8, 12) + 3 * k for k in (-1, 0, 1)])
    guide = AutoIAF(three_classes)
    diagnosis = fit(three_classes, guide, (y,), seed=0, progress=False).diagnosis
    assert not diagnosis.modes
    assert len(guide.component_weights) == 6
    orders = {tuple(order) for order in guide.sample_posterior(500)["level"].argsort(-1).tolist()}
    assert len(orders) == 6


def test_a_state_and_a_copy_know_them(fitted):
    guide, _ = fitted
    fresh = AutoIAF(mixture, name="fresh")
    fresh.load_state_dict(guide.state_dict())
    assert fresh.sample_posterior(2, Y, discrete=True)["z"].shape == (2, 5)
    assert fresh.discrete == guide.discrete


def hierarchical(y):
    """Rows with an effect of their own, whose spread depends on a class of their own."""
    mean = pyro.sample("mean", dist.Normal(0.0, 2.0))
    with pyro.plate("rows", len(y)):
        wide = pyro.sample("wide", dist.Bernoulli(0.3))
        effect = pyro.sample("effect", dist.Normal(mean, 1.0 + wide))
        pyro.sample("y", dist.Normal(effect, 0.5), obs=y)


def test_local_latents_may_depend_on_local_classes():
    y = torch.cat([Y, 4 + Y])
    guide = AutoHierarchicalIAF(hierarchical, hidden_dims=[16])
    fit(hierarchical, guide, (y,), seed=0, progress=False, num_steps=600)
    grid = torch.linspace(-6.0, 8.0, 4000)
    log_p = dist.Normal(0.0, 2.0).log_prob(grid)
    for v in y:  # effect summed out by hand
        parts = [
            math.log(share) + dist.Normal(grid, math.hypot(sd, 0.5)).log_prob(v)
            for share, sd in ((0.7, 1.0), (0.3, 2.0))
        ]
        log_p = log_p + torch.logaddexp(*parts)
    weights = log_p.softmax(0)
    mean = (weights * grid).sum()
    sd = (weights * (grid - mean).square()).sum().sqrt()
    draws = guide.sample_posterior(8000, y, discrete=True)
    assert abs(draws["mean"].mean() - mean) < 0.15 * sd
    assert draws["mean"].std() == pytest.approx(sd.item(), rel=0.15)
    assert draws["wide"].shape == draws["effect"].shape == (8000, 10)
    of_wide = dist.Normal(draws["mean"].unsqueeze(-1), 2.0).log_prob(draws["effect"])
    of_narrow = dist.Normal(draws["mean"].unsqueeze(-1), 1.0).log_prob(draws["effect"])
    expected = (math.log(0.3 / 0.7) + of_wide - of_narrow).sigmoid()
    assert_close(draws["wide"].mean(0), expected.mean(0), rtol=0, atol=0.02)


def test_two_equal_classes_are_two_modes():
    y = torch.cat([Y / 4 - 2, Y / 4 + 2, torch.tensor([1.8, 2.3])])

    def model(y):
        low = pyro.sample("low", dist.Normal(0.0, 3.0))
        high = pyro.sample("high", dist.Normal(0.0, 3.0))
        with pyro.plate("rows", len(y)):
            z = pyro.sample("z", dist.Bernoulli(0.5))
            pyro.sample("y", dist.Normal(low + z * (high - low), 0.5), obs=y)

    guide = AutoIAF(model)
    result = fit(model, guide, (y,), seed=0, progress=False)
    assert_close(guide.component_weights, torch.full((2,), 0.5), rtol=0, atol=0.05)
    assert result.diagnosis.verdict == "good"


def test_a_number_of_particles_too_large_for_the_table_goes_in_parts():
    """The numbers of a run count the values that are summed out."""

    def model():
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        z = [pyro.sample(f"z{k}", dist.Bernoulli(0.5)) for k in range(9)]
        pyro.sample("y", dist.Normal(a + sum(z), 1.0), obs=torch.tensor(5.0))

    found = diagnose(model, AutoIAF(model), num_samples=200, search=False)
    exact = torch.stack(
        [
            math.log(math.comb(9, k) / 2**9)
            + dist.Normal(float(k), math.sqrt(2.0)).log_prob(torch.tensor(5.0))
            for k in range(10)
        ]
    ).logsumexp(0)
    assert found.iw_elbo == pytest.approx(exact.item(), abs=0.05)


SEQUENCES = list(itertools.product((0.0, 1.0), repeat=4))


def test_the_most_probable_path_of_a_chain_is_found():
    y = Y[:4]

    def model(y):
        a = pyro.sample("a", dist.Normal(1.0, 1.0))
        z = torch.tensor(0.0)
        for t in pyro.markov(range(4)):
            z = pyro.sample(f"z_{t}", dist.Bernoulli(0.2 + 0.6 * z))
            pyro.sample(f"y_{t}", dist.Normal(a * z, 0.8), obs=y[t])

    guide = AutoIAF(model, start="init")
    guide.setup(y)
    draws = guide.sample_posterior(50, y, discrete="map")

    def score(path, a):
        total, before = 0.0, 0.0
        for z, v in zip(path, y, strict=True):
            total += math.log(0.2 + 0.6 * before if z else 0.8 - 0.6 * before)
            total += dist.Normal(a * z, 0.8).log_prob(v).item()
            before = z
        return total

    for k, a in enumerate(draws["a"]):
        best = max(SEQUENCES, key=lambda path, a=a: score(path, a))
        assert tuple(draws[f"z_{t}"][k].item() for t in range(4)) == best


def test_values_of_any_shape_are_drawn():
    """One-hot vectors, numbers of successes, and a latent that has one value only."""
    shares = torch.tensor([0.2, 0.3, 0.5])

    def model(y):
        a = pyro.sample("a", dist.Normal(1.0, 0.5))
        with pyro.plate("groups", 2, dim=-2):
            only = pyro.sample("only", dist.Categorical(torch.ones(1)))
            with pyro.plate("rows", 5, dim=-1):
                kind = pyro.sample("kind", dist.OneHotCategorical(shares))
                count = pyro.sample("count", dist.Binomial(3, 0.4))
                loc = a * (kind @ torch.arange(3.0)) + 2 * count + only
                pyro.sample("y", dist.Normal(loc, 0.8), obs=y)

    y = torch.stack([Y, Y + 2])
    guide = AutoIAF(model, start="init", init_scale=1e-4)
    guide.setup(y)
    a = guide.median()["a"]
    draws = guide.sample_posterior(4000, y, discrete=True)
    assert draws["only"].shape == (4000, 2, 1)
    assert draws["kind"].shape == (4000, 2, 5, 3)
    assert draws["count"].shape == (4000, 2, 5)
    table = torch.stack(
        [
            shares[k].log()
            + dist.Binomial(3, 0.4).log_prob(torch.tensor(float(n)))
            + dist.Normal(a * k + 2 * n, 0.8).log_prob(y)
            for k, n in itertools.product(range(3), range(4))
        ],
        -1,
    )
    exact = table.softmax(-1).reshape(2, 5, 3, 4)
    assert_close(draws["kind"].mean(0), exact.sum(-1), rtol=0, atol=0.04)
    assert_close(draws["count"].mean(0), exact.sum(-2) @ torch.arange(4.0), rtol=0, atol=0.08)
    best = guide.sample_posterior(10, y, discrete="map")
    flat = table.argmax(-1)
    assert torch.equal(best["kind"].argmax(-1), (flat // 4).expand(10, 2, 5))
    assert torch.equal(best["count"], (flat % 4).double().expand(10, 2, 5))


def test_masked_rows_are_drawn_from_their_prior():
    def model(y):
        pyro.sample("a", dist.Normal(1.0, 0.5))
        with pyro.plate("rows", 5), pyro.poutine.mask(mask=torch.arange(5) < 2):
            z = pyro.sample("z", dist.Bernoulli(0.9))
            pyro.sample("y", dist.Normal(3 * z, 0.8), obs=y)

    guide = AutoIAF(model, start="init")
    drawn = guide.sample_posterior(4000, Y, discrete=True)["z"]
    assert_close(drawn[:, 2:].mean(0), torch.full((3,), 0.9), rtol=0, atol=0.03)
    assert (guide.sample_posterior(5, Y, discrete="map")["z"][:, 2:] == 1).all()


def test_a_latent_that_is_observed_later_is_not_drawn():
    def model(y, z=None):
        a = pyro.sample("a", dist.Normal(1.0, 0.5))
        with pyro.plate("rows", 5):
            z = pyro.sample("z", dist.Bernoulli(0.9), obs=z)
            pyro.sample("y", dist.Normal(a * z, 0.8), obs=y)

    guide = AutoIAF(model, start="init")
    guide.setup(Y)
    assert guide.sample_posterior(4, Y, torch.ones(5), discrete=True).keys() == {"a"}
