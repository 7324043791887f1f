import math

import pytest
import torch
from torch.testing import assert_close

from pyro_iaf.solvers.fixed_point import solve_by_sweeps


def solve(sweep, y, method="auto", **kwargs):
    D = y.shape[-1]
    return solve_by_sweeps(
        sweep, torch.zeros_like(y), torch.arange(D), method, size=lambda _: y, **kwargs
    )


def chain(y, weights):
    """A sweep for x_k = y_k - weights_k x_{k-1}; it counts itself."""
    count = []

    def sweep(x):
        count.append(1)
        before = torch.cat([torch.zeros_like(x[..., :1]), x[..., :-1]], -1)
        return y - weights * before, len(count)

    return sweep


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1.0, 1e-9])
@pytest.mark.parametrize("strength", [0.0, 0.1, 0.9, 3.0])
@pytest.mark.parametrize("method", ["auto", "incremental"])
def test_sweeps_solve_a_chain(strength, method, size, dtype):
    y = size * torch.randn(5, 30, dtype=dtype)
    sweep = chain(y, strength)
    x, found, num_sweeps = solve(sweep, y, method)
    residual = (sweep(x)[0] - x).abs() / (x.abs() + y.abs())
    assert (residual <= 32 * torch.finfo(dtype).eps).all()
    assert found == num_sweeps <= 30
    if method == "auto" and strength <= 0.1:
        assert num_sweeps < 30


def test_nobody_looks_before_the_first_sweep_that_counts():
    y = torch.randn(12)
    assert solve(chain(y, 0.0), y, first=6)[2] == 6  # settled after one


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_is_too_small_to_see_may_be_large_for_those_after_it(dtype):
    shrinking, growing = 17 * [1 / 8], 17 * [8.0]
    weights = torch.tensor([0.0, *shrinking, *growing], dtype=dtype)
    y = torch.zeros(35, dtype=dtype)
    y[0] = 1.0
    x, _, _ = solve(chain(y, weights), y)
    assert x[-1].item() == 1.0


def test_a_sudden_drop_is_no_sign_of_having_settled():
    weights = torch.tensor([0.0, 1.0, 1e9, 1e-9, 1e-3, 1.0, 1e-17, 1e16, 0.1])
    y = torch.zeros(9)
    y[0] = 1.0
    x, _, _ = solve(chain(y, weights), y)
    assert_close(x.abs(), torch.cat([torch.ones(1), weights[1:].cumprod(0)]), rtol=1e-14, atol=0)


def test_a_change_that_is_infinite_beside_nothing_is_one():
    y = torch.zeros(4, dtype=torch.float32)
    y[0] = 1.0

    def sweep(x):  # 0, 1e5 and 0 again, beside nothing: 1 / 0, or nearly
        return torch.stack([y[0], 1e5 * (1 - x[0]), 1e5 * x[1], x[2] + x[0]]), None

    x, _, _ = solve(sweep, y, first=1)
    assert x.tolist() == [1.0, 0.0, 0.0, 1.0]


def test_an_overflow_on_the_way_does_no_harm():
    y = torch.randn(3, 40, dtype=torch.float32)

    def sweep(x):  # x_k = y_k - exp(100 (x_{k-1} - y_{k-1})): coordinates that wait would overflow
        before = torch.cat([y[:, :1] - 1, x[:, :-1]], -1)
        wanted = torch.cat([y[:, :1], y[:, :-1]], -1)
        polluted = 0 * x.sum(-1, keepdim=True)  # zero weights, as in a network
        return y - (100 * (before - wanted) - 50).exp() + polluted, None

    start = torch.full_like(y, 3.0)
    x, _, num_sweeps = solve_by_sweeps(sweep, start, torch.arange(40), "auto", size=lambda _: y)
    assert x.isfinite().all()
    assert num_sweeps <= 40
    assert_close(sweep(x)[0], x)


def test_what_is_not_a_number_stays_where_it_is():
    y = torch.randn(2, 6)
    y[0, 3] = math.nan
    x, _, _ = solve(chain(y, 0.1), y)
    assert x[0].isnan().tolist() == [False, False, False, True, True, True]
    assert x[1].isfinite().all()
