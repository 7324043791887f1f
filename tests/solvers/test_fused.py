import pytest
import torch
from bijections import rough
from torch.testing import assert_close
from univariate_maps import TOYS

from pyro_iaf import Gated, inverse_autoregressive_flow
from pyro_iaf.flows import autoregressive
from pyro_iaf.flows.sinh_arcsinh import LocScale
from pyro_iaf.nn.made import MaskedAutoregressiveNetwork
from pyro_iaf.solvers import fused, kernels, path_score
from pyro_iaf.solvers.path_score import draw_scored, draw_with_score

FLOWS = {
    "one coordinate": (1, {"hidden_dims": [4]}),
    "narrow": (5, {"hidden_dims": [7, 3]}),
    "some order": (6, {"hidden_dims": [9, 8, 7], "order": [3, 1, 0, 5, 2, 4]}),
    "gated": (12, {"univariate": Gated(1.3)}),
    "bent": (5, {"univariate": TOYS["bent"]}),
    "many coordinates": (100, {}),
    "many layers": (3, {"hidden_dims": 30 * [4]}),
    "other activation": (5, {"activation": "tanh"}),
}


pytestmark = pytest.mark.usefixtures("kernels")


def last_step(D, dense_frame, dense):
    frame = torch.eye(D) + 0.1 * torch.randn(D, D).tril()
    return rough(LocScale(torch.randn(D), frame if dense_frame else frame.diag(), 0.1, dense), 0.3)


def results(parts, x):
    """A draw with density and score, and the gradient of the draw in noise and parameters."""
    x = x.detach().requires_grad_()
    found = draw_scored(parts, x)
    weights = torch.linspace(0.5, 1.5, x.numel()).to(x).reshape(x.shape)
    params = [x, *(p for part in parts for p in part.parameters())]
    return [*found, *torch.autograd.grad((found.value * weights).sum(), params)]


@pytest.mark.parametrize("name", FLOWS)
@pytest.mark.parametrize("num_rows", [1, 16, 37])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_kernel_of_the_inverse_finds_the_noise(monkeypatch, name, num_rows, dtype):
    D, settings = FLOWS[name]
    if name not in ("bent", "many layers", "other activation"):
        monkeypatch.setattr(autoregressive, "walk_back", None)  # so that it is the kernel
    flow = rough(inverse_autoregressive_flow(D, **settings), 0.2).to(dtype)
    with torch.no_grad():
        x = torch.randn(num_rows, D, dtype=dtype)
        found = flow.undo_at_once(flow(x).clone(), path_score.goes_by_kernel(x))
    rounding = 1e-10 if dtype == torch.float64 else 1e-4
    assert_close(found, x, rtol=rounding, atol=rounding)


@pytest.mark.parametrize("name", FLOWS)
@pytest.mark.parametrize("dense_frame", [False, True])
@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_kernels_give_what_the_operations_of_pytorch_give(
    monkeypatch, name, dense_frame, dense, dtype
):
    D, settings = FLOWS[name]
    flows = rough(inverse_autoregressive_flow(D, num_flows=2, **settings), 0.2).parts
    parts = [part.to(dtype) for part in (*flows, last_step(D, dense_frame, dense))]
    x = torch.randn(7, D, dtype=dtype)
    by_kernel = results(parts, x)
    monkeypatch.setattr(path_score, "goes_by_kernel", lambda _: False)
    for found, expected in zip(by_kernel, results(parts, x), strict=True):
        size = expected.abs().max().item()
        rounding = 1e-12 if dtype == torch.float64 else 2e-5
        assert_close(found, expected, rtol=rounding, atol=rounding * size)


def test_density_and_score_are_those_of_the_inverse():
    flow = rough(inverse_autoregressive_flow(6, num_flows=2), 0.3)
    parts = [*flow.parts, last_step(6, True, True)]
    found = draw_scored(parts, torch.randn(5, 6))
    y = noise = found.value.detach().requires_grad_()
    log_q = torch.zeros(())
    for part in reversed(parts):
        noise, log_slope = part._undo(noise)
        log_q = log_q - log_slope.sum(-1)
    log_q = log_q + torch.distributions.Normal(0.0, 1.0).log_prob(noise).sum(-1)
    assert_close(found.log_prob, log_q.detach())
    assert_close(found.score, torch.autograd.grad(log_q.sum(), y)[0])


@pytest.mark.parametrize("needs_slope", [False, True])
def test_a_network_pass_has_the_gradient_of_the_network(needs_slope):
    network = rough(MaskedAutoregressiveNetwork(5, [7, 6], num_params=3), 0.3)
    x = torch.randn(4, 5, requires_grad=needs_slope)
    wanted = [*network.parameters(), *([x] if needs_slope else [])]
    weights = torch.randn(4, 15)

    def slopes(outputs):
        return [outputs, *torch.autograd.grad((outputs * weights).sum(), wanted)]

    found = fused.network_pass(network, x)
    expected = slopes(torch.cat(network(x), -1))
    for a, b in zip(slopes(found.outputs), expected, strict=True):
        assert_close(a, b)


def test_a_network_that_is_not_finite_gives_a_draw_that_is_not():
    flow = inverse_autoregressive_flow(3)
    with torch.no_grad():
        flow.network.weights[0].fill_(float("nan"))
    assert draw_scored([flow], torch.randn(2, 3)).value[:, 1:].isnan().all()


@pytest.mark.parametrize("draw", [draw_scored, draw_with_score])
def test_a_second_derivative_is_refused(draw):
    flow = inverse_autoregressive_flow(3)
    value = draw([flow, last_step(3, True, True)], torch.randn(2, 3)).value
    weights = flow.network.weights[0]
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(value.square().sum(), weights, create_graph=True)


def test_no_particles_are_none():
    flow = inverse_autoregressive_flow(3)
    found = draw_scored([flow, last_step(3, True, True)], torch.randn(0, 3))
    found.value.sum().backward()
    assert found.score.shape == (0, 3)
    assert not flow.network.weights[0].grad.any()


def test_without_a_compiler_the_operations_of_pytorch_run(monkeypatch):
    flow = rough(inverse_autoregressive_flow(3, num_flows=2), 0.3)
    x = torch.randn(4, 3)
    expected = draw_scored(flow.parts, x)
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr(kernels, "_library", [])
    kernels.has_kernels.cache_clear()
    try:
        assert not kernels.has_kernels()
        monkeypatch.setattr(fused, "_operation", None)
        for a, b in zip(draw_scored(flow.parts, x), expected, strict=True):
            assert_close(a, b)
    finally:
        kernels.has_kernels.cache_clear()
