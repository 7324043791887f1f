import pytest
import torch
from bijections import biases, rough
from torch.testing import assert_close

from pyro_iaf import conditional_inverse_autoregressive_flow, inverse_autoregressive_flow
from pyro_iaf.inversion import attach_gradient, invert


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("D", [1, 2, 8, 33])
@pytest.mark.parametrize("gated", [False, True])
def test_inverse_is_exact(D, gated, dtype):
    flow = inverse_autoregressive_flow(D, [32], gated=gated, order=torch.randperm(D))
    flow = rough(flow, 0.1).to(dtype)
    y = flow(torch.randn(6, D, dtype=dtype)).detach().clone()
    x = invert(flow._coefficients, y, flow.order)
    bound = 1e-10 if dtype == torch.float64 else 1e-5
    assert ((flow(x) - y).abs() <= bound * (1 + y.abs())).all()


def test_each_coordinate_costs_one_call(count_passes):
    flow = inverse_autoregressive_flow(7, [16])
    passes = count_passes(flow)
    flow.inv(torch.randn(3, 7))
    assert passes() == 7


@pytest.mark.parametrize("num_flows", [1, 2])
@pytest.mark.parametrize("steepness", [0.5, 5.0])  # rounding only, and an overflow
def test_a_loss_of_precision_is_never_silent(num_flows, steepness):
    flow = inverse_autoregressive_flow(40, [8], num_flows=num_flows).float()
    for part in getattr(flow, "parts", [flow]):
        with torch.no_grad():
            part.network.matrices(part.network.weights[0])[1].fill_(steepness)
            biases(part.network)[-40:] = -100.0  # scales of e^-10
    y = torch.randn(4, 40, dtype=torch.float32)
    with pytest.warns(RuntimeWarning, match=r"within .* of it.*torch.float32.*\.double\(\)"):
        flow.inv(y)


def test_a_stack_measures_what_its_parts_can_not():
    flow = inverse_autoregressive_flow(2, [8], num_flows=2).float()
    with torch.no_grad():
        for sign, part in zip((1, -1), flow.parts, strict=True):
            biases(part.network)[-4:] = torch.tensor([sign * 1e7, sign * 1e7, 0.0, 0.0])
    y = torch.randn(4, 2, dtype=torch.float32)
    with pytest.warns(RuntimeWarning, match="comes back only"):  # a shift by 1e7 and back
        flow.inv(y)


def test_a_good_inverse_comes_without_a_warning(recwarn):
    flow = rough(inverse_autoregressive_flow(10, [16], num_flows=2), 0.1)
    for dtype in (torch.float32, torch.float64):
        flow.to(dtype).inv(torch.randn(5, 10, dtype=dtype))
        flow.inv(torch.full((10,), torch.nan, dtype=dtype))  # what comes in goes out
    assert not recwarn.list


# A value that was drawn without gradients


def drawn_without_gradients(flow, D):
    with torch.no_grad():
        return flow(torch.randn(5, D))


FLOWS = {
    "affine": lambda: inverse_autoregressive_flow(4, [16]),
    "gated": lambda: inverse_autoregressive_flow(4, [16], gated=True),
    "own order": lambda: inverse_autoregressive_flow(4, [16], order=[2, 0, 3, 1]),
    "one coordinate": lambda: inverse_autoregressive_flow(1, [16]),
    "stack": lambda: inverse_autoregressive_flow(4, [16], num_flows=3),
    "conditioned": lambda: conditional_inverse_autoregressive_flow(4, 2, [16]).condition(
        torch.randn(5, 2, requires_grad=True)
    ),
    "conditioned stack": lambda: conditional_inverse_autoregressive_flow(
        4, 2, [16], num_flows=2
    ).condition(torch.randn(5, 2, requires_grad=True)),
}


@pytest.fixture(params=FLOWS)
def flow(request):
    return rough(FLOWS[request.param]())


def score(flow, y):
    """A density at y, weighted so that no two gradients agree by chance."""
    x = flow.inv(y)
    weights = torch.linspace(1, 2, x.numel()).reshape(x.shape)
    return (weights * x.square()).sum() + (weights[..., 0] * flow.log_abs_det_jacobian(x, y)).sum()


def test_the_implicit_gradient_is_that_of_the_unrolled_inverse(flow, count_passes):
    parts = getattr(flow, "parts", [flow])
    y = drawn_without_gradients(flow, parts[0].input_dim).requires_grad_()
    leaves = [y, *flow.parameters(), *{part.context for part in parts if part.context is not None}]
    passes = count_passes(flow)
    known = score(flow, y)
    assert passes() == len(parts)  # one each: the noise is known, only its gradient is not
    found = score(flow, y.clone())
    assert passes() > len(parts)
    assert_close(known, found)
    assert_close(
        torch.autograd.grad(known, leaves, allow_unused=True, materialize_grads=True),
        torch.autograd.grad(found, leaves, allow_unused=True, materialize_grads=True),
    )


def test_the_implicit_gradient_passes_gradcheck():
    flow = rough(inverse_autoregressive_flow(3, [6]))

    def run(y, weights):
        def coefficients(x):
            return torch.func.functional_call(flow.network, {"weights.0": weights}, (x,))

        with torch.no_grad():
            known = invert(coefficients, y, flow.order)
        x, log_scale = attach_gradient(coefficients, known, y)
        return x, log_scale.sum(-1)

    y = torch.randn(2, 3, requires_grad=True)
    weights = flow.network.weights[0].detach().requires_grad_()
    assert torch.autograd.gradcheck(run, (y, weights))


def test_batched_gradients_agree_with_single_ones():
    flow = rough(inverse_autoregressive_flow(4, [16]))
    y = drawn_without_gradients(flow, 4)[0].clone()
    with torch.no_grad():
        y = flow(flow.inv(y))
    x = flow.inv(y.requires_grad_())
    together = torch.autograd.grad(x, y, torch.eye(4), is_grads_batched=True)[0]
    assert_close(together, torch.func.jacrev(flow.inv)(y.detach()))


def test_a_map_without_gradients_is_left_without():
    x, y = torch.zeros(3), torch.ones(3)
    found, log_scale = attach_gradient(lambda x: (torch.ones(3), torch.zeros(3)), x, y)
    assert_close(found, x)
    assert not log_scale.requires_grad


def test_a_second_derivative_says_what_to_do():
    flow = rough(inverse_autoregressive_flow(4, [16]))
    y = drawn_without_gradients(flow, 4).requires_grad_()
    with pytest.raises(RuntimeError, match=r"flow.inv\(y.clone\(\)\)"):
        torch.autograd.grad(score(flow, y), y, create_graph=True)
    (slope,) = torch.autograd.grad(score(flow, y.clone()), y, create_graph=True)
    slope.sum().backward()
    assert y.grad.isfinite().all()
