"""Where users meet the inverse: densities of values that the flow did not make."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from bijections import rough, standard_normal
from pyro import poutine
from pyro.infer import CSIS, SVI, ReweightedWakeSleep, Trace_ELBO
from sklearn.datasets import load_diabetes
from torch.testing import assert_close

from pyro_iaf import (
    AutoIAF,
    conditional_inverse_autoregressive_flow,
    inverse_autoregressive_flow,
)

NOISE = 0.7


def regression(observations=None):
    """Disease progression of 40 diabetics by body mass, blood pressure and a blood value."""
    observed = {} if observations is None else observations
    weights = pyro.sample("weights", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    mean = weights @ covariates().T
    return pyro.sample("y", dist.Normal(mean, NOISE).to_event(1), obs=observed.get("y"))


def covariates():
    X = torch.tensor(load_diabetes().data[:40, [2, 3, 8]])
    return (X - X.mean(0)) / X.std(0)


def outcomes():
    y = torch.tensor(load_diabetes().target[:40])
    return (y - y.mean()) / y.std()


def exact_posterior():
    X, y = covariates(), outcomes()
    precision = torch.eye(3) + X.T @ X / NOISE**2
    covariance = torch.linalg.inv(precision)
    return covariance @ X.T @ y / NOISE**2, covariance


def check_posterior(draws, atol):
    """Means and covariances in units of the exact posterior."""
    mean, covariance = exact_posterior()
    scale = covariance.diag().sqrt()
    assert_close(draws.mean(0) / scale, mean / scale, rtol=0, atol=atol)
    units = scale.outer(scale)
    assert_close(draws.T.cov() / units, covariance / units, rtol=0, atol=2 * atol)


def test_svi_finds_the_posterior():
    guide = AutoIAF(regression)
    elbo = Trace_ELBO(num_particles=16, vectorize_particles=True, max_plate_nesting=0)
    svi = SVI(regression, guide, pyro.optim.ClippedAdam({"lr": 0.01, "lrd": 0.99}), elbo)
    for _ in range(300):
        svi.step({"y": outcomes()})
    check_posterior(guide.sample_posterior(20_000)["weights"], atol=0.1)


def test_reweighted_wake_sleep_finds_the_posterior():
    guide = AutoIAF(regression)
    loss = ReweightedWakeSleep(
        num_particles=32, vectorize_particles=True, max_plate_nesting=0, insomnia=1.0
    )
    svi = SVI(regression, guide, pyro.optim.ClippedAdam({"lr": 0.01, "lrd": 0.99}), loss)
    for _ in range(300):
        svi.step({"y": outcomes()})
    check_posterior(guide.sample_posterior(20_000)["weights"], atol=0.1)


def test_the_sleep_phase_trains_a_guide_by_hand():
    """It scores draws of the prior, which the flow did not make; without context it learns them."""
    flow = inverse_autoregressive_flow(3, 32, num_flows=2)

    def model(observations=None):
        return regression({"y": outcomes()})

    def guide(observations=None):
        pyro.module("flow", flow)
        base = standard_normal(3, scale=3.0)
        pyro.sample("weights", dist.TransformedDistribution(base, [flow]))

    optimiser = pyro.optim.ClippedAdam({"lr": 0.03, "lrd": 0.98})
    loss = ReweightedWakeSleep(num_particles=2, insomnia=0.0, num_sleep_particles=64)
    svi = SVI(model, guide, optimiser, loss)
    for _ in range(200):
        svi.step()
    draws = dist.TransformedDistribution(standard_normal(3, scale=3.0), [flow]).sample((20_000,))
    assert_close(draws.mean(0), torch.zeros(3), rtol=0, atol=0.15)
    assert_close(draws.T.cov(), torch.eye(3), rtol=0, atol=0.3)


def test_inference_compilation_finds_the_posterior():
    """The guide learns from draws of the prior, and is then shown the real outcomes."""
    X = covariates()
    flow = conditional_inverse_autoregressive_flow(3, 3, 32, num_flows=2)

    def guide(observations=None):
        pyro.module("flow", flow)
        context = observations["y"] @ X / len(X)
        base = dist.TransformedDistribution(standard_normal(3), [flow.condition(context)])
        pyro.sample("weights", base)

    optimiser = pyro.optim.ClippedAdam({"lr": 0.03, "lrd": 0.985})
    csis = CSIS(regression, guide, optimiser, training_batch_size=8, validation_batch_size=1)
    for _ in range(250):
        csis.step(observations={"y": outcomes()})
    with torch.no_grad(), pyro.plate("draws", 20_000):
        draws = poutine.trace(guide).get_trace({"y": outcomes()}).nodes["weights"]["value"]
    check_posterior(draws, atol=0.25)


# By hand


def banana(num_draws):
    """Draws of a curved density, and the mean of its logarithm."""
    a, b = torch.randn(2, num_draws)
    data = torch.stack([a, a**2 + 0.5 * b], -1)
    entropy = 1 + torch.tensor(2 * torch.pi).log() + torch.tensor(0.5).log()
    return data, -entropy


@pytest.mark.parametrize("direction", ["inverse", "forward"])
def test_maximum_likelihood_fits_data_in_both_directions(direction):
    """``.inv`` scores data in one pass a flow; the flow itself has to walk back."""
    # The flow next to the data takes the cause before its effect.
    order = [0, 1] if direction == "inverse" else [1, 0]
    flow = inverse_autoregressive_flow(2, 32, num_flows=2, order=order)
    transform = flow.inv if direction == "inverse" else flow
    density = dist.TransformedDistribution(standard_normal(2), [transform])
    optimiser = torch.optim.Adam(flow.parameters(), lr=0.02)
    schedule = torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, 0.02, total_iters=400)
    for _ in range(400):
        data, _ = banana(200)
        optimiser.zero_grad()
        density.log_prob(data).mean().neg().backward()
        optimiser.step()
        schedule.step()
    data, truth = banana(20_000)
    with torch.no_grad():
        assert truth - density.log_prob(data).mean() < 0.05
        draws = density.sample((20_000,))
    assert_close(draws.mean(0), torch.tensor([0.0, 1.0]), rtol=0, atol=0.1)
    assert_close(draws[:, 0].square().mean(), draws[:, 1].mean(), rtol=0, atol=0.1)


def test_a_trace_is_replayed_on_values_from_elsewhere():
    flow = rough(inverse_autoregressive_flow(3, [16], num_flows=2))

    def guide():
        pyro.module("flow", flow)
        return pyro.sample("z", dist.TransformedDistribution(standard_normal(3), [flow]))

    z = torch.randn(3)

    def score():
        trace = poutine.trace(poutine.condition(guide, {"z": z})).get_trace()
        return trace.log_prob_sum()

    log_prob = score()
    jacobian = torch.func.jacrev(flow)(flow.inv(z).detach())
    noise = standard_normal(3).log_prob(flow.inv(z))
    assert_close(log_prob, noise - jacobian.det().abs().log())
    log_prob.backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in flow.parameters())


def test_a_guide_scores_what_nuts_or_anybody_else_drew(count_passes):
    guide = AutoIAF(regression)
    guide.setup({"y": outcomes()})
    rough(guide, 0.1)
    mean, covariance = exact_posterior()
    draws = dist.MultivariateNormal(mean, covariance).sample((10,))
    passes = count_passes(guide.get_transform())
    posterior = guide.get_posterior()
    with torch.no_grad():
        log_prob = posterior.log_prob(draws)
        before = passes()
    jacobian = torch.func.jacrev(guide.get_transform())
    for draw, value in zip(draws, log_prob, strict=True):
        x = guide.get_transform().inv(draw).detach()
        truth = posterior.base_dist.log_prob(x) - jacobian(x).det().abs().log()
        assert_close(value, truth)
    assert before == 2  # to see whether the stack comes back to what was asked for


def test_a_draw_without_gradients_costs_one_pass_to_score_with_them(count_passes):
    flow = rough(inverse_autoregressive_flow(3, [16]))
    posterior = dist.TransformedDistribution(standard_normal(3), [flow])
    with torch.no_grad():
        y = posterior.sample((5,))
    passes = count_passes(flow)
    posterior.log_prob(y).sum().backward()
    assert passes() == 1
    known = [p.grad.clone() for p in flow.parameters()]
    flow.zero_grad()
    posterior.log_prob(y.clone()).sum().backward()  # the same value, from elsewhere
    assert_close([p.grad for p in flow.parameters()], known)
