"""Latents that a model's mask leaves without a density don't spoil the others."""

import functools

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Predictive, Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import init_to_value
from pyro.optim import Adam
from torch.testing import assert_close

from pyro_iaf import (
    AutoHierarchicalIAF,
    AutoIAF,
    CompiledTrace_ELBO,
    TraceSTL_ELBO,
    diagnose,
    fit,
    to_arviz,
)
from pyro_iaf.elbo.objectives import TraceLoss
from pyro_iaf.models.traces import samples

# Guides, and steps after which they are at the posterior, where an AutoIAF starts.
GUIDES = {AutoIAF: 100, AutoHierarchicalIAF: 200}
N = 12
SEEN = torch.arange(N) < 8


def data():
    return 1.0 + torch.linspace(-1.5, 1.5, N, dtype=torch.get_default_dtype())


def by_mask(seen=SEEN):
    """The effects that are not seen have no density, and nothing depends on them."""
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", N), poutine.mask(mask=seen):
        effect = pyro.sample("effect", dist.Normal(mean, 1.0))
        pyro.sample("y", dist.Normal(effect, 1.0), obs=data())


def by_obs_mask(seen=SEEN):
    """What obs_mask leaves out is a latent at the places that are not seen, and nothing else."""
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", N):
        pyro.sample("y", dist.Normal(mean, 2.0**0.5), obs=data(), obs_mask=seen)


def by_masked_fn(seen=SEEN):
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", N):
        effect = pyro.sample("effect", dist.Normal(mean, 1.0).mask(seen))
        pyro.sample("y", dist.Normal(effect, 1.0).mask(seen), obs=data())


def subsampled(seen=SEEN):
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", N, subsample_size=6) as rows, poutine.mask(mask=seen[rows]):
        effect = pyro.sample("effect", dist.Normal(mean, 1.0))
        pyro.sample("y", dist.Normal(effect, 1.0), obs=data()[rows])


def fitted(kind, model, num_steps=None, lr=0.01, **settings):
    guide = kind(model, hidden_dims=[16], **settings)
    steps = {"num_steps": num_steps or GUIDES[kind], "lr": lr}
    fit(model, guide, **steps, compile=False, seed=0, progress=False)
    return guide


def by_masked_event(seen=SEEN):
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    prior = dist.Normal(mean.unsqueeze(-1).expand(*mean.shape, N), 1.0).mask(seen)
    effect = pyro.sample("effect", prior.to_event(1))
    likelihood = dist.Normal(effect, 1.0).mask(seen).to_event(1)
    pyro.sample("y", likelihood, obs=data())


MODELS = {
    "mask": (by_mask, "effect"),
    "obs_mask": (by_obs_mask, "y_unobserved"),
    "masked distribution": (by_masked_fn, "effect"),
    "masked event": (by_masked_event, "effect"),
}


@functools.cache
def at_the_posterior(kind, model):
    """A guide that several tests look at and none trains."""
    is_vector = model is by_masked_event  # one flow learns all effects
    return fitted(kind, model, num_steps=GUIDES[kind] * (2 if is_vector else 1))


def exact_mean():
    """Loc and scale of the mean: each row seen tells it with variance two."""
    precision = 1 + SEEN.sum() / 2
    return (data()[SEEN].sum() / 2 / precision).item(), precision.rsqrt().item()


def check(guide, site, tolerance=0.1):
    loc, scale = exact_mean()
    draws = guide.sample_posterior(20_000)
    assert abs(draws["mean"].mean() - loc) < tolerance * scale
    assert abs(draws["mean"].std() / scale - 1) < tolerance
    # The masked ones have their prior given the mean: of y that includes its noise.
    free = draws[site][:, ~SEEN] - draws["mean"].unsqueeze(-1)
    sd = 2.0**0.5 if site == "y_unobserved" else 1.0
    assert (free.mean(0).abs() < 2 * tolerance * sd).all()
    assert ((free.std(0) / sd - 1).abs() < 2 * tolerance).all()


@pytest.mark.parametrize("kind", GUIDES)
@pytest.mark.parametrize("name", MODELS)
def test_masked_latents_leave_the_others_exact(name, kind, recwarn):
    model, site = MODELS[name]
    guide = at_the_posterior(kind, model)
    check(guide, site)
    assert diagnose(model, guide).ess > 3500  # of 4000 draws
    assert not [w for w in recwarn if "masked" in str(w.message)]


def test_a_loop_of_svi_finds_them_too():
    elbo = Trace_ELBO(num_particles=16, vectorize_particles=True)
    guide = AutoIAF(by_mask, hidden_dims=[16], init_scale=0.5)
    svi = SVI(by_mask, guide, Adam({"lr": 0.01}), elbo)
    for _ in range(250):
        svi.step()
    check(guide, "effect", tolerance=0.3)  # by noisy gradients, at a rate that does not fall


@pytest.mark.parametrize("kind", GUIDES)
def test_all_losses_are_those_of_the_joint_density_without_masks(kind):
    """At the posterior, where mean and effects are normal, every loss is minus the evidence."""
    guide = at_the_posterior(kind, by_mask)
    covariance = torch.ones(8, 8) + 2 * torch.eye(8)
    evidence = dist.MultivariateNormal(torch.zeros(8), covariance).log_prob(data()[SEEN]).item()
    losses = [Trace_ELBO(), TraceMeanField_ELBO(), TraceSTL_ELBO()]
    for loss in [*losses, CompiledTrace_ELBO(backend="graph")]:
        found = torch.tensor([loss.loss_and_grads(by_mask, guide) for _ in range(60)])
        assert -found.mean() == pytest.approx(evidence, abs=0.1)
    assert diagnose(by_mask, guide).iw_elbo == pytest.approx(evidence, abs=0.02)
    with poutine.trace() as capture:
        guide()
    own = [name for name in capture.trace.nodes if name.endswith("_masked")]
    assert own
    assert all(capture.trace.nodes[name]["infer"]["is_auxiliary"] for name in own)


@pytest.mark.parametrize("kind", GUIDES)
def test_annealing_weighs_them_as_all_latents(kind):
    guide = kind(by_mask)
    guide.setup()
    _, weighted = TraceLoss(by_mask, guide, Trace_ELBO())._weighted(0.5)
    sites = samples(poutine.trace(weighted).get_trace())
    assert any(name.endswith("_masked") for name in sites)
    assert {site["scale"] for site in sites.values()} == {0.5}


def test_a_mask_may_come_with_each_minibatch():
    guide = fitted(AutoHierarchicalIAF, subsampled, num_steps=300)
    loc, scale = exact_mean()
    draws = guide.sample_posterior(20_000)
    assert abs(draws["mean"].mean() - loc) < 0.6 * scale  # minibatches leave some noise
    assert abs(draws["mean"].std() / scale - 1) < 0.3
    assert draws["effect"].std(0).max() < 2


@pytest.mark.parametrize("kind", GUIDES)
def test_a_mask_may_change_after_the_setup(kind):
    guide = kind(by_mask, hidden_dims=[16])
    guide.setup(torch.ones(N, dtype=torch.bool))
    steps = {"num_steps": GUIDES[kind], "lr": 0.01}
    fit(by_mask, guide, (SEEN,), **steps, compile=False, seed=0, progress=False)
    check(guide, "effect", tolerance=0.15)


@pytest.mark.parametrize("kind", GUIDES)
def test_positive_latents_may_be_masked(kind):
    def model():
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", 4), poutine.mask(mask=torch.arange(4) < 2):
            rate = pyro.sample("rate", dist.LogNormal(loc, 0.5))
            pyro.sample("y", dist.LogNormal(rate.log(), 0.5), obs=torch.ones(4))

    guide = fitted(kind, model)
    draws = guide.sample_posterior(20_000)
    # Two values log y = 0 of variance one half around loc, whose prior has variance one.
    assert_close(draws["loc"].mean(), torch.tensor(0.0), atol=0.05, rtol=0)  # 0.1 sd
    assert draws["loc"].std() == pytest.approx(5**-0.5, rel=0.07)
    free = draws["rate"][:, 2:].log() - draws["loc"].unsqueeze(-1)
    assert_close(free.std(0), torch.full((2,), 0.5), atol=0.05, rtol=0)


@pytest.mark.parametrize("kind", GUIDES)
def test_a_masked_prior_that_the_data_hold_stays_flat(kind):
    def model():
        with poutine.mask(mask=torch.tensor(False)):
            z = pyro.sample("z", dist.Normal(100.0, 0.1))
        pyro.sample("y", dist.Normal(z, 1.0), obs=torch.tensor(1.0))

    with pytest.warns(UserWarning, match="'z' is masked .* Unless the data determine it"):
        guide = fitted(
            kind, model, lr=0.05, init_loc_fn=init_to_value(values={"z": torch.tensor(0.0)})
        )
    draws = guide.sample_posterior(20_000)["z"]
    assert draws.mean() == pytest.approx(1.0, abs=0.1)
    assert draws.std() == pytest.approx(1.0, abs=0.07)


def test_a_density_that_overflows_farther_out_is_no_obstacle():
    x = torch.tensor([1.0, -1.0, 30.0, 1.0, 30.0, 2.0])
    seen = x < 30

    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", 6):
            scale = (x * z).exp()
            pyro.sample("y", dist.Normal(z, scale), obs=torch.ones(6), obs_mask=seen)

    guide = AutoIAF(model)
    guide.setup()
    assert guide.lifted == {"y_unobserved"}


def test_a_step_in_what_is_masked_is_not_overlooked():
    """The slope is zero, and yet the data depend on it."""

    def model():
        with poutine.mask(mask=torch.tensor(False)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal((z > 0).to(z.dtype), 1.0), obs=torch.tensor(1.0))

    guide = AutoIAF(model, start="init")
    with pytest.warns(UserWarning, match="'z' is masked"):
        guide.setup()
    assert not guide.lifted


@pytest.mark.parametrize("kind", GUIDES)
def test_predictions_at_masked_places_are_draws_given_the_rest(kind):
    guide = at_the_posterior(kind, by_obs_mask)
    y = Predictive(by_obs_mask, guide=guide, num_samples=5000, parallel=True)()["y"].squeeze()
    assert torch.equal(y[:, SEEN], data()[SEEN].expand(5000, -1))
    loc, scale = exact_mean()
    sd = (2 + scale**2) ** 0.5
    assert_close(y[:, ~SEEN].mean(0), torch.full((4,), loc), atol=0.1 * sd, rtol=0)
    assert_close(y[:, ~SEEN].std(0), torch.full((4,), sd), atol=0.1 * sd, rtol=0)


def test_arviz_has_them():
    pytest.importorskip("arviz", reason="it takes pip install '.[arviz]'")
    guide = AutoIAF(by_mask)
    draws = to_arviz(by_mask, guide, num_samples=50)
    assert draws.posterior["effect"].shape == (1, 50, N)
