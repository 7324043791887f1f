import dataclasses
import math
import sys
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from example_models import MODELS, make, one_latent, plates, subsampled_data, two_sites
from pyro import poutine
from pyro.distributions import constraints
from pyro.infer.autoguide import AutoDelta, AutoMultivariateNormal, AutoNormal
from pyro.poutine.util import site_is_subsample
from torch.testing import assert_close

from pyro_iaf import AutoIAF, diagnose, fit, to_arviz
from pyro_iaf.models.weighted import WeightedParticles

# The model "one latent": z ~ N(0, 1), y = 1 ~ N(z, 0.5).
MEAN, SD = 0.8, math.sqrt(0.2)
EVIDENCE = dist.Normal(0.0, math.sqrt(1.25)).log_prob(torch.tensor(1.0)).item()


def normal_guide(loc=MEAN, scale=SD):
    return lambda *args: pyro.sample("z", dist.Normal(loc, scale))


def standard(name="z"):
    return pyro.sample(name, dist.Normal(0.0, 1.0))


@pytest.fixture(params=MODELS)
def case(request):
    return make(request.param, hidden_dims=[16], start="init")


# How good a guide is


def test_the_posterior_is_good():
    found = diagnose(one_latent, normal_guide())
    assert found.elbo == pytest.approx(EVIDENCE)
    assert found.iw_elbo == pytest.approx(EVIDENCE)
    assert found.elbo_se < 1e-9
    assert found.iw_elbo_se < 1e-6
    assert found.khat < 0.5
    assert found.ess == pytest.approx(4000)
    assert found.log_weights.shape == (4000,)
    shift, factor = found.sites["z"]
    assert abs(shift) < 1e-6
    assert factor == pytest.approx(1.0, abs=1e-3)  # S instead of S - 1
    assert str(found).startswith("Good: ")
    assert "nats" in str(found)


def test_weights_that_are_all_the_same_are_good():
    found = diagnose(two_sites, two_sites)
    assert found.elbo == 0.0
    assert found.ess == pytest.approx(4000)
    assert str(found).startswith("Good: ")


def test_a_narrow_guide_is_not_to_be_trusted_and_its_worst_site_comes_first():
    def model():
        for name in ("fine", "narrow", "other"):
            standard(name)

    def guide():
        standard("fine")
        pyro.sample("narrow", dist.Normal(0.0, 0.2))
        standard("other")

    found = diagnose(model, guide)
    assert found.khat > 0.7
    assert found.worst_sites[0] == "narrow"
    assert found.sites["narrow"][1] > 1.3  # it ought to be 5; the tails aren't seen
    assert found.ess < 2000
    lines = str(found).splitlines()
    assert lines[0].startswith("Not to be trusted: ")
    assert "site 'narrow'" in lines[4]


def test_between_them_a_guide_is_usable():
    # 4,000 draws tell k to 0.12, and the range from 0.5 to 0.7 is narrow: so k is set.
    found = dataclasses.replace(diagnose(one_latent, normal_guide(scale=0.8 * SD)), khat=0.6)
    assert str(found).startswith("Usable: ")
    assert "resample=True" in str(found)


def diagnosis_with(**changes):
    """That of a guide near the posterior, with other numbers."""
    return dataclasses.replace(diagnose(one_latent, normal_guide(scale=1.02 * SD)), **changes)


@pytest.mark.parametrize(
    ("changes", "verdict"),
    [
        ({}, "good"),
        ({"khat": 0.9}, "good"),  # the weights hardly differ, so their tail says nothing
        ({"khat": 0.9, "ess": 3000.0}, "not to be trusted"),
        ({"khat": 0.6, "ess": 3000.0}, "usable"),
        ({"khat": 0.3, "ess": 3000.0}, "good"),
        ({"khat": 0.3, "elbo": EVIDENCE - 0.3}, "usable"),  # half of a mode may be missing
        ({"sites": {"z": (0.12, 1.0)}}, "usable"),
        ({"sites": {"z": (0.0, 0.88)}}, "usable"),
        ({"spread_khat": 1.1}, "good"),  # far draws that cost next to nothing add nothing
        ({"spread_khat": 1.1, "elbo": EVIDENCE - 0.02}, "usable"),
        ({"is_point": True}, "none"),
        ({"improper": ("z",)}, "none"),
    ],
)
def test_a_verdict_reads_all_numbers_together(changes, verdict):
    found = diagnosis_with(**changes)
    assert found.verdict == verdict
    assert str(found).lower().startswith("no verdict" if verdict == "none" else verdict)


def test_a_verdict_that_wavers_is_the_worse_one():
    """At a guide whose k-hat is one half, the error of k-hat decides."""
    ratio = 1 / math.sqrt(2)  # the variance of the weights is infinite from here on
    for seed in range(4):
        pyro.set_rng_seed(seed)
        found = diagnose(one_latent, normal_guide(scale=ratio * SD), search=False)
        assert len(found.log_weights) == 32_000 if found.wavers else 4000
        assert found.wavers == (not found.is_decided)
    near = dataclasses.replace(found, khat=0.69, wavers=False)
    assert near.verdict == "usable"
    assert dataclasses.replace(near, wavers=True).verdict == "not to be trusted"
    assert "k-hat 0.69 +/- 0." in str(dataclasses.replace(near, wavers=True))
    sure = diagnose(one_latent, normal_guide(scale=1.1 * SD), search=False)
    assert sure.is_decided
    assert not sure.wavers
    assert len(sure.log_weights) == 4000


def test_where_weights_hardly_move_anything_a_tail_is_no_reason_for_distrust():
    good = diagnose(one_latent, normal_guide(scale=1.02 * SD), search=False)
    assert dataclasses.replace(good, khat=0.9, ess=3660.0).verdict == "usable"
    assert dataclasses.replace(good, khat=0.9, ess=2000.0).verdict == "not to be trusted"
    far = dataclasses.replace(good, khat=0.9, ess=3660.0, sites={"z": (0.2, 1.0)})
    assert far.verdict == "not to be trusted"


def three_normals(shares):
    normals = dist.Normal(torch.tensor([-4.0, 0.0, 4.0]), 1.0)
    return dist.MixtureSameFamily(dist.Categorical(torch.tensor(shares)), normals)


def test_shares_that_are_off_are_not_good_although_means_and_spreads_are_right():
    def model():
        z = pyro.sample("z", dist.Normal(0.0, 5.0))
        prior = dist.Normal(0.0, 5.0).log_prob(z)
        pyro.factor("target", three_normals([0.25, 0.5, 0.25]).log_prob(z) - prior)

    found = diagnose(model, lambda: pyro.sample("z", three_normals([0.31, 0.38, 0.31])))
    assert found.khat < 0.5
    assert found.largest_change < 0.1
    assert found.moved["z"] == pytest.approx(0.06, abs=0.02)
    assert found.verdict == "usable"
    assert "and moves 6% of the draws" in str(found) or "and moves 5% of the draws" in str(found)
    right = diagnose(model, lambda: pyro.sample("z", three_normals([0.25, 0.5, 0.25])))
    assert right.share_moved < 0.01


def test_more_draws_tell_the_tail_of_weights_that_hardly_differ():
    def model():
        pyro.sample("u", dist.Normal(0.0, 1.0))
        standard()

    def guide():
        u = pyro.sample("u", dist.Normal(0.0, 1.0))
        pyro.sample("z", dist.Normal(0.0, torch.where(u > 2.3, 0.8, 1.0 - 0.001 * u.tanh())))

    found = diagnose(model, guide)
    assert found.hardly_differ
    assert len(found.log_weights) == 32_000
    assert len(diagnose(one_latent, normal_guide(scale=1.02 * SD)).log_weights) == 4000


def test_few_draws_far_out_make_tails_too_heavy():
    # One draw in fifty is of a distribution without a variance, so the guide has none either.
    far = dist.StudentT(torch.tensor([200.0, 1.0]), MEAN, torch.tensor([SD, 2 * SD]))
    guide = dist.MixtureSameFamily(dist.Categorical(torch.tensor([0.98, 0.02])), far)
    for _ in range(5):
        found = diagnose(one_latent, lambda: pyro.sample("z", guide))
        assert found.spread_khat > 1
        assert found.verdict == "usable"
        assert "tails are heavier" in str(found)
        assert diagnose(one_latent, normal_guide(scale=1.1 * SD)).spread_khat < 1


@pytest.mark.parametrize(("loc", "scale"), [(1.5, 1.2), (3.0, 1.5)])
def test_a_guide_that_is_off_is_not_good_however_light_its_tails(loc, scale):
    def model():
        pyro.sample("z", dist.Normal(0.0, 1.0))

    found = diagnose(model, lambda: pyro.sample("z", dist.Normal(loc, scale)))
    assert found.khat < 0.5
    assert str(found).startswith("Usable: ")


def test_estimates_lie_within_their_standard_errors():
    # KL(guide, posterior), in closed form
    ratio = 1.2
    divergence = math.log(1 / ratio) + (ratio**2 - 1) / 2
    guide = normal_guide(scale=ratio * SD)
    runs = [diagnose(one_latent, guide, num_samples=500, search=False) for _ in range(200)]
    for name, truth in (("elbo", EVIDENCE - divergence), ("iw_elbo", EVIDENCE)):
        values = torch.tensor([getattr(run, name) for run in runs])
        errors = torch.tensor([getattr(run, f"{name}_se") for run in runs])
        assert (values - truth).abs().max() < 4.5 * errors.max()
        assert values.std() == pytest.approx(errors.mean().item(), rel=0.25)  # 5 se of 200 runs
    ess = [run.ess for run in runs]
    squares = ratio**2 / math.sqrt(2 * ratio**2 - 1)  # E w^2 / (E w)^2
    assert sum(ess) / len(ess) == pytest.approx(500 / squares, rel=0.02)


def of_one_size():
    """Like subsampled_data, but it can't be run on all rows."""
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("data", 10, subsample_size=4) as i:
        y = torch.linspace(0, 1, 10)[i]
        pyro.sample("y", dist.Normal(z, 0.5), obs=y + 0 * torch.zeros(4))


def test_the_standard_error_knows_of_subsamples():
    guide = normal_guide(0.5, 0.15)
    runs = [diagnose(of_one_size, guide, num_samples=200) for _ in range(10)]
    assert runs[0].subsampled
    assert "subsamples its data" in str(runs[0])
    elbos = torch.tensor([run.elbo for run in runs])
    assert elbos.std() < 2 * max(run.elbo_se for run in runs)


@pytest.mark.parametrize(("size", "threshold"), [(100, 0.5), (1000, 2 / 3), (4000, 0.7)])
def test_few_draws_lower_the_threshold(size, threshold):
    found = diagnose(one_latent, normal_guide(scale=1.4 * SD), num_samples=size)
    assert found.threshold == pytest.approx(threshold)
    assert f"below {threshold:.2f} usable" in str(found)


@pytest.mark.parametrize("size", [1, 2, 5])
def test_a_few_draws_bring_no_verdict(size):
    found = diagnose(one_latent, normal_guide(scale=1.1 * SD), num_samples=size)
    assert str(found).startswith("No verdict: ")
    assert math.isfinite(found.elbo)


def test_draws_without_a_density_are_counted():
    def model():
        z = standard()
        pyro.factor("f", torch.where(z < -1, -math.inf, -0.5 * z**2))

    found = diagnose(model, standard, num_samples=1000)
    lost = (~found.log_weights.isfinite()).sum().item()
    assert 100 < lost < 220
    assert f"{lost} draws where the model has no finite density" in str(found)
    assert found.elbo == -math.inf
    truth = math.log(dist.Normal(0.0, 1.0).cdf(torch.tensor(math.sqrt(2))) / math.sqrt(2))
    assert abs(found.iw_elbo - truth) < 4 * found.iw_elbo_se
    assert math.isfinite(found.khat)
    nowhere = diagnose(lambda: pyro.factor("f", standard() - math.inf), standard)
    assert nowhere.ess == 0
    assert "4000 draws where" in str(nowhere)


def test_where_a_matrix_has_no_cholesky_factor_there_is_no_density():
    def model():
        cov = torch.eye(2) * pyro.sample("z", dist.Normal(1.0, 1.0))[..., None, None]
        pyro.sample("y", dist.MultivariateNormal(torch.zeros(2), cov), obs=torch.ones(2))

    found = diagnose(model, normal_guide(1.0, 0.5), num_samples=500)
    assert 0 < (~found.log_weights.isfinite()).sum() < 50


@pytest.mark.parametrize("Auto", [AutoNormal, AutoMultivariateNormal, AutoIAF, AutoDelta])
def test_it_takes_pyros_guides_and_ours(Auto):
    found = diagnose(plates, Auto(plates), num_samples=200)
    assert set(found.sites) == {"mu", "z"}
    assert len(str(found).splitlines()) == 7 - found.is_point  # which is not searched


def test_it_takes_arguments_by_position_and_by_keyword():
    model, data = (make() for make in MODELS["arguments"])
    guide = AutoIAF(model)
    diagnoses = [
        diagnose(model, guide, data, {"noise": 0.5}, num_samples=300),
        diagnose(model, guide, data[:1], {"y": data[1], "noise": 0.5}, num_samples=300),
    ]
    assert diagnoses[0].iw_elbo == pytest.approx(diagnoses[1].iw_elbo, abs=0.2)
    with pytest.raises(ValueError, match="num_samples should be an int"):
        diagnose(model, guide, data, num_samples=0)


# Resampled draws


def test_resampled_draws_of_a_guide_are_nearer_to_the_posterior():
    guide = AutoIAF(one_latent, init_loc_fn=lambda site: torch.tensor(0.5), init_scale=0.8)
    plain, better = (guide.sample_posterior(10_000, resample=r)["z"] for r in (False, True))
    assert plain.mean().item() == pytest.approx(0.5, abs=0.05)
    assert better.shape == (10_000,)
    assert better.mean().item() == pytest.approx(MEAN, abs=0.02)  # 4 se
    assert better.std().item() == pytest.approx(SD, abs=0.02)


def test_resampling_warns_where_it_cannot_repair():
    guide = AutoIAF(one_latent, init_scale=0.05)
    with pytest.warns(UserWarning, match="above 0.7: resampled draws"):
        assert guide.sample_posterior(100, resample=True)["z"].shape == (100,)


# Draws for ArviZ


@pytest.fixture
def arviz():
    return pytest.importorskip("arviz")


quiet = pytest.mark.filterwarnings("ignore::FutureWarning")


@quiet
def test_the_log_likelihood_is_that_of_the_data_at_each_draw(case, arviz):
    guide, model, arguments = case
    data = to_arviz(model, guide, arguments, num_samples=3)
    given = {}
    if model is subsampled_data:
        given["data"] = torch.as_tensor(data.observed_data["y"].values * 9).round().long()
    for k in range(3):
        for name in guide(*arguments):
            given[name] = torch.as_tensor(data.posterior[name].values[0, k])
            assert given[name].shape == guide.prototype_trace.nodes[name]["value"].shape
        trace = poutine.trace(poutine.condition(model, given)).get_trace(*arguments)
        trace.compute_log_prob(lambda _, site: not site_is_subsample(site))
        observed = {"y", "v"} & trace.nodes.keys() - given.keys()
        assert observed == set(data.get("log_likelihood", ()))
        for name in observed:
            found = torch.as_tensor(data.log_likelihood[name].values[0, k]).sum()
            site = trace.nodes[name]
            assert_close(found, site["log_prob_sum"].detach() / site["scale"], check_dtype=False)


def school(x, y=None):
    mu = standard("mu")
    with pyro.plate("schools", 4):
        effect = pyro.sample("effect", dist.Normal(mu, 1.0))
        pyro.deterministic("exp_effect", effect.exp())
        pyro.factor("f", -effect)
    with pyro.plate("pupils", 5, dim=-2), pyro.plate("schools again", 4):
        means = torch.stack([effect, effect + x], -1)
        pyro.sample("y", dist.Normal(means, 0.5).to_event(1), obs=y)


def school_guide(x, y=None):
    pyro.sample("mu", dist.Normal(0.5, 0.3))
    with pyro.plate("schools", 4):
        pyro.sample("effect", dist.Normal(1.0, 0.2))


@pytest.fixture
def school_data(arviz):
    y = torch.randn(5, 4, 2) + 1
    return y, to_arviz(school, school_guide, (torch.tensor(2.0),), {"y": y}, num_samples=2000)


@quiet
def test_dimensions_are_plates(school_data):
    _, data = school_data
    dims = {
        group: {name: values.dims[2:] for name, values in data[group].items()}
        for group in ("posterior", "posterior_predictive", "log_likelihood")
    }
    y = {"y": ("pupils", "schools again", "y_dim_2")}
    effects = {"effect": ("schools",), "exp_effect": ("schools",)}
    assert dims == {
        "posterior": {"mu": (), **effects},
        "posterior_predictive": y,
        "log_likelihood": y,
    }
    assert data.observed_data["y"].dims == y["y"]
    assert data.posterior["mu"].shape == (1, 2000)


@quiet
def test_values_are_those_by_hand(school_data):
    y, data = school_data
    effect = torch.as_tensor(data.posterior["effect"].values[0])
    assert_close(torch.as_tensor(data.posterior["exp_effect"].values[0]), effect.exp())
    assert_close(torch.as_tensor(data.observed_data["y"].values), y)
    means = torch.stack([effect, effect + 2], -1).unsqueeze(1)
    each = torch.as_tensor(data.log_likelihood["y"].values[0])
    assert_close(each, dist.Normal(means, 0.5).log_prob(y))
    predicted = torch.as_tensor(data.posterior_predictive["y"].values[0])
    errors = (predicted - means).mean((0, 1, 2))
    assert errors.abs().max() < 0.01  # 4 se of 40,000 draws
    assert (predicted - means).std().item() == pytest.approx(0.5, abs=0.01)


@quiet
@pytest.mark.filterwarnings("ignore::UserWarning")  # ArviZ's on high k-hats
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Matplotlib's on ArviZ
def test_arviz_can_work_with_it(school_data, arviz):
    pytest.importorskip("matplotlib").use("Agg")
    _, data = school_data
    summary = arviz.summary(data, var_names=["mu", "effect"])
    assert list(summary.index) == ["mu", *(f"effect[{i}]" for i in range(4))]
    assert summary["mean"]["effect[2]"] == pytest.approx(1.0, abs=0.02)  # 4 se of 2,000 draws
    assert math.isfinite(arviz.loo(data).elpd_loo)
    assert len(arviz.plot_trace(data, var_names=["mu"]).flatten()) == 2


@quiet
def test_resampled_draws_go_to_arviz(arviz):
    data = to_arviz(one_latent, normal_guide(0.5, 0.8), num_samples=5000, resample=True)
    z = torch.as_tensor(data.posterior["z"].values)
    assert z.mean().item() == pytest.approx(MEAN, abs=0.03)  # 4 se
    assert z.std().item() == pytest.approx(SD, abs=0.03)


@quiet
def test_one_number_may_be_all_the_data_of_a_plate(arviz):
    def model():
        with pyro.plate("data", 3):
            pyro.sample("y", dist.Normal(standard(), 1.0), obs=torch.tensor(1.0))

    def guide():
        with pyro.plate("data", 3):
            standard()

    data = to_arviz(model, guide, num_samples=10)
    assert data.log_likelihood["y"].shape == (1, 10, 3)


def test_without_arviz_the_install_line_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "arviz", None)
    with pytest.raises(ImportError, match=r"pip install 'pyro_iaf\[arviz\]'"):
        to_arviz(one_latent, normal_guide())


def test_a_point_gets_no_verdict():
    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=torch.tensor(1.0))

    text = str(diagnose(model, AutoDelta(model), num_samples=100))
    assert text.startswith("No verdict: the guide is a point")


def test_a_perfect_guide_is_good_whatever_its_rounding():
    y = torch.randn(5)

    def model():
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("n", 5):
            pyro.sample("y", dist.Normal(w, 1.0), obs=y)

    torch.set_default_dtype(torch.float32)
    y = y.float()
    guide = AutoIAF(model)
    for _ in range(20):
        found = diagnose(model, guide)
        assert found.khat < 0.5
        assert str(found).startswith("Good: ")
    assert len(guide.sample_posterior(100, resample=True)["w"]) == 100


# Large log densities


def a_constant_inside(size):
    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.factor("f", torch.as_tensor(size) - 1.5 * z**2)

    return model, 0.0, 0.5


def a_constant_beside(size):
    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.factor("constant", torch.as_tensor(size))
        pyro.factor("f", -1.5 * z**2)

    return model, 0.0, 0.5


def rows(size):
    num_rows = min(round(size / 2.5), 2_000)
    y, share = 3 * torch.randn(num_rows) + 10, size / 2.5 / num_rows

    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1000.0))
        with pyro.plate("rows", num_rows), poutine.scale(scale=share):
            pyro.sample("y", dist.Normal(z, 3.0), obs=y)

    return model, y.mean().item(), 3 / math.sqrt(num_rows * share)


def rows_of_an_event(size):
    y = 3 * torch.randn(min(round(size / 2.5), 2_000)) + 10

    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1000.0))
        pyro.sample("y", dist.Normal(z, 3.0).expand(y.shape).to_event(1), obs=y)

    return model, y.mean().item(), 3 / math.sqrt(len(y))


def far_data(size):
    y = math.sqrt(2 * size / 10) * torch.tensor([1.0, -1.0]).repeat(5)

    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", 10):
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    return model, 0.0, 1 / math.sqrt(11)


LARGE = {
    "a constant inside": a_constant_inside,
    "a constant beside": a_constant_beside,
    "rows": rows,
    "rows of an event": rows_of_an_event,
    "far data": far_data,
}


# Rows of an event have no scale, and no more than 2,000 of them are made, for 1e4 and for 1e8.
SIZES = {
    f"{name}-{size:.0e}": (make_large, size)
    for name, make_large in LARGE.items()
    for size in (1e2, 1e4, 1e5, 1e6, 1e7, 1e8)
    if name != "rows of an event" or size <= 1e4
}


@pytest.fixture(params=[torch.float32, torch.float64], ids=["single", "double"])
def dtype(request):
    torch.set_default_dtype(request.param)
    return request.param


@pytest.mark.parametrize(("make_large", "size"), SIZES.values(), ids=SIZES)
def test_no_guide_that_is_wrong_is_good_however_large_the_density(make_large, size, dtype):
    model, mean, sd = make_large(size)
    for loc, scale in [(mean, sd / 5), (mean + 2 * sd, sd), (mean - 2 * sd, sd)]:
        guide = normal_guide(torch.tensor(loc), torch.tensor(scale))
        for num_samples in (100, 1000):
            found = str(diagnose(model, guide, num_samples=num_samples, search=False))
            assert found.startswith(("Usable: ", "Not to be trusted: ", "No verdict: log dens"))


@pytest.mark.parametrize(("make_large", "size"), SIZES.values(), ids=SIZES)
def test_a_perfect_guide_is_good_where_densities_are_known(make_large, size, dtype):
    model, mean, sd = make_large(size)
    guide = normal_guide(torch.tensor(mean), torch.tensor(sd))
    found = diagnose(model, guide, num_samples=1000, search=False)
    known = found.rounding < 0.1
    assert known or (dtype == torch.float32 and size >= 1e6)
    told = "Good: " if known else "No verdict: log densities are so large"
    assert str(found).startswith(told)
    assert not known or found.khat < 0.1


@pytest.mark.parametrize("num_rows", [3000, 30_000])
def test_on_many_rows_a_perfect_guide_is_good_in_single_precision(num_rows):
    torch.set_default_dtype(torch.float32)
    for seed in range(3):
        y = 3 * torch.randn(num_rows) + 10 * seed

        def model(y=y):
            z = pyro.sample("z", dist.Normal(0.0, 1000.0))
            with pyro.plate("rows", len(y)):
                pyro.sample("y", dist.Normal(z, 3.0), obs=y)

        pyro.clear_param_store()
        guide = AutoIAF(model, num_flows=1, hidden_dims=[4])
        found = diagnose(model, guide, num_samples=1000, search=False)
        assert str(found).startswith("Good: ")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            guide.sample_posterior(100, resample=True)


def test_resampling_warns_where_rounding_hides_the_weights():
    torch.set_default_dtype(torch.float32)
    guide = AutoIAF(a_constant_inside(1e8)[0], start="init")
    with pytest.warns(UserWarning, match="rounding error is 12 nats") as warned:
        guide.sample_posterior(100, resample=True)
    assert warned[0].filename == __file__


def test_few_draws_are_counted_and_no_others_called_few():
    few = diagnose(one_latent, normal_guide(), num_samples=24, search=False)
    assert "24 of 24 draws have a finite weight, and at least 25" in str(few)
    hopeless = diagnose(one_latent, normal_guide(0.0, 1e4), search=False)
    assert str(hopeless).startswith("Not to be trusted: ")

    def coin(share):
        return lambda: pyro.sample("k", dist.Bernoulli(share))

    assert str(diagnose(coin(0.5), coin(0.4))).startswith("Usable: ")
    rare = diagnose(coin(1e-2), coin(5e-4))  # a few draws of a weight that none else has
    assert "too many weights are equal" in str(rare)


# Priors without a total


IMPROPER = {
    "nothing else": lambda z: None,
    "a constant likelihood": lambda z: pyro.factor("f", torch.tensor(3.0)),
    "data of other numbers": lambda z: pyro.sample(
        "y", dist.Normal(z[..., :2], 1.0).to_event(1), obs=torch.zeros(2)
    ),
    "a slope of zero": lambda z: pyro.factor("f", 0.0 * z.sum(-1)),
}


@pytest.mark.parametrize("observe", IMPROPER.values(), ids=IMPROPER)
def test_a_flat_prior_that_nothing_holds_is_told(observe):
    def model():
        observe(pyro.sample("z", dist.ImproperUniform(constraints.real_vector, (), (3,))))

    guide = AutoIAF(model, start="init")
    told = "'z' has a flat prior without ends"
    with pytest.warns(UserWarning, match=told) as warned:
        fit(model, guide, num_steps=5, progress=False)
    assert warned[0].filename == __file__
    with pytest.warns(UserWarning, match=told):
        found = str(diagnose(model, guide))
    assert found.startswith("No verdict: the posterior is improper")


@pytest.mark.parametrize("support", [constraints.interval(0.0, 2.0), constraints.unit_interval])
def test_a_flat_prior_between_ends_is_proper(support):
    def model():
        pyro.sample("z", dist.ImproperUniform(support, (), ()))

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = diagnose(model, AutoIAF(model, start="init"))
    assert not found.improper


def test_a_guide_whose_draws_the_model_excludes_is_not_good():
    def model():
        a = pyro.sample("a", dist.Uniform(0.0, 1.0))
        pyro.factor("excluded", torch.where(a < 0.2, -torch.inf, 0.0))

    found = diagnose(model, lambda: pyro.sample("a", dist.Uniform(0.0, 1.0)))
    assert not str(found).startswith("Good: ")
    assert "draws where the model has no finite density" in str(found)


def test_what_sites_determine_is_no_data_for_arviz():
    pytest.importorskip("arviz", reason="it takes pip install '.[arviz]'")

    def model(y):
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        b = pyro.deterministic("b", 2 * a)
        with pyro.plate("n", len(y)):
            pyro.sample("y", dist.Normal(b, 1.0), obs=y)

    guide = AutoIAF(model)
    data = torch.ones(5)
    guide.setup(data)
    found = to_arviz(model, guide, (data,), num_samples=100)
    a, b = (torch.as_tensor(found.posterior[name].values) for name in "ab")
    assert_close(b, 2 * a)
    assert found.posterior_predictive["y"].shape == (1, 100, 5)
    assert found.log_likelihood["y"].shape == (1, 100, 5)


@pytest.mark.parametrize("is_one", [lambda b: b.bool(), lambda b: b == 1, lambda b: b != 0])
def test_what_is_discrete_is_not_rounded(is_one):
    def model():
        b = pyro.sample("b", dist.Bernoulli(0.3))
        loc = torch.where(is_one(b), 3.0, -1.0)
        pyro.sample("y", dist.Normal(loc, 2.0), obs=torch.tensor(1.5))

    log_p = dist.Normal(torch.tensor([-1.0, 3.0]), 2.0).log_prob(torch.tensor(1.5))
    posterior = (torch.tensor([0.7, 0.3]).log() + log_p).softmax(0)[1]
    found = diagnose(model, lambda: pyro.sample("b", dist.Bernoulli(posterior)), search=False)
    assert str(found).startswith("Good: ")


def test_looking_for_rounding_takes_no_random_numbers_and_no_more_memory(monkeypatch):
    particles = WeightedParticles(one_latent, normal_guide(), (), {})
    monkeypatch.setattr("pyro_iaf.models.particles.MAX_NUMBERS", 3 * particles.num_numbers)
    sizes = []
    run_guide = WeightedParticles.run_guide

    def spy(self, size):
        sizes.append(size)
        return run_guide(self, size)

    monkeypatch.setattr(WeightedParticles, "run_guide", spy)
    before = torch.get_rng_state()
    particles._measured_rounding()
    assert torch.equal(torch.get_rng_state(), before)
    assert sizes == [3]


@pytest.mark.parametrize(("rate", "num_rows"), [(20.0, 1000), (200.0, 100_000), (5000.0, 10_000)])
def test_rounding_that_all_rows_share_is_found(rate, num_rows):
    """That of a rate's logarithm counts as often as there are counts."""

    def diagnosed(dtype):
        torch.set_default_dtype(dtype)
        y = torch.poisson(torch.full((num_rows,), rate))
        total = y.double().sum()
        loc, scale = (total / num_rows).log().to(dtype), total.rsqrt().to(dtype)

        def model():
            z = pyro.sample("z", dist.Normal(5.0, 5.0))
            with pyro.plate("rows", num_rows):
                pyro.sample("y", dist.Poisson(z.exp()), obs=y)

        def guide():
            pyro.sample("z", dist.Normal(loc, scale))

        return diagnose(model, guide, num_samples=500, search=False)

    assert diagnosed(torch.float64).rounding < 1e-6
    is_told = "rounding error is" in str(diagnosed(torch.float32))
    assert is_told == (rate > 20)
