import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from example_models import MODELS, two_sites
from pyro import poutine
from pyro.infer.autoguide import (
    init_to_feasible,
    init_to_mean,
    init_to_sample,
    init_to_uniform,
    init_to_value,
)
from pyro.infer.reparam import ProjectedNormalReparam
from torch.testing import assert_close

from pyro_iaf import AutoHierarchicalIAF, AutoIAF


@pytest.mark.parametrize("univariate", ["affine", "gated"])
@pytest.mark.parametrize("init_scale", [1e-4, 0.1, 2.0])
def test_a_fresh_guide_sits_where_it_is_told(univariate, init_scale):
    inits = {"x": torch.randn(2), "y": torch.randn(3)}
    guide = AutoIAF(
        two_sites,
        univariate=univariate,
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


def vector():
    w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    pyro.sample("y", dist.Normal(w, 1.0).to_event(1), obs=torch.tensor([-3.0, 0.0, 3.0]))


def in_a_plate():
    with pyro.plate("rows", 3):
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(w, 1.0), obs=torch.tensor([-3.0, 0.0, 3.0]))


@pytest.mark.parametrize("kind", [AutoIAF, AutoHierarchicalIAF])
@pytest.mark.parametrize("model", [vector, in_a_plate])
def test_a_start_that_broadcasts_is_one_for_each_number(model, kind):
    for value in (torch.tensor(0.5), torch.full((1,), 0.5), torch.full((3,), 0.5)):
        guide = kind(model, init_scale=1e-3, init_loc_fn=init_to_value(values={"w": value}))
        draws = guide.sample_posterior(100)["w"]
        assert draws.shape == (100, 3)
        assert_close(draws.mean(0), torch.full((3,), 0.5), atol=1e-2, rtol=0)
    for shape in [(2, 3), (4,), (1, 3), (0,)]:
        guide = kind(model, init_loc_fn=init_to_value(values={"w": torch.zeros(shape)}))
        with pytest.raises(ValueError, match=r"of shape \(3,\) for site 'w'.*got shape \("):
            guide()


def test_a_start_for_all_rows_is_that_of_the_rows_drawn():
    def model():
        with pyro.plate("rows", 100, subsample_size=5):
            pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))

    of_all = torch.arange(200.0).reshape(100, 2)
    guide = AutoHierarchicalIAF(model, init_loc_fn=init_to_value(values={"w": of_all}))
    guide.setup()
    value = guide._latent_sites()["w"]["value"]
    rows = (value[:, 0] / 2).long()
    assert value.shape == (5, 2)
    assert len(rows.unique()) == 5
    assert torch.equal(value, of_all[rows])


@pytest.mark.parametrize("num_rows", [5, 7])
def test_a_start_for_another_number_of_rows_is_told(num_rows):
    def model():
        with pyro.plate("rows", 6, subsample_size=3):
            pyro.sample("w", dist.Normal(0.0, 1.0))

    guide = AutoHierarchicalIAF(
        model, init_loc_fn=init_to_value(values={"w": torch.zeros(num_rows)})
    )
    with pytest.raises(ValueError, match=rf"of shape \(3,\) for site 'w'.*got shape \({num_rows},"):
        guide()


@pytest.mark.parametrize("kind", [AutoIAF, AutoHierarchicalIAF])
def test_a_start_of_whole_numbers_will_do(kind):
    guide = kind(vector, init_loc_fn=init_to_value(values={"w": torch.tensor([1, 2, 3])}))
    assert guide.sample_posterior(3)["w"].shape == (3, 3)


def test_one_number_is_no_start_for_a_simplex():
    def model():
        pyro.sample("p", dist.Dirichlet(torch.ones(3)))

    with pytest.raises(ValueError, match="is in its support; got shape"):
        AutoIAF(model, init_loc_fn=init_to_value(values={"p": torch.ones(1)}))()


@pytest.mark.parametrize("shape", [(10,), (1, 10), (3, 10), (4,), (3, 1), (1, 4), (1,)])
def test_a_start_may_broadcast_beside_a_plate_that_is_subsampled(shape):
    def model():
        with pyro.plate("groups", 3, dim=-2), pyro.plate("rows", 10, subsample_size=4, dim=-1):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    start = torch.arange(math.prod(shape)).reshape(shape) * 1.0
    AutoHierarchicalIAF(model, init_loc_fn=init_to_value(values={"z": start}))()


@pytest.mark.parametrize("shape", [(4, 1), (1, 10), (4, 10), (1, 1)])
def test_a_start_may_broadcast_where_two_plates_are_subsampled(shape):
    def model():
        groups = pyro.plate("groups", 4, subsample_size=2, dim=-2)
        with groups, pyro.plate("rows", 10, subsample_size=5, dim=-1):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    start = init_to_value(values={"z": torch.zeros(shape)})
    AutoHierarchicalIAF(model, init_loc_fn=start)()


def test_one_row_of_a_simplex_is_a_start_for_all_rows_in_the_precision_it_has():
    def model():
        with pyro.plate("rows", 5):
            pyro.sample("p", dist.Dirichlet(torch.ones(3)))

    start = torch.full((3,), 0.3333)
    AutoIAF(model, init_loc_fn=init_to_value(values={"p": start}))()


@pytest.mark.parametrize("value", [torch.tensor(-1.0), -torch.ones(3)], ids=["one", "each"])
def test_a_start_outside_of_the_support_warns_in_any_shape(value):
    def model():
        pyro.sample("g", dist.Gamma(2.0, torch.ones(3)).to_event(1))

    guide = AutoIAF(model, start="init", init_loc_fn=init_to_value(values={"g": value}))
    with pytest.warns(UserWarning, match="starts site 'g' outside of its support"):
        guide.setup()


@pytest.mark.parametrize("kind", [AutoIAF, AutoHierarchicalIAF])
def test_sites_that_are_replaced_need_no_bijection(kind):
    def model():
        direction = pyro.sample("direction", dist.ProjectedNormal(torch.tensor([1.0, 0.0])))
        pyro.sample("y", dist.Normal(direction, 0.5).to_event(1), obs=torch.tensor([0.0, 1.0]))

    replaced = poutine.reparam(model, {"direction": ProjectedNormalReparam()})
    guide = kind(replaced)
    assert guide.sample_posterior(10, resample=False)["direction_normal"].shape == (10, 2)
    with pytest.raises(ValueError, match="spherical sample site 'direction'"):
        kind(model)()


@pytest.mark.filterwarnings("ignore:init_loc_fn starts site 'positive'")  # an infinite mean
@pytest.mark.parametrize("init", [init_to_feasible, init_to_mean, init_to_sample, init_to_uniform])
@pytest.mark.parametrize("name", MODELS)
def test_every_start_works_on_every_model(name, init):
    model, arguments = (make() for make in MODELS[name])
    guide = AutoIAF(model, init_loc_fn=init)
    guide.setup(*arguments)
    assert guide.transform.origin.isfinite().all()


def test_the_default_start_is_the_prior_median():
    def model():
        pyro.sample("z", dist.Normal(100.0, 0.001))

    guide = AutoIAF(model)
    assert guide.median()["z"].item() == pytest.approx(100.0, abs=0.005)
