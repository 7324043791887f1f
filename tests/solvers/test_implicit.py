import gc
import warnings

import pytest
import torch
from bijections import (
    BACKEND,
    BIJECTIONS,
    biases,
    coordinate_by_coordinate,
    make,
    rough,
    separate,
    standard_normal,
)
from pyro.distributions import TransformedDistribution
from pyro.nn import AutoRegressiveNN
from torch.testing import assert_close
from univariate_maps import TOYS

from pyro_iaf import (
    Gated,
    InverseAutoregressiveFlow,
    conditional_inverse_autoregressive_flow,
    inverse_autoregressive_flow,
    invert,
    solve_transposed,
)

METHODS = ["auto", "incremental", "fixed_point"]


def hard(flow, size=1.0):
    """Noise on every weight of a flow, as large as on a network's fresh weights, times ``size``.

    Such flows take tens of sweeps.
    """
    for part in getattr(flow, "parts", [flow]):
        network = part.network
        masks = network.matrices(network.mask)[:-1]
        weights = list(network.weights)
        weights = network.matrices(weights[0]) if len(weights) == 1 else weights
        for weight, mask in zip(weights, masks, strict=False):
            with torch.no_grad():
                noise = size * torch.randn_like(mask) / mask.shape[1] ** 0.5
                weight.view(mask.shape).add_(torch.where(mask == 0, mask, noise / mask))
    return flow


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("D", [1, 2, 8, 33, 150])
@pytest.mark.parametrize("univariate", ["affine", "gated"])
@pytest.mark.parametrize("method", METHODS)
def test_inverse_is_exact(D, univariate, dtype, method):
    flow = inverse_autoregressive_flow(D, [32, 20], univariate=univariate, order=torch.randperm(D))
    flow = hard(flow, 0.5).to(dtype)
    x = torch.randn(6, D, dtype=dtype)
    with torch.no_grad():
        y = flow(x).clone()
        found = invert(flow, y, method)
        bound = 1e-10 if dtype == torch.float64 else 1e-5
        assert ((flow(found.clone()) - y).abs() <= bound * (1 + y.abs())).all()
        if dtype == torch.float64:
            assert_close(found, x, rtol=0, atol=1e-10)


@pytest.mark.parametrize("D", [8, 32, 128, 256])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("foreign", [False, True])
def test_hard_flows_are_exact_as_well(D, method, foreign):
    if foreign:
        network = AutoRegressiveNN(D, [max(64, 2 * D)] * 2)
        with torch.no_grad():
            for layer in network.layers:
                layer.weight.copy_(torch.randn_like(layer.weight) / layer.weight.shape[1] ** 0.5)
        flow = InverseAutoregressiveFlow(network)
    else:
        flow = hard(inverse_autoregressive_flow(D))
    with torch.no_grad():
        y = flow(torch.randn(20, D)).clone()
        x = invert(flow, y, method)
        assert ((flow(x.clone()) - y).abs() <= 1e-12 * (1 + y.abs())).all()
        assert_close(x, coordinate_by_coordinate(flow, y), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_inverts_a_stack(method):
    flow = rough(inverse_autoregressive_flow(6, [16], num_flows=3))
    y = torch.randn(2, 5, 6)
    assert_close(invert(flow, y, method), coordinate_by_coordinate(flow, y))


@pytest.mark.parametrize("num_flows", [1, 2])
@pytest.mark.parametrize("method", METHODS)
def test_each_row_has_its_own_context(num_flows, method):
    conditional = conditional_inverse_autoregressive_flow(6, 2, [16], num_flows=num_flows)
    rough(conditional, 0.1)
    context, y = torch.randn(5, 2), torch.randn(6)
    flow = conditional.condition(context)
    together = invert(flow, y, method)
    assert together.shape == (5, 6)
    for c, x in zip(context, together, strict=True):
        assert_close(invert(conditional.condition(c), y, method), x)
    more = torch.randn(3, 5, 6)
    assert_close(invert(flow, more, method), coordinate_by_coordinate(flow, more))


def test_a_network_that_never_says_the_same_twice_is_found_out():
    class Noisy(AutoRegressiveNN):
        def forward(self, x):
            shift, log_scale = super().forward(x)
            return shift + torch.randn_like(shift), log_scale

    flow = InverseAutoregressiveFlow(Noisy(4, [16]).requires_grad_(False))
    with pytest.warns(RuntimeWarning, match="comes back only"):
        flow.inv(torch.randn(3, 4))


def test_our_networks_are_inverted_without_calling_them(count_passes):
    flow = rough(inverse_autoregressive_flow(7, [16], num_flows=2))
    posterior = TransformedDistribution(standard_normal(7), [flow.parts[0]])
    passes = count_passes(flow)
    y = torch.randn(3, 7)
    with torch.no_grad():
        flow.parts[0].inv(y)
        posterior.log_prob(y)
        assert passes() == 0  # the density is known from the way back
    posterior.log_prob(y)
    assert passes() == 1  # its gradient needs a pass


def test_networks_of_others_take_a_few_passes(count_passes):
    network = AutoRegressiveNN(40, [80])
    flow = InverseAutoregressiveFlow(network)
    passes = count_passes(flow)
    y = torch.randn(3, 40)
    with torch.no_grad():
        flow.inv(y)
        assert passes() < 20
        before = passes()
        invert(flow, y, "incremental")
        assert passes() == before + 40 + 1  # to see whether it comes back


@pytest.mark.parametrize("with_gradient", [False, True])
@pytest.mark.parametrize("num_flows", [1, 2])
@pytest.mark.parametrize("steepness", [0.5, 5.0])  # rounding only, and an overflow
def test_a_loss_of_precision_is_never_silent(num_flows, steepness, with_gradient):
    flow = inverse_autoregressive_flow(40, [8], num_flows=num_flows).float()
    for part in getattr(flow, "parts", [flow]):
        with torch.no_grad():
            part.network.matrices(part.network.weights[0])[1].fill_(steepness)
            biases(part.network)[-40:] = -100.0  # scales of e^-10
    y = torch.randn(4, 40, dtype=torch.float32)
    with (
        torch.set_grad_enabled(with_gradient),
        pytest.warns(RuntimeWarning, match=r"within .* of it.*torch.float32.*\.double\(\)"),
    ):
        flow.inv(y)


@pytest.mark.parametrize("with_gradient", [False, True])
def test_a_stack_measures_what_its_parts_can_not(with_gradient):
    # Nothing but shifts, so that every processor rounds alike: float32 has steps of 1 / 64 at 2e5.
    # The 0.003 that are lost there are little beside the 500 in between, and much in the end.
    flow = inverse_autoregressive_flow(2, [8], num_flows=2).float()
    with torch.no_grad():
        for shift, part in zip((2e5, -500.0), flow.parts, strict=True):
            part.network.weights[0].zero_()
            biases(part.network)[-4:-2] = shift
    y = torch.tensor([0.3, -0.7], dtype=torch.float32)
    with torch.set_grad_enabled(with_gradient):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            between = flow.parts[1].inv(y)
            flow.parts[0].inv(between.detach().clone())
        with pytest.warns(RuntimeWarning, match="comes back only"):
            flow.inv(y)


@pytest.mark.parametrize("size", [1e-3, 1e-6, 1e-9])
def test_small_values_are_as_exact_as_large_ones(size):
    flow = hard(inverse_autoregressive_flow(32), 0.5).float()
    with torch.no_grad():
        biases(flow.network).zero_()
        y = size * torch.randn(20, 32, dtype=torch.float32)
        x, truth = flow.inv(y), coordinate_by_coordinate(flow.double(), y.double())
    assert ((x - truth).abs() <= 1e-4 * truth.abs() + 1e-6 * size).all()


@pytest.mark.parametrize("D", [20, 100])
def test_sweeps_are_as_exact_as_single_steps(D):
    flow = hard(inverse_autoregressive_flow(D))
    with torch.no_grad():
        x = torch.randn(50, D)
        y = flow(x).clone()
        swept, stepped = (invert(flow, y, method) for method in ("fixed_point", "incremental"))
    assert (swept - x).abs().max() <= 10 * (stepped - x).abs().max()


def test_what_vanishes_on_the_way_may_come_back():
    """A chain that shrinks its first value beyond what sweeps would see, and then grows it."""
    flow = inverse_autoregressive_flow(35, [4])
    with torch.no_grad():
        (weights,) = flow.network.weights
        weights.zero_()
        _, output, _ = flow.network.matrices(weights)
        _, mask, _ = flow.network.matrices(flow.network.mask)
        for k in range(1, 35):
            output[k, 4 + k - 1] = -(1 / 8 if k <= 17 else 8) / mask[k, 4 + k - 1]
        y = torch.zeros(1, 35)
        y[0, 0] = 1.0
        for method in METHODS:
            assert invert(flow, y, method)[0, -1].item() == 1.0


def test_an_empty_batch_of_contexts_is_no_trouble():
    flow = conditional_inverse_autoregressive_flow(3, 2, [8], num_flows=2)
    assert flow.condition(torch.randn(0, 2)).inv(torch.randn(3)).shape == (0, 3)


def test_a_good_inverse_comes_without_a_warning(recwarn):
    flow = rough(inverse_autoregressive_flow(10, [16], num_flows=2), 0.1)
    for dtype in (torch.float32, torch.float64):
        flow.to(dtype).inv(torch.randn(5, 10, dtype=dtype))
        flow.inv(torch.full((10,), torch.nan, dtype=dtype))  # what comes in goes out
    assert not recwarn.list


def test_a_mistake_is_named_where_it_is_made():
    flow = inverse_autoregressive_flow(3, [8])
    with pytest.raises(ValueError, match="auto, incremental, fixed_point; got 'newton'"):
        invert(flow, torch.randn(3), "newton")
    conditional = conditional_inverse_autoregressive_flow(3, 2, [8])
    for stranger in (torch.distributions.AffineTransform(0.0, 1.0), conditional, flow.inv):
        with pytest.raises(
            ValueError, match=r"stack of them; got \w+\. .*flow\.condition\(context\)"
        ):
            invert(stranger, torch.randn(3))
    with pytest.raises(ValueError, match="y should be a tensor; got list"):
        invert(flow, [1.0, 2.0, 3.0])
    with pytest.raises(ValueError, match=r"network's dtype, torch.float64; got .*\.to\("):
        flow.inv(torch.randn(3).float())
    for run in (flow.inv, lambda y: invert(flow, y), lambda y: solve_transposed(flow, y, y)):
        with pytest.raises(ValueError, match=r"floating-point numbers.*got torch.int64"):
            run(torch.arange(3))
    with pytest.raises(ValueError, match=r"vectors of 3 coordinates; got shape \(4,\)"):
        invert(flow, torch.randn(4))
    with pytest.raises(ValueError, match=r"value, \(2, 3\) and .*64; got \(3,\)"):
        solve_transposed(flow, torch.randn(2, 3), torch.randn(3))
    with pytest.raises(ValueError, match=r"and torch.float64; got \(3,\) and torch.float32"):
        solve_transposed(flow, torch.randn(3), torch.randn(3).float())
    with pytest.raises(RuntimeError, match=r"none under torch\.func.*Call it outside"):
        torch.vmap(lambda x: solve_transposed(flow, x, x))(torch.randn(2, 3))


# Gradients

FLOWS = {
    "affine": lambda: inverse_autoregressive_flow(4, [16]),
    "gated": lambda: inverse_autoregressive_flow(4, [16], univariate="gated"),
    **{
        name: lambda univariate=univariate: inverse_autoregressive_flow(
            4, [16], univariate=univariate
        )
        for name, univariate in TOYS.items()
    },
    "own order": lambda: inverse_autoregressive_flow(4, [16], order=[2, 0, 3, 1]),
    "two layers": lambda: inverse_autoregressive_flow(5, [7, 16]),
    "many coordinates": lambda: hard(inverse_autoregressive_flow(70, [90]), 0.3),
    "one coordinate": lambda: inverse_autoregressive_flow(1, [16]),
    "stack": lambda: inverse_autoregressive_flow(4, [16], num_flows=3),
    "conditioned": lambda: conditional_inverse_autoregressive_flow(4, 2, [16]).condition(
        torch.randn(5, 2, requires_grad=True)
    ),
    "one context": lambda: conditional_inverse_autoregressive_flow(4, 2, [16]).condition(
        torch.randn(2, requires_grad=True)
    ),
    "conditioned stack": lambda: conditional_inverse_autoregressive_flow(
        4, 2, [16], num_flows=2
    ).condition(torch.randn(5, 2, requires_grad=True)),
    "Pyro's network": lambda: make("Pyro's network"),
}


@pytest.fixture(params=FLOWS)
def flow(request):
    return rough(FLOWS[request.param](), 0.1)


def input_dim(flow):
    return getattr(flow, "parts", [flow])[0].input_dim


def leaves(flow, y):
    contexts = {part.context for part in getattr(flow, "parts", [flow])} - {None}
    return [y, *flow.parameters(), *contexts]


def gradients(score, inputs):
    return torch.autograd.grad(score, inputs, allow_unused=True, materialize_grads=True)


def score(flow, y, inverse=None):
    """A density at y, weighted so that no two gradients agree by chance."""
    if inverse is None:
        x = flow.inv(y)
        log_det = flow.log_abs_det_jacobian(x, y)
    else:
        x = z = inverse(flow, y)
        log_det = 0
        for part in getattr(flow, "parts", [flow]):
            z, log_slope = part.univariate.forward(z, *part.params_at(z))
            log_det = log_det + log_slope.sum(-1)
    weights = torch.linspace(1, 2, x.numel()).reshape(x.shape)
    return (weights * x.square()).sum() + (weights[..., 0] * log_det).sum()


def test_the_implicit_gradient_is_that_of_the_unrolled_inverse(flow):
    y = torch.randn(5, input_dim(flow), requires_grad=True)
    inputs = leaves(flow, y)
    found, truth = score(flow, y), score(flow, y, coordinate_by_coordinate)
    assert_close(found, truth)
    assert_close(gradients(found, inputs), gradients(truth, inputs), rtol=1e-6, atol=1e-9)


def test_a_known_value_has_the_same_gradient_for_one_pass(flow, count_passes):
    with torch.no_grad():
        y = flow(torch.randn(5, input_dim(flow)))
    inputs = leaves(flow, y.requires_grad_())
    passes = count_passes(flow)
    known = score(flow, y)
    assert passes() == len(getattr(flow, "parts", [flow]))
    found = score(flow, y.clone())
    assert_close(known, found)
    assert_close(gradients(known, inputs), gradients(found, inputs), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_has_the_gradient(method):
    flow = rough(inverse_autoregressive_flow(4, [16], num_flows=2))
    y = torch.randn(5, 4, requires_grad=True)
    inputs = leaves(flow, y)
    found, truth = invert(flow, y, method), coordinate_by_coordinate(flow, y)
    weights = torch.randn(5, 4)
    assert_close(
        gradients((weights * found).sum(), inputs), gradients((weights * truth).sum(), inputs)
    )


@pytest.mark.parametrize("scale", [1e-4, 1e-8, 1e-12])
@pytest.mark.parametrize("batch", [5, 800])  # by sweeps, and one by one
def test_small_gradients_are_as_exact_as_large_ones(scale, batch):
    flow = hard(inverse_autoregressive_flow(32), 0.5)
    y = torch.randn(batch, 32, requires_grad=True)
    inputs = leaves(flow, y)
    small, large = (gradients((s * flow.inv(y).sin()).sum(), inputs) for s in (scale, 1.0))
    for one, other in zip(small, large, strict=True):
        assert_close(one / scale, other, rtol=1e-10, atol=1e-11)


MOVES = {
    "weights": lambda flow: flow.network.weights[0].mul_(2.0),
    "an optimiser's step": lambda flow: flow.network.weights[0].data.add_(1.0),
    "context": lambda flow: flow.context.mul_(2.0),
    "gate": lambda flow: setattr(flow, "univariate", Gated(-3.0)),
    "order": lambda flow: flow.network.load_state_dict(
        {**flow.network.state_dict(), "order": torch.tensor([3, 1, 0, 2])}
    ),
}


@pytest.mark.parametrize("move", MOVES)
@pytest.mark.parametrize("separate_weights", [False, True])
def test_a_gradient_is_of_the_flow_as_it_was(move, separate_weights):
    def make():
        return conditional_inverse_autoregressive_flow(4, 2, [16], univariate="gated")

    conditional = rough(separate(make) if separate_weights else make()).requires_grad_(False)
    flow = conditional.condition(torch.randn(2))
    y = torch.randn(5, 4, requires_grad=True)
    (truth,) = torch.autograd.grad(flow.inv(y).square().sum(), y)
    x = flow.inv(y)
    with torch.no_grad():
        MOVES[move](flow)
    (found,) = torch.autograd.grad(x.square().sum(), y)
    assert_close(found, truth)


def test_a_gradient_reaches_weights_from_elsewhere():
    flow = rough(inverse_autoregressive_flow(4, [16]))
    y = torch.randn(5, 4)
    weights = (2 * flow.network.weights[0].detach()).requires_grad_()

    def score(weights):
        state = {"flow.network.weights.0": weights}
        return torch.func.functional_call(flow.inv, state, (y,)).square().sum()

    assert_close(torch.autograd.grad(score(weights), weights)[0], torch.func.grad(score)(weights))


def test_a_log_scale_has_a_gradient_by_itself():
    flow = rough(inverse_autoregressive_flow(4, [16]))
    y = torch.randn(5, 4, requires_grad=True)
    weights = torch.randn(5)
    log_det = flow.log_abs_det_jacobian(flow.inv(y), y)
    x = coordinate_by_coordinate(flow, y)
    truth = flow.univariate.forward(x, *flow.params_at(x))[1].sum(-1)
    inputs = leaves(flow, y)
    assert_close(
        gradients((weights * log_det).sum(), inputs), gradients((weights * truth).sum(), inputs)
    )


def test_the_implicit_gradient_passes_gradcheck():
    conditional = rough(conditional_inverse_autoregressive_flow(3, 2, [6], num_flows=2))

    def run(y, context):
        flow = conditional.condition(context)
        x = flow.inv(y)
        return x, flow.log_abs_det_jacobian(x, y)

    y, context = torch.randn(2, 3, requires_grad=True), torch.randn(2, 2, requires_grad=True)
    assert torch.autograd.gradcheck(run, (y, context))


def saved_bytes(run):
    """How much autograd keeps for the backward pass of what ``run`` computes."""
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = run()
    assert out.requires_grad
    return sum(kept.values())


def test_memory_does_not_grow_with_the_number_of_passes():
    flow = inverse_autoregressive_flow(60, [64])
    y = torch.randn(100, 60)
    forward = saved_bytes(lambda: flow(y.clone()))
    assert saved_bytes(lambda: flow.inv(y.clone())) < 2 * forward
    assert saved_bytes(lambda: coordinate_by_coordinate(flow, y)) > 20 * forward


def test_nothing_is_left_behind():
    flow = rough(inverse_autoregressive_flow(4, [16], num_flows=2))
    gc.collect()
    gc.disable()
    try:
        before = sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects())
        for _ in range(3):
            score(flow, torch.randn(5, 4, requires_grad=True)).backward()
        flow.zero_grad()
        assert sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects()) <= before
    finally:
        gc.enable()


@pytest.mark.parametrize("batch", [1, 200])
def test_batched_gradients_agree_with_single_ones(batch):
    flow = rough(inverse_autoregressive_flow(4, [16]), 0.1)
    y = torch.randn(batch, 4, requires_grad=True)
    x = flow.inv(y)
    v = torch.randn(3, batch, 4)
    together = torch.autograd.grad(x, y, v, is_grads_batched=True, retain_graph=True)[0]
    for v_, slope in zip(v, together, strict=True):
        assert_close(slope, torch.autograd.grad(x, y, v_, retain_graph=True)[0])


@pytest.mark.parametrize("name", ["affine", "stack", "Pyro's network"])
def test_what_wants_no_gradient_is_left_without_one(name):
    flow = rough(FLOWS[name](), 0.1).requires_grad_(False)
    y = torch.randn(5, 4)
    x = flow.inv(y)
    assert not x.requires_grad
    assert not flow.log_abs_det_jacobian(x, y).requires_grad
    assert flow.inv(torch.randn(5, 4, requires_grad=True)).requires_grad


def test_gradients_of_half_precision_are_those_of_half_precision():
    flow = rough(inverse_autoregressive_flow(6, [16]), 0.1).float()
    y = torch.randn(20, 6, dtype=torch.float32, requires_grad=True)
    full = torch.autograd.grad(flow.inv(y).square().sum(), y)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        x = flow.inv(y)
    half = torch.autograd.grad(x.square().sum(), y)[0]
    assert_close(half, full, rtol=0.1, atol=0.1)
    assert not torch.equal(half, full)


def test_a_second_derivative_says_what_to_do():
    flow = rough(inverse_autoregressive_flow(4, [16]))
    y = torch.randn(4, requires_grad=True)
    with pytest.raises(RuntimeError, match=r"once, not twice.*torch\.func\.hessian"):
        torch.autograd.grad(flow.inv(y).sum(), y, create_graph=True)
    hessian = torch.func.hessian(lambda y: flow.inv(y).square().sum())(y.detach())
    truth = torch.autograd.functional.hessian(
        lambda y: coordinate_by_coordinate(flow, y).square().sum(), y.detach()
    )
    assert_close(hessian, truth)


# The transposed Jacobian


@pytest.mark.parametrize("name", [name for name in BIJECTIONS if not name.startswith("inverse")])
def test_the_transposed_jacobian_is_solved_with(name):
    flow = make(name).double()
    x, v = torch.randn(2, 3, input_dim(flow))
    u = solve_transposed(flow, x, v)
    for x_, u_, v_ in zip(x, u, v, strict=True):
        assert_close(torch.func.jacrev(flow)(x_).T @ u_, v_)
    assert not u.requires_grad


def test_the_transposed_jacobian_is_known_in_inference_mode():
    flow = rough(inverse_autoregressive_flow(4, [16], num_flows=2))
    x, v = torch.randn(2, 3, 4)
    with torch.inference_mode():
        u = solve_transposed(flow, x + 0, v + 0)
    assert_close(u, solve_transposed(flow, x, v))


def test_a_path_derivative_is_that_of_the_density():
    # With J^T u = v, the slope of log q in the value is that of log p(x) - log|det J| in the noise.
    flow = rough(inverse_autoregressive_flow(5, [16], num_flows=2))
    x = torch.randn(5, requires_grad=True)
    y = flow(x)
    (v,) = torch.autograd.grad(-(x**2).sum() / 2 - flow.log_abs_det_jacobian(x, y), x)
    u = solve_transposed(flow, x, v)
    value = y.detach().clone().requires_grad_()
    log_prob = TransformedDistribution(standard_normal(5), [flow]).log_prob(value)
    assert_close(u, torch.autograd.grad(log_prob, value)[0])


# Under torch.func and tracers


@pytest.mark.parametrize("name", list(BIJECTIONS))
def test_the_inverse_is_the_same_under_vmap(name):
    flow = make(name)
    y = torch.randn(3, input_dim(getattr(flow, "flow", flow)), dtype=next(flow.parameters()).dtype)
    tolerance = {"rtol": 1e-4, "atol": 1e-4} if "float32" in name else {}
    assert_close(torch.vmap(flow.inv)(y), flow.inv(y), **tolerance)
    assert_close(torch.vmap(flow.inv)(y[:, None]), flow.inv(y[:, None]), **tolerance)


def test_an_ensemble_of_flows_is_inverted_at_once():
    flows = [rough(inverse_autoregressive_flow(4, [8])) for _ in range(3)]
    weights = torch.stack([flow.network.weights[0].detach() for flow in flows])
    y = torch.randn(4)

    def inverse(weights):
        return torch.func.functional_call(flows[0].inv, {"flow.network.weights.0": weights}, (y,))

    assert_close(torch.vmap(inverse)(weights), torch.stack([flow.inv(y) for flow in flows]))


def test_forward_mode_agrees_with_reverse_mode():
    flow = rough(inverse_autoregressive_flow(4, [16]))
    y = torch.randn(4)
    assert_close(torch.func.jacfwd(flow.inv)(y), torch.func.jacrev(flow.inv)(y))


def test_the_inverse_compiles_to_one_graph():
    flow = rough(inverse_autoregressive_flow(3, [8]))
    y = torch.randn(5, 3)
    compiled = torch.compile(lambda y: flow.inv(y), backend=BACKEND, fullgraph=True)
    assert_close(compiled(y), flow.inv(y))


def test_shapes_of_an_inverse_are_known_on_no_device():
    flow = inverse_autoregressive_flow(4, [8]).to("meta")
    assert flow.inv(torch.empty(5, 4, device="meta")).shape == (5, 4)
