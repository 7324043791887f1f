"""A model and a guide that do not belong together are told, whatever is done with them."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.distributions import constraints
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import (
    AutoDiscreteParallel,
    AutoGuideList,
    AutoNormal,
    AutoNormalMessenger,
)

from pyro_iaf import AutoHierarchicalIAF, AutoIAF, TraceSTL_ELBO, diagnose, fit, to_arviz


def quick(model, guide, args=(), **settings):
    return fit(model, guide, args, num_steps=6, progress=False, compile=False, **settings)


def by_trace_elbo(model, guide, args=()):
    return quick(model, guide, args, loss=Trace_ELBO())


def for_arviz(model, guide, args=()):
    pytest.importorskip("arviz")
    return to_arviz(model, guide, args, num_samples=10)


CALLS = {
    "fit": quick,
    "fit by Trace_ELBO": by_trace_elbo,
    "diagnose": diagnose,
    "to_arviz": for_arviz,
}
GUIDES = {
    "AutoIAF": lambda model: AutoIAF(model, start="init", hidden_dims=[4]),
    "AutoHierarchicalIAF": lambda model: AutoHierarchicalIAF(model, hidden_dims=[4]),
    "AutoNormal": AutoNormal,
}

pytestmark = pytest.mark.filterwarnings(
    "ignore:Found :UserWarning",  # Pyro's, where model and guide have other sites
    "ignore::FutureWarning",  # ArviZ's, of its next version
)


@pytest.fixture(params=CALLS.values(), ids=CALLS)
def call(request):
    return request.param


@pytest.fixture(params=GUIDES.values(), ids=GUIDES)
def make_guide(request):
    return request.param


def model_of(**sizes):
    """A model with latents of these names and sizes."""

    def model():
        values = [
            pyro.sample(name, dist.Normal(torch.zeros(size), 1.0).to_event(1))
            for name, size in sizes.items()
        ]
        total = sum(value @ torch.ones(value.shape[-1]) for value in values)
        pyro.sample("y", dist.Normal(total, 1.0), obs=torch.tensor(1.0))

    return model


# For each: the latents that the guide was made for, those of the model, and what is told.
OTHERS = {
    "more numbers": ({"z": 2}, {"z": 3}, r"site 'z' it draws shape \(2,\), and the model has \(3,"),
    "fewer": ({"z": 3}, {"z": 2}, r"site 'z' it draws shape \(3,\), and the model has \(2,"),
    "many for one": ({"z": 3}, {"z": 1}, r"site 'z' it draws shape \(3,\), and the model has \(1,"),
    "one for many": ({"z": 1}, {"z": 3}, r"site 'z' it draws shape \(1,\), and the model has \(3,"),
    "another name": (
        {"z": 2},
        {"w": 2},
        "site 'w' is a latent in this run, and the guide draws 'z'",
    ),
    "one more": ({"z": 2}, {"z": 2, "w": 1}, "site 'w' is a latent in this run"),
    "one less": (
        {"z": 2, "w": 1},
        {"z": 2},
        "draws 'w'; the model's run has no such latent, but 'z'",
    ),
}


@pytest.mark.parametrize(("of_guide", "of_model", "told"), OTHERS.values(), ids=OTHERS)
def test_a_guide_for_another_model_is_told_by_its_sites(of_guide, of_model, told, make_guide, call):
    guide = make_guide(model_of(**of_guide))
    guide()
    with pytest.raises(ValueError, match=told):
        call(model_of(**of_model), guide)


@pytest.mark.parametrize(("of_guide", "of_model", "told"), OTHERS.values(), ids=OTHERS)
@pytest.mark.parametrize("kind", ["AutoIAF", "AutoHierarchicalIAF"])
def test_no_draws_of_another_model_are_resampled(of_guide, of_model, told, kind):
    guide = GUIDES[kind](model_of(**of_guide))
    guide()
    guide._model = (model_of(**of_model),)
    with pytest.raises(ValueError, match=told):
        guide.sample_posterior(10, resample=True)


def rows(x):
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=x)


@pytest.mark.parametrize(("before", "after"), [(3, 1), (1, 3), (3, 4)])
def test_data_of_another_length_are_told_where_each_row_has_a_latent(
    before, after, make_guide, call
):
    guide = make_guide(rows)
    guide(torch.zeros(before))
    told = f"plate 'rows' has {before} in the guide and {after} in the model"
    with pytest.raises(ValueError, match=told):
        call(rows, guide, (torch.zeros(after),))


@pytest.mark.parametrize(("before", "after"), [(3, 1), (1, 3), (3, 4)])
def test_a_minibatch_of_another_length_is_told_where_each_row_has_a_latent(
    before, after, make_guide
):
    with pytest.raises(ValueError, match=r"('rows' has|'z' it draws)"):
        quick(rows, make_guide(rows), data=[torch.zeros(before), torch.zeros(after)])


@pytest.mark.parametrize("kind", ["fit", "diagnose"])
def test_a_model_that_tells_its_rows_may_have_any(kind):
    def model(index):
        with pyro.plate("rows", 12, subsample=index):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=torch.arange(12.0)[index])

    def guide(index, num_rows=None):
        with pyro.plate("rows", 12, subsample=index[:num_rows]):
            pyro.sample("z", dist.Normal(pyro.param("loc", torch.tensor(0.1)), 1.0))

    index = torch.tensor([3, 5, 7])
    CALLS[kind](model, guide, (index,))
    with pytest.raises(ValueError, match="plate 'rows' has 2 in the guide and 3 in the model"):
        CALLS[kind](model, lambda index: guide(index, 2), (index,))


def observable(v=None):
    z = pyro.sample("z", dist.Normal(0.0, 1.0), obs=v)
    w = pyro.sample("w", dist.Normal(z, 1.0))
    pyro.sample("y", dist.Normal(w, 1.0), obs=torch.tensor(1.0))


def test_a_latent_that_is_observed_now_is_told(make_guide, call):
    guide = make_guide(observable)
    guide()
    with pytest.raises(ValueError, match="draws 'z'; the model's run has no such"):
        call(observable, guide, (torch.tensor(1.0),))


def test_a_site_that_is_observed_no_more_is_told(make_guide, call):
    guide = make_guide(observable)
    guide(torch.tensor(1.0))
    with pytest.raises(ValueError, match="site 'z' is a latent in this run"):
        call(observable, guide)


class Switch:
    """A model whose latent comes, or goes, after so many runs."""

    def __init__(self, comes):
        self.comes, self.num_left = comes, 10**9

    def __call__(self):
        self.num_left -= 1
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        if self.comes == (self.num_left < 0):
            z = z + pyro.sample("w", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=torch.tensor(1.0))


@pytest.mark.parametrize("loss", [None, TraceSTL_ELBO])
@pytest.mark.parametrize(
    ("comes", "told"),
    [(True, "site 'w' is a latent in this run"), (False, "draws 'w'; the model's run has no")],
)
def test_a_latent_that_comes_or_goes_at_a_later_step_is_told(comes, told, make_guide, loss):
    model = Switch(comes)
    guide = make_guide(model)
    guide()
    model.num_left = 60
    with pytest.raises(ValueError, match=told):
        fit(model, guide, num_steps=200, progress=False, compile=False, loss=loss and loss())


def test_one_that_comes_late_in_a_compiled_run_is_told_at_its_end():
    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        if model.is_switched:
            z = z + pyro.sample("w", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=torch.tensor(1.0))

    def annealing(step):
        model.is_switched = step >= 598
        return 1.0

    model.is_switched = False
    settings = {"num_steps": 600, "early_stop": False, "compile": "graph", "progress": False}
    with pytest.raises(ValueError, match="site 'w' is a latent in this run"):
        fit(model, AutoIAF(model, hidden_dims=[8]), annealing=annealing, **settings)


@pytest.mark.parametrize("kind", [AutoIAF, AutoHierarchicalIAF, AutoNormal])
def test_a_guide_for_another_support_is_told(kind):
    def model(prior):
        return lambda: pyro.sample("z", prior)

    guide = kind(model(dist.Normal(0.0, 1.0)))
    guide()
    for prior in (dist.HalfNormal(1.0), dist.Beta(2.0, 2.0)):
        for call in (fit, diagnose):
            with pytest.raises(ValueError, match=r"in the supports that .* at site 'z' it"):
                call(model(prior), guide)
    diagnose(model(dist.Normal(3.0, 1.0)), guide)  # other numbers in a prior are no other site


def test_one_set_in_two_writings_is_one_support():
    interval = constraints.interval(torch.tensor(0.0), torch.tensor(1.0))

    def model(prior):
        z = pyro.sample("z", prior)
        pyro.sample("y", dist.Normal(z, 1.0), obs=torch.tensor(0.4))

    guide = AutoNormal(model)
    guide(dist.Beta(1.0, 1.0))
    diagnose(model, guide, (dist.ImproperUniform(interval, (), ()),))
    with pytest.raises(ValueError, match="in the supports that"):
        diagnose(model, guide, (dist.HalfNormal(1.0),))


def test_discrete_latents_have_no_bijection_and_need_none():
    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        b = pyro.sample("b", dist.Bernoulli(0.3), infer={"enumerate": "parallel"})
        pyro.sample("y", dist.Normal(z + b, 1.0), obs=torch.tensor(1.0))

    guide = AutoGuideList(model)
    guide.append(AutoNormal(poutine.block(model, hide=["b"])))
    guide.append(AutoDiscreteParallel(poutine.block(model, hide=["z"])))
    guide()
    found = diagnose(model, guide, num_samples=200)
    assert found.ess > 1


def test_data_on_another_device_than_the_latents_are_told():
    """Meta stands for CUDA: a prior is on the CPU unless its parameters say otherwise."""

    def model(y):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    y = torch.zeros(3, device="meta")
    match = r"site 'z' is on cpu, and the data of site 'y' on meta.*device='meta'"
    for guide in (AutoNormal(model), AutoIAF(model, start="init")):
        with pytest.raises(ValueError, match=match):
            fit(model, guide, (y,), num_steps=5, progress=False)
        with pytest.raises(ValueError, match=match):
            diagnose(model, guide, (y,))


def test_a_compiled_step_that_is_looked_at_again_tells_it_too():
    def model(x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        if model.is_switched:
            z = z + pyro.sample("w", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=x)

    def data():
        for k in range(2000):
            model.is_switched = k > 100
            yield torch.tensor(1.0)

    model.is_switched = False
    with pytest.raises(ValueError, match="site 'w' is a latent in this run"):
        fit(
            model,
            GUIDES["AutoIAF"](model),
            data=data(),
            num_steps=2000,
            progress=False,
            compile="graph",
        )


def test_latents_that_come_and_go_can_be_fitted_by_hand_and_not_weighed():
    def model():
        k = pyro.sample("k", dist.Bernoulli(0.5))
        if k:
            pyro.sample("a", dist.Normal(0.0, 1.0))

    def guide():
        k = pyro.sample("k", dist.Bernoulli(0.5))
        if k:
            pyro.sample("a", dist.Normal(pyro.param("loc", torch.tensor(0.1)), 1.0))

    with pytest.warns(UserWarning, match="one after the other"):
        assert quick(model, guide).losses.isfinite().all()
    with pytest.raises(ValueError, match="site 'a' in some runs only"):
        diagnose(model, guide)


def test_sites_that_help_a_guide_alone_are_none_of_its_latents(call):
    def guide():
        loc = pyro.param("loc", torch.tensor(0.1))
        u = pyro.sample("u", dist.Normal(loc, 1.0), infer={"is_auxiliary": True})
        pyro.sample("z", dist.Delta(u.unsqueeze(-1), event_dim=1))

    call(model_of(z=1), guide)


def test_a_guide_that_is_a_messenger_is_weighed_without_the_data():
    model = model_of(z=2)
    guide = AutoNormalMessenger(model)
    loss = Trace_ELBO(num_particles=2000, vectorize_particles=True, max_plate_nesting=0)
    found = diagnose(model, guide)
    expected = -loss.loss(model, guide)
    sd = found.elbo_se * len(found.log_weights) ** 0.5
    assert found.elbo == pytest.approx(expected, abs=5 * sd * (2 / 2000) ** 0.5)


# What is no model, or no guide


def by_hand():
    pyro.sample("z", dist.Normal(pyro.param("loc", torch.zeros(2)), 1.0).to_event(1))


pair = model_of(z=2)
FOREIGN = {
    "swapped": (lambda: (AutoIAF(pair), pair), "a model and then a guide"),
    "a messenger, swapped": (lambda: (AutoNormalMessenger(pair), pair), "a model and then a guide"),
    "by hand, swapped": (lambda: (by_hand, pair), "observes site 'y'"),
    "the model twice": (lambda: (pair, pair), "observes site 'y'"),
    "no model": (lambda: (None, by_hand), "got as model None"),
    "no guide": (lambda: (pair, None), "got as guide None"),
    "a string": (lambda: (pair, "AutoIAF"), "got as guide 'AutoIAF'"),
    "a list": (lambda: (pair, [by_hand]), "got as guide"),
    "a tensor": (lambda: (torch.ones(2), by_hand), "got as model"),
    "a class of guides": (lambda: (pair, AutoIAF), "got as guide"),
    "a class for a model": (lambda: (AutoIAF, by_hand), "got as model"),
    "a trace": (lambda: (poutine.trace(pair).get_trace(), by_hand), "got as model"),
}


@pytest.mark.parametrize(("make", "told"), FOREIGN.values(), ids=FOREIGN)
def test_what_is_no_model_or_no_guide_is_told(make, told, call):
    with pytest.raises(ValueError, match=told):
        call(*make())
