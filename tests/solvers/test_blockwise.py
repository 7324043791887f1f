import pytest
import torch
from bijections import SINGLE, coordinate_by_coordinate, make, rough
from torch import nn
from torch.testing import assert_close

from pyro_iaf import (
    InverseAutoregressiveFlow,
    MaskedAutoregressiveNetwork,
    conditional_inverse_autoregressive_flow,
    inverse_autoregressive_flow,
)
from pyro_iaf.solvers import blockwise
from pyro_iaf.solvers.blockwise import Cut, can_be_cut, solve_in_blocks, transposed_in_blocks


def transposed(flow, x, v):
    return transposed_in_blocks(Cut(flow, v.shape, "auto"), x, v)


FLOWS = {
    **{name: lambda name=name: make(name) for name in SINGLE if name != "Pyro's network"},
    "affine, reversed": lambda: rough(
        inverse_autoregressive_flow(9, [16, 5, 7], order=range(9)[::-1])
    ),
    "an activation in place": lambda: rough(
        inverse_autoregressive_flow(5, [8, 8], activation=nn.ReLU(inplace=True))
    ),
    "contexts, own order": lambda: rough(
        conditional_inverse_autoregressive_flow(6, 2, [9, 12], order=[2, 5, 0, 3, 1, 4])
    ).condition(torch.randn(4, 2)),
}


@pytest.fixture(params=FLOWS)
def flow(request):
    return FLOWS[request.param]()


@pytest.mark.parametrize("size", [1, 2, 3, 100])
@pytest.mark.parametrize("method", ["auto", "incremental", "fixed_point"])
def test_blocks_compute_what_the_network_does(flow, method, size, monkeypatch):
    monkeypatch.setattr(blockwise, "block_size", lambda *_: size)
    dtype = next(flow.parameters()).dtype
    y = torch.randn(4, flow.input_dim, dtype=dtype)
    with torch.no_grad():
        x, params = solve_in_blocks(flow, y, method)
        truth = coordinate_by_coordinate(flow, y)
        tolerance = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {}
        assert_close(x, truth, **tolerance)
        theirs = [part.expand_as(y) for part in flow.params_at(truth)]
        assert_close(params, theirs, **tolerance)


@pytest.mark.parametrize("size", [1, 2, 3, 100])
def test_blocks_solve_with_the_transposed_jacobian(flow, size, monkeypatch):
    monkeypatch.setattr(blockwise, "block_size", lambda *_: size)
    flow = flow.double()
    if flow.context is not None:
        flow.__dict__["context"] = flow.context[:1] if flow.context.dim() > 1 else flow.context
    x, v = torch.randn(2, flow.input_dim), torch.randn(2, flow.input_dim)
    with torch.no_grad():
        u = transposed(flow, x, v)
    for x_, u_, v_ in zip(x, u, v, strict=True):
        jacobian = torch.func.jacrev(lambda x: flow(x).reshape(-1))(x_)
        assert_close(jacobian.T @ u_, v_)


def test_big_batches_are_solved_one_coordinate_at_a_time(flow, monkeypatch):
    monkeypatch.setattr(blockwise, "block_size", lambda *_: 3)
    flow = flow.double()
    y = torch.randn(
        200, *(flow.context.shape[:-1] if flow.context is not None else ()), flow.input_dim
    )
    with torch.no_grad():
        x, params = solve_in_blocks(flow, y, "auto")
        again, params_again = solve_in_blocks(flow, y[:4], "auto")
        assert_close([part[:4] for part in (x, *params)], [again, *params_again])
        u = transposed(flow, x, y)
        assert_close(u[:4], transposed(flow, x[:4], y[:4]))
        monkeypatch.setattr(blockwise, "solve_by_sweeps", None)  # nobody swept
        solve_in_blocks(flow, y, "auto")
        transposed(flow, x, y)


@pytest.mark.parametrize("shape", [(), (1,), (3,), (2, 3), (0,), (2, 0)])
def test_blocks_take_any_batch_shape(shape):
    flow = rough(inverse_autoregressive_flow(5, [8], order=[4, 2, 0, 1, 3]))
    y = torch.randn(*shape, 5)
    with torch.no_grad():
        x, params = solve_in_blocks(flow, y, "auto")
        assert [part.shape for part in (x, *params)] == 3 * [y.shape]
        assert x.is_contiguous()
        assert_close(flow(x), y)
        assert transposed(flow, x, y).shape == y.shape


def test_a_value_that_is_not_contiguous_is_no_trouble():
    flow = rough(inverse_autoregressive_flow(5, [8]))
    with torch.no_grad():
        for y in (torch.randn(5, 4).T, torch.randn(5).expand(3, 5), torch.randn(4, 10)[:, ::2]):
            assert_close(flow(solve_in_blocks(flow, y, "auto")[0]), y)


def test_a_solution_is_nobody_else_s():
    for order in (None, [4, 2, 0, 1, 3]):
        flow = rough(inverse_autoregressive_flow(5, [8], order=order))
        for shape in ((), (1,), (7,)):
            with torch.no_grad():
                x = flow.inv(torch.randn(*shape, 5))
            assert x.untyped_storage().nbytes() == x.numel() * x.element_size()
            assert x._base is None


class Bias(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.register_buffer("shift", torch.randn(size))

    def forward(self, x):
        return torch.tanh(x + self.shift)


class Halved(MaskedAutoregressiveNetwork):
    def factors(self):
        return [(0.5 * factor[0], *factor[1:]) for factor in super().factors()]


class Doubled(MaskedAutoregressiveNetwork):
    def forward(self, x, context=None):
        return tuple(2 * part for part in super().forward(x, context))


def hooked():
    network = MaskedAutoregressiveNetwork(4, [8])
    network.register_forward_hook(lambda module, args, out: tuple(2 * part for part in out))
    return network


OTHERS = {
    "a forward of its own": lambda: Doubled(4, [8]),
    "a hook": hooked,
    "factors of its own": lambda: Halved(4, [8]),
    "an activation of its own": lambda: MaskedAutoregressiveNetwork(4, [8], activation=Bias(8)),
    "an activation with parameters": lambda: MaskedAutoregressiveNetwork(
        4, [8], activation=nn.PReLU(8)
    ),
}


@pytest.mark.parametrize("other", OTHERS)
def test_a_network_that_is_not_its_weights_is_called(other):
    flow = InverseAutoregressiveFlow(rough(OTHERS[other]()))
    assert not can_be_cut(flow)
    for batch in (3, 8):
        y = torch.randn(batch, 4)
        assert_close(flow(flow.inv(y).clone()), y)


def test_half_precision_is_left_to_the_network():
    flow = rough(inverse_autoregressive_flow(4, [8])).float()
    assert can_be_cut(flow)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not can_be_cut(flow)
