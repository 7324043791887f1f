import pytest
import torch
from bijections import rough
from torch.testing import assert_close
from univariate_maps import TOYS

from pyro_iaf import (
    DiagonalNormal,
    InverseAutoregressiveFlow,
    InverseAutoregressiveFlowStack,
    conditional_inverse_autoregressive_flow,
    inverse_autoregressive_flow,
)
from pyro_iaf.flows.sinh_arcsinh import LocScale
from pyro_iaf.flows.sparse_step import Coordinates, Leading, SparseStep, feature_degrees
from pyro_iaf.solvers.path_score import draw_with_score
from pyro_iaf.solvers.sparse import eliminated


def guide_like(D, **settings):
    """Two flows and a dense loc and scale, moved away from where they start."""
    stack = inverse_autoregressive_flow(D, num_flows=2, **settings)
    root = torch.eye(D) + 0.1 * torch.randn(D, D).tril()
    stack.parts.append(LocScale(torch.randn(D), root, -0.3, True))
    return rough(stack, 0.1)


def structured(num_globals, num_others):
    """Flows over globals, then a chain of others, of which the first three are sums."""
    G, D = num_globals, num_globals + num_others
    over = [Leading(part, D) for part in guide_like(G).parts] if G else []
    elimination = eliminated(num_others, [(i, i + 1) for i in range(num_others - 1)])
    num = 2 * num_others + elimination.num_coefficients
    start = 0.1 * torch.randn(len(feature_degrees(G)), num)
    last = rough(SparseStep(elimination, torch.randn(G), 0.5 * torch.eye(G), start), 0.1)
    before = torch.full((D,), D)
    before[[1, 2]] = torch.tensor([0, 1])
    return InverseAutoregressiveFlowStack([*over, last, Coordinates(torch.randperm(D), before)])


def foreign(D):
    """Networks that can only be called."""

    class Network(torch.nn.Module):
        def __init__(self, own):
            super().__init__()
            self.own, self.order = own, own.order

        def forward(self, x):
            return self.own(x)

    parts = inverse_autoregressive_flow(D, num_flows=2).parts
    wrapped = [InverseAutoregressiveFlow(Network(part.network)) for part in parts]
    return rough(InverseAutoregressiveFlowStack(wrapped), 0.1)


STACKS = {
    "one coordinate": lambda: guide_like(1),
    "affine": lambda: guide_like(5),
    "gated": lambda: guide_like(5, univariate="gated"),
    **{
        name: lambda univariate=univariate: guide_like(5, univariate=univariate)
        for name, univariate in TOYS.items()
    },
    "bent, more than is written out": lambda: guide_like(70, univariate=TOYS["bent"]),
    "tanh": lambda: guide_like(4, activation="tanh", hidden_dims=[8, 16, 8]),
    "another order": lambda: guide_like(4, order=[2, 0, 3, 1]),
    "more than is written out": lambda: guide_like(70),
    "globals and others": lambda: structured(2, 5),
    "one global": lambda: structured(1, 4),
    "no globals": lambda: structured(0, 6),
    "many globals": lambda: structured(70, 5),
    "networks of other makes": lambda: foreign(4),
    "conditioned": lambda: rough(
        conditional_inverse_autoregressive_flow(4, 2, num_flows=2), 0.1
    ).condition(torch.randn(2)),
    "contexts of its own for each": lambda: rough(
        conditional_inverse_autoregressive_flow(4, 2, num_flows=2), 0.1
    ).condition(torch.randn(6, 2)),
}


@pytest.fixture(params=STACKS.values(), ids=STACKS)
def stack(request):
    return request.param()


def log_density(stack, y):
    base = DiagonalNormal(torch.zeros(stack.parts[0].input_dim), torch.ones(()))
    x = stack.inv(y)
    return base.log_prob(x) - stack.log_abs_det_jacobian(x, y)


def test_the_value_its_density_and_its_score_are_autograds(stack):
    x = torch.randn(6, stack.parts[0].input_dim)
    y, log_q, score, *_ = draw_with_score(stack.parts, x)
    assert_close(y, stack(x))
    elsewhere = y.detach().clone().requires_grad_()
    expected = log_density(stack, elsewhere)
    (slope,) = torch.autograd.grad(expected.sum(), elsewhere)
    assert_close(log_q, expected.detach())
    assert_close(score, slope, atol=1e-8, rtol=1e-8)


def test_the_value_and_its_density_have_the_gradients_of_a_pass(stack):
    x = torch.randn(6, stack.parts[0].input_dim)
    y, log_q, score, *_ = draw_with_score(stack.parts, x)
    weights = torch.randn_like(y)
    params = [p for p in stack.parameters() if p.requires_grad and p.numel()]
    y_again = stack(x)
    log_det = stack.log_abs_det_jacobian(x, y_again)
    for ours, theirs in (((weights * y).sum(), (weights * y_again).sum()), (-log_q, log_det)):
        ours = torch.autograd.grad(ours.sum(), params, retain_graph=True)
        theirs = torch.autograd.grad(theirs.sum(), params, retain_graph=True)
        for a, b in zip(ours, theirs, strict=True):
            assert_close(a, b)
    assert not score.requires_grad
