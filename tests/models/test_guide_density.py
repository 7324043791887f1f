"""The log density of a guide at given latents: that of its own draws is known otherwise."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import (
    AutoDiagonalNormal,
    AutoHierarchicalNormalMessenger,
    AutoIAFNormal,
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
    AutoNormal,
    AutoNormalMessenger,
    AutoStructured,
)
from torch.testing import assert_close

from pyro_iaf import AutoHierarchicalIAF, AutoIAF
from pyro_iaf.models.guide_density import Unscorable, guide_log_prob
from pyro_iaf.models.log_joint import LogJoint
from pyro_iaf.models.weighted import WeightedParticles

Y = torch.arange(12.0).reshape(4, 3) / 10


def model(broadcasts=True):
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    scale = pyro.sample("scale", dist.LogNormal(0.0, 0.5))
    if not broadcasts:
        assert float(mean) < 100
    with pyro.plate("groups", 4, dim=-2):
        effect = pyro.sample("effect", dist.Normal(mean, scale))
        pyro.sample("shares", dist.Dirichlet(torch.ones(3)))
        with pyro.plate("rows", 3, dim=-1):
            noise = pyro.sample("noise", dist.Gamma(2.0, effect.exp()))
            pyro.sample("y", dist.Normal(effect, noise), obs=Y)


def by_hand(broadcasts=True):
    mean = pyro.sample("mean", dist.Normal(0.3, 0.5))
    pyro.sample("scale", dist.LogNormal(0.1 * mean, 0.5))
    with pyro.plate("groups", 4, dim=-2):
        effect = pyro.sample("effect", dist.Normal(mean, 0.7))
        pyro.sample("shares", dist.Dirichlet(torch.tensor([1.0, 2.0, 3.0])))
        with pyro.plate("rows", 3, dim=-1):
            pyro.sample("noise", dist.LogNormal(effect, 0.3))


GUIDES = [
    AutoDiagonalNormal,
    AutoHierarchicalIAF,
    AutoHierarchicalNormalMessenger,
    AutoIAF,
    AutoIAFNormal,
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
    AutoNormal,
    AutoNormalMessenger,
]


def scored(guide, broadcasts):
    particles = WeightedParticles(model, guide, (), {"broadcasts": broadcasts})
    assert particles.at_once == broadcasts
    joint = LogJoint(model, particles.first_model, (), {"broadcasts": broadcasts})
    joint.at_once = particles.at_once
    draws = particles.weighted(20)
    z = joint.unconstrained(draws.sites)
    return guide_log_prob(particles, joint, z), joint(z) - draws.log_weights


@pytest.mark.parametrize("broadcasts", [True, False], ids=["at once", "one by one"])
@pytest.mark.parametrize("Auto", [*GUIDES, None], ids=lambda Auto: getattr(Auto, "__name__", ""))
def test_it_is_that_by_which_draws_are_weighted(Auto, broadcasts):
    guide = by_hand if Auto is None else Auto(model)
    found, expected = scored(guide, broadcasts)
    assert_close(found, expected, rtol=1e-8, atol=1e-8)


def test_a_site_that_the_latents_do_not_determine_is_named():
    with pytest.raises(Unscorable, match="site 'mean_aux' is no function of the latents"):
        scored(AutoStructured(model, conditionals="normal"), True)
