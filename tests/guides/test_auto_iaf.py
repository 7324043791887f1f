import copy
import gc
import io
import math
import pickle
import weakref

import pyro
import pyro.distributions as dist
import pytest
import torch
from bijections import rough
from example_models import MODELS, make, reload_store, same, seeded, train, two_sites, values
from pyro import poutine
from pyro.infer import (
    MCMC,
    NUTS,
    SVI,
    JitTrace_ELBO,
    Predictive,
    RenyiELBO,
    ReweightedWakeSleep,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
)
from pyro.infer.autoguide import (
    AutoDelta,
    AutoDiscreteParallel,
    AutoGuideList,
    AutoNormal,
)
from pyro.infer.mcmc.util import initialize_model
from pyro.infer.reparam import NeuTraReparam
from pyro.optim import Adam, ClippedAdam
from pyro.util import check_model_guide_match
from torch.distributions import biject_to
from torch.func import jacfwd
from torch.testing import assert_close

from pyro_iaf import AutoHierarchicalIAF, AutoIAF, fit


@pytest.fixture(params=MODELS)
def case(request):
    return make(request.param, hidden_dims=[16])


def replayed(model, arguments, values):
    """The model's trace at these values of its latents."""
    return poutine.trace(poutine.condition(model, values)).get_trace(*arguments)


# Properties of every model


def test_draws_are_what_the_model_expects(case):
    guide, model, arguments = case
    values = guide(*arguments)
    trace = replayed(model, arguments, values)
    latents = {name for name, _ in guide.prototype_trace.iter_stochastic_nodes()}
    assert set(values) == latents
    for name in latents:
        site = trace.nodes[name]
        assert values[name].shape == site["fn"].batch_shape + site["fn"].event_shape
        assert site["fn"].support.check(values[name]).all()


def test_scores_are_those_computed_by_hand(case):
    guide, _, arguments = case
    trace = poutine.trace(guide).get_trace(*arguments)
    latent = trace.nodes[f"_{guide._pyro_name}_latent"]["value"].detach()
    transform = guide.get_transform(*arguments)
    x = transform.inv(latent).detach()
    slope = jacfwd(lambda x: transform(x))(x)
    by_hand = -0.5 * (x**2 + math.log(2 * math.pi)).sum() - slope.det().abs().log()
    start = 0
    for name, site in guide.prototype_trace.iter_stochastic_nodes():
        to_support = biject_to(site["fn"].support)
        shape = to_support.inverse_shape(site["value"].shape)
        free = latent[start : start + shape.numel()].reshape(shape)
        start += shape.numel()
        value = to_support(free)
        assert_close(trace.nodes[name]["value"], value)
        by_hand = by_hand - to_support.log_abs_det_jacobian(free, value).sum()
    assert start == len(latent)
    tolerance = 1e-9 if latent.dtype == torch.float64 else 1e-4
    own = trace.log_prob_sum(lambda name, _: not name.endswith("_masked"))  # see test_masks.py
    assert_close(own, by_hand, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("vectorize", [False, True], ids=["one by one", "vectorised"])
def test_losses_and_gradients_are_finite(case, vectorize):
    guide, model, arguments = case
    elbo = Trace_ELBO(num_particles=3, vectorize_particles=vectorize)
    loss = elbo.differentiable_loss(model, guide, *arguments)
    loss.backward()
    assert loss.isfinite()
    for name, parameter in guide.named_parameters():
        gradient = parameter.grad
        assert gradient is not None, name
        assert gradient.isfinite().all(), name


def test_a_step_costs_one_network_call_per_flow(case, count_passes):
    guide, model, arguments = case
    # Small steps: a support that learns may leave a draw outside.
    svi = SVI(model, guide, Adam({"lr": 1e-6}), Trace_ELBO())
    svi.step(*arguments)
    calls = count_passes(guide.transform)
    svi.step(*arguments)
    assert calls() == len(guide.networks())


def test_posterior_draws_have_the_shapes_of_the_sites(case):
    guide, model, arguments = case
    draws = guide.sample_posterior(7)
    shapes = {name: value.shape for name, value in guide(*arguments).items()}
    assert {name: value.shape for name, value in draws.items()} == {
        name: (7, *shape) for name, shape in shapes.items()
    }
    trace = replayed(model, arguments, {name: value[3] for name, value in draws.items()})
    for name, value in draws.items():
        assert trace.nodes[name]["fn"].support.check(value[3]).all()
        assert not value.requires_grad


def test_the_median_is_a_point_of_the_model(case):
    guide, model, arguments = case
    median = guide.median(*arguments)
    trace = replayed(model, arguments, median)
    assert trace.log_prob_sum().isfinite()
    for name, value in median.items():
        assert trace.nodes[name]["fn"].support.check(value).all()


def test_quantiles_increase_and_are_those_of_draws(case):
    guide, _, arguments = case
    levels = [0.1, 0.5, 0.9]
    quantiles = guide.quantiles(levels, *arguments)
    draws = guide.sample_posterior(20_000)
    for name, value in quantiles.items():
        assert value.shape == (3, *draws[name].shape[1:])
        assert (value.diff(dim=0) >= 0).all()
        for level, quantile in zip(levels, value, strict=True):
            below = (draws[name] <= quantile).to(value.dtype).mean(0)
            # 5 se of 20,000 draws and of 10,000; a coordinate that is fixed is never below
            free = draws[name].std(0) > 1e-6
            assert ((below - level).abs()[free] < 0.03).all()


def test_the_state_loads_into_a_guide_that_was_never_called(case):
    guide, model, arguments = case
    state = guide.state_dict()
    fresh = AutoIAF(model, hidden_dims=[16], name="fresh")
    fresh.load_state_dict(state, strict=True)
    for (name, a), (_, b) in zip(
        guide.state_dict().items(), fresh.state_dict().items(), strict=True
    ):
        assert torch.equal(a, b), name
    fresh.setup(*arguments)
    expected, found = seeded(guide, *arguments), seeded(fresh, *arguments)
    for name in expected:
        assert_close(found[name], expected[name])


@pytest.mark.parametrize("twin", [copy.deepcopy, lambda guide: pickle.loads(pickle.dumps(guide))])
def test_copies_draw_as_the_original_does(case, twin):
    guide, model, arguments = case
    # Small steps: a support that learns may leave a draw outside.
    svi = SVI(model, guide, Adam({"lr": 1e-6}), Trace_ELBO())
    svi.step(*arguments)
    other = twin(guide)
    other._pyro_name = "other"
    expected, found = seeded(guide, *arguments), seeded(other, *arguments)
    for name in expected:
        assert torch.equal(found[name], expected[name])
    assert guide.model is model
    svi.step(*arguments)
    for name, value in other.sample_posterior(3).items():
        assert value.shape[1:] == expected[name].shape
    assert not set(map(id, guide.parameters())) & set(map(id, other.parameters()))


# Losses


def regression(x, y):
    weights = pyro.sample("weights", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    noise = pyro.sample("noise", dist.HalfNormal(1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal((weights * x).sum(-1), noise), obs=y)


def regression_data():
    x = torch.randn(20, 2)
    return x, x @ torch.tensor([1.0, -1.0]) + 0.3 * torch.randn(20)


LOSSES = {
    "Trace": lambda: Trace_ELBO(num_particles=4, vectorize_particles=True),
    "TraceMeanField": TraceMeanField_ELBO,
    "TraceGraph": TraceGraph_ELBO,
    "TraceEnum": lambda: TraceEnum_ELBO(strict_enumeration_warning=False),
    "Renyi": lambda: RenyiELBO(alpha=0.5, num_particles=4, vectorize_particles=True),
    "JitTrace": lambda: JitTrace_ELBO(ignore_jit_warnings=True),
    "Reweighted": lambda: ReweightedWakeSleep(
        num_particles=8, insomnia=1.0, model_has_params=False
    ),
}


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_every_loss_trains_it(loss):
    data = regression_data()
    guide = AutoIAF(regression, hidden_dims=[16])
    svi = SVI(regression, guide, Adam({"lr": 0.02}), loss())
    for _ in range(300):
        svi.step(*data)
    truth = torch.tensor([1.0, -1.0])
    assert (guide.median()["weights"] - truth).abs().max() < 0.3  # 4 posterior sd


@pytest.mark.parametrize("lr", [0.01, 0.02, 0.05])
def test_training_does_not_run_away(lr):
    def model():  # exponentials of latents, squared: what a stretched draw costs knows no bound
        with pyro.plate("data", 2):
            z = pyro.sample("z", dist.LogNormal(0.0, 1.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=torch.ones(2))

    elbo = Trace_ELBO(num_particles=16, vectorize_particles=True, max_plate_nesting=1)
    for seed in range(6):
        pyro.clear_param_store()
        pyro.set_rng_seed(seed)
        svi = SVI(model, AutoIAF(model), Adam({"lr": lr}), elbo)
        losses = [svi.step() for _ in range(60)]
        assert all(map(math.isfinite, losses))
        assert max(losses[-10:]) < 2 * losses[0] + 10


@pytest.mark.parametrize("Elbo", [Trace_ELBO, TraceGraph_ELBO, TraceEnum_ELBO])
def test_factors_count_in_every_loss(Elbo):
    def model(factor):
        pyro.sample("z1", dist.Normal(0.0, 1.0))
        pyro.factor("f1", factor)
        with pyro.plate("plate", 3):
            pyro.factor("f2", factor)
            pyro.sample("z2", dist.Normal(torch.zeros(3), 1.0))

    guide = AutoIAF(model)
    elbo = Elbo(strict_enumeration_warning=False)
    elbo.loss(model, guide, torch.tensor(0.0))
    losses = []
    for factor in (5.0, 4.0):
        pyro.set_rng_seed(0)
        losses.append(elbo.loss(model, guide, torch.tensor(factor)))
    assert losses[0] - losses[1] == pytest.approx(-4)


def test_reweighted_wake_sleep_knows_its_draws(count_passes):
    guide, model, _ = make("vectors", hidden_dims=[16])
    loss = ReweightedWakeSleep(
        num_particles=3, insomnia=1.0, model_has_params=False, max_plate_nesting=0
    )
    calls = count_passes(guide.transform)
    loss.loss_and_grads(model, guide)
    assert calls() == 2 * guide.num_flows  # one to draw, one for the gradient
    found = [parameter.grad for parameter in guide.parameters()]

    pyro.set_rng_seed(1)
    trace = poutine.trace(guide).get_trace()
    latent = trace.nodes["_AutoIAF_latent"]
    value = latent["value"].detach()
    calls = count_passes(guide.transform)
    known = torch.autograd.grad(latent["fn"].log_prob(value), list(guide.parameters()))
    assert calls() == len(guide.networks())
    unknown = torch.autograd.grad(latent["fn"].log_prob(value.clone()), list(guide.parameters()))
    for a, b in zip(known, unknown, strict=True):
        assert_close(a, b)
    assert all(gradient.isfinite().all() for gradient in found)


def test_a_discrete_site_can_be_enumerated_beside_it():
    data = torch.tensor([0.0, 1.0, 10.0, 11.0, 12.0])

    def model():
        weights = pyro.sample("weights", dist.Dirichlet(0.5 * torch.ones(2)))
        locs = pyro.sample("locs", dist.Normal(torch.zeros(2), 10.0).to_event(1))
        scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
        with pyro.plate("data", len(data)):
            k = pyro.sample("k", dist.Categorical(weights), infer={"enumerate": "parallel"})
            pyro.sample("y", dist.Normal(locs[k], scale), obs=data)

    # Without k summed out the density is random, so Pathfinder has nothing to climb.
    guide = AutoIAF(poutine.block(model, hide=["k"]), start="init")
    elbo = TraceEnum_ELBO(max_plate_nesting=1)
    svi = SVI(model, guide, Adam({"lr": 0.01}), elbo)
    assert all(math.isfinite(svi.step()) for _ in range(5))

    both = AutoGuideList(model)
    both.append(AutoIAF(poutine.block(model, hide=["k"]), start="init"))
    both.append(AutoDiscreteParallel(poutine.block(model, expose=["k"])))
    assert math.isfinite(elbo.loss_and_grads(model, both))


# Company


def test_guides_share_a_list():
    guide = AutoGuideList(two_sites)
    guide.append(AutoIAF(poutine.block(two_sites, expose=["x"])))
    guide.append(AutoIAF(poutine.block(two_sites, expose=["y"])))
    svi = SVI(two_sites, guide, Adam({"lr": 0.01}), Trace_ELBO())
    for _ in range(3):
        svi.step()
    assert set(guide.median()) == set(guide.quantiles([0.5])) == {"x", "y"}
    names = set(pyro.get_param_store())
    assert names == {
        f"AutoGuideList.{i}.transform$$${name}"
        for i in (0, 1)
        for name in [*dict(guide[i].transform.named_parameters()), "parts.2.frame"]
    }


@pytest.mark.parametrize("before", [True, False], ids=["set up before", "set up by the list"])
def test_lists_nest_and_mix(before):
    def model():
        pyro.sample("x", dist.Normal(0.0, 1.0))
        with pyro.plate("plate", 2):
            pyro.sample("y", dist.Normal(2.0, 0.1))

    inner = AutoGuideList(poutine.block(model, expose=["y"]))
    guide = AutoGuideList(model)
    guide.append(AutoDelta(poutine.block(model, expose=["x"])))
    inner.z = AutoIAF(poutine.block(model, expose=["y"]))
    guide.append(inner)
    if before:
        inner.z.setup()
    SVI(model, guide, Adam({"lr": 0.01}), Trace_ELBO()).step()
    assert inner.z.master() is guide
    trace = poutine.trace(guide).get_trace()
    check_model_guide_match(poutine.trace(model).get_trace(), trace)
    assert "_AutoGuideList.1.z_latent" in trace.nodes
    assert all(
        name.startswith(("AutoGuideList.0", "AutoGuideList.1.z")) for name in trace.param_nodes
    )


@pytest.mark.parametrize("parallel", [False, True])
def test_predictive_runs(parallel):
    x, y = regression_data()

    def model(x, y=None):
        a, b = (pyro.sample(name, dist.Normal(0.0, 1.0)) for name in "ab")
        with pyro.plate("data", len(x)):
            return pyro.sample("y", dist.Normal(a * x[:, 0] + b * x[:, 1], 0.3), obs=y)

    guide = AutoIAF(model)
    guide(x, y)
    draws = Predictive(model, guide=guide, num_samples=7, parallel=parallel)(x)
    assert draws["y"].shape == (7, 20)
    assert draws["a"].unique().numel() == 7
    given = Predictive(model, guide.sample_posterior(5), parallel=parallel)(x)
    assert given["y"].shape == (5, 20)


def test_it_runs_in_outer_plates_and_behind_handlers():
    guide, _, _ = make("nested plates")
    expected = {name: value.shape for name, value in guide().items()}
    for size, dim in ((4, -3), (5, -4)):
        with pyro.plate("outer", size, dim=dim):
            values = guide()
        batch = torch.Size([size, *[1] * (-dim - 3)])
        shapes = {name: v.shape for name, v in values.items()}
        assert shapes["c"] == batch + expected["c"]
        assert shapes["a"] == batch + expected["a"]
    blocked = poutine.block(guide, expose=["a"])
    nodes = poutine.trace(blocked).get_trace().nodes
    assert "a" in nodes
    assert "b" not in nodes
    with poutine.mask(mask=False):
        assert poutine.trace(guide).get_trace().log_prob_sum() == 0


def test_setup_keeps_to_itself():
    def model():
        with pyro.plate("data", 3):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    guide = AutoIAF(model)
    with pyro.plate("outer", 5, dim=-2), poutine.trace() as trace, torch.inference_mode():
        guide.setup()
    assert not trace.trace.nodes
    assert guide()["z"].shape == (3,)
    assert len(list(guide.parameters())) == 1 + guide.num_flows
    guide.get_posterior().rsample().sum().backward()  # no parameter was made in inference mode
    before = list(guide.parameters())
    guide.setup()
    assert all(a is b for a, b in zip(before, guide.parameters(), strict=True))


def test_it_trains_with_optimisers_of_torch():
    data = regression_data()
    guide = AutoIAF(regression, hidden_dims=[16])
    guide.setup(*data)
    optimizer = torch.optim.Adam(guide.parameters(), lr=0.02)
    elbo = Trace_ELBO(num_particles=4, vectorize_particles=True)
    for _ in range(300):
        optimizer.zero_grad()
        elbo.differentiable_loss(regression, guide, *data).backward()
        optimizer.step()
    assert (guide.median()["weights"] - torch.tensor([1.0, -1.0])).abs().max() < 0.3


@pytest.mark.parametrize("local", [False, True])
def test_losses_are_modules_with_it(local):
    with pyro.settings.context(module_local_params=local):
        x, y = MODELS["module"][1]()
        model = MODELS["module"][0]()
        guide = AutoIAF(model)
        elbo = Trace_ELBO()(model, guide)
        elbo(x, y)
        optimizer = torch.optim.Adam(elbo.parameters(), lr=0.01)
        before = copy.deepcopy(elbo.state_dict())
        for _ in range(3):
            optimizer.zero_grad()
            elbo(x, y).backward()
            optimizer.step()
        after = elbo.state_dict()
        assert {name.split(".")[0] for name in after} == {"model", "guide"}
        assert not torch.equal(
            before["guide.transform.parts.2.coefficients"],
            after["guide.transform.parts.2.coefficients"],
        )
        assert bool(len(pyro.get_param_store())) != local
        other = copy.deepcopy(elbo)
        assert other.guide.model is other.model
        other.guide._pyro_name = "other"
        other(x, y).backward()
        fresh_model = MODELS["module"][0]()
        fresh = Trace_ELBO()(fresh_model, AutoIAF(fresh_model))
        fresh.load_state_dict(after, strict=True)
        assert_close(fresh.guide.transform.parts[2].loc, guide.transform.parts[2].loc)


def test_it_straightens_a_funnel_for_nuts():
    def model():
        v = pyro.sample("v", dist.Normal(0.0, 1.0))
        with pyro.plate("plate", 2):
            pyro.sample("x", dist.Normal(0.0, (v / 2).exp()))

    guide = AutoIAF(model, hidden_dims=[16])
    svi = SVI(model, guide, Adam({"lr": 0.01}), Trace_ELBO())
    for _ in range(50):
        svi.step()
    neutra = NeuTraReparam(guide)
    straight = neutra.reparam(model)
    mcmc = MCMC(NUTS(straight), num_samples=200, warmup_steps=50, disable_progbar=True)
    mcmc.run()
    latent = mcmc.get_samples()["v_shared_latent"]
    with torch.no_grad():
        draws = neutra.transform_sample(latent.unsqueeze(-2))
    assert draws["x"].shape == (200, 2)
    assert draws["v"].std() == pytest.approx(1.0, abs=0.4)


def test_neutra_keeps_the_joint_density():
    def model():
        v = pyro.sample("v", dist.Normal(0.0, 3.0))
        pyro.sample("p", dist.Dirichlet(torch.ones(3)))
        with pyro.plate("plate", 4):
            pyro.sample("x", dist.Normal(0.0, (v / 2).exp()))

    guide = rough(AutoIAF(model), 0.1)
    guide()
    neutra = NeuTraReparam(guide)
    _, plain, to_support, _ = initialize_model(model)
    start, straight, _, _ = initialize_model(neutra.reparam(model))
    energy = straight(start)
    (x,) = start.values()
    transform = guide.get_transform()
    sites = neutra.transform_sample(x)
    expected = plain({name: to_support[name](value) for name, value in sites.items()})
    assert_close(energy, expected - transform.log_abs_det_jacobian(x, transform(x)))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_it_serialises_to_torchscript():
    guide, _, _ = make("supports", hidden_dims=[16])
    names = sorted(guide())
    expected = seeded(guide)
    traced = torch.jit.trace_module(guide, {"call": ()}, check_trace=False)
    file = io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    loaded = torch.jit.load(file)
    pyro.set_rng_seed(1)
    for name, value in zip(names, loaded.call(), strict=True):
        assert_close(value, expected[name])
    assert {n for n, _ in loaded.named_parameters()} == {n for n, _ in guide.named_parameters()}


# The state, and copies


def line(x, y=None, noise=None):
    w = pyro.sample("w", dist.Normal(0.0, 1.0))
    scale = 0.1 if noise is None else pyro.sample("scale", dist.HalfNormal(0.1))
    with pyro.plate("rows", len(x)):
        return pyro.sample("y", dist.Normal(w * x, scale), obs=y)


@pytest.mark.parametrize("kind", [AutoIAF, AutoHierarchicalIAF])
def test_a_loaded_state_predicts_without_the_data(kind, tmp_path):
    x = torch.linspace(-1.0, 1.0, 30)
    guide = kind(line)
    fit(line, guide, (x, 2 * x), num_steps=200, compile=False, progress=False)
    torch.save(guide.state_dict(), tmp_path / "state")
    pyro.clear_param_store()

    def loaded():
        fresh = kind(line)
        fresh.load_state_dict(torch.load(tmp_path / "state", weights_only=True))
        return fresh

    predicted = Predictive(line, guide=loaded(), num_samples=200)(torch.ones(3))["y"]
    assert predicted.shape == (200, 3)
    assert_close(predicted.mean(), torch.tensor(2.0), atol=0.05, rtol=0)
    assert set(loaded().sample_posterior(10, torch.ones(3))) == {"w"}
    for told in (lambda g: g(torch.ones(3)), lambda g: fit(line, g, (torch.ones(3),))):
        with pytest.raises(ValueError, match=r"Site 'y' is latent in this run.*sites 'w'"):
            told(loaded())
    with pytest.raises(ValueError, match=r"Site 'scale' is latent in this run"):
        loaded().setup(x, 2 * x, noise=True)
    again = loaded()
    again.sample_posterior(10, torch.ones(3))
    fit(line, again, (x, 2 * x), num_steps=10, progress=False)  # with the data it goes on


def test_a_state_of_another_size_is_refused():
    state = make("vectors")[0].state_dict()
    guide = AutoIAF(two_sites, num_flows=3)
    guide.setup()
    with pytest.raises(RuntimeError, match="Missing key"):
        guide.load_state_dict(state)
    gated = AutoIAF(two_sites, univariate="gated")
    gated.setup()
    with pytest.raises(RuntimeError, match=r"a guide with univariate=Affine\(\)"):
        gated.load_state_dict(values_of_two())
    guide = AutoIAF(MODELS["plates"][0]())
    guide.load_state_dict(state)
    with pytest.raises(ValueError, match=r"with sites 'w', 'z'; in this run .* 'w' is no"):
        guide()

    def vector(size):
        return AutoIAF(lambda: pyro.sample("z", dist.Normal(torch.zeros(size), 1.0).to_event(1)))

    short, long = vector(5), vector(6)
    short.setup()
    long.load_state_dict(short.state_dict())
    with pytest.raises(ValueError, match=r"over 5 numbers.*this model have 6"):
        long()
    with pytest.raises(RuntimeError, match="a guide with sites 'x', 'y'; this one has 'z'"):
        short.load_state_dict(values_of_two())


def test_a_failed_load_leaves_a_guide_as_it_was(tmp_path):
    guide = AutoIAF(two_sites)
    train(guide)
    saved = values(guide)
    pyro.get_param_store().save(tmp_path / "store")
    narrow = AutoIAF(two_sites, hidden_dims=[8], name="narrow")
    narrow.setup()

    fresh = AutoIAF(two_sites)
    fresh.setup()
    with pytest.raises(RuntimeError, match=r"hidden_dims=\[8\].*this has.*hidden_dims=\[64, 64\]"):
        fresh.load_state_dict(narrow.state_dict())
    reload_store(tmp_path / "store")
    fresh()  # the store still counts
    assert same(values(fresh), saved)

    other = AutoIAF(two_sites, name="other")
    other.load_state_dict(AutoIAF(MODELS["plates"][0]()).state_dict(), strict=False)
    other.load_state_dict(make("plates")[0].state_dict())
    other.load_state_dict(saved)  # the right one, in time
    other()
    assert same(values(other), saved)


def test_a_loaded_state_takes_the_precision_of_the_model():
    state = {name: v.float() if v.is_floating_point() else v for name, v in values_of_two().items()}
    guide = AutoIAF(two_sites)
    with torch.inference_mode():
        guide.load_state_dict(state)
    assert guide()["x"].dtype == torch.float64
    train(guide)  # nor was a parameter made in inference mode


def values_of_two():
    guide = AutoIAF(two_sites)
    guide.setup()
    return values(guide)


def test_parameters_can_be_swapped():
    guide = AutoIAF(two_sites, start="init")
    guide.setup()
    swapped = {name: p.detach().clone() for name, p in guide.named_parameters()}
    swapped["transform.parts.2.coefficients"][0] = 7.0
    draw = torch.func.functional_call(guide, swapped, ())
    assert draw["x"].mean().item() == pytest.approx(7.0, abs=0.5)
    assert not len(pyro.get_param_store())


@pytest.mark.parametrize(
    "settings",
    [{"num_flows": 3}, {"hidden_dims": [8, 9, 7]}, {"univariate": "gated"}, {"num_flows": 1}],
)
def test_a_guide_builds_itself_from_a_state(settings):
    guide = AutoIAF(two_sites, name="other", **settings)
    train(guide)
    fresh = AutoIAF(two_sites)
    fresh.load_state_dict(guide.state_dict(), strict=True)
    assert same(fresh.state_dict(), guide.state_dict())
    fresh.setup()
    assert torch.equal(seeded(fresh)["x"], seeded(guide)["x"])


def test_a_checkpoint_is_tensors_only(tmp_path):
    guide = make("vectors")[0]
    torch.save(guide.state_dict(), tmp_path / "state")
    state = torch.load(tmp_path / "state", weights_only=True)
    fresh = AutoIAF(guide.model)
    fresh.load_state_dict(state)
    assert same(fresh.state_dict(), guide.state_dict())


def test_a_pickled_guide_draws_without_its_model():
    guide, model, arguments = make("module")
    train_svi = SVI(model, guide, Adam({"lr": 0.01}), Trace_ELBO())
    train_svi.step(*arguments)
    file = io.BytesIO()
    torch.save(guide, file)
    file.seek(0)
    pyro.clear_param_store()
    loaded = torch.load(file, weights_only=False)
    assert set(loaded(*arguments)) == set(guide.median())
    assert set(loaded.quantiles([0.5])) == set(guide.median())
    with pytest.raises(RuntimeError, match="pickling leaves it behind"):
        loaded.model  # noqa: B018
    never_called = pickle.loads(pickle.dumps(AutoIAF(two_sites)))
    with pytest.raises(RuntimeError, match=r"before its first call.*load_state_dict"):
        never_called()


def test_nothing_outlives_its_use():
    guide = AutoIAF(two_sites)
    train(guide)
    gc.collect()
    gc.disable()
    try:
        trace = poutine.trace(guide).get_trace()
        trace.compute_log_prob()
        latent = weakref.ref(trace.nodes["_AutoIAF_latent"]["value"])
        del trace
        assert latent() is None
    finally:
        gc.enable()
    reference = weakref.ref(guide)
    del guide
    pyro.clear_param_store()
    gc.collect()
    assert reference() is None


# Precision and devices


@pytest.mark.parametrize("default", [torch.float32, torch.float64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_precision_follows_the_model(default, dtype):
    torch.set_default_dtype(default)

    def model():
        z = pyro.sample("z", dist.Normal(torch.zeros(3, dtype=dtype), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(z.sum(-1), 1.0), obs=torch.tensor(1.0, dtype=dtype))

    guide = AutoIAF(model)
    train(guide, model)
    assert guide()["z"].dtype == dtype
    assert guide.sample_posterior(3)["z"].dtype == dtype
    assert guide.median()["z"].dtype == guide.quantiles([0.5])["z"].dtype == dtype
    assert {p.dtype for p in guide.parameters()} == {dtype}


@pytest.mark.parametrize("before", [True, False])
def test_a_conversion_counts_before_and_after_the_first_call(before):
    guide = AutoIAF(MODELS["single precision"][0]())
    if not before:
        guide()
    assert guide.double() is guide
    assert guide()["z"].dtype == torch.float64
    single = AutoIAF(MODELS["supports"][0](), name="single").float()
    single.setup()
    assert {value.dtype for value in single().values()} == {torch.float32}
    single.double()
    assert {value.dtype for value in single().values()} == {torch.float64}


def test_one_seed_gives_one_run():
    losses = []
    for _ in range(2):
        pyro.clear_param_store()
        pyro.set_rng_seed(3)
        losses.append(train(AutoIAF(two_sites)))
    assert losses[0] == losses[1]


def test_medians_do_not_disturb_the_run():
    guide = make("vectors")[0]
    state = torch.get_rng_state()
    first = guide.median(), guide.quantiles([0.5])
    assert torch.equal(torch.get_rng_state(), state)
    again = guide.median(), guide.quantiles(torch.tensor([0.5]))
    for a, b in zip(first, again, strict=True):
        assert all(torch.equal(a[name], b[name]) for name in a)
    assert_close(first[0]["z"], first[1]["z"][0])


def test_one_latent_gives_no_warning(recwarn):
    guide, model, _ = make("one latent")
    train(guide, model)
    assert not recwarn.list


# What it refuses


def test_subsampled_latents_are_refused():
    def model():
        with pyro.plate("data", 100, subsample_size=10):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    guide = AutoIAF(model)
    for _ in range(2):  # a guide that failed fails again, in the same words
        with pytest.raises(
            NotImplementedError, match=r"'z'.*'data'.*10 of 100.*AutoHierarchicalIAF"
        ):
            guide()

    def remedy():
        scale = pyro.sample("scale", dist.HalfNormal(1.0))
        with pyro.plate("data", 100, subsample_size=10):
            pyro.sample("z", dist.Normal(0.0, scale))

    both = AutoGuideList(remedy, create_plates=lambda: pyro.plate("data", 100, subsample_size=10))
    both.append(AutoIAF(poutine.block(remedy, hide=["z"])))
    both.append(AutoNormal(poutine.block(remedy, expose=["z"])))
    assert all(map(math.isfinite, train(both, remedy)))


def test_sequential_plates_are_refused():
    def model():
        for i in pyro.plate("data", 3):
            pyro.sample(f"z{i}", dist.Normal(0.0, 1.0))

    with pytest.raises(NotImplementedError, match="sequential"):
        AutoIAF(model)()


UNFIT = {
    "discrete": (dist.Bernoulli(0.5), ValueError, "are discrete: 'z'"),
    "spherical": (dist.ProjectedNormal(torch.ones(3)), ValueError, "spherical sample site 'z'"),
    "none": (None, RuntimeError, "found no latent variables"),
    "empty": (dist.Normal(torch.zeros(0), 1.0), RuntimeError, "found no latent"),
    "half": (
        dist.Normal(torch.zeros(2).half(), 1.0).to_event(1),
        ValueError,
        "'z' is in .*float16",
    ),
}


@pytest.mark.parametrize("kind", [AutoIAF, AutoHierarchicalIAF])
@pytest.mark.parametrize(("prior", "error", "message"), UNFIT.values(), ids=UNFIT)
def test_unfit_models_are_refused_and_a_mended_one_is_not(prior, error, message, kind):
    broken = True

    def model():
        if broken:
            if prior is not None:
                pyro.sample("z", prior)
        else:
            pyro.sample("z", dist.Normal(0.0, 1.0))

    guide = kind(model)
    with pytest.raises(error, match=message):
        guide()
    broken = False
    assert guide()["z"].isfinite()


@pytest.mark.parametrize("kind", [AutoIAF, AutoHierarchicalIAF])
def test_an_empty_site_is_no_obstacle(kind):
    def model():
        pyro.sample("none", dist.Normal(torch.zeros(0), 1.0).to_event(1))
        pyro.sample("z", dist.Normal(0.0, 1.0))

    draws = kind(model).sample_posterior(5)
    assert draws["none"].shape == (5, 0)
    assert draws["z"].shape == (5,)


@pytest.mark.parametrize("kind", [AutoIAF, AutoHierarchicalIAF])
def test_a_site_called_like_the_guides_is_refused(kind):
    def model():
        pyro.sample(f"_{kind.__name__}_latent", dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match=r"as the guide's own sites do.*name=\.\.\."):
        kind(model)()
    assert len(kind(model, name="another")()) == 1


BAD_ARGUMENTS = {
    "model": ({"model": 3}, "a callable"),
    "num_flows": ({"num_flows": 0}, "num_flows should be an int"),
    "start": ({"start": "nowhere"}, "start should be"),
    "init_scale": ({"init_scale": 0.0}, "init_scale should be a positive"),
    "true": ({"init_scale": True}, "init_scale should be a positive"),
    "nan": ({"init_scale": math.nan}, "init_scale should be a positive"),
    "name": ({"name": ""}, "name should be a string"),
    "dollar": ({"name": "a$$$b"}, "name should be a string"),
    "init_loc_fn": ({"init_loc_fn": 3}, "init_loc_fn should be a callable"),
    "create_plates": ({"create_plates": []}, "create_plates should be a callable"),
    "hidden_dims": ({"hidden_dims": [0]}, r"hidden_dims\[0\] should be an int"),
}


@pytest.mark.parametrize(("settings", "message"), BAD_ARGUMENTS.values(), ids=BAD_ARGUMENTS)
def test_bad_arguments_are_named_where_they_are_given(settings, message):
    with pytest.raises(ValueError, match=message):
        AutoIAF(**{"model": two_sites, **settings})


def test_bad_levels_and_counts_are_named():
    guide = make("one latent")[0]
    for wrong in ([0.5, 1.5], math.nan, None, [None], "half", ["0.5"], [], [[0.1], [0.9]]):
        with pytest.raises(ValueError, match=r"a level between 0 and 1.*got "):
            guide.quantiles(wrong)
    with pytest.raises(ValueError, match="num_samples should be an int"):
        guide.sample_posterior(0)


@pytest.mark.parametrize("method", ["get_base_dist", "get_transform", "get_posterior", "median"])
def test_a_guide_is_built_on_demand_or_says_what_it_needs(method):
    assert getattr(AutoIAF(two_sites), method)() is not None
    with pytest.raises(RuntimeError, match=r"guide.setup\(\*args, \*\*kwargs\)"):
        getattr(AutoIAF(MODELS["arguments"][0]()), method)()


def test_a_type_error_of_the_model_stays_its_own():
    def model():
        pyro.sample("z", dist.Normal(torch.zeros(2) + None, 1.0))

    with pytest.raises(TypeError, match="NoneType"):
        AutoIAF(model).median()


def test_half_precision_has_quantiles():
    guide = make("one latent")[0].bfloat16()
    assert guide.quantiles([0.1, 0.9])["z"].dtype == torch.float32
    assert guide.median()["z"].isfinite()


# What it finds


@pytest.mark.parametrize("batch", [(), (2,)], ids=["alone", "batched"])
def test_it_finds_the_posterior_and_evidence_of_a_correlated_gaussian(batch):
    D, N, noise = 3, 4, 0.5
    A, y = torch.randn(N, D), torch.randn(*batch, N)

    def model():
        with pyro.plate_stack("batch", batch):
            z = pyro.sample("z", dist.Normal(torch.zeros(D), 1.0).to_event(1))
            pyro.sample("y", dist.Normal(z @ A.T, noise).to_event(1), obs=y)

    precision = torch.eye(D) + A.T @ A / noise**2
    covariance = precision.inverse()
    mean = y @ A @ covariance / noise**2
    marginal = dist.MultivariateNormal(torch.zeros(N), A @ A.T + noise**2 * torch.eye(N))
    evidence = marginal.log_prob(y).sum()

    guide = AutoIAF(model)
    elbo = Trace_ELBO(num_particles=32, vectorize_particles=True, max_plate_nesting=len(batch))
    num_steps = 300  # it starts near the posterior
    optimizer = ClippedAdam({"lr": 0.01, "lrd": 0.01 ** (1 / num_steps)})
    svi = SVI(model, guide, optimizer, elbo)
    for _ in range(num_steps):
        svi.step()
    many = Trace_ELBO(num_particles=10_000, vectorize_particles=True, max_plate_nesting=len(batch))
    loss = many.loss(model, guide)
    assert loss == pytest.approx(-evidence.item(), abs=0.02 * 2 ** len(batch))
    draws = guide.sample_posterior(50_000)["z"]
    spread = covariance.diagonal().sqrt()
    assert (((draws.mean(0) - mean) / spread).abs() < 0.05).all()
    centred = (draws - draws.mean(0)) / spread
    correlation = covariance / spread / spread[:, None]
    found = torch.einsum("n...i,n...j->...ij", centred, centred) / len(draws)
    assert_close(found, correlation.expand_as(found), atol=0.05, rtol=0)
