"""Many climbs of a log density at once."""

import math

import pytest
import torch
from torch.testing import assert_close

from pyro_iaf.guides import climbs
from pyro_iaf.guides.climbs import climb


def of(log_prob):
    """A log density and its gradient, counted in ``calls``."""
    calls = []

    def gradient(z):
        calls.append(len(z))
        with torch.enable_grad():
            z = z.detach().requires_grad_()
            value = log_prob(z)
            (slope,) = torch.autograd.grad(value.sum(), z)
        return value.detach(), slope

    return gradient, calls


def test_they_end_at_the_peak_of_a_normal_whatever_its_units():
    units = torch.tensor([1e-3, 1.0, 1e4])
    root = torch.tensor([[1.0, 0.0, 0.0], [0.9, 0.5, 0.0], [0.3, -0.4, 0.7]])
    precision = torch.cholesky_inverse(root)

    def log_prob(z):
        x = z / units - 1.0
        return -0.5 * (x @ precision * x).sum(-1)

    gradient, calls = of(log_prob)
    found = climb(gradient, units * (1 + 3 * torch.randn(20, 3)), units)
    assert found.has_arrived.all()
    assert found.value.min() > -1e-3
    assert_close(found.z / units, torch.ones(20, 3), atol=0.05, rtol=0.0)
    assert len(calls) < 40


def test_each_ends_at_its_own_peak():
    gradient, _ = of(lambda z: torch.logsumexp(-2 * (z - torch.tensor([-3.0, 3.0])) ** 2, -1))
    found = climb(gradient, torch.tensor([[-4.0], [-2.0], [2.5], [5.0]]), torch.ones(1))
    assert_close(found.z[:, 0], torch.tensor([-3.0, -3.0, 3.0, 3.0]), atol=0.03, rtol=0.0)


def test_a_density_without_a_peak_has_no_end():
    gradient, calls = of(lambda z: (z[:, 0] ** 2).log1p() * 5 - z[:, 1] ** 2)
    found = climb(gradient, torch.randn(5, 2), torch.ones(2))
    assert not found.has_arrived.any()
    assert len(calls) <= climbs.NUM_STEPS + 1


def test_walls_and_errors_stop_no_other():
    def log_prob(z):
        value = -0.5 * (z - 1.0).square().sum(-1)
        return torch.where(z[:, 0] > 2.0, -math.inf, value)

    gradient, _ = of(log_prob)
    found = climb(gradient, torch.tensor([[3.0], [-4.0], [1.9]]), torch.ones(1))
    assert found.value[0] == -math.inf
    assert not found.has_arrived[0]
    assert found.has_arrived[1:].all()
    assert_close(found.z[1:], torch.ones(2, 1), atol=0.05, rtol=0.0)


@pytest.mark.parametrize("num", [15, 40])
def test_they_stop_where_their_evaluations_are_spent(num):
    gradient, calls = of(lambda z: -(z.square().sum(-1)).sqrt())
    climb(gradient, 100 * torch.randn(10, 3), torch.ones(3), num)
    assert sum(calls) <= num + 10  # the first points, which have to be


def test_rounding_does_not_keep_them_from_an_end():
    def log_prob(z):
        return 1e6 - 0.5 * z.square().sum(-1)

    gradient, _ = of(log_prob)
    found = climb(gradient, 3 * torch.randn(10, 2, dtype=torch.float32), torch.ones(2).float())
    assert found.has_arrived.all()
