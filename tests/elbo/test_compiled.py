import copy
import pickle
import warnings
from typing import ClassVar

import pyro
import pyro.distributions as dist
import pytest
import torch
from example_models import MODELS, Regression, arguments, data, one_latent, plates, subsampled_data
from pyro import poutine
from pyro.distributions.testing.rejection_gamma import RejectionStandardGamma
from pyro.infer import SVI, Trace_ELBO, config_enumerate
from pyro.infer.autoguide import (
    AutoDelta,
    AutoGuideList,
    AutoHierarchicalNormalMessenger,
    AutoMultivariateNormal,
    AutoNormal,
    AutoNormalMessenger,
    AutoRegressiveMessenger,
)
from pyro.nn import PyroModule, PyroSample
from pyro.optim import Adam, ClippedAdam
from torch import nn
from torch.testing import assert_close

from pyro_iaf import (
    AutoIAF,
    CompiledTrace_ELBO,
    DiagonalNormal,
    TraceSTL_ELBO,
    inverse_autoregressive_flow,
)
from pyro_iaf.compiler import lowering
from pyro_iaf.compiler.recorder import MAX_GRAPHS

needs_compiler = pytest.mark.skipif(
    not lowering.has_compiler(torch.device("cpu")), reason="there is no C++ compiler"
)


def graph(*args, **settings):
    return CompiledTrace_ELBO(*args, backend="graph", **settings)


def guide_for(model, args, kind=AutoIAF):
    settings = {"hidden_dims": [8], "start": "init"} if kind is AutoIAF else {}
    guide = kind(model, **settings)
    guide(*args)
    return guide


def both(model, guide, args=(), *, elbo=graph, particles=(1, False), num_steps=4, **kwargs):
    """Losses and gradients of a few calls, by Trace_ELBO and by a graph, under one seed."""
    found = []
    for param in pyro.get_param_store()._params.values():
        param.grad = None
    for loss in (Trace_ELBO(particles[0], vectorize_particles=particles[1]), elbo(*particles)):
        pyro.set_rng_seed(1)
        steps = []
        for _ in range(num_steps):
            with poutine.trace(param_only=True) as capture:
                value = loss.loss_and_grads(model, guide, *args, **kwargs)
            sites = capture.trace.nodes
            params = {name: site["value"].unconstrained() for name, site in sites.items()}
            grads = {n: p.grad.clone() for n, p in params.items() if p.grad is not None}
            for param in params.values():
                param.grad = None
            steps.append((value, grads))
        found.append(steps)
    return found


def assert_same(eager, compiled):
    for (value, grads), (again, others) in zip(eager, compiled, strict=True):
        # A hundred roundings of what is summed up.
        single = any(grad.dtype == torch.float32 for grad in grads.values())
        scale = 1e-5 if single else 1e-9
        assert again == pytest.approx(value, rel=scale, abs=scale)
        assert grads.keys() == others.keys()
        for name, grad in grads.items():
            assert_close(others[name], grad, rtol=scale, atol=scale * (1 + grad.abs().max().item()))


@pytest.mark.parametrize("particles", [(1, False), (3, True), (2, False)], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_loss_and_gradients_are_those_of_trace_elbo(name, particles):
    model, args = (make() for make in MODELS[name])
    assert_same(*both(model, guide_for(model, args), args, particles=particles))


@needs_compiler
@pytest.mark.parametrize("name", ["arguments", "correlations"])
def test_compiled_they_are_too(name):
    model, args = (make() for make in MODELS[name])

    def inductor(*args):
        return CompiledTrace_ELBO(*args, backend="inductor")

    assert_same(*both(model, guide_for(model, args), args, elbo=inductor, particles=(3, True)))


@pytest.mark.parametrize("kind", [AutoNormal, AutoMultivariateNormal, AutoDelta])
@pytest.mark.parametrize("name", ["nested plates", "supports", "arguments", "subsampled data"])
def test_it_takes_other_guides(name, kind):
    model, args = (make() for make in MODELS[name])
    assert_same(*both(model, guide_for(model, args, kind), args, particles=(3, True)))


def test_it_takes_lists_of_guides():
    guide = AutoGuideList(plates)
    guide.append(AutoIAF(poutine.block(plates, expose=["mu"]), start="init"))
    guide.append(AutoNormal(poutine.block(plates, hide=["mu"])))
    guide()
    assert_same(*both(plates, guide))


def by_hand_with(draw):
    def model():
        z = pyro.sample("z", dist.Gamma(2.0, 2.0))
        w = pyro.sample("w", dist.Dirichlet(torch.ones(3)))
        pyro.sample("y", dist.Normal(z + w[..., 0], 0.5), obs=torch.tensor(1.0))

    def guide():
        a = pyro.param("a", torch.tensor(2.0), constraint=dist.constraints.positive)
        b = pyro.param("b", torch.ones(3), constraint=dist.constraints.positive)
        pyro.sample("z", draw(a))
        pyro.sample("w", dist.Dirichlet(b))

    return model, guide


@pytest.mark.parametrize(
    "draw",
    [lambda a: dist.Gamma(a, a + 1), lambda a: dist.LogNormal(a.log(), a), dist.HalfNormal],
    ids=["gamma", "log normal", "half normal"],
)
def test_draws_that_hang_on_parameters_come_in_order(draw):
    model, guide = by_hand_with(draw)
    assert_same(*both(model, guide))


@pytest.mark.parametrize("particles", [(1, False), (3, True)], ids=str)
def test_loops_over_whole_plates_are_written_out(particles):
    def model():
        p = pyro.sample("p", dist.Beta(2.0, 2.0))
        for k in pyro.plate("rows", 3):
            pyro.sample(f"y{k}", dist.Bernoulli(p), obs=torch.tensor(k % 2.0))
        for k in pyro.plate("others", 2, subsample_size=2):
            with pyro.plate(f"inner{k}", 4) as rows:
                z = pyro.sample(f"z{k}", dist.Normal(torch.arange(4.0)[rows], 1.0))
                pyro.sample(f"x{k}", dist.Normal(z, 1.0), obs=torch.full((4,), float(k)))

    def guide():
        a = pyro.param("a", torch.tensor(2.0), constraint=dist.constraints.positive)
        pyro.sample("p", dist.Beta(a, 2.0))
        for k in pyro.plate("others", 2, subsample_size=2):
            with pyro.plate(f"inner{k}", 4):
                pyro.sample(f"z{k}", dist.Normal(a * k, 1.0))

    guide()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert_same(*both(model, guide, particles=particles))


def test_leaves_that_each_run_makes_anew_are_nobodys():
    def model():
        loc = torch.tensor(0.5, requires_grad=True)
        z = pyro.sample("z", dist.Normal(loc, 1.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=torch.tensor(1.0))

    assert_same(*both(model, guide_for(model, ()), num_steps=8))


def test_dropout_draws_anew():
    net = nn.Sequential(nn.Linear(2, 8), nn.Dropout(0.5), nn.Linear(8, 1))

    def model(x):
        pyro.module("net", net)
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(net(x).sum() + z, 1.0), obs=torch.tensor(1.0))

    eager, compiled = both(model, guide_for(model, (torch.ones(2),)), (torch.ones(2),))
    assert_same(eager, compiled)
    assert len({value for value, _ in compiled}) == len(compiled)


def test_both_train_to_the_same_end():
    ends = []
    for loss in (Trace_ELBO(4, vectorize_particles=True), graph(4, True)):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        guide = AutoIAF(plates, start="init")
        svi = SVI(plates, guide, ClippedAdam({"lr": 0.02, "lrd": 0.998}), loss)
        losses = [svi.step() for _ in range(200)]
        ends.append(sum(losses[-100:]) / 100)
    assert ends[0] == pytest.approx(ends[1], abs=1e-6)
    assert ends[0] < losses[0]


def test_it_is_a_module_for_optimisers_of_pytorch():
    x = torch.randn(5, 2)
    with pyro.settings.context(module_local_params=True):
        ends = []
        for kind in (Trace_ELBO, graph):
            pyro.set_rng_seed(0)
            model = Regression()
            elbo = kind(2)(model, AutoNormal(model))
            elbo(x, torch.zeros(5))
            optimizer = torch.optim.Adam(elbo.parameters(), lr=0.01)
            for _ in range(5):
                optimizer.zero_grad()
                loss = elbo(x, torch.zeros(5))
                (2 * loss).backward()
                optimizer.step()
            ends.append((loss.detach(), [p.detach().clone() for p in elbo.parameters()]))
    assert_close(ends[0], ends[1])


def test_arguments_get_their_gradients():
    encoder = nn.Linear(3, 2)
    y = torch.tensor([1.0, 2.0, 3.0])

    def model(loc):
        z = pyro.sample("z", dist.Normal(loc, 1.0).to_event(1))
        pyro.sample("y", dist.Normal(z.sum(-1), 1.0), obs=torch.tensor(1.0))

    guide = guide_for(model, (torch.zeros(2),))
    found = []
    for loss in (Trace_ELBO(), graph()):
        pyro.set_rng_seed(0)
        grads = []
        for _ in range(3):
            encoder.zero_grad()
            loss.loss_and_grads(model, guide, encoder(y))
            by_steps = encoder.weight.grad.clone()
            encoder.zero_grad()
            loss.differentiable_loss(model, guide, encoder(y)).backward()
            grads += [by_steps, encoder.weight.grad.clone()]
        found.append(grads)
    assert_close(found[0], found[1])


def test_new_shapes_are_recorded_anew_and_old_ones_kept():
    guide = guide_for(arguments, data())
    loss = graph()
    x, y = data()
    for size in (3, 2, 3, 2):
        values = []
        for elbo in (Trace_ELBO(), loss):
            pyro.set_rng_seed(0)
            values.append(elbo.loss_and_grads(arguments, guide, x[:size], y[:size], noise=2.0))
        assert values[0] == pytest.approx(values[1])
    assert len(loss.recorder.recordings) == 2


def test_ever_new_kinds_are_warned_about_and_bounded():
    guide = guide_for(arguments, data())
    loss = graph()

    def step(elbo, noise):
        pyro.set_rng_seed(0)
        return elbo.loss_and_grads(arguments, guide, *data(), noise=noise)

    for k in range(MAX_GRAPHS):
        step(loss, 1.0 + k)
    with pytest.warns(UserWarning, match="ever new kinds"):
        step(loss, 100.0)
    for noise in (101.0, 102.0):
        assert step(loss, noise) == step(Trace_ELBO(), noise)
    assert len(loss.recorder.recordings) == MAX_GRAPHS


def test_subsamples_are_drawn_at_each_step():
    guide = guide_for(subsampled_data, ())
    loss = graph()
    values = {loss.loss_and_grads(subsampled_data, guide) for _ in range(8)}
    assert len(values) == 8
    assert_same(*both(subsampled_data, guide, num_steps=8))


def test_what_the_model_reads_from_elsewhere_may_change_in_place():
    y, mask = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([True, False, True])

    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(z, 1.0).expand(y[mask].shape).to_event(1), obs=y[mask])

    guide, loss = guide_for(model, ()), graph()
    for change in (lambda: None, lambda: y.fill_(5.0), lambda: mask.fill_(True)):
        change()
        for _ in range(2):
            values = []
            for elbo in (Trace_ELBO(), loss):
                pyro.set_rng_seed(0)
                values.append(elbo.loss_and_grads(model, guide))
            assert values[0] == pytest.approx(values[1])


def test_a_mask_that_is_computed_from_elsewhere_may_change_in_place():
    w = torch.tensor([1.0, -1.0, 1.0])

    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        y = torch.tensor([1.0, 2.0, 4.0])[w > 0]
        pyro.sample("y", dist.Normal(z, 1.0).expand(y.shape).to_event(1), obs=y)

    guide, loss = guide_for(model, ()), graph()
    for _ in range(3):
        loss.loss_and_grads(model, guide)
    w.neg_()
    for seed in range(2):
        found = []
        for each in (loss, Trace_ELBO()):
            pyro.set_rng_seed(seed)
            found.append(each.loss_and_grads(model, guide))
        assert found[0] == pytest.approx(found[1], rel=1e-4)


def test_parameters_may_freeze_and_modes_change():
    net = nn.Sequential(nn.Linear(1, 1), nn.Dropout(0.5))

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self):
            pyro.module("net", self.net)
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample(
                "y", dist.Normal(self.net(torch.ones(1)).sum() + z, 1.0), obs=z.new_ones(())
            )

    model = Model()
    guide, loss = guide_for(model, ()), graph()
    changes = (net.train, net.eval, lambda: net[0].weight.requires_grad_(False))
    for change in changes:
        change()
        assert_same(*both(model, guide, elbo=lambda *_: loss))


def test_a_cleared_store_is_noticed():
    def guide():
        loc = pyro.param("loc", lambda: torch.randn(()))
        pyro.sample("z", dist.Normal(loc, 1.0))

    loss = graph()
    svi = SVI(one_latent, guide, Adam({"lr": 0.1}), loss)
    for _ in range(3):
        svi.step()
    pyro.clear_param_store()
    svi.step()
    before = pyro.param("loc").item()
    svi.step()
    assert pyro.param("loc").item() != before


# Distributions from before the run, and what they say of themselves


def checked():
    """A model whose distributions were made ahead, under validation, as PyroSample's are."""
    loc = dist.Normal(0.0, 1.0).expand([3]).to_event(1)
    scale = dist.LogNormal(torch.zeros(2), 1.0).expand([2]).mask(True).to_event(1)
    share = dist.Dirichlet(torch.ones(3))
    factor = dist.LKJCholesky(2, 1.0)
    noise = dist.Wishart(torch.tensor(4.0), torch.eye(2))
    parts = [dist.Normal(float(k), 1.0).expand([3]).to_event(1) for k in range(2)]

    class OfParts(dist.TorchDistribution):
        arg_constraints: ClassVar = {}
        support = dist.constraints.real_vector
        has_rsample = True

        def rsample(self, sample_shape=()):
            return parts[0].rsample(sample_shape)

        def log_prob(self, value):
            return (parts[0].log_prob(value) + parts[1].log_prob(value)) / 2

    of_parts = OfParts(event_shape=torch.Size([3]))

    class Model(PyroModule):
        def __init__(self):
            super().__init__()
            self.w = PyroSample(loc)

        def forward(self, y):
            s, p = pyro.sample("s", scale), pyro.sample("p", share)
            L = pyro.sample("L", factor)
            pyro.sample("parts", of_parts)
            pyro.factor("noise", noise.log_prob(torch.eye(2) * s.sum()))
            own = dist.Normal(self.w.sum() + p[0] + L.sum(), s.sum(), validate_args=True)
            pyro.sample("y", own, obs=y)

    return Model()


MESSENGERS = [AutoNormalMessenger, AutoHierarchicalNormalMessenger, AutoRegressiveMessenger]


@pytest.mark.parametrize("kind", [AutoIAF, AutoNormal, AutoMultivariateNormal])
def test_distributions_made_ahead_with_checks_are_recorded(kind):
    model, args = checked(), (torch.tensor(1.0),)
    assert_same(*both(model, guide_for(model, args, kind), args))


@pytest.mark.parametrize("particles", [(1, False), (3, True)], ids=str)
@pytest.mark.parametrize("kind", MESSENGERS)
def test_messengers_around_models_with_such_priors_are_too(kind, particles):
    prior = dist.Normal(0.0, 1.0).expand([3]).to_event(1)
    positive = dist.Gamma(2.0, 2.0).expand([2])

    def model():
        w = pyro.sample("w", prior)
        with pyro.plate("rows", 2):
            s = pyro.sample("s", positive)
            pyro.sample("y", dist.Normal(w.sum(-1, keepdim=True), s), obs=torch.ones(2))

    guide = guide_for(model, (), kind)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert_same(*both(model, guide, particles=particles))


def test_a_value_that_a_distribution_forbids_is_still_found():
    def model(y):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.LogNormal(z, 1.0), obs=y)

    guide, loss = guide_for(model, (torch.tensor(1.0),)), graph()
    with pyro.validation_enabled():
        for y in (1.0, 2.0, 3.0):
            loss.loss_and_grads(model, guide, torch.tensor(y))
        with pytest.raises(ValueError, match="invalid values"):
            loss.loss_and_grads(model, guide, torch.tensor(-1.0))


def several(make):
    return make(torch.full((3,), 0.4) + pyro.param("a", torch.tensor(0.1)))


SCORED = {
    "to_event": lambda: several(dist.Bernoulli).to_event(1),
    "expand": lambda: dist.Bernoulli(pyro.param("a", torch.tensor(0.5))).expand([3]).to_event(1),
    "mask": lambda: several(dist.Bernoulli).mask(True).to_event(1),
    "mask of some": lambda: several(dist.Bernoulli).mask(torch.arange(3) > 0).to_event(1),
    "expanded": lambda: dist.ExpandedDistribution(several(dist.Poisson), [3]).to_event(1),
    "has_rsample_": lambda: dist.Normal(several(torch.exp), 1.0).has_rsample_(False).to_event(1),
    "transformed": lambda: dist.TransformedDistribution(
        several(dist.Exponential).has_rsample_(False), [dist.transforms.AffineTransform(0.0, 2.0)]
    ).to_event(1),
    "mixture": lambda: dist.MixtureSameFamily(
        dist.Categorical(logits=torch.zeros(2)),
        dist.Normal(several(torch.exp)[:2, None].expand(2, 3), 1.0).to_event(1),
    ),
    "one hot": lambda: several(dist.OneHotCategorical),
}


@pytest.mark.parametrize("make", SCORED.values(), ids=SCORED)
def test_draws_without_a_gradient_are_told_by_the_site_and_left_to_trace_elbo(make):
    def model():
        with pyro.validation_enabled(False):
            z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
            pyro.sample("y", dist.Normal(z.sum(-1), 1.0), obs=torch.tensor(1.0))

    def guide():
        pyro.sample("z", make())

    guide()
    with pyro.validation_enabled(False), pytest.warns(UserWarning, match="'z' are not reparam"):
        assert_same(*both(model, guide))


REPARAMETERISED = {
    "mask": lambda: dist.Normal(several(torch.exp), 1.0).mask(True).to_event(1),
    "expanded": lambda: dist.ExpandedDistribution(
        dist.Normal(several(torch.exp), 1.0), [3]
    ).to_event(1),
    "point": lambda: dist.Delta(several(torch.exp)).to_event(1),
    "relaxed": lambda: dist.RelaxedBernoulliStraightThrough(
        torch.tensor(0.7), logits=several(torch.exp)
    ).to_event(1),
}


@pytest.mark.parametrize("make", REPARAMETERISED.values(), ids=REPARAMETERISED)
def test_draws_with_a_gradient_are_told_by_it_too(make):
    def model():
        z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(z.sum(-1), 1.0), obs=torch.tensor(1.0))

    def guide():
        pyro.sample("z", make())

    guide()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert_same(*both(model, guide))


def test_a_sampler_that_rejects_is_left_to_trace_elbo():
    def model():
        pyro.sample("z", dist.Gamma(2.0, 1.0))

    def guide():
        pyro.sample("z", RejectionStandardGamma(1 + pyro.param("a", torch.tensor(1.0))))

    guide()
    with pytest.warns(UserWarning, match="'z' are not reparam"):
        assert_same(*both(model, guide))


def test_a_score_of_what_a_guide_observes_is_left_to_trace_elbo():
    def guide():
        p = pyro.param("p", torch.tensor(0.5), constraint=dist.constraints.unit_interval)
        pyro.sample("coin", dist.Bernoulli(p), obs=torch.tensor(1.0), infer={"is_auxiliary": True})
        pyro.sample("z", dist.Normal(p, 1.0))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of Pyro, out of inference
        guide()
    with pytest.warns(UserWarning, match="'coin'"):
        assert_same(*both(one_latent, guide))


# Little to do


def nothing():
    pass


def known():
    pyro.deterministic("a", torch.tensor(1.0))


def one_number():
    pyro.factor("a", pyro.param("p", torch.tensor(2.0)).square())


def param_alone():
    pyro.param("p", torch.tensor(1.0))


@pytest.mark.parametrize("particles", [(1, False), (3, True), (2, False)], ids=str)
@pytest.mark.parametrize("model", [nothing, known, one_number, param_alone])
@pytest.mark.parametrize("guide", [nothing, param_alone])
def test_models_and_guides_without_latents_are_scored(model, guide, particles):
    assert_same(*both(model, guide, particles=particles))
    found = graph(particles[0], vectorize_particles=particles[1])
    expected = torch.as_tensor(Trace_ELBO().differentiable_loss(model, guide))
    for _ in range(3):
        loss = found.differentiable_loss(model, guide)
        assert isinstance(loss, torch.Tensor)
        assert_close(loss, expected)


def test_a_loss_that_is_infinite_at_once_is_that_of_trace_elbo():
    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Delta(z), obs=torch.tensor(1.0))

    eager, compiled = both(model, guide_for(model, (), AutoNormal))
    assert [value for value, _ in compiled] == [value for value, _ in eager] == 4 * [torch.inf]


@pytest.mark.parametrize("elbo", [CompiledTrace_ELBO, TraceSTL_ELBO])
@pytest.mark.parametrize("num_particles", [0, -1, 1.5, True, None, "2"])
def test_the_number_of_particles_is_a_positive_int(elbo, num_particles):
    with pytest.raises(ValueError, match="num_particles should be an int of at least 1"):
        elbo(num_particles=num_particles)


# Refusals


def test_a_branch_on_a_number_is_named_by_its_line():
    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        scale = 1.0 if z > 0 else 2.0
        pyro.sample("y", dist.Normal(z, scale), obs=torch.tensor(1.0))

    with pytest.raises(
        ValueError, match=r"test_compiled.py, line \d+, in model: `scale = 1.0 if z"
    ):
        graph().loss_and_grads(model, guide_for(model, ()))


def test_a_selection_by_a_latent_is_refused():
    def model():
        z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        pyro.factor("f", z[z > 0].sum())

    with pytest.raises(ValueError, match=r"poutine\.mask"):
        graph().loss_and_grads(model, guide_for(model, ()))


def test_a_model_that_changes_is_refused():
    calls = []

    def model():
        calls.append(1)
        z = pyro.sample("z", dist.Normal(float(len(calls)), 1.0))
        pyro.sample("y", dist.Normal(z, 0.5), obs=torch.tensor(1.0))

    with pytest.raises(ValueError, match="counter"):
        graph().loss_and_grads(model, guide_for(model, ()))


def test_sites_that_take_turns_are_refused_at_the_first_call():
    calls = []

    def model():
        calls.append(1)
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample(f"y{len(calls) % 2}", dist.Normal(z, 0.5), obs=torch.tensor(1.0))

    guide = guide_for(model, ())
    with pytest.raises(ValueError, match="its sites are not the same in two runs"):
        graph().loss_and_grads(model, guide)


def test_enumeration_is_refused():
    def model():
        k = pyro.sample("k", dist.Bernoulli(0.5))
        pyro.sample("y", dist.Normal(k, 1.0), obs=torch.tensor(1.0))

    def guide():
        p = pyro.param("p", torch.tensor(0.5), constraint=dist.constraints.unit_interval)
        pyro.sample("k", dist.Bernoulli(p))

    with (
        pytest.warns(UserWarning, match="TraceEnum_ELBO instead"),  # Pyro's own
        pytest.raises(ValueError, match="TraceEnum_ELBO"),
    ):
        graph().loss_and_grads(model, config_enumerate(guide))
    with pytest.warns(UserWarning, match="site 'k' are not reparameterised"):
        assert_same(*both(model, guide))


def test_writing_into_a_buffer_is_refused():
    norm = nn.BatchNorm1d(2)
    x = torch.randn(4, 2)

    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(norm(x).sum() + z, 1.0), obs=torch.tensor(1.0))

    guide = guide_for(model, ())
    with pytest.raises(ValueError, match="BatchNorm"):
        graph().loss_and_grads(model, guide)
    norm.eval()
    graph().loss_and_grads(model, guide)


def test_arguments_that_cant_be_watched_are_left_to_trace_elbo():
    def model(x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=torch.as_tensor(x[0]))

    numbers = data()[1].numpy().copy()
    guide, loss = guide_for(model, (numbers,)), graph()
    with pytest.warns(UserWarning, match="type ndarray"):
        assert_same(*both(model, guide, (numbers,), elbo=lambda *_: loss))


def test_a_tensor_in_two_roles_is_two_inputs():
    def model(x, t):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=x - 2 * t)

    x, t = torch.tensor(1.0), torch.tensor(5.0)
    guide, loss = guide_for(model, (x, x)), graph()
    loss.loss_and_grads(model, guide, x, x)
    assert_same(*both(model, guide, (x, t), elbo=lambda *_: loss))


@pytest.mark.parametrize(
    "layout", [lambda x: x, lambda x: x.T.clone().T, lambda x: x.repeat(1, 2)[:, ::2]]
)
def test_layouts_of_memory_are_told_apart(layout):
    x, y = data()
    guide, loss = guide_for(arguments, (x, y)), graph()
    loss.loss_and_grads(arguments, guide, x, y)
    assert_same(*both(arguments, guide, (layout(x), y), elbo=lambda *_: loss))


def test_a_number_that_changes_is_noticed_in_time():
    weight = [1.0]

    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with poutine.scale(scale=weight[0]):
            pyro.sample("y", dist.Normal(z, 1.0), obs=torch.tensor(1.0))

    guide, loss = guide_for(model, ()), graph()
    for _ in range(5):
        loss.loss_and_grads(model, guide)
    weight[0] = 1.5
    with pytest.raises(ValueError, match="under one seed"):
        list(loss.loss_and_grads(model, guide) for _ in range(8))


def test_hooks_of_parameters_are_heeded():
    guide, loss = guide_for(one_latent, ()), graph()
    for _ in range(2):
        loss.loss_and_grads(one_latent, guide)
    for param in guide.parameters():
        param.grad = None
        param.register_hook(lambda grad: 0 * grad)
    with pytest.warns(UserWarning, match="hook"):
        loss.loss_and_grads(one_latent, guide)
    assert all((param.grad == 0).all() for param in guide.parameters())


def test_gradients_that_are_one_tensor_are_added_up_apart():
    def guide():
        a, b = (pyro.param(name, torch.tensor(0.0)) for name in "ab")
        pyro.sample("z", dist.Normal(a + b, 1.0))

    assert_same(*both(one_latent, guide, particles=(3, False)))


def test_modules_in_functions_change_their_mode_too():
    net = nn.Dropout(0.5)

    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(net(torch.ones(9)).sum() + z, 1.0), obs=torch.tensor(1.0))

    guide, loss = guide_for(model, ()), graph()
    for change in (net.train, net.eval, net.train):
        change()
        assert_same(*both(model, guide, elbo=lambda *_: loss))


def test_a_guide_that_grows_at_its_first_call_has_one_graph():
    loss = graph()
    guide = AutoNormal(plates)
    for _ in range(3):
        loss.loss_and_grads(plates, guide)
    assert len(loss.recorder.recordings) == 1


def test_handlers_around_a_step_are_heeded():
    guide = guide_for(one_latent, ())
    with poutine.scale(scale=3.0), pytest.warns(UserWarning, match="handlers"):
        assert_same(*both(one_latent, guide))


def test_a_backend_is_one_of_three():
    with pytest.raises(ValueError, match="backend should be one of"):
        CompiledTrace_ELBO(backend="jit")


# Backends


def test_without_a_compiler_it_says_so_and_replays(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    loss = CompiledTrace_ELBO()
    with pytest.warns(UserWarning, match="no C\\+\\+ compiler"):
        assert_same(*both(one_latent, guide_for(one_latent, ()), elbo=lambda *_: loss))
    assert loss.backend == "graph"


def test_a_compiler_that_fails_is_done_without(monkeypatch):
    def fail(*_):
        raise RuntimeError("no Python.h")

    monkeypatch.setattr(lowering.Inductor, "lower", fail)
    loss = CompiledTrace_ELBO(backend="inductor")
    with pytest.warns(UserWarning, match=r"The compiler failed.*no Python\.h"):
        assert_same(*both(one_latent, guide_for(one_latent, ()), elbo=lambda *_: loss))
    assert loss.backend == "graph"


def test_a_compiled_step_that_is_wrong_is_not_used(monkeypatch):
    def wrong(_, fn, *__):
        return lambda tensors: [2 * out for out in fn(*tensors)]

    monkeypatch.setattr(lowering.Inductor, "lower", wrong)
    loss = CompiledTrace_ELBO(backend="inductor")
    with pytest.warns(UserWarning, match="does not agree"):
        assert_same(*both(one_latent, guide_for(one_latent, ()), elbo=lambda *_: loss))


def test_errors_of_the_code_are_raised_as_ever():
    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        matrix = torch.eye(2) * (z - z - sign) + 0 * z
        pyro.sample("y", dist.MultivariateNormal(torch.zeros(2), matrix), obs=torch.zeros(2))

    sign = torch.tensor(-1.0)
    guide, loss = guide_for(model, ()), graph()
    with pyro.validation_enabled(False):
        for _ in range(6):
            loss.loss_and_grads(model, guide)
        sign.fill_(1.0)
        with pytest.raises(torch.linalg.LinAlgError):
            loss.loss_and_grads(model, guide)


def test_it_and_what_it_trained_can_be_copied():
    guide, loss = guide_for(one_latent, ()), graph()
    svi = SVI(one_latent, guide, Adam({"lr": 0.01}), loss)
    svi.step()
    for twin in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        twin.loss_and_grads(one_latent, guide)
    pickle.loads(pickle.dumps(guide)).sample_posterior(3)


def test_a_step_makes_the_statements_that_optimisers_wait_for():
    guide, loss = guide_for(one_latent, ()), graph()
    for _ in range(2):
        with poutine.trace(param_only=True) as capture:
            loss.loss_and_grads(one_latent, guide)
        assert len(capture.trace.nodes) == len(list(guide.parameters()))


def test_it_warns_of_no_more_than_it_should():
    guide, loss = guide_for(plates, ()), graph(3, True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            loss.loss_and_grads(plates, guide)


@needs_compiler
@pytest.mark.parametrize("vectorized", [False, True])
def test_the_number_of_particles_may_change(vectorized):
    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(z, 0.5), obs=torch.tensor(1.0))

    guide, found = guide_for(model, ()), []
    settings = {"vectorize_particles": vectorized, "max_plate_nesting": 0}
    for loss in (Trace_ELBO(2, **settings), graph(2, **settings)):
        losses = []
        for num_particles in (2, 2, 2, 5, 5):
            loss.num_particles = num_particles
            pyro.set_rng_seed(0)
            losses.append(loss.loss_and_grads(model, guide))
        found.append(losses)
    assert found[0] == pytest.approx(found[1], rel=1e-4)


def test_a_copy_records_for_itself():
    loss = graph()
    for twin in (copy.copy(loss), copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        assert twin.recorder.elbo is twin
        assert twin.backend == loss.backend


@pytest.mark.parametrize("num_particles", [1, 3])
def test_gradients_of_several_calls_add_up(num_particles):
    class Guide(PyroModule):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(2, 4), nn.Linear(4, 1)

        def forward(self, x):
            loc = self.last(self.first(x).tanh()).squeeze(-1)
            with pyro.plate("rows", len(x)):
                pyro.sample("z", dist.Normal(loc, 0.5))

    def model(x):
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=x.sum(-1))

    guide, x = Guide(), torch.randn(5, 2)
    found = []
    for loss in (Trace_ELBO(num_particles), CompiledTrace_ELBO(num_particles, backend="inductor")):
        pyro.set_rng_seed(0)
        guide.zero_grad()
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            elbo = loss(model, guide)
            (elbo(x) + elbo(2 * x)).backward()
        found.append([p.grad.clone() for p in guide.parameters()])
    assert_close(found[1], found[0])


@pytest.mark.parametrize("elbo", [graph, pytest.param(CompiledTrace_ELBO, marks=needs_compiler)])
def test_a_loss_may_invert_a_flow(elbo):
    prior = inverse_autoregressive_flow(3, [8], num_flows=2)
    base = DiagonalNormal(torch.zeros(3), torch.ones(3))

    def model():
        pyro.module("prior", prior)
        z = pyro.sample("z", dist.TransformedDistribution(base, [prior]))
        pyro.sample("y", dist.Normal(z.sum(-1), 1.0), obs=torch.tensor(1.0))

    def guide():
        loc = pyro.param("loc", torch.zeros(3))
        pyro.sample("z", DiagonalNormal(loc, torch.ones(3)))

    guide()
    assert_same(*both(model, guide, elbo=elbo))
