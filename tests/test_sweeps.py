import math

import pytest
import torch
from torch.testing import assert_close

from pyro_iaf.sweeps import settle


def chain(y, strength):
    """A sweep for x_k = y_k - strength x_{k-1}, and how many there were."""
    count = []

    def sweep(x):
        count.append(1)
        shifted = torch.cat([torch.zeros_like(x[..., :1]), x[..., :-1]], -1)
        return y - strength * shifted, len(count)

    return sweep, count


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("strength", [0.0, 0.1, 0.9, 3.0])
@pytest.mark.parametrize("method", ["auto", "incremental"])
def test_sweeps_solve_a_chain(strength, method, dtype):
    y = torch.randn(5, 30, dtype=dtype)
    sweep, _ = chain(y, strength)
    x, found, num_sweeps = settle(sweep, torch.zeros_like(y), torch.arange(30), method)
    residual = (sweep(x)[0] - x).abs() / (1 + x.abs())
    assert (residual <= 8 * torch.finfo(dtype).eps).all()
    assert found == num_sweeps <= 30
    if method == "auto" and strength <= 0.1:
        assert num_sweeps < 30


def test_nobody_looks_before_the_first_sweep_that_counts():
    y = torch.randn(12)
    sweep, _ = chain(y, 0.0)  # settled after one sweep
    assert settle(sweep, torch.zeros(12), torch.arange(12), "auto", first=6)[2] == 6


def test_a_sudden_drop_is_no_sign_of_having_settled():
    # Changes of 1, then 1e9, then 1: as if the next were to be 1e-9.
    weights = torch.tensor([1.0, 1e9, 1e-9, 1e-3, 1.0, 1.0])

    def sweep(x):
        return torch.cat([torch.ones(1), (weights * x)[:-1]]), None

    x, _, _ = settle(sweep, torch.zeros(6), torch.arange(6), "auto")
    assert_close(x, torch.cat([torch.ones(1), weights[:-1].cumprod(0)]), rtol=1e-14, atol=0)


def test_an_overflow_on_the_way_does_no_harm():
    y = torch.randn(3, 40, dtype=torch.float32)

    def sweep(x):  # x_k = y_k - exp(100 (x_{k-1} - y_{k-1})): coordinates that wait would overflow
        before = torch.cat([y[:, :1] - 1, x[:, :-1]], -1)
        wanted = torch.cat([y[:, :1], y[:, :-1]], -1)
        polluted = 0 * x.sum(-1, keepdim=True)  # zero weights, as in a network
        return y - (100 * (before - wanted) - 50).exp() + polluted, None

    x, _, num_sweeps = settle(sweep, torch.full_like(y, 3.0), torch.arange(40), "auto")
    assert x.isfinite().all()
    assert num_sweeps <= 40
    assert_close(sweep(x)[0], x)


def test_what_is_not_a_number_stays_where_it_is():
    y = torch.randn(2, 6)
    y[0, 3] = math.nan
    sweep, _ = chain(y, 0.1)
    x, _, _ = settle(sweep, torch.zeros(2, 6), torch.arange(6), "auto")
    assert x[0].isnan().tolist() == [False, False, False, True, True, True]
    assert x[1].isfinite().all()
