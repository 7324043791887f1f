import pytest
import torch
from bijections import rough
from torch.testing import assert_close
from univariate_maps import TOYS

from pyro_iaf import inverse_autoregressive_flow
from pyro_iaf.solvers import path_score, score_kernel
from pyro_iaf.solvers.path_score import draw_with_score

FLOWS = {
    "one coordinate": (1, {"hidden_dims": [4]}),
    "narrow": (5, {"hidden_dims": [7, 3]}),
    "some order": (6, {"hidden_dims": [9, 8, 7], "order": [3, 1, 0, 5, 2, 4]}),
    "gated": (12, {"hidden_dims": [16, 16], "univariate": "gated"}),
    **{name: (6, {"univariate": univariate}) for name, univariate in TOYS.items()},
    "many coordinates, bent": (70, {"hidden_dims": [70], "univariate": TOYS["bent"]}),
    "many coordinates": (100, {"hidden_dims": [100, 100]}),
}


@pytest.mark.parametrize("num_flows", [1, 2])
@pytest.mark.parametrize("name", FLOWS)
@pytest.mark.parametrize("by_kernel", [False, True])
def test_a_carried_score_is_the_gradient_of_the_log_density(
    kernels, monkeypatch, name, num_flows, by_kernel
):
    D, settings = FLOWS[name]
    flow = rough(inverse_autoregressive_flow(D, num_flows=num_flows, **settings), 0.3)
    x = torch.randn(3, D)
    monkeypatch.setattr(path_score, "goes_by_kernel", lambda _: by_kernel)
    parts = flow.parts if num_flows > 1 else [flow]
    y, log_q, score, *_ = draw_with_score(parts, x)
    y = y.detach().requires_grad_()
    noise = flow.inv(y)
    log_prob = -0.5 * (noise**2 + torch.tensor(2 * torch.pi).log()).sum(-1)
    log_prob = log_prob - flow.log_abs_det_jacobian(noise, y)
    assert_close(log_q, log_prob)
    (slope,) = torch.autograd.grad(log_prob.sum(), y)
    assert_close(score, slope, rtol=1e-6, atol=1e-8 * slope.abs().max().item())


@pytest.mark.parametrize("batch_shape", [(), (1,), (2, 3)])
def test_it_takes_batches_of_any_shape(kernels, monkeypatch, batch_shape):
    flow = rough(inverse_autoregressive_flow(4, [8], num_flows=2), 0.3)
    x = torch.randn(*batch_shape, 4)
    monkeypatch.setattr(path_score, "goes_by_kernel", lambda _: False)
    plain = draw_with_score(flow.parts, x).score
    monkeypatch.setattr(path_score, "goes_by_kernel", lambda _: True)
    assert_close(draw_with_score(flow.parts, x).score, plain)


@pytest.mark.parametrize(("num_flows", "num_layers"), [(5, 4), (1, 30), (2, 30)])
def test_it_takes_more_tensors_than_an_operation_has_arguments(
    kernels, monkeypatch, num_flows, num_layers
):
    flow = rough(inverse_autoregressive_flow(3, num_layers * [4], num_flows=num_flows), 0.3)
    x = torch.randn(2, 3)
    parts = flow.parts if num_flows > 1 else [flow]
    monkeypatch.setattr(path_score, "goes_by_kernel", lambda _: False)
    plain = draw_with_score(parts, x).score
    monkeypatch.setattr(path_score, "goes_by_kernel", lambda _: True)
    assert_close(draw_with_score(parts, x).score, plain)


def test_single_precision_and_several_threads(kernels, monkeypatch):
    flow = rough(inverse_autoregressive_flow(40, [64], num_flows=2).float(), 0.2)
    x = torch.randn(33, 40, dtype=torch.float32)
    monkeypatch.setattr(path_score, "goes_by_kernel", lambda _: False)
    plain = draw_with_score(flow.parts, x).score
    monkeypatch.setattr(score_kernel, "WORK_PER_THREAD", 1)
    monkeypatch.setattr(path_score, "goes_by_kernel", lambda _: True)
    assert_close(draw_with_score(flow.parts, x).score, plain, rtol=1e-3, atol=1e-3)


def test_the_score_lies_in_memory_as_compiled_code_takes_it(kernels, monkeypatch):
    flow = rough(inverse_autoregressive_flow(4, [8]), 0.3)
    x = torch.randn(4, 3).T
    assert draw_with_score([flow], x).score.is_contiguous()
    meta = x.to("meta")
    assert score_kernel._operation(1)(meta, meta, 1, 1, 2, 0).is_contiguous()
