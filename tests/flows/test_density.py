"""The density of a flow, against equations 10 and 11 of Kingma et al. (2016) by hand."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from bijections import rough
from pyro import poutine
from pyro.infer import Trace_ELBO
from torch.testing import assert_close

from pyro_iaf import DiagonalNormal, Gated, inverse_autoregressive_flow

BASES = {
    "Normal": lambda D: dist.Normal(torch.zeros(D), torch.ones(D)),
    "Normal to event": lambda D: dist.Normal(torch.zeros(D), torch.ones(D)).to_event(1),
    "DiagonalNormal": lambda D: DiagonalNormal(torch.zeros(D), torch.ones(D)),
}


@pytest.fixture(params=BASES)
def base(request):
    return BASES[request.param]


def flows_by_hand(flow, noise):
    """Equation 10 (or 13 and 14) for each flow in turn: the value, and the sum of log-scales."""
    z, log_scales = noise, torch.zeros(noise.shape[:-1])
    for part in getattr(flow, "parts", [flow]):
        m, s = part.network(z)
        s = 10 * torch.tanh(s / 10)
        if isinstance(part.univariate, Gated):
            sigma = 1 / (1 + (-s - part.univariate.bias).exp())
            z = sigma * z + (1 - sigma) * m
        else:
            sigma = s.exp()
            z = sigma * z + m
        log_scales = log_scales + sum(sigma[..., i].log() for i in range(z.shape[-1]))
    return z, log_scales


def density_by_hand(noise, log_scales):
    """Equation 11: log q(z) = -sum_i (noise_i^2 / 2 + log(2 pi) / 2 + sum_t log scale_ti)."""
    total = -log_scales
    for i in range(noise.shape[-1]):
        total = total - noise[..., i] ** 2 / 2 - math.log(2 * math.pi) / 2
    return total


@pytest.mark.parametrize("univariate", ["affine", "gated", Gated(bias=-1.0)], ids=str)
@pytest.mark.parametrize("num_flows", [1, 3])
@pytest.mark.parametrize("D", [1, 2, 3, 10, 50])
@pytest.mark.parametrize("batch_shape", [(), (5,), (3, 5)])
def test_density_is_that_of_the_paper(base, D, batch_shape, num_flows, univariate):
    settings = {"num_flows": num_flows, "univariate": univariate}
    flow = rough(inverse_autoregressive_flow(D, [16], **settings), 0.1)
    noise = torch.randn(*batch_shape, D)
    value, log_scales = flows_by_hand(flow, noise)
    expected = density_by_hand(noise, log_scales)
    assert expected.shape == batch_shape

    posterior = dist.TransformedDistribution(base(D), [flow])
    assert posterior.batch_shape == ()
    assert posterior.event_shape == (D,)
    assert_close(flow(noise), value)
    assert_close(posterior.log_prob(flow(noise)), expected)  # remembered
    assert_close(posterior.log_prob(value), expected)  # inverted

    expanded = posterior.expand(batch_shape)
    assert expanded.batch_shape == batch_shape
    assert_close(expanded.log_prob(value), expected)

    batched = base(D).expand([*batch_shape, *base(D).batch_shape])
    batched = dist.TransformedDistribution(batched, [flow])
    assert batched.batch_shape == batch_shape
    assert_close(batched.log_prob(value), expected)


@pytest.mark.parametrize("D", [1, 4, 50])
def test_density_is_the_same_inside_a_plate(base, D):
    flow = rough(inverse_autoregressive_flow(D, [16], num_flows=2), 0.1)

    def guide():
        with pyro.plate("rows", 5):
            return pyro.sample("z", dist.TransformedDistribution(base(D), [flow]))

    trace = poutine.trace(guide).get_trace()
    trace.compute_log_prob()
    site = trace.nodes["z"]
    assert site["value"].shape == (5, D)
    assert site["log_prob"].shape == (5,)
    noise = flow.inv(site["value"])
    _, log_scales = flows_by_hand(flow, noise)
    assert_close(site["log_prob"], density_by_hand(noise, log_scales))


def test_a_plate_of_particles_adds_nothing(base, count_passes):
    flow = rough(inverse_autoregressive_flow(3, [16], num_flows=2), 0.1)
    passes = count_passes(flow)

    def guide():
        with pyro.plate("rows", 4):
            return pyro.sample("z", dist.TransformedDistribution(base(3), [flow]))

    def model():
        with pyro.plate("rows", 4):
            pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))

    elbo = Trace_ELBO(num_particles=6, vectorize_particles=True, max_plate_nesting=1)
    loss = elbo.differentiable_loss(model, guide)
    assert passes() == 2  # one for each flow, to draw; none to score
    assert loss.shape == ()


def test_density_integrates_to_one(base):
    flow = rough(inverse_autoregressive_flow(2, [8], num_flows=2))
    posterior = dist.TransformedDistribution(base(2), [flow])
    draws = posterior.sample((20_000,))
    wide = dist.MultivariateNormal(draws.mean(0), 4 * draws.T.cov())
    points = wide.sample((400_000,))
    weights = (posterior.log_prob(points) - wide.log_prob(points)).exp()
    standard_error = weights.std() / math.sqrt(len(weights))
    assert abs(weights.mean() - 1) < 4 * standard_error
    assert standard_error < 0.02


@pytest.mark.parametrize("univariate", ["affine", "gated"])
def test_a_lone_coordinate_is_an_affine_normal(base, univariate):
    flow = rough(inverse_autoregressive_flow(1, [8], univariate=univariate))
    shift = flow(torch.zeros(1)).detach()
    scale = (flow(torch.ones(1)) - shift).detach()
    exact = dist.Normal(shift, scale).to_event(1)
    posterior = dist.TransformedDistribution(base(1), [flow])
    points = torch.randn(9, 1)
    assert_close(posterior.log_prob(points), exact.log_prob(points))
