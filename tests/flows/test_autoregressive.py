"""What we know of every flow in the table, and of single kinds of them."""

import copy
import math
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from bijections import (
    BACKEND,
    BIJECTIONS,
    DOUBLE,
    SINGLE,
    biases,
    dim_and_dtype,
    make,
    rough,
    standard_normal,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from pyro.infer import SVI, Trace_ELBO
from pyro.nn import AutoRegressiveNN, ConditionalAutoRegressiveNN, PyroModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing import assert_close

from pyro_iaf import (
    ConditionalInverseAutoregressiveFlow,
    DiagonalNormal,
    Gated,
    InverseAutoregressiveFlow,
    InverseAutoregressiveFlowStack,
    MaskedAutoregressiveNetwork,
    TraceSTL_ELBO,
    conditional_inverse_autoregressive_flow,
    inverse_autoregressive_flow,
)


@pytest.fixture(params=BIJECTIONS)
def bijection(request):
    return make(request.param)


@pytest.fixture
def x(bijection):
    D, dtype = dim_and_dtype(bijection)
    return torch.randn(7, D, dtype=dtype)


def tolerance(x):
    # A few roundings of numbers of order 10 and their sums.
    return {"rtol": 1e-4, "atol": 1e-4} if x.dtype == torch.float32 else {}


def flow_on(flow, D):
    return dist.TransformedDistribution(standard_normal(D), [flow])


# The log-determinant and the Jacobian


def test_log_det_agrees_with_autograd(bijection, x):
    slopes = torch.stack([torch.autograd.functional.jacobian(bijection, row) for row in x])
    log_det = bijection.log_abs_det_jacobian(x, bijection(x))
    assert_close(log_det, slopes.det().abs().log(), **tolerance(x))


def test_log_det_has_batch_shape(bijection, x):
    for value in (x, x[0], x.expand(3, *x.shape), x[:0]):
        log_det = bijection.log_abs_det_jacobian(value, bijection(value))
        assert log_det.shape == value.shape[:-1]
        assert bijection(value).shape == value.shape


@pytest.mark.parametrize("bijection", SINGLE, indirect=True)
def test_slope_on_a_later_coordinate_is_exactly_zero(bijection, x):
    slope = torch.autograd.functional.jacobian(bijection, x[0])
    in_order = slope[bijection.order][:, bijection.order]
    assert (in_order.triu(1) == 0).all()
    assert (in_order.diagonal() > 0).all()


@pytest.mark.parametrize("hidden_dims", [1, 2, [1, 1], [3, 1], [40], [40, 3, 40]])
@pytest.mark.parametrize("D", [2, 7])
def test_every_permitted_dependence_is_there_in_a_fresh_flow(D, hidden_dims):
    flow = inverse_autoregressive_flow(D, hidden_dims, order=torch.randperm(D))
    slope = torch.autograd.functional.jacobian(flow, torch.randn(D))
    in_order = slope[flow.order][:, flow.order]
    assert ((in_order != 0) == torch.ones(D, D).tril().bool()).all()


# There and back


def test_there_and_back(bijection, x):
    back = bijection.inv(bijection(x).clone())  # a clone is nobody's value
    single = x.dtype == torch.float32
    bound = 1e-4 if single else 1e-10
    assert ((back - x).abs() <= bound * (1 + x.abs())).all()


def test_back_and_there(bijection, x):
    there = bijection(bijection.inv(x).clone())
    assert_close(there, x, **tolerance(x))


@pytest.mark.parametrize("bijection", DOUBLE, indirect=True)
def test_inverse_is_exact_to_rounding(bijection, x):
    y = bijection(x).detach().clone()
    residual = (bijection(bijection.inv(y).clone()) - y).abs()
    assert (residual <= 1e-10 * (1 + y.abs())).all()


def test_what_pytorch_itself_calls_computes_anew(bijection, x, count_passes):
    # Pyro's tests of its transforms go this way, past what a cache knows.
    y = bijection(x)
    passes = count_passes(getattr(bijection, "flow", bijection))
    assert_close(bijection._call(x), y, **tolerance(x))
    back = bijection._inverse(y)
    assert passes() > 0
    assert back is not x
    assert_close(back, x, **tolerance(x))
    inverse = bijection.inv
    assert_close(inverse._call(y), x, **tolerance(x))
    assert_close(inverse._inverse(x), y, **tolerance(x))
    before = bijection.log_abs_det_jacobian(x, y)
    assert_close(bijection.log_abs_det_jacobian(back, y), before, **tolerance(x))


def test_what_says_it_is_autoregressive_is(bijection, x):
    # Pyro's tests ask for a triangular Jacobian wherever there is this word.
    if hasattr(bijection, "autoregressive"):
        slope = torch.autograd.functional.jacobian(bijection, x[0])[bijection.order]
        assert bijection.autoregressive
        assert (slope[:, bijection.order].triu(1) == 0).all()


def test_inverse_of_the_inverse_is_the_flow(bijection, x):
    assert bijection.inv.inv is bijection
    assert isinstance(bijection.inv, torch.nn.Module)
    ours = {id(p) for p in bijection.parameters()}
    assert ours == {id(p) for p in bijection.inv.parameters()}
    y = bijection(x)
    assert_close(bijection.inv.log_abs_det_jacobian(y, x), -bijection.log_abs_det_jacobian(x, y))


# Gradients


def test_gradients_reach_every_parameter(bijection, x):
    (bijection(x).square().sum() + bijection.log_abs_det_jacobian(x, bijection(x)).sum()).backward()
    for name, parameter in bijection.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        # A lone coordinate has nothing before it, so its input weights are masked altogether.
        if x.shape[-1] > 1 or "hidden.0.weight" not in name:
            assert parameter.grad.any(), name


@pytest.mark.parametrize("univariate", ["affine", "gated"])
@pytest.mark.parametrize("level", [-60.0, -12.0, 0.0, 12.0, 60.0])
def test_gradients_are_true_wherever_the_scale_is(univariate, level):
    flow = rough(inverse_autoregressive_flow(3, [6], univariate=univariate))
    with torch.no_grad():
        biases(flow.network)[-6:] = torch.cat([torch.zeros(3), torch.full((3,), level)])
    weights = flow.network.weights[0].detach().requires_grad_()
    x = torch.randn(2, 3, requires_grad=True)

    def run(x, weights):
        parameters = {"flow.network.weights.0": weights}
        return torch.func.functional_call(_Scored(flow), parameters, (x,))

    unit = run(x, weights)[0].abs().mean().item()  # finite differences like numbers of order one
    assert torch.autograd.gradcheck(
        lambda x, weights: (run(x, weights)[0] / unit, run(x, weights)[1]), (x, weights)
    )


class _Scored(torch.nn.Module):
    def __init__(self, flow):
        super().__init__()
        self.flow = flow

    def forward(self, x):
        y = self.flow(x)
        return y, self.flow.log_abs_det_jacobian(x, y)


@pytest.mark.parametrize("bijection", DOUBLE, indirect=True)
def test_inverse_has_the_gradient_of_the_inverse(bijection, x):
    y = bijection(x[:2]).detach().requires_grad_()
    assert torch.autograd.gradcheck(lambda y: bijection.inv(y.clone()), (y,))


@pytest.mark.parametrize("target", [1e-3, 1e3])
def test_one_affine_layer_reaches_extreme_scales(target):
    flow = inverse_autoregressive_flow(2, [8])
    x = torch.randn(64, 2)
    optimizer = torch.optim.LBFGS(flow.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        log_scale = flow.log_abs_det_jacobian(x, flow(x)) / 2
        error = (log_scale - math.log(target)).square().mean()
        error.backward()
        return error

    optimizer.step(loss)
    scale = (flow.log_abs_det_jacobian(x, flow(x)) / 2).exp()
    assert_close(scale, torch.full_like(scale, target), rtol=0.05, atol=0)


# Where a fresh flow starts


@pytest.mark.parametrize("num_flows", [1, 4])
@pytest.mark.parametrize("D", [1, 5, 50])
def test_a_fresh_affine_flow_is_nearly_the_identity(D, num_flows):
    x = 3 * torch.randn(200, D)
    y = inverse_autoregressive_flow(D, num_flows=num_flows)(x)
    assert ((y - x).abs() <= 1e-2 * (1 + x.abs())).all()


@pytest.mark.parametrize("bias", [-1.0, 2.0])
def test_a_fresh_gated_flow_contracts_by_its_bias(bias):
    x = 3 * torch.randn(200, 5)
    flow = inverse_autoregressive_flow(5, univariate=Gated(bias))
    y = x * torch.sigmoid(torch.tensor(bias))
    assert ((flow(x) - y).abs() <= 1e-2 * (1 + x.abs())).all()
    rough(flow, 3.0)
    assert (flow.log_abs_det_jacobian(x, flow(x)) < 0).all()


@pytest.mark.parametrize("hidden_dims", [[16], [64, 64], [256, 256]])
def test_a_large_learning_rate_does_not_blow_a_flow_up(hidden_dims):
    flow = inverse_autoregressive_flow(10, hidden_dims, num_flows=2)
    optimizer = torch.optim.Adam(flow.parameters(), lr=0.05)
    target = dist.MultivariateNormal(torch.zeros(10), 0.5 * torch.eye(10) + 0.5)
    posterior = flow_on(flow, 10)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        y = posterior.rsample((64,))
        loss = (posterior.log_prob(y) - target.log_prob(y)).mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert max(losses) < 2 * losses[0] + 1  # it starts at the KL of N(0, I) from the target
    assert losses[-1] < 0.5 * losses[0]


# Composition


def test_works_under_torch_func(bijection, x):
    y = bijection(x)
    assert_close(torch.func.vmap(bijection)(x), y, **tolerance(x))
    assert_close(
        torch.func.vmap(lambda x: bijection.log_abs_det_jacobian(x, bijection(x)))(x),
        bijection.log_abs_det_jacobian(x, y),
        **tolerance(x),
    )
    assert_close(torch.func.vmap(bijection.inv)(y.detach().clone()), x, **tolerance(x))
    assert_close(
        torch.func.jacrev(bijection)(x[0]),
        torch.autograd.functional.jacobian(bijection, x[0]),
        **tolerance(x),
    )


def score(bijection, x):
    y = bijection(x)
    return y, bijection.log_abs_det_jacobian(x, y), bijection.inv(y)


def test_traced_and_eager_runs_agree(bijection, x):
    traced = make_fx(lambda x: score(bijection, x))(x)
    assert_close(traced(2 * x), score(bijection, 2 * x), **tolerance(x))


@pytest.mark.parametrize("name", ["affine", "gated", "stack", "conditioned", "inverse"])
def test_compiles_without_a_break(name):
    bijection = make(name)
    x = torch.randn(7, 4)
    run = torch.compile(lambda x: score(bijection, x), fullgraph=True, backend="aot_eager")
    assert_close(run(x), score(bijection, x))
    module = torch.compile(bijection, fullgraph=True, backend="aot_eager")
    assert_close(module(x), bijection(x))


def test_inductor_agrees():
    flow = make("stack")
    # torch checks values by branching on them, which no full graph can hold.
    posterior = dist.TransformedDistribution(standard_normal(4), [flow], validate_args=False)
    x = torch.randn(7, 4)
    compiled = torch.compile(posterior.log_prob, fullgraph=True, backend=BACKEND)
    assert_close(compiled(x), posterior.log_prob(x))


def test_caching_a_flow_changes_nothing(bijection, x):
    assert bijection.with_cache(1) is bijection
    bijection.clear_cache()
    composed = dist.transforms.ComposeTransform([bijection], cache_size=1)
    y = composed(x)
    assert_close(composed.log_abs_det_jacobian(x, y), bijection.log_abs_det_jacobian(x, y))
    assert_close(composed.inv(y.clone()), x, **tolerance(x))


def test_iterated_makes_a_module_of_flows():
    flows = dist.transforms.iterated(3, inverse_autoregressive_flow, 4, [16])
    assert len(flows.state_dict()) == 3 * len(flows.parts[0].state_dict())
    posterior = flow_on(flows, 4)
    y = posterior.rsample((5,))
    assert_close(posterior.log_prob(y), posterior.log_prob(y.clone()))


def test_shapes_are_inferred(bijection, x):
    assert bijection.forward_shape(x.shape) == x.shape
    assert bijection.inverse_shape(x.shape) == x.shape
    assert bijection.domain.event_dim == bijection.codomain.event_dim == bijection.event_dim == 1


@given(
    D=st.integers(1, 6),
    hidden_dims=st.one_of(st.integers(1, 9), st.lists(st.integers(1, 9), min_size=1, max_size=3)),
    batch_shape=st.lists(st.integers(0, 3), max_size=3),
    context_shape=st.one_of(st.none(), st.lists(st.integers(1, 3), max_size=2)),
    num_flows=st.integers(1, 3),
    univariate=st.sampled_from(["affine", "gated"]),
    data=st.data(),
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_shapes_hold_for_any_sizes(
    D, hidden_dims, batch_shape, context_shape, num_flows, univariate, data
):
    order = data.draw(st.permutations(range(D)))
    options = {"num_flows": num_flows, "univariate": univariate, "order": order}
    if context_shape is None:
        flow = rough(inverse_autoregressive_flow(D, hidden_dims, **options))
        context_shape = []
    else:
        flow = rough(conditional_inverse_autoregressive_flow(D, 2, hidden_dims, **options))
        flow = flow.condition(torch.randn(*context_shape, 2))
    try:
        shape = torch.broadcast_shapes(batch_shape, context_shape)
    except RuntimeError:
        with pytest.raises(ValueError, match="should broadcast"):
            flow(torch.randn(*batch_shape, D))
        return
    x = torch.randn(*batch_shape, D)
    y = flow(x)
    assert y.shape == flow.forward_shape(x.shape) == (*shape, D)
    assert flow.log_abs_det_jacobian(x, y).shape == shape
    assert flow.inv(y).shape == y.shape
    assert_close(flow.inv(y.clone()), x.expand(y.shape))
    posterior = dist.TransformedDistribution(standard_normal(D), [flow])
    assert posterior.batch_shape == torch.Size(context_shape)


# Context


def test_context_carries_batch_shape():
    flow = rough(conditional_inverse_autoregressive_flow(4, 2, [16], num_flows=2))
    for batch_shape in [(), (5,), (3, 5)]:
        contexts = torch.randn(*batch_shape, 2)
        posterior = dist.ConditionalTransformedDistribution(standard_normal(4), [flow])
        conditioned = posterior.condition(contexts)
        assert conditioned.batch_shape == batch_shape
        draws = conditioned.rsample((6,))
        assert draws.shape == (6, *batch_shape, 4)
        assert conditioned.log_prob(draws).shape == (6, *batch_shape)
        assert (draws.flatten(0, -2).unique(dim=0).shape[0]) == draws[..., 0].numel()


def test_each_row_depends_on_its_own_context_alone():
    flow = rough(conditional_inverse_autoregressive_flow(3, 2, [16], num_flows=2))
    x = torch.randn(5, 3)
    slope = torch.autograd.functional.jacobian(
        lambda context: flow.condition(context)(x), torch.randn(5, 2)
    )
    for b in range(5):
        for other in range(5):
            assert slope[b, :, other].any() == (b == other)
    alone = flow.condition(torch.ones(2))
    together = flow.condition(torch.ones(5, 2))
    assert_close(together(x), alone(x))


def test_context_reaches_every_coordinate():
    flow = rough(conditional_inverse_autoregressive_flow(4, 3, [16]))
    slope = torch.autograd.functional.jacobian(
        lambda context: torch.cat(flow.network(torch.randn(4), context)), torch.randn(3)
    )
    assert (slope != 0).all()


def test_a_conditioned_flow_exposes_the_parameters():
    flow = conditional_inverse_autoregressive_flow(4, 2, [16], num_flows=2)
    conditioned = flow.condition(torch.nn.Parameter(torch.zeros(2)))
    assert {id(p) for p in conditioned.parameters()} == {id(p) for p in flow.parameters()}
    assert flow.inv.condition(torch.zeros(2)).inv(torch.zeros(4)).shape == (4,)


def test_an_encoder_learns_through_the_context():
    encoder = torch.nn.Linear(3, 2)
    flow = conditional_inverse_autoregressive_flow(4, 2, [16])
    posterior = dist.ConditionalTransformedDistribution(standard_normal(4), [flow])
    conditioned = posterior.condition(encoder(torch.randn(5, 3)))
    conditioned.log_prob(conditioned.rsample()).sum().backward()
    assert encoder.weight.grad.any()


# State


def test_state_is_state(bijection, x):
    y = bijection(x)
    other = rough(copy.deepcopy(bijection))
    assert not torch.equal(other(x), y)
    assert other.load_state_dict(bijection.state_dict(), strict=True)
    assert torch.equal(other(x), y)


def test_order_travels_with_the_state():
    flow, other = (inverse_autoregressive_flow(5, [16], order=torch.randperm(5)) for _ in range(2))
    x = torch.randn(3, 5)
    for assign in (False, True):
        rough(flow)
        other.load_state_dict(flow.state_dict(), assign=assign)
        assert torch.equal(other(x), flow(x))
        assert_close(other.inv(other(x).clone()), x)
    assert not any("mask" in name for name in flow.state_dict())


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda f: pickle.loads(pickle.dumps(f))])
def test_copies_are_equal_and_apart(bijection, x, duplicate):
    y = bijection(x)
    y.sum().backward()
    inverse = bijection.inv  # held, as it may be while a guide is copied
    twin = duplicate(bijection)
    assert inverse.inv is bijection
    assert torch.equal(twin(x), y)
    assert twin.inv.inv is twin
    rough(twin)
    assert not torch.equal(twin(x), y)
    assert torch.equal(bijection(x.clone()), y)  # the original is as it was


def test_a_conditioned_flow_can_be_copied_while_its_context_has_a_graph():
    encoder = torch.nn.Linear(3, 2)
    flow = rough(conditional_inverse_autoregressive_flow(4, 2, [16]))
    conditioned = flow.condition(encoder(torch.randn(3)))
    x = torch.randn(4)
    assert torch.equal(copy.deepcopy(conditioned)(x), conditioned(x))
    assert conditioned.context.requires_grad


def test_flows_do_not_share_an_activation():
    flow = inverse_autoregressive_flow(3, [8], num_flows=2, activation=torch.nn.PReLU())
    assert len({id(part.network.activation.weight) for part in flow.parts}) == 2


def test_a_flow_built_on_no_device_takes_a_state():
    flow = make("stack")
    with torch.device("meta"):
        empty = BIJECTIONS["stack"]()
    empty.load_state_dict(flow.state_dict(), assign=True)
    x = torch.randn(5, 4)
    assert torch.equal(empty(x), flow(x))


def test_a_checkpoint_loads_with_weights_only(tmp_path):
    flow = make("stack")
    torch.save(flow.state_dict(), tmp_path / "flow.pt")
    state = torch.load(tmp_path / "flow.pt", weights_only=True)
    make("stack").load_state_dict(state, strict=True)


def test_dtype_follows_an_explicit_conversion():
    for dtype in (torch.float32, torch.float64):
        flow = inverse_autoregressive_flow(4, [16], num_flows=2).to(dtype)
        y = flow(torch.randn(3, 4, dtype=dtype))
        assert y.dtype == flow.log_abs_det_jacobian(torch.zeros(4, dtype=dtype), y).dtype == dtype


def test_autocast_keeps_densities_in_full_precision():
    D = 50
    flow = rough(inverse_autoregressive_flow(D, [16], num_flows=2), 0.05).float()
    base = standard_normal(D, torch.float32)
    x = torch.randn(8, D, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert_close(base.log_prob(x), dist.Normal(x.new_zeros(D), 1.0).to_event(1).log_prob(x))
        y = flow(x)
        assert flow.log_abs_det_jacobian(x, y).dtype == torch.float32


def test_shapes_are_inferred_on_no_device():
    flow = inverse_autoregressive_flow(4, [8], num_flows=2).to("meta")
    assert flow.inv(torch.empty(5, 4, device="meta")).shape == (5, 4)


# With Pyro


def test_a_guide_finds_the_exact_posterior_of_a_correlated_gaussian():
    D = 4
    root = torch.tensor(
        [[1.0, 0, 0, 0], [0.8, 0.6, 0, 0], [-0.5, 0.5, 0.7, 0], [0.3, -0.2, 0.4, 0.9]]
    )
    target = dist.MultivariateNormal(torch.tensor([0.5, -1.0, 2.0, 0.0]), scale_tril=root)
    flow = inverse_autoregressive_flow(D, [32], num_flows=2)

    def model():
        with pyro.plate("particles", 64):
            pyro.sample("z", target)

    def guide():
        pyro.module("flow", flow)
        loc = pyro.param("loc", torch.zeros(D))
        scale = pyro.param("scale", torch.ones(D), constraint=dist.constraints.positive)
        with pyro.plate("particles", 64):
            pyro.sample("z", dist.TransformedDistribution(DiagonalNormal(loc, scale), [flow]))

    # The noise of this gradient goes away with the divergence, so that the fit has an end.
    optimizer = pyro.optim.ClippedAdam({"lr": 0.02, "lrd": 0.996})
    svi = SVI(model, guide, optimizer, TraceSTL_ELBO())
    for _ in range(1500):
        svi.step()
    base = DiagonalNormal(pyro.param("loc"), pyro.param("scale"))
    draws = dist.TransformedDistribution(base, [flow]).sample((200_000,))
    spread = target.variance.sqrt()
    units = spread * spread[:, None]
    # 200,000 draws tell a mean and a covariance to 0.003; the rest is what is left to learn.
    assert ((draws.mean(0) - target.mean).abs() < 0.03 * spread).all()
    assert_close(draws.T.cov() / units, target.covariance_matrix / units, atol=0.03, rtol=0)
    # The evidence of a normalised target is 0 nats: the loss, per particle, is the divergence.
    assert abs(sum(svi.evaluate_loss() for _ in range(50)) / (50 * 64)) < 0.01


def test_a_flow_shared_over_time_steps_costs_one_pass_each(count_passes):
    T, D = 6, 3
    flow = conditional_inverse_autoregressive_flow(D, D, [16], num_flows=2)
    passes = count_passes(flow)

    def model(x):
        z = torch.zeros(D)
        for t in range(T):
            z = pyro.sample(f"z_{t}", dist.Normal(z, 1.0).to_event(1))
            pyro.sample(f"x_{t}", dist.Normal(z, 1.0).to_event(1), obs=x[t])

    def guide(x):
        pyro.module("flow", flow)
        z = torch.zeros(D)
        for t in range(T):
            posterior = dist.ConditionalTransformedDistribution(standard_normal(D), [flow])
            z = pyro.sample(f"z_{t}", posterior.condition(z + x[t]))

    svi = SVI(model, guide, pyro.optim.ClippedAdam({"lr": 0.01}), Trace_ELBO())
    for step in range(1, 4):
        svi.step(torch.randn(T, D))
        assert passes() == 2 * T * step


def test_a_pyro_module_holds_flows():
    class Guide(PyroModule):
        def __init__(self):
            super().__init__()
            self.flow = inverse_autoregressive_flow(3, [8], num_flows=2)

        def forward(self):
            return pyro.sample("z", flow_on(self.flow, 3))

    guide = Guide()
    svi = SVI(
        lambda: pyro.sample("z", dist.Normal(torch.ones(3), 1.0).to_event(1)),
        guide,
        pyro.optim.Adam({"lr": 0.01}),
        Trace_ELBO(),
    )
    before = copy.deepcopy(guide.flow.state_dict())
    svi.step()
    assert len(pyro.get_param_store()) == len(list(guide.parameters())) > 0
    assert any(not torch.equal(before[name], now) for name, now in guide.flow.state_dict().items())


def test_the_masked_autoregressive_direction_fits_by_maximum_likelihood(count_passes):
    D = 2
    first = torch.randn(4000)
    data = torch.stack([first, first**2 + 0.3 * torch.randn(4000)], -1)
    flow = inverse_autoregressive_flow(D, [32], order=[0, 1])
    density = flow_on(flow.inv, D)
    passes = count_passes(flow)
    optimizer = torch.optim.Adam(flow.inv.parameters(), lr=0.01)
    for step in range(1, 501):
        optimizer.zero_grad()
        loss = -density.log_prob(data).mean()
        loss.backward()
        optimizer.step()
        assert passes() == step  # scoring data is one pass in this direction
    # Entropy of the truth: log 2 pi e + log 0.3; 4000 points tell it to about 0.02.
    assert abs(loss.item() - (math.log(2 * math.pi * math.e) + math.log(0.3))) < 0.06


def test_networks_of_pyro_work(count_passes):
    flow = rough(InverseAutoregressiveFlow(AutoRegressiveNN(4, [16])))
    passes = count_passes(flow)
    y = flow_on(flow, 4).rsample((5,))
    log_prob = flow_on(flow, 4).log_prob(y)
    assert passes() == 1
    assert_close(flow_on(flow, 4).log_prob(y.clone()), log_prob)
    assert torch.equal(flow.order, flow.network.permutation)
    network = ConditionalAutoRegressiveNN(4, 2, [16])
    conditional = ConditionalInverseAutoregressiveFlow(network).condition(torch.randn(5, 2))
    posterior = flow_on(conditional, 4)
    assert posterior.batch_shape == (5,)
    y = posterior.rsample((3,))
    assert_close(posterior.log_prob(y), posterior.log_prob(y.clone()))


# Bad input


def test_a_wrong_last_dimension_says_which_is_expected():
    flow = inverse_autoregressive_flow(4, [8])
    for bad in (torch.zeros(3), torch.zeros(4, 3), torch.zeros(())):
        for run in (flow, flow.inv, lambda v: flow.log_abs_det_jacobian(v, v)):
            with pytest.raises(ValueError, match=r"4 coordinates; got"):
                run(bad)
    with pytest.raises(ValueError, match=r"4 coordinates; got shape \(3,\)"):
        flow_on(flow, 3)


@pytest.mark.parametrize("bad", ["a", [1.0, 2.0, 3.0], None, 1.0, torch.ones(3).numpy()])
def test_only_tensors_flow(bijection, bad):
    for run in (bijection, bijection.inv, bijection._call, bijection._inverse):
        with pytest.raises(ValueError, match=f"should be a tensor; got {type(bad).__name__}"):
            run(bad)
    x = torch.zeros(dim_and_dtype(bijection)[0])
    for pair in ((bad, x), (x, bad)):
        with pytest.raises(ValueError, match=f"should be a tensor; got {type(bad).__name__}"):
            bijection.log_abs_det_jacobian(*pair)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
def test_only_floating_point_numbers_flow(bijection, dtype):
    bad = torch.ones(dim_and_dtype(bijection)[0], dtype=dtype)
    for run in (bijection, bijection.inv, lambda v: bijection.log_abs_det_jacobian(v, v)):
        with pytest.raises(ValueError, match=f"floating-point numbers.*got {dtype}"):
            run(bad)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_flows_where_the_network_has_it(dtype):
    flow = rough(inverse_autoregressive_flow(4, [16], num_flows=2))
    half, x = copy.deepcopy(flow).to(dtype), torch.randn(5, 4)
    for run in (flow, flow.inv):
        with pytest.raises(ValueError, match=f"network's dtype, torch.float64; got {dtype}"):
            run(x.to(dtype))
    y = half(x.to(dtype))
    assert y.dtype == dtype
    # Eight bits of a number, through two networks.
    assert_close(y.double(), flow(x), rtol=0.05, atol=0.05)
    assert_close(half.inv(y.clone()).double(), x, rtol=0.05, atol=0.05)


MAKERS = {
    "flow": lambda **settings: inverse_autoregressive_flow(3, [8], **settings),
    "stack": lambda **settings: inverse_autoregressive_flow(3, [8], num_flows=2, **settings),
    "conditional": lambda **settings: conditional_inverse_autoregressive_flow(3, 2, **settings),
    "own network": lambda **settings: InverseAutoregressiveFlow(
        AutoRegressiveNN(3, [8]), **settings
    ),
}


@pytest.mark.parametrize("maker", MAKERS.values(), ids=MAKERS)
def test_a_map_is_given_by_name_or_as_itself(maker):
    for bad in ("no", "Affine", 1, None, True, torch.tensor(True), Gated):
        with pytest.raises(ValueError, match='univariate should be "affine", "gated" or a'):
            maker(univariate=bad)


def test_the_bias_of_a_gate_is_a_finite_number():
    for bad in (math.nan, math.inf, -math.inf, "2", True, None):
        with pytest.raises(ValueError, match="bias should be a finite number"):
            Gated(bias=bad)
    assert Gated(bias=2).bias == 2.0


def test_a_missing_context_says_how_to_give_one():
    for num_flows in (1, 2):
        flow = conditional_inverse_autoregressive_flow(4, 2, [8], num_flows=num_flows)
        with pytest.raises(ValueError, match=r"condition\(context\)"):
            flow(torch.zeros(4))
        with pytest.raises(ValueError, match="context should end in context_dim=2"):
            flow.condition(None)


@pytest.mark.parametrize("shape", [(), (3,), (2, 3)])
def test_a_misshapen_context_says_its_shape(shape):
    flow = conditional_inverse_autoregressive_flow(4, 2, [8])
    with pytest.raises(ValueError, match="context_dim=2 features") as error:
        flow.condition(torch.zeros(shape))
    assert str(shape) in str(error.value)


def test_a_context_that_does_not_broadcast_says_both_shapes():
    flow = conditional_inverse_autoregressive_flow(4, 2, [8]).condition(torch.zeros(5, 2))
    with pytest.raises(ValueError, match=r"\(5,\), should broadcast.*\(3,\)"):
        flow(torch.zeros(3, 4))


def test_the_wrong_kind_of_network_is_refused():
    plain = MaskedAutoregressiveNetwork(4, [8])
    waiting = MaskedAutoregressiveNetwork(4, [8], context_dim=2)
    with pytest.raises(ValueError, match="ConditionalInverseAutoregressiveFlow"):
        InverseAutoregressiveFlow(waiting)
    with pytest.raises(ValueError, match="context_dim=0"):
        ConditionalInverseAutoregressiveFlow(plain)
    with pytest.raises(ValueError, match="num_params=2"):
        InverseAutoregressiveFlow(MaskedAutoregressiveNetwork(4, [8], num_params=3))
    with pytest.raises(ValueError, match="permutation"):
        InverseAutoregressiveFlow(torch.nn.Linear(4, 4))
    with pytest.raises(ValueError, match="2 tensors"):
        InverseAutoregressiveFlow(AutoRegressiveNN(4, [8], param_dims=[2]))(torch.zeros(2, 4))
    short = AutoRegressiveNN(4, [8])
    short.permutation = torch.tensor([0, 0, 1, 2])
    with pytest.raises(ValueError, match=r"permutation of 0, \.\.\., 3.*got \[0, 0, 1, 2\]"):
        InverseAutoregressiveFlow(short)
    narrow = lambda x: (x[..., :2], x[..., :2])  # noqa: E731
    narrow.order = torch.arange(4)
    with pytest.raises(ValueError, match=r"4 coordinates; got shapes \(2,\) and \(2,\)"):
        InverseAutoregressiveFlow(narrow)(torch.zeros(4))


def test_a_stack_of_other_things_is_refused():
    with pytest.raises(ValueError, match="ComposeTransformModule"):
        InverseAutoregressiveFlowStack([dist.transforms.ExpTransform()])
    with pytest.raises(ValueError, match="ComposeTransformModule"):
        InverseAutoregressiveFlowStack([])
    with pytest.raises(ValueError, match="ComposeTransformModule"):
        InverseAutoregressiveFlowStack(inverse_autoregressive_flow(3, 8, num_flows=2))
    with pytest.raises(ValueError, match="ComposeTransformModule"):
        InverseAutoregressiveFlowStack(inverse_autoregressive_flow(3, 8))
    with pytest.raises(ValueError, match=r"input_dim \[3, 4\]"):
        InverseAutoregressiveFlowStack([inverse_autoregressive_flow(D, 8) for D in (3, 4)])


def test_a_stack_takes_its_parts_from_a_generator():
    stack = InverseAutoregressiveFlowStack(inverse_autoregressive_flow(3, 8) for _ in range(2))
    assert len(stack.parts) == 2


def test_a_conditional_flow_needs_room_for_its_context():
    with pytest.raises(ValueError, match="context_dim=0"):
        conditional_inverse_autoregressive_flow(3, 0)


@pytest.mark.parametrize("num_flows", [0, -1, 1.5, True])
def test_a_stack_needs_a_positive_number_of_flows(num_flows):
    with pytest.raises(ValueError, match="num_flows should be an int of at least 1"):
        inverse_autoregressive_flow(4, [8], num_flows=num_flows)
