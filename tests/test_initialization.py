import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from models import MODELS, two_sites
from pyro.infer.autoguide import (
    init_to_feasible,
    init_to_mean,
    init_to_sample,
    init_to_uniform,
    init_to_value,
)
from torch.testing import assert_close

from pyro_iaf import AutoIAF


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("init_scale", [1e-4, 0.1, 2.0])
def test_a_fresh_guide_sits_where_it_is_told(gated, init_scale):
    inits = {"x": torch.randn(2), "y": torch.randn(3)}
    guide = AutoIAF(
        two_sites,
        gated=gated,
        init_scale=init_scale,
        init_loc_fn=lambda site: inits[site["name"]],
    )
    draws = guide.sample_posterior(10_000)
    for name, value in guide.median().items():
        assert_close(value, inits[name], atol=2e-3 * init_scale, rtol=0)
        assert_close(draws[name].std(0) / init_scale, torch.ones_like(value), atol=0.05, rtol=0)


def test_a_start_that_is_not_finite_is_mended_number_by_number():
    start = torch.tensor([1.0, math.nan, -2.0])
    guide = AutoIAF(
        MODELS["vectors"][0](), start="init", init_loc_fn=init_to_value(values={"z": start})
    )
    with pytest.warns(UserWarning, match="starts site 'z' outside of its support"):
        guide.setup()
    loc = guide.transform.parts[-1].loc
    assert torch.equal(loc[[0, 2]], start[[0, 2]])
    assert loc.isfinite().all()
    with pytest.raises(ValueError, match="a tensor for site 'z'"):
        AutoIAF(MODELS["vectors"][0](), init_loc_fn=lambda site: 0.0)()


@pytest.mark.filterwarnings("ignore:init_loc_fn starts site 'positive'")  # an infinite mean
@pytest.mark.parametrize("init", [init_to_feasible, init_to_mean, init_to_sample, init_to_uniform])
@pytest.mark.parametrize("name", MODELS)
def test_every_start_works_on_every_model(name, init):
    model, arguments = (make() for make in MODELS[name])
    guide = AutoIAF(model, init_loc_fn=init)
    guide.setup(*arguments)
    assert guide.transform.parts[-1].loc.isfinite().all()


def test_the_default_start_is_the_prior_median():
    def model():
        pyro.sample("z", dist.Normal(100.0, 0.001))

    guide = AutoIAF(model)
    assert guide.median()["z"].item() == pytest.approx(100.0, abs=0.005)
