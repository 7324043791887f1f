import math
import warnings
from threading import Barrier, Thread

import pyro
import pyro.distributions as dist
import pytest
import torch
from example_models import MODELS, data, make, plates, subsampled_data
from pyro import poutine
from pyro.poutine.util import site_is_subsample
from torch.autograd import grad
from torch.distributions import biject_to
from torch.testing import assert_close

from pyro_iaf import AutoHierarchicalIAF, AutoIAF, diagnose, fit
from pyro_iaf.guides import base
from pyro_iaf.models.log_joint import LogJoint
from pyro_iaf.models.traces import compute_log_prob, log_prob_of_particles, quietly


def packed(joint, trace):
    """The latents of a run as one vector in unconstrained space."""
    sites = joint.latents.items()
    values = {name: trace.nodes[name]["value"] for name, _ in sites}
    return torch.cat([biject_to(s["fn"].support).inv(values[n]).reshape(-1) for n, s in sites])


def joint_of(model, *arguments, run=None):
    """The log joint density of a model, over the latents of a run of it."""
    trace = poutine.trace(model if run is None else run).get_trace(*arguments)
    sites = trace.iter_stochastic_nodes()
    latents = {name: site for name, site in sites if not site_is_subsample(site)}
    return LogJoint(model, trace, arguments, {}, latents), trace


def by_hand(joint, z):
    """Pyro's log density at one vector of latents, and the log-determinants, site by site."""
    values, log_det, start = dict(joint.subsamples), 0.0, 0
    for name, site in joint.latents.items():
        to_support = biject_to(site["fn"].support)
        shape = to_support.inverse_shape(site["value"].shape)
        free = z[start : start + shape.numel()].reshape(shape)
        start += shape.numel()
        values[name] = to_support(free)
        log_det = log_det + to_support.log_abs_det_jacobian(free, values[name]).sum()
    assert start == len(z)
    trace = poutine.trace(poutine.condition(joint.model, values)).get_trace(*joint.args)
    trace.compute_log_prob(lambda _, site: not site_is_subsample(site))
    sites = [site for site in trace.nodes.values() if "log_prob_sum" in site]
    latent = sum(site["log_prob_sum"] for site in sites if site["name"] in joint.latents)
    other = sum(site["log_prob_sum"] for site in sites if site["name"] not in joint.latents)
    return latent + log_det, other


def total_by_hand(joint, z):
    return torch.stack([sum(by_hand(joint, row)) for row in z])


def tolerance(z):
    return {"atol": 1e-9, "rtol": 1e-9} if z.dtype == torch.float64 else {"atol": 1e-3, "rtol": 0}


@pytest.fixture(params=MODELS)
def case(request):
    """A log joint density, and five points around a draw of a guide."""
    guide, model, arguments = make(request.param, hidden_dims=[16], start="init")
    drawn = poutine.trace(guide).get_trace(*arguments)
    joint, trace = joint_of(model, *arguments, run=poutine.replay(model, drawn))
    start = packed(joint, trace).detach()
    return joint, start + 0.3 * torch.randn_like(start.expand(5, -1))


# Properties of every model


@pytest.mark.parametrize("at_once", [True, False], ids=["at once", "one by one"])
def test_it_is_the_density_by_hand(case, at_once):
    joint, z = case
    joint.at_once = at_once
    assert_close(joint(z), total_by_hand(joint, z), **tolerance(z))


@pytest.mark.parametrize("at_once", [True, False], ids=["at once", "one by one"])
def test_gradients_are_those_of_autograd(case, at_once):
    joint, z = case
    joint.at_once = at_once
    value, slope = joint.gradient(z)
    assert_close(value, joint(z).detach(), **tolerance(z))
    for k, row in enumerate(z):
        row = row.clone().requires_grad_()
        (expected,) = grad(sum(by_hand(joint, row)), row)
        assert_close(slope[k], expected, **tolerance(z))


@pytest.mark.parametrize("at_once", [True, False], ids=["at once", "one by one"])
def test_hessians_are_differences_of_gradients(case, at_once):
    joint, z = case
    joint.at_once = at_once
    # Rounding comes to 1e-16 / 1e-5 of a slope; in single precision it takes wider steps.
    step, scale = (1e-5, 1e-6) if z.dtype == torch.float64 else (1e-1, 1e-3)
    hessian = joint.hessian(z)
    for k, unit in enumerate(torch.eye(z.shape[1], dtype=z.dtype)):
        above, below = (joint.gradient(z + sign * step * unit)[1] for sign in (1, -1))
        expected = (above - below) / (2 * step)
        assert_close(hessian[:, k], expected, atol=scale * (1 + expected.abs().max()), rtol=0)


def test_nothing_speaks_against_it(case):
    joint, z = case
    joint.at_once = False
    assert joint.check(z) is None
    assert joint.at_once


@pytest.mark.parametrize("model", [plates, subsampled_data])
def test_all_latents_count_unless_told_otherwise(model):
    trace = poutine.trace(model).get_trace()
    joint = LogJoint(model, trace, (), {})
    told, _ = joint_of(model)
    assert list(joint.latents) == list(told.latents)


def test_it_stays_out_of_its_callers_sight(case):
    joint, z = case
    expected = joint(z)
    with poutine.trace() as caller, poutine.scale(scale=2.0):
        found = joint(z)
    assert {site["type"] for site in caller.trace.nodes.values()} <= {"param"}
    assert_close(found, expected)


# Models that take no particles, or have no density


def product(x, y):
    w = pyro.sample("w", dist.Normal(torch.zeros(x.shape[1]), 1.0).to_event(1))
    pyro.sample("y", dist.Normal(x @ w, 0.5).to_event(1), obs=y)


def product_in_a_plate(x, y):
    w = pyro.sample("w", dist.Normal(torch.zeros(x.shape[1]), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ w, 0.5), obs=y)


def total(x, y):
    w = pyro.sample("w", dist.Normal(torch.zeros(x.shape[1]), 1.0).to_event(1))
    pyro.sample("y", dist.Normal(w.sum(), 0.5), obs=y[0])


@pytest.mark.parametrize("num_points", [2, 3, 5])  # as many as features, data, or neither
@pytest.mark.parametrize("model", [product, product_in_a_plate, total])
def test_models_that_take_no_particles_are_mapped(model, num_points):
    joint, _ = joint_of(model, *data())
    z = torch.randn(num_points, 2)
    assert joint.check(z) is None
    assert joint.mapped
    known = total_by_hand(joint, z)
    assert_close(joint(z), known)
    assert_close(joint.gradient(z)[0], known)
    hessian = joint.hessian(z)
    joint.at_once = joint.mapped = False
    assert_close(joint(z), known)
    assert_close(joint.hessian(z), hessian)


def test_a_density_that_changes_from_call_to_call_is_told():
    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.factor("f", z * torch.randn(()))

    joint, _ = joint_of(model)
    assert "changes from one run to the next" in joint.check(torch.randn(3, 1))


def correlation():
    r = pyro.sample("r", dist.Normal(0.0, 1.0))
    one = torch.ones_like(r)
    rows = torch.stack([one, r], -1), torch.stack([r, one], -1)
    normal = dist.MultivariateNormal(torch.zeros(2), torch.stack(rows, -2))
    pyro.sample("y", normal, obs=torch.tensor([0.5, 0.4]))


@pytest.mark.parametrize("at_once", [True, False], ids=["at once", "one by one"])
def test_where_a_matrix_has_no_cholesky_factor_the_density_is_zero(at_once):
    first = poutine.condition(correlation, {"r": torch.tensor(0.0)})
    trace = poutine.trace(first).get_trace()
    joint = LogJoint(correlation, trace, (), {}, {"r": trace.nodes["r"]})
    joint.at_once = at_once
    z = torch.tensor([[0.1], [0.2], [0.3], [1.5], [-0.4], [-0.5]])
    fine = torch.tensor([True, True, True, False, True, True])
    found = joint(z)
    assert_close(found[fine], total_by_hand(joint, z[fine]))
    assert (found[~fine] == -math.inf).all()
    value, slope = joint.gradient(z)
    assert_close(value, found)
    assert slope[fine].abs().min() > 0
    assert (slope[~fine] == 0).all()
    with quietly(), pytest.raises(RuntimeError, match="cholesky"):
        joint.density(z)
    together = torch.tensor([True, True, False, False, True, True])
    assert torch.equal(joint(z, group_size=2).isfinite(), together)
    assert torch.equal(joint(z, group_size=3).isfinite(), torch.arange(6) < 3)
    assert_close(joint(z, group_size=2)[together], found[together])


# Data


@pytest.mark.parametrize("at_once", [True, False], ids=["at once", "one by one"])
def test_subsamples_are_held_still_and_those_of_other_data_are_fresh(at_once):
    joint, _ = joint_of(subsampled_data)
    joint.at_once = at_once
    assert joint.subsampled
    assert not joint_of(plates)[0].subsampled
    z = torch.randn(3, 1)
    assert torch.equal(joint(z), joint(z))
    fresh = joint.with_data((), {})
    assert len({fresh(z)[0].item() for _ in range(10)}) > 5
    assert torch.equal(joint(z), joint(z))


@pytest.mark.parametrize("at_once", [True, False], ids=["at once", "one by one"])
def test_on_other_data_latents_are_weighted_and_nothing_else(at_once):
    def model(y):
        scale = pyro.sample("scale", dist.HalfNormal(1.0))
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Normal(0.0, scale))
            pyro.sample("y", dist.Normal(z, 0.5), obs=y)
        pyro.factor("f", -scale)

    joint, _ = joint_of(model, torch.zeros(3))
    joint.at_once = at_once
    z = torch.randn(4, 4)
    before = joint(z)
    other = joint.with_data((torch.ones(3),), {}, weight=0.25)
    expected = [0.25 * latent + rest for latent, rest in (by_hand(other, row) for row in z)]
    assert_close(other(z), torch.stack(expected))
    assert_close(joint.with_data((), {"y": torch.ones(3)}, weight=0.25)(z), other(z))
    assert torch.equal(joint(z), before)
    assert not torch.allclose(before, other(z))


# A guide's start


@pytest.mark.parametrize("name", MODELS)
def test_a_guide_looks_for_its_start_at_many_points_at_once(name, monkeypatch):
    joints = []

    class Seen(LogJoint):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            joints.append(self)

    monkeypatch.setattr(base, "LogJoint", Seen)
    model, arguments = (make() for make in MODELS[name])
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # also on a subsample, which is held still
        warnings.filterwarnings("ignore", "Site '.' is masked")
        AutoIAF(model).setup(*arguments)
    assert [joint.at_once for joint in joints] == [True]


# Sums in double precision


@pytest.mark.parametrize("name", MODELS)
def test_what_is_summed_in_double_is_the_density(name):
    guide, model, arguments = make(name, hidden_dims=[4], start="init")
    drawn = poutine.trace(guide).get_trace(*arguments)
    trace = poutine.trace(poutine.replay(model, drawn)).get_trace(*arguments)
    compute_log_prob(trace)
    expected = log_prob_of_particles(trace, 1, None)
    compute_log_prob(trace, in_double=True)
    found = log_prob_of_particles(trace, 1, None)
    assert found.dtype == torch.float64
    assert_close(found.to(expected), expected)


def test_between_two_draws_a_density_errs_by_its_rounding_alone():
    y = (3 * torch.randn(100_000)).float()
    locs = torch.tensor([1.0, 1.001]).float()

    def model(loc):
        pyro.sample("y", dist.Normal(loc, 3.0).expand([len(y)]).to_event(1), obs=y)

    (total, rounding), (other, _) = (in_double(model, loc) for loc in locs)
    each = [dist.Normal(loc, 3.0).log_prob(y.double()) for loc in locs.double()]
    expected = (each[0] - each[1]).sum()
    assert 1e-5 < rounding < 1e-3
    assert (total - other - expected).abs() < 5 * rounding
    summed = [poutine.trace(model).get_trace(loc).log_prob_sum().double() for loc in locs]
    assert (summed[0] - summed[1] - expected).abs() > 5 * rounding  # in single precision


def in_double(model, *arguments):
    """The log density of a run, and what its rounding comes to."""
    trace = poutine.trace(model).get_trace(*arguments)
    compute_log_prob(trace, in_double=True)
    squared_rounding = log_prob_of_particles(trace, 1, None, what="squared_rounding")
    return log_prob_of_particles(trace, 1, None).squeeze(), squared_rounding.sqrt().squeeze()


# Threads


def in_threads(*works):
    """Runs these at once, and returns what each raised."""
    errors = [None] * len(works)
    start = Barrier(len(works))

    def run(k):
        start.wait()
        try:
            works[k]()
        except Exception as error:
            errors[k] = error

    threads = [Thread(target=run, args=(k,)) for k in range(len(works))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return errors


@pytest.fixture(params=[True, False], ids=["checked", "unchecked"])
def is_checked(request):
    with pyro.validation_enabled(request.param):
        yield request.param


def switches():
    return (
        torch.distributions.Distribution._validate_args,
        pyro.infer.util.is_validation_enabled(),
        pyro.poutine.util.is_validation_enabled(),
        list(warnings.filters),
    )


def test_checks_are_as_before_whichever_thread_leaves_last(is_checked):
    before = switches()
    inside, left = Barrier(2), Barrier(2)

    def leaves_first():
        with quietly():
            inside.wait()
        left.wait()

    def leaves_last():
        inside.wait()
        with quietly():
            left.wait()
            assert not torch.distributions.Distribution._validate_args

    def both_at_once():
        with quietly():
            inside.wait()
            with quietly():
                left.wait()
        raise RuntimeError("a mistake of the model")

    assert in_threads(leaves_first, leaves_last) == [None, None]
    assert switches() == before
    errors = in_threads(both_at_once, both_at_once)
    assert [type(error) for error in errors] == [RuntimeError, RuntimeError]
    assert switches() == before


def known(mean, guide_of):
    """A model with a mean that is known, and a guide for it of its own name."""

    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 3):
            pyro.sample("y", dist.Normal(z, 1.0), obs=torch.tensor(4 / 3 * mean).expand(3))

    return model, guide_of(model)


def fails_in_the_middle():
    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        model.num_left -= 1
        if model.num_left < 0:
            raise KeyError("a mistake of the model")
        pyro.sample("y", dist.Normal(z, 1.0), obs=torch.tensor(1.0))

    model.num_left = 60
    guide = AutoIAF(model, name="failing", start="init")
    fit(model, guide, num_steps=100, progress=False, compile=False)


def test_fits_of_several_threads_are_each_right(is_checked):
    before = switches()
    kinds = [AutoIAF, AutoHierarchicalIAF]
    cases = [
        known(float(k), lambda model, k=k: kinds[k % 2](model, name=f"guide_{k}")) for k in range(4)
    ]
    works = [
        lambda model=model, guide=guide: fit(
            model, guide, num_steps=300, progress=False, compile=False
        )
        for model, guide in cases
    ]
    *errors, failed = in_threads(*works, fails_in_the_middle)
    assert errors == [None] * 4
    assert isinstance(failed, KeyError)
    assert switches() == before
    for k, (_, guide) in enumerate(cases):
        draws = guide.sample_posterior(4000)["z"]
        assert draws.mean().item() == pytest.approx(k, abs=0.05)  # 6 se of 4,000 draws
        assert draws.std().item() == pytest.approx(0.5, rel=0.1)


def test_threads_judge_and_resample_one_guide_that_none_has_set_up():
    model, guide = known(1.0, AutoIAF)
    found = []
    errors = in_threads(
        *3 * [lambda: found.append(diagnose(model, guide))],
        *3 * [lambda: found.append(guide.sample_posterior(2000, resample=True)["z"])],
    )
    assert errors == [None] * 6
    for result in found:
        if isinstance(result, torch.Tensor):
            assert result.mean().item() == pytest.approx(1.0, abs=0.07)  # 6 se of 2,000 draws
        else:
            assert str(result).startswith("Good: ")
