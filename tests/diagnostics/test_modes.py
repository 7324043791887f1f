"""The search for modes that a guide misses."""

import math
import warnings
from dataclasses import replace

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoDelta, AutoNormal, AutoStructured
from torch.testing import assert_close

from pyro_iaf import AutoHierarchicalIAF, AutoIAF, diagnose, fit
from pyro_iaf.diagnostics import modes, shares
from pyro_iaf.diagnostics.modes import Mode, search_modes
from pyro_iaf.models.log_joint import LogJoint
from pyro_iaf.models.weighted import WeightedParticles

LOCS = torch.tensor([[-3.0, -3.0], [3.0, 3.0]], dtype=torch.float64)
SCALES = torch.tensor([0.4, 0.8], dtype=torch.float64)


def two_modes(weights=(0.3, 0.7)):
    """A mixture of two normals, written by its density."""

    def model():
        prior = dist.Normal(0.0, 5.0).expand([2]).to_event(1)
        x = pyro.sample("x", prior)
        parts = dist.Normal(LOCS, SCALES.unsqueeze(-1)).to_event(1).log_prob(x.unsqueeze(-2))
        target = (torch.tensor(weights).log() + parts).logsumexp(-1)
        pyro.factor("target", target - prior.log_prob(x))

    return model


def guide_at(k, scale=None):
    """A guide that has one of the modes, or an ellipse of another scale there."""

    def guide():
        own = SCALES[k] if scale is None else scale
        pyro.sample("x", dist.Normal(LOCS[k], own).to_event(1))

    return guide


def searched(model, guide, *args, num_evaluations=2000):
    particles = WeightedParticles(model, guide, args, {})
    return search_modes(particles, particles.weighted(2000), num_evaluations)


# What is found


def factors(scale=0.2):
    """Data that are a product of a loading and factors: either sign of both is as likely."""
    torch.manual_seed(0)
    w, f = torch.tensor([1.0, -1.5]), torch.randn(24)
    y = w.unsqueeze(-1) * f + scale * torch.randn(2, 24)

    def model():
        mu = pyro.sample("mu", dist.Normal(torch.zeros(2), 2.0).to_event(1))
        w = pyro.sample("w", dist.Normal(torch.zeros(2), 2.0).to_event(1))
        f = pyro.sample("f", dist.Normal(torch.zeros(24), 1.0).to_event(1))
        mean = mu.unsqueeze(-1) + w.unsqueeze(-1) * f.unsqueeze(-2)
        pyro.sample("y", dist.Normal(mean, scale).to_event(2), obs=y)

    return model


def test_a_mode_that_differs_by_signs_is_weighed_in_many_skewed_dimensions():
    model = factors()
    guide = AutoIAF(model, num_components=1)
    fit(model, guide, num_steps=300, progress=False, seed=0)
    found = diagnose(model, guide)
    assert found.share_missed == pytest.approx(0.5, abs=0.05)
    assert found.verdict == "modes missing"
    assert "signs" in found.modes[0].reached or "prior" in found.modes[0].reached


def test_a_peak_whose_mass_is_not_known_forbids_good(monkeypatch):
    monkeypatch.setattr(shares, "UNSURE", 0.0)
    found = searched(two_modes((0.5, 0.5)), guide_at(0))
    assert not found.is_sure
    assert "how much mass 1 elsewhere hold is not known" in found.summary


def test_where_no_climb_ends_nothing_is_known():
    def uphill():
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.factor("up", 2 * z.square().sum(-1))

    found = searched(uphill, lambda: pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1)))
    assert not found.is_sure
    assert "none ended, so nothing is known of other modes" in found.summary


def test_a_model_that_can_be_differentiated_once_is_searched():
    def model():
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 2.0).to_event(1))
        away = torch.cdist(z.unsqueeze(-2), torch.tensor([[2.0, 2.0], [-2.0, -2.0]])).squeeze(-2)
        pyro.factor("target", (-8 * away.square()).logsumexp(-1))

    found = searched(
        model, lambda: pyro.sample("z", dist.Normal(torch.ones(2) * 1.94, 0.25).to_event(1))
    )
    assert sum(mode.share for mode in found.modes) == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize("num_sites", [2, 12])
def test_all_sites_have_their_signs_changed_however_many_latents_there_are(num_sites):
    def model():
        for k in range(num_sites):
            pyro.sample(f"x_{k}", dist.Normal(torch.zeros(10), 1.0).to_event(1))

    particles = WeightedParticles(model, AutoNormal(model), (), {})
    searcher = modes._Searcher(particles, particles.weighted(100), modes.AT_ONCE)
    groups = [group.tolist() for group in searcher._groups()]
    assert len(groups) == modes.AT_ONCE.flipped
    for k in range(num_sites):
        assert list(range(10 * k, 10 * k + 10)) in groups


@pytest.mark.parametrize("k", [0, 1])
def test_the_share_and_the_place_of_a_mode_are_found(k):
    weights = (0.3, 0.7)
    found = diagnose(two_modes(weights), guide_at(k))
    (mode,) = found.modes
    assert abs(mode.share - weights[1 - k]) < 3 * mode.share_se < 0.1
    assert_close(mode.sites["x"], LOCS[1 - k], atol=0.05, rtol=0.0)
    assert found.khat < 0.5  # by its own draws the guide is perfect
    assert found.verdict == "modes missing"
    assert found.share_missed == mode.share
    first, *rest = str(found).splitlines()
    assert first.startswith(f"Modes missing: about {mode.share:.0%} of the posterior's mass is")
    assert f"  {mode}" in rest
    assert "near x = (" in str(mode)


def test_without_a_search_nobody_knows():
    found = diagnose(two_modes(), guide_at(1), search=False)
    assert found.verdict == "good"
    assert not found.modes
    assert "search" not in str(found)


def test_a_mode_of_little_mass_counts_where_it_changes_a_spread():
    found = diagnose(two_modes((0.02, 0.98)), guide_at(1))
    (mode,) = found.modes
    assert abs(mode.share - 0.02) < 0.005
    # It is more than seven standard deviations away, so spreads are too small by a third.
    assert 0.3 < mode.change < 0.5
    assert found.verdict == "usable"
    assert "2% of the posterior's mass is elsewhere" in str(found)
    near = replace(mode, change=0.01)
    assert replace(found, modes=[near]).verdict == "good"


def test_a_guide_with_both_modes_misses_nothing():
    def guide():
        parts = dist.Normal(LOCS, SCALES.unsqueeze(-1)).to_event(1)
        of_both = dist.MixtureSameFamily(dist.Categorical(torch.tensor([0.3, 0.7])), parts)
        pyro.sample("x", of_both)

    found = diagnose(two_modes(), guide)
    assert found.verdict == "good"
    assert not found.modes


@pytest.mark.parametrize("scale", [0.3, 1.5])
def test_a_guide_that_is_off_in_its_own_mode_misses_no_other(scale):
    found = diagnose(two_modes((1e-9, 1.0)), guide_at(1, scale))
    assert found.verdict in ("usable", "not to be trusted")
    assert not found.modes


def test_signs_and_permutations_are_tried():
    def model():
        loc = pyro.sample("loc", dist.Normal(0.0, 50.0).expand([2]).to_event(1))
        a, b = loc.unbind(-1)
        pyro.factor("apart", -0.5 * ((a - b).abs() - 40.0) ** 2 - 0.5 * (a + b) ** 2)

    guide = AutoIAF(model)
    fit(model, guide, num_steps=100, progress=False)
    (mode,) = diagnose(model, guide).modes
    assert abs(mode.share - 0.5) < 0.1


def test_a_constrained_mode_is_told_in_the_units_of_the_model():
    def model():
        scale = pyro.sample("scale", dist.Uniform(0.0, 10.0))
        parts = dist.Normal(torch.tensor([2.0, 7.0]), 0.3).log_prob(scale.unsqueeze(-1))
        pyro.factor("target", parts.logsumexp(-1))

    def guide():
        pyro.sample("scale", dist.Normal(2.0, 0.3))

    (mode,) = diagnose(model, guide).modes
    assert abs(mode.share - 0.5) < 0.05
    assert mode.sites["scale"].shape == ()
    assert abs(mode.sites["scale"] - 7.0) < 0.3


def mixture_of(*parts):
    """A model of one site ``x`` with a mixture of these as its posterior, and its components."""

    def model():
        prior = dist.Normal(0.0, 10.0).expand([2]).to_event(1)
        x = pyro.sample("x", prior)
        target = torch.stack([part.log_prob(x) for part in parts], -1).logsumexp(-1)
        pyro.factor("target", target - math.log(len(parts)) - prior.log_prob(x))

    return model


def normal_at(*loc, scale=0.1):
    return dist.Normal(torch.tensor(loc), scale).to_event(1)


def guide_of(*parts):
    def guide():
        k = int(torch.randint(len(parts), ()))
        if len(parts) == 1:
            pyro.sample("x", parts[0])
        else:
            locs = torch.stack([part.mean for part in parts])
            each = dist.Normal(locs, torch.stack([part.stddev for part in parts])).to_event(1)
            pyro.sample("x", dist.MixtureSameFamily(dist.Categorical(torch.ones(len(parts))), each))
        assert k < len(parts)

    return guide


def test_a_mode_beside_a_tilted_one_is_found_although_climbs_jump():
    covariance = torch.tensor([[1.0, 0.95], [0.95, 1.0]])
    one = dist.MultivariateNormal(torch.zeros(2), covariance)
    other = dist.MultivariateNormal(torch.tensor([2.0, -2.0]) / 2**0.5, covariance)
    for seed in range(8):
        pyro.set_rng_seed(seed)
        found = diagnose(mixture_of(one, other), guide_of(one))
        assert abs(found.share_missed - 0.5) < 0.1


def test_a_mode_between_those_of_a_wide_guide_is_found():
    parts = [normal_at(*(2 * [x])) for x in (-5.0, 0.0, 1.5, 5.0)]
    found = diagnose(mixture_of(*parts), guide_of(parts[0], parts[1], parts[3]))
    (mode,) = found.modes
    assert abs(mode.share - 0.25) < 0.05


def test_a_draw_far_out_hides_no_mode():
    def far():
        x = dist.Normal(LOCS[1], SCALES[1]).to_event(1)
        wide = dist.Normal(LOCS[1], 1e4).to_event(1)
        kinds = torch.tensor([0.999, 0.001])
        pyro.sample("x", dist.MixtureSameFamily(dist.Categorical(kinds), stacked(x, wide)))

    def stacked(*parts):
        locs, scales = ([getattr(p, n) for p in parts] for n in ("mean", "stddev"))
        return dist.Normal(torch.stack(locs), torch.stack(scales)).to_event(1)

    (mode,) = diagnose(two_modes(), far).modes
    assert abs(mode.share - 0.3) < 0.1


def test_a_peak_with_a_kink_is_weighed():
    parts = [dist.Laplace(torch.full((2,), 4.0 * sign), 0.5).to_event(1) for sign in (-1, 1)]
    shares = []
    for seed in range(6):
        pyro.set_rng_seed(seed)
        (mode,) = diagnose(mixture_of(*parts), guide_of(parts[0])).modes
        shares.append(mode.share)
    assert abs(sum(shares) / 6 - 0.5) < 0.1


def test_what_masks_hide_is_searched_in_a_hierarchical_guide_too():
    def model():
        with pyro.plate("rows", 3):
            z = pyro.sample("z", dist.Normal(0.0, 3.0))
            mask = torch.tensor([True, False, False])
            pyro.sample("y", dist.Normal(z**2, 0.5), obs=torch.full((3,), 4.0), obs_mask=mask)

    guide = AutoHierarchicalIAF(model)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Site 'y_unobserved' is masked")
        fit(model, guide, num_steps=300, progress=False)
        found = diagnose(model, guide)
    assert found.searched.startswith("searched by ")


# Posteriors of one mode


def one_normal():
    z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    pyro.sample("y", dist.Normal(z.sum(-1), 0.1), obs=torch.tensor(1.0))


def a_funnel():
    v = pyro.sample("v", dist.Normal(0.0, 2.0))
    pyro.sample("x", dist.Normal(torch.zeros(4), (v / 2).exp().unsqueeze(-1)).to_event(1))


def a_banana():
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(x**2, 0.3))


@pytest.mark.parametrize("model", [one_normal, a_funnel, a_banana])
@pytest.mark.parametrize("Auto", [AutoNormal, AutoIAF, AutoHierarchicalIAF])
def test_there_is_no_false_alarm(model, Auto):
    guide = Auto(model)
    fit(model, guide, num_steps=100, progress=False, seed=0)
    found = diagnose(model, guide)
    assert found.share_missed < 0.02
    assert found.searched.startswith("searched by ")


# What it takes, and what it refuses


def test_looking_for_modes_does_not_change_the_draws():
    texts = []
    for search in (True, False):
        pyro.set_rng_seed(0)
        texts.append(diagnose(one_normal, AutoNormal(one_normal), search=search).log_weights)
    assert_close(texts[0], texts[1], rtol=0.0, atol=0.0)


def test_one_seed_gives_one_answer():
    found = []
    for _ in range(2):
        pyro.set_rng_seed(3)
        found.append([mode.share for mode in diagnose(two_modes(), guide_at(0)).modes])
    assert found[0] == found[1]


def test_few_evaluations_of_a_large_model_are_enough(monkeypatch):
    monkeypatch.setattr(modes, "CHEAP", 1)
    counted = []
    gradient = LogJoint.gradient

    def count(self, z):
        counted.append(len(z))
        return gradient(self, z)

    monkeypatch.setattr(LogJoint, "gradient", count)
    found = searched(two_modes(), guide_at(0), num_evaluations=500)
    assert sum(counted) <= 500
    assert abs(found.modes[0].share - 0.7) < 0.1


def test_a_model_that_runs_for_one_draw_at_a_time_is_searched_too():
    model = two_modes()

    def alone():
        model()
        assert float(pyro.sample("one", dist.Normal(0.0, 1.0))) < 100

    def guide():
        guide_at(1)()
        pyro.sample("one", dist.Normal(0.0, 1.0))

    particles = WeightedParticles(alone, guide, (), {})
    assert not particles.at_once
    found = search_modes(particles, particles.weighted(400), 2000)
    assert abs(found.modes[0].share - 0.3) < 0.15


def test_a_subsample_a_point_and_a_guide_without_a_density_are_told():
    def rows():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", 10, subsample_size=2):
            pyro.sample("y", dist.Normal(z, 1.0), obs=torch.ones(2))

    def of_rows():
        pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.plate("rows", 10, subsample_size=2)

    assert "subsamples its data" in str(diagnose(rows, of_rows, num_samples=50))
    assert diagnose(one_normal, AutoDelta(one_normal)).searched == ""
    model = two_modes()
    found = diagnose(model, AutoStructured(model, conditionals="normal"))
    assert found.searched.startswith("not searched for other modes, as the guide's site '")


def test_a_density_that_is_another_than_that_of_the_draws_is_told():
    def model():
        with pyro.plate("rows", 2):
            x = pyro.sample("x", dist.Normal(0.0, 5.0))
            parts = dist.Normal(LOCS, 0.5).log_prob(x.unsqueeze(-2))
            pyro.factor("target", (parts.logsumexp(-2) / 2))

    def guide():
        pyro.sample("x", dist.Normal(LOCS[0], 0.5).to_event(1))

    found = diagnose(model, guide)
    assert found.searched.startswith("not searched") or found.share_missed > 0.4


def test_few_draws_are_enough_to_start_from():
    def alone():
        two_modes()()
        assert pyro.sample("one", dist.Normal(0.0, 1.0)).dim() == 0

    def guide():
        guide_at(1)()
        pyro.sample("one", dist.Normal(0.0, 1.0))

    assert diagnose(alone, guide, num_samples=25).searched.startswith("searched by ")


def test_a_ridge_has_no_modes_on_its_way():
    def ridge():
        x = pyro.sample("x", dist.Normal(1.0, 3.0))
        pyro.sample("y", dist.Normal(x**2, 0.1))

    for seed in range(4):
        pyro.clear_param_store()
        guide = AutoIAF(ridge)
        fit(ridge, guide, num_steps=40, progress=False, seed=seed)
        assert diagnose(ridge, guide).share_missed < 0.05


def test_an_error_of_the_search_is_told_and_loses_nothing(monkeypatch):
    monkeypatch.setattr(modes, "climb", lambda *_: 1 / 0)
    found = diagnose(one_normal, AutoIAF(one_normal))
    assert "as the search ended in ZeroDivisionError: division by zero" in found.searched
    assert found.verdict == "usable"
    assert "Whether there are other modes is not known." in str(found)
    assert diagnose(one_normal, AutoIAF(one_normal), search=False).verdict == "good"


def test_rounding_hides_modes():
    torch.set_default_dtype(torch.float32)

    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.factor("constant", 1e8 + 0 * z)

    found = diagnose(model, lambda: pyro.sample("z", dist.Normal(0.0, 1.0)))
    assert not found.modes


@pytest.mark.parametrize("search", [None, 1, "yes"])
def test_search_is_true_or_false(search):
    with pytest.raises(ValueError, match="search should be True or False"):
        diagnose(one_normal, AutoIAF(one_normal), search=search)


def test_long_sites_are_cut_short():
    mode = Mode(0.256, 0.011, {"a": torch.arange(9.0), "b": torch.tensor(2.5)}, "a draw")
    where = "near a = (0, 1, 2, 3, ...), b = 2.5"
    assert str(mode) == f"26% +/- 1% of the mass {where}, reached from a draw"


# In a fit


def test_fit_tells_of_half_a_posterior():
    def model():
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        b = pyro.sample("b", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(a * b, 0.2), obs=torch.tensor(1.2))

    result = fit(model, AutoIAF(model, num_components=1), progress=False, seed=0)
    assert result.diagnosis.verdict == "modes missing"
    assert math.isclose(result.diagnosis.share_missed, 0.5, abs_tol=0.2)


def found_for_labels(locs):
    """The diagnosis of one component, at locs of a mixture that may have any order."""
    y = torch.tensor(locs).repeat_interleave(3) + torch.tensor([-0.1, 0.0, 0.1]).repeat(len(locs))

    def model():
        loc = pyro.sample("loc", dist.Normal(torch.zeros(len(locs)), 5.0).to_event(1))
        parts = dist.Normal(loc.unsqueeze(-2), 0.5).log_prob(y.unsqueeze(-1))
        pyro.factor("rows", parts.logsumexp(-1).sum(-1))

    guide = AutoIAF(model, num_components=1)
    guide.setup()
    return diagnose(model, guide)


@pytest.mark.parametrize(("locs", "num"), [([-3.0, 4.0], 2), ([-3.0, 0.0, 4.0], 6)])
def test_modes_that_differ_by_the_order_of_entries_are_told(locs, num):
    found = found_for_labels(locs)
    assert found.verdict == "modes missing"
    said = f"There are {num} modes at least, some of which differ by the order of entries"
    assert said in str(found)


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("NUM_NEWTON", 0, "elsewhere hold is not known"),
        ("MOST_GRADIENTS", 6, "elsewhere hold is not known"),
        ("MOST_LATENTS", 2, "elsewhere were not weighed, for more than 2 latents"),
    ],
)
def test_ends_that_are_not_weighed_forbid_good(monkeypatch, name, value, said):
    monkeypatch.setattr(modes, name, value)
    found = found_for_labels([-3.0, 0.0, 4.0])
    assert not found.is_sure
    assert found.verdict != "good"
    assert said in found.searched


def test_others_are_not():
    def model():
        x = pyro.sample("x", dist.Normal(torch.zeros(2), 5.0).to_event(1))
        parts = dist.Normal(torch.tensor([[-3.0, 3.0], [4.0, -2.0]]), 0.5).log_prob(x).sum(-1)
        pyro.factor("two", parts.logsumexp(-1))

    guide = AutoIAF(model, num_components=1)
    guide.setup()
    found = diagnose(model, guide)
    assert found.verdict == "modes missing"
    assert "order of entries" not in str(found)
