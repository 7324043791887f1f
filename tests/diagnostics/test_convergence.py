"""R-hat and effective sample sizes are those of ArviZ."""

import math

import pytest
import torch
from torch.testing import assert_close

from pyro_iaf.diagnostics.convergence import ess, rhat


def chains(num_chains, num_draws):
    """Independent, slow, alternating, rounded and unequal chains, and some that never mix."""
    memory = torch.tensor([0.0, 0.9, -0.5, 0.3, 0.3, 0.99], dtype=torch.float64)
    draws = torch.randn(num_chains, num_draws, 6, dtype=torch.float64)
    for t in range(1, num_draws):
        draws[:, t] += memory * draws[:, t - 1]
    draws[..., 3] = (2 * draws[..., 3]).round()
    draws[0, :, 4] += 0.7
    return draws


@pytest.mark.parametrize("size", [(4, 100), (40, 50), (3, 37), (1, 200), (2, 9)])
def test_they_are_those_of_arviz(size):
    arviz = pytest.importorskip("arviz", reason="it takes pip install '.[arviz]'")
    draws = chains(*size)
    data = arviz.convert_to_dataset(draws.numpy())
    found = [arviz.ess(data, method=method)["x"].values for method in ("bulk", "tail")]
    expected = torch.minimum(*map(torch.as_tensor, found))
    assert_close(ess(draws), expected, rtol=1e-10, atol=1e-10)
    if size[0] > 1:
        known = torch.as_tensor(arviz.rhat(data)["x"].values)
        assert_close(rhat(draws), known, rtol=1e-10, atol=1e-10)


def test_what_is_constant_has_converged_and_what_is_not_finite_has_not():
    draws = torch.randn(4, 50, 3)
    draws[..., 1] = 2.0
    draws[0, 0, 2] = math.nan
    assert rhat(draws)[1] == 1.0
    assert ess(draws)[1] == 200
    assert rhat(draws)[2].isnan()
    assert ess(draws)[2].isnan()
    assert rhat(draws)[0] < 1.2


def test_shapes_are_those_of_the_quantities():
    draws = torch.randn(3, 20, 2, 5)
    assert rhat(draws).shape == ess(draws).shape == (2, 5)
    assert rhat(draws[..., 0, 0]).shape == ()
