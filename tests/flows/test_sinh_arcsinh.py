import pytest
import torch
from torch.testing import assert_close

from pyro_iaf.flows.sinh_arcsinh import LocScale


@pytest.fixture(params=["diagonal", "dense", "dense in a diagonal frame"])
def affine(request):
    scale = torch.tensor([0.1, 1.0, 50.0])
    if request.param == "dense":
        scale = torch.tensor([[2.0, 0.0, 0.0], [-1.0, 0.1, 0.0], [30.0, 2.0, 9.0]])
    affine = LocScale(torch.tensor([1.0, -2.0, 300.0]), scale, -0.3, request.param != "diagonal")
    with torch.no_grad():
        affine.coefficients.add_(0.3 * torch.randn_like(affine.coefficients))
    return affine


def test_a_fresh_one_is_its_frame():
    loc, scale = torch.tensor([1.0, -2.0]), torch.tensor([[2.0, 0.0], [-1.0, 0.1]])
    x = torch.randn(5, 2)
    assert_close(LocScale(loc, scale, 0.0, True)(x), loc + x @ scale.T)
    assert_close(LocScale(loc, scale.diagonal(), 0.0, False)(x), loc + x * scale.diagonal())


def test_the_log_det_is_that_of_the_jacobian(affine):
    x = 2 * torch.randn(3)
    slope = torch.func.jacrev(lambda x: affine._compute(x)[0])(x)
    assert_close(affine.log_abs_det_jacobian(x, affine(x)), slope.det().abs().log())


def test_there_and_back(affine):
    x = 5 * torch.randn(4, 7, 3)
    y = affine(x).detach().clone()
    assert_close(affine.inv(y), x, atol=1e-10, rtol=0)
    assert_close(affine(affine.inv(y)), y, atol=0, rtol=1e-12)


def test_its_jacobian_is_lower_triangular(affine):
    slope = torch.func.jacrev(lambda x: affine._compute(x)[0])(torch.randn(3))
    assert (slope.triu(1) == 0).all()


def test_transposed_systems_are_solved(affine):
    x, v = torch.randn(5, 3), torch.randn(5, 3)
    u = affine.solve_transposed(x, v)
    slope = torch.func.vmap(torch.func.jacrev(lambda x: affine._compute(x)[0]))(x)
    assert_close((slope.mT @ u.unsqueeze(-1)).squeeze(-1), v)


def test_the_gradient_of_the_log_det_is_autograds(affine):
    x = torch.randn(5, 3, requires_grad=True)
    (expected,) = torch.autograd.grad(affine._compute(x)[1].sum(), x)
    assert_close(affine.slope_of_log_det(x), expected)


def test_skewness_and_tails_bend_each_coordinate():
    affine = LocScale(torch.zeros(1), torch.ones(1), 0.0, False)
    x = torch.randn(100_000, 1)
    with torch.no_grad():
        affine.coefficients[2] = 0.5
        skewed = affine(x)
        affine.coefficients[2:4] = torch.tensor([[0.0], [0.3]])
        heavy = affine(x)
    assert ((skewed - skewed.mean()) ** 3).mean() / skewed.std() ** 3 > 0.5
    assert (heavy**4).mean() / heavy.var() ** 2 > 3.8  # 3 of a normal


def test_gradients_reach_every_number_that_counts(affine):
    y = affine(torch.randn(5, 3))
    (y.sin().sum() - affine.log_abs_det_jacobian(torch.randn(5, 3), y).sum()).backward()
    slope = affine.coefficients.grad
    above = torch.ones_like(slope[4:]).triu().bool()
    assert (slope[:4] != 0).all()
    assert (slope[4:][~above] != 0).all()
