import copy
import gc
import io
import math
import pickle
import warnings
import weakref

import pyro
import pyro.distributions as dist
import pytest
import torch
from bijections import rough
from models import MODELS
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
    init_to_feasible,
    init_to_mean,
    init_to_sample,
    init_to_uniform,
)
from pyro.infer.mcmc.util import initialize_model
from pyro.infer.reparam import NeuTraReparam
from pyro.optim import Adam, ClippedAdam
from pyro.util import check_model_guide_match
from torch.distributions import biject_to
from torch.func import jacfwd
from torch.testing import assert_close

from pyro_iaf import AutoIAF, DiagonalNormal

INDEPENDENT = ["one latent", "plates", "supports", "arguments", "module", "improper"]


def make(name, **settings):
    """A guide for a model of the table, moved away from where it starts."""
    model, arguments = (make() for make in MODELS[name])
    guide = AutoIAF(model, **settings)
    guide.setup(*arguments)
    return rough(guide, 0.1), model, arguments


@pytest.fixture(params=MODELS)
def case(request):
    return make(request.param, hidden_dims=[16])


def sites_of(model, arguments):
    trace = poutine.trace(poutine.uncondition(model) if False else model)
    return trace.get_trace(*arguments)


def replayed(model, arguments, values):
    """The model's trace at these values of its latents."""
    return poutine.trace(poutine.condition(model, values)).get_trace(*arguments)


def seeded(guide, *arguments):
    pyro.set_rng_seed(1)
    return guide(*arguments)


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
    assert_close(trace.log_prob_sum(), by_hand, atol=tolerance, rtol=tolerance)


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
        assert parameter.dtype == guide()["z"].dtype if name == "z" else True


def test_a_step_costs_one_network_call_per_flow(case, count_passes):
    guide, model, arguments = case
    svi = SVI(model, guide, Adam({"lr": 0.01}), Trace_ELBO())
    svi.step(*arguments)
    calls = count_passes(guide.transform)
    svi.step(*arguments)
    assert calls() == guide.num_flows


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
    for (name, a), (_, b) in zip(guide.state_dict().items(), fresh.state_dict().items()):
        assert torch.equal(a, b), name
    fresh.setup(*arguments)
    expected, found = seeded(guide, *arguments), seeded(fresh, *arguments)
    for name in expected:
        assert_close(found[name], expected[name])


@pytest.mark.parametrize("twin", [copy.deepcopy, lambda guide: pickle.loads(pickle.dumps(guide))])
def test_copies_draw_as_the_original_does(case, twin):
    guide, model, arguments = case
    svi = SVI(model, guide, Adam({"lr": 0.01}), Trace_ELBO())
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
