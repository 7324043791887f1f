"""Gradients through the draws alone: right in mean, and nothing at the posterior."""

import copy
import gc
import math
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from bijections import rough
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoDelta, AutoIAFNormal, AutoMultivariateNormal, AutoNormal
from pyro.nn import PyroModule, PyroParam
from torch.distributions import Transform, constraints
from torch.testing import assert_close

from pyro_iaf import (
    AutoHierarchicalIAF,
    AutoIAF,
    DiagonalNormal,
    TraceSTL_ELBO,
    conditional_inverse_autoregressive_flow,
    fit,
    inverse_autoregressive_flow,
)
from pyro_iaf.flows import pass_cache
from pyro_iaf.solvers.path_score import noise_of_draw


def regression():
    scale = pyro.sample("scale", dist.HalfNormal(1.0))
    weights = pyro.sample("weights", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("data", 6):
        fn = dist.Normal(weights.sum(-1, keepdim=True), scale.unsqueeze(-1))
        pyro.sample("y", fn, obs=torch.linspace(-1, 2, 6))


def local():
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", 8, subsample_size=4) as rows:
        effect = pyro.sample("effect", dist.LogNormal(mean, 0.5))
        pyro.sample("y", dist.Normal(effect, 1.0), obs=torch.linspace(0, 2, 8)[rows])


MASK = torch.tensor([True, False])


class TwoSites(PyroModule):
    """The second site, masked and scaled, listens to the first."""

    def __init__(self, kind):
        super().__init__()
        self.loc = PyroParam(torch.tensor(0.5))
        self.scale = PyroParam(torch.tensor(0.7), constraint=constraints.positive)
        self.slope = PyroParam(torch.tensor([1.0, -1.0]))
        self.kind = kind
        if kind == "flow":
            self.flow = conditional_inverse_autoregressive_flow(2, 1, [4])
            rough(self.flow)
        if "base" in kind:
            self.flow = rough(inverse_autoregressive_flow(2, [4]))

    def model(self):
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        with pyro.plate("two", 2), poutine.scale(scale=1.5):
            fn = dist.Normal(a.unsqueeze(-1), 1.0).expand([*a.shape[:-1], 2, 2]).to_event(1)
            b = pyro.sample("b", fn.mask(MASK))
            pyro.factor("f", -0.1 * b.sum(-1) ** 4 * MASK)

    def forward(self):
        if self.kind == "moving":
            a = pyro.sample("a", dist.Uniform(self.loc - 1, self.loc + self.scale))
        elif self.kind == "scored":
            a = pyro.sample("a", Scored(self.loc, self.scale))
        else:
            a = pyro.sample("a", dist.Normal(self.loc, self.scale))
        loc = (a.unsqueeze(-1) * self.slope).expand(*a.shape[:-1], 2, 2)
        base = DiagonalNormal(loc, self.scale)
        fn = base
        if self.kind in ("normal base", "independent base"):
            base = dist.Normal(base.loc, self.scale)
            base = base if self.kind == "normal base" else base.to_event(1)
            fn = dist.TransformedDistribution(base, [self.flow])
        if self.kind == "flow":
            fn = dist.TransformedDistribution(base, [self.flow.condition(a.unsqueeze(-1))])
        if self.kind == "point":
            b = base.rsample()
            fn = dist.Delta(b, log_density=base.log_prob(b), event_dim=1)
        with pyro.plate("two", 2), poutine.scale(scale=1.5):
            pyro.sample("b", fn.mask(MASK) if self.kind != "point" else fn)


class Scored(dist.Normal):
    """A normal whose draws have no gradient."""

    has_rsample = False


def two(kind):
    guide = TwoSites(kind)
    return guide.model, guide


def moved(model, guide):
    """The guide away from where it starts."""
    guide()
    with torch.no_grad():
        for param in guide.parameters():
            param.add_(0.1 * torch.randn_like(param))
    return model, guide


def widths(kind, model, **settings):
    return moved(model, kind(model, hidden_dims=[6], init_scale=0.3, **settings))


# A model and a guide; the sites that keep their gradient.
PAIRS = {
    "normals": (lambda: moved(regression, AutoNormal(regression, init_scale=0.3)), set()),
    "dense": (lambda: moved(regression, AutoMultivariateNormal(regression)), set()),
    "flows of Pyro": (lambda: moved(regression, AutoIAFNormal(regression, hidden_dim=[6])), set()),
    "affine": (lambda: widths(AutoIAF, regression), set()),
    "gated": (lambda: widths(AutoIAF, regression, univariate="gated", num_flows=3), set()),
    "hierarchical": (lambda: widths(AutoHierarchicalIAF, local), set()),
    "two sites": (lambda: two("normal"), set()),
    "flow of normals": (lambda: two("normal base"), set()),
    "flow of a vector of normals": (lambda: two("independent base"), set()),
    "conditional": (lambda: two("flow"), set()),
    "moving support": (lambda: two("moving"), {"a"}),
    "not reparameterised": (lambda: two("scored"), {"a"}),
    "point": (lambda: two("point"), {"b"}),
}


@pytest.fixture(params=PAIRS.values(), ids=PAIRS)
def pair(request):
    make, keeping = request.param
    pyro.set_rng_seed(0)
    return *make(), keeping


def gradient(loss, model, guide):
    """The loss and its gradient, flat."""
    guide.zero_grad()
    value = loss.loss_and_grads(model, guide)
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in guide.parameters()]
    return value, torch.cat([grad.reshape(-1) for grad in grads])


@pytest.mark.filterwarnings("ignore:Site")
def test_the_mean_of_gradients_is_that_of_the_elbo(pair):
    model, guide, _ = pair
    gaps, particles = [], {"num_particles": 20, "vectorize_particles": True, "max_plate_nesting": 1}
    for seed in range(50):
        found = []
        for loss in (TraceSTL_ELBO(**particles), Trace_ELBO(**particles)):
            pyro.set_rng_seed(seed)
            found.append(gradient(loss, model, guide))
        (value, ours), (expected, theirs) = found
        assert_close(value, expected)
        gaps.append(ours - theirs)
    gaps = torch.stack(gaps)
    error = gaps.std(0) / math.sqrt(len(gaps))
    z = gaps.mean(0) / error.clamp(min=1e-9)
    assert z.abs().max() < 4.5  # standard errors, of some hundred numbers at most


def test_both_ways_to_the_gradient_agree(pair):
    model, guide, keeping = pair
    loss = TraceSTL_ELBO(num_particles=2)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        pyro.set_rng_seed(1)
        value, expected = gradient(loss, model, guide)
        guide.zero_grad()
        pyro.set_rng_seed(1)
        surrogate = loss.differentiable_loss(model, guide)
        surrogate.backward()
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in guide.parameters()]
    assert_close(surrogate.item(), value)
    assert_close(torch.cat([grad.reshape(-1) for grad in grads]), expected)
    told = [str(w.message) for w in caught if "TraceSTL_ELBO" in str(w.message)]
    assert len(told) == len(keeping)  # once each
    assert all(any(f"Site '{name}' keeps" in text for text in told) for name in keeping)


@pytest.mark.parametrize("D", [1, 2, 10, 50])
def test_the_gradient_is_zero_at_the_posterior(D):
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(D, D, generator=generator).tril(-1) / D**0.5 + torch.eye(D)
    loc = torch.arange(1.0, D + 1)

    def model():
        pyro.sample("z", dist.MultivariateNormal(loc, scale_tril=root))

    class Guide(PyroModule):
        def __init__(self):
            super().__init__()
            self.loc, self.root = PyroParam(loc.clone()), PyroParam(root.clone())

        def forward(self):
            pyro.sample("z", dist.MultivariateNormal(self.loc, scale_tril=self.root.tril()))

    guide = Guide()
    ours, theirs = (
        torch.stack([gradient(loss(), model, guide)[1] for _ in range(50)]).square().sum(1).mean()
        for loss in (TraceSTL_ELBO, Trace_ELBO)
    )
    assert ours < 1e-20
    assert theirs > 0.5


@pytest.mark.parametrize("kind", [AutoIAF, AutoHierarchicalIAF])
def test_the_gradient_of_flows_at_the_posterior_is_rounding(kind):
    def model():
        with poutine.block():
            posterior = twin.get_posterior()
        pyro.sample("z", posterior)

    def simple():
        pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))

    twin = AutoIAF(simple, hidden_dims=[6], init_scale=0.5)
    moved(simple, twin)
    guide = kind(simple, hidden_dims=[6], init_scale=0.5, name="guide")
    guide()
    flows = guide.transform if kind is AutoIAF else guide.transforms[0]
    flows.load_state_dict(twin.transform.state_dict())
    for _ in range(5):
        _, ours = gradient(TraceSTL_ELBO(), model, guide)
        _, theirs = gradient(Trace_ELBO(), model, guide)
        assert ours.norm() < 1e-8 * theirs.norm()


class Tempered(dist.TransformedDistribution):
    """Flows with a density of its own."""

    def log_prob(self, value):
        return 0.5 * super().log_prob(value)


class Wide(dist.Normal):
    """A normal that draws and scores in its own way."""

    def rsample(self, sample_shape=()):
        return self.loc + 2 * self.scale * torch.randn(self._extended_shape(sample_shape))

    def log_prob(self, value):
        return dist.Normal(self.loc, 2 * self.scale).log_prob(value)


class Twice(Transform):
    """A flow after itself, written down once."""

    domain = codomain = constraints.real_vector
    bijective = True

    def __init__(self, flow):
        super().__init__()
        self.parts = [flow]

    def _call(self, x):
        return self.parts[0](self.parts[0](x))

    def _inverse(self, y):
        return self.parts[0].inv(self.parts[0].inv(y))

    def log_abs_det_jacobian(self, x, y):
        (flow,), middle = self.parts, self.parts[0](x)
        return flow.log_abs_det_jacobian(x, middle) + flow.log_abs_det_jacobian(middle, y)


OF_THEIR_OWN = {
    "straight through": lambda loc, flow: dist.RelaxedBernoulliStraightThrough(
        torch.tensor(0.7), logits=loc
    ).to_event(1),
    "one hot, straight through": lambda loc, flow: dist.RelaxedOneHotCategoricalStraightThrough(
        torch.tensor(0.7), logits=loc
    ),
    "another density": lambda loc, flow: Tempered(DiagonalNormal(loc, torch.ones(3)), [flow]),
    "parts of its own": lambda loc, flow: dist.TransformedDistribution(
        dist.Normal(loc, 1.0).to_event(1), [Twice(flow)]
    ),
    "another base": lambda loc, flow: dist.TransformedDistribution(
        Wide(loc, torch.ones(3)).to_event(1), [flow]
    ),
}


@pytest.mark.filterwarnings("ignore:Site")
@pytest.mark.parametrize("make", OF_THEIR_OWN.values(), ids=OF_THEIR_OWN)
def test_distributions_with_ways_of_their_own_are_scored_in_them(make):
    flow = rough(inverse_autoregressive_flow(3, [4]))
    loc = torch.tensor([0.3, -0.2, 0.5], requires_grad=True)

    def model():
        pyro.sample("z", make(torch.tensor([0.5, 0.1, -0.4]), flow))

    def guide():
        pyro.sample("z", make(loc, flow))

    gaps = []
    for seed in range(200):
        found = []
        for loss in (TraceSTL_ELBO(), Trace_ELBO()):
            loc.grad = None
            pyro.set_rng_seed(seed)
            value = loss.differentiable_loss(model, guide)
            value.backward()
            found.append((value.detach(), loc.grad))
        assert_close(found[0][0], found[1][0])
        gaps.append(found[0][1] - found[1][1])
    gaps = torch.stack(gaps)
    z = gaps.mean(0) / (gaps.std(0) / math.sqrt(len(gaps))).clamp(min=1e-9)
    assert z.abs().max() < 4.5


def test_losses_keep_their_digits_far_from_zero():
    torch.set_default_dtype(torch.float32)

    def far():
        mean = pyro.sample("mean", dist.Normal(1e5, 1.0))
        with pyro.plate("rows", 3):
            pyro.sample("a", dist.Normal(mean, 0.1))

    guide = AutoHierarchicalIAF(far, hidden_dims=[6])
    guide.setup()
    losses = []
    for loss in (TraceSTL_ELBO(), Trace_ELBO()):
        pyro.set_rng_seed(1)
        losses.append(loss.loss_and_grads(far, guide))
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)


@pytest.mark.parametrize("hears", ["the value", "the noise"])
def test_the_gradient_of_sites_that_listen_is_rounding_at_the_posterior(hears):
    def in_order(flows, noise_of):
        first, second, third = flows
        base = DiagonalNormal(torch.zeros(3), torch.ones(3))
        fn = dist.TransformedDistribution(base, [first])
        told = a = pyro.sample("a", fn)
        told = noise_of(first, a) if hears == "the noise" else a
        second = second.condition(told)
        b = pyro.sample("b", dist.TransformedDistribution(base, [second]))
        told = told + (noise_of(second, b) if hears == "the noise" else b)
        pyro.sample("c", dist.TransformedDistribution(base, [third.condition(told)]))

    def inverse(flow, value):
        return flow.inv(value)

    flows = torch.nn.ModuleList([inverse_autoregressive_flow(3, [6], num_flows=2)])
    for _ in range(2):
        flows.append(conditional_inverse_autoregressive_flow(3, 3, [6], num_flows=2))
    for flow in flows:
        rough(flow, 0.1)  # one hears the other, so steep ones multiply roundings
    twins = copy.deepcopy(flows).requires_grad_(False)
    guide = Sites(flows, lambda: in_order(flows, noise_of_draw))
    for _ in range(5):
        _, ours = gradient(TraceSTL_ELBO(2), lambda: in_order(twins, inverse), guide)
        _, theirs = gradient(Trace_ELBO(2), lambda: in_order(twins, inverse), guide)
        assert ours.norm() < 1e-8 * theirs.norm()


class Sites(torch.nn.Module):
    """A guide of these modules and statements."""

    def __init__(self, flows, statements):
        super().__init__()
        self.flows, self.statements = flows, statements

    def forward(self):
        pyro.module("flows", self.flows)
        self.statements()


def test_fit_sticks_the_landing_of_hierarchical_guides(monkeypatch):
    calls = []
    own = TraceSTL_ELBO.loss_and_grads
    monkeypatch.setattr(
        TraceSTL_ELBO, "loss_and_grads", lambda *args: calls.append(1) or own(*args)
    )
    fit(local, AutoHierarchicalIAF(local, hidden_dims=[6]), num_steps=5, progress=False)
    assert len(calls) == 5


@pytest.mark.parametrize("at_once", [False, True])
def test_svi_takes_it(at_once):
    pyro.set_rng_seed(0)
    guide = AutoIAF(regression, hidden_dims=[6])
    loss = TraceSTL_ELBO(num_particles=4, vectorize_particles=at_once, max_plate_nesting=1)
    svi = SVI(regression, guide, pyro.optim.Adam({"lr": 0.01}), loss)
    losses = [svi.step() for _ in range(200)]
    assert sum(losses[-50:]) < sum(losses[:50])
    assert svi.evaluate_loss() < 100


@pytest.mark.parametrize("mode", [False, "graph", True])
def test_fit_takes_it_compiled_and_not(mode):
    pyro.set_rng_seed(0)
    found = {}
    for compile in (False, mode):  # noqa: A001
        pyro.clear_param_store()
        guide = AutoIAF(regression, hidden_dims=[6], start="init")
        loss = TraceSTL_ELBO(num_particles=4, vectorize_particles=True, max_plate_nesting=1)
        result = fit(
            regression, guide, num_steps=40, loss=loss, compile=compile, seed=0, progress=False
        )
        found[compile] = result.losses
    assert_close(found[mode], found[False], rtol=1e-6, atol=1e-6)


def test_no_flow_is_inverted(monkeypatch):
    def undo(*_):
        raise AssertionError("inverted")

    monkeypatch.setattr("pyro_iaf.flows.autoregressive.walk_back", undo)
    for make in (PAIRS["affine"][0], PAIRS["hierarchical"][0], PAIRS["conditional"][0]):
        pyro.clear_param_store()
        model, guide = make()
        gradient(TraceSTL_ELBO(), model, guide)


def test_points_without_parameters_of_their_own_are_no_reason_to_warn():
    guide = AutoDelta(regression)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gradient(TraceSTL_ELBO(), regression, guide)


def test_learnable_parameters_of_the_model_keep_their_gradient():
    def model():
        scale = pyro.param("model_scale", torch.tensor(0.7))
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(z, scale), obs=torch.tensor(2.0))

    guide = AutoNormal(model)
    guide()
    found = []
    for loss in (TraceSTL_ELBO(), Trace_ELBO()):
        pyro.set_rng_seed(0)
        loss.loss_and_grads(model, guide)
        param = pyro.param("model_scale").unconstrained()
        found.append(param.grad.clone())
        param.grad = None
    assert_close(*found)


def uniform(*transforms):
    zero, one = torch.tensor(0.0), torch.tensor(1.0)
    return dist.TransformedDistribution(dist.Uniform(zero, one), list(transforms))


class Hidden(dist.transforms.ExpTransform):
    """A transform whose parameter is nowhere to be seen."""

    def __init__(self, fn):
        super().__init__()
        self.fn = fn

    def _call(self, x):
        return super()._call(x) * self.fn()

    def _inverse(self, y):
        return super()._inverse(y / self.fn())


T = dist.transforms
MOVING = {
    "uniform": lambda p: dist.Uniform(0.0, p),
    "pareto": lambda p: dist.Pareto(p, torch.tensor(2.0)),
    "affine": lambda p: uniform(T.AffineTransform(0.0, p)),
    "affine by another graph": lambda p: uniform(T.AffineTransform(0.0, p.exp() * p.sigmoid())),
    "composed": lambda p: uniform(T.ComposeTransform([T.AffineTransform(0.0, p)])),
    "inverse": lambda p: uniform(T.AffineTransform(0.0, p).inv),
    "power": lambda p: dist.TransformedDistribution(
        dist.Uniform(torch.tensor(1.0), torch.tensor(2.0)), [T.PowerTransform(p)]
    ),
    "squashed": lambda p: dist.TransformedDistribution(
        dist.Laplace(torch.tensor(0.0), torch.tensor(1.0)),
        [T.SigmoidTransform(), T.AffineTransform(0.0, p)],
    ),
    "hidden": lambda p: uniform(Hidden(lambda: p)),
}
STILL = {
    "weibull": lambda p: dist.Weibull(p, p),
    "gumbel": lambda p: dist.Gumbel(p, p),
    "lognormal": lambda p: dist.LogNormal(p, p),
    "shifted": lambda p: dist.TransformedDistribution(
        dist.Normal(torch.tensor(0.0), torch.tensor(1.0)), [T.AffineTransform(p, p)]
    ),
    "exponential": lambda p: dist.TransformedDistribution(
        dist.Exponential(torch.tensor(1.0)), [T.AffineTransform(0.0, p)]
    ),
    "beta": lambda p: dist.Beta(p, p),
}


def warned_of(fn):
    """What is said of a guide with this site; its steps have to run."""

    def model():
        pyro.sample("z", dist.ImproperUniform(constraints.real, (), fn().event_shape))

    loss = TraceSTL_ELBO()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            loss.loss_and_grads(model, lambda: pyro.sample("z", fn()))
    return [str(w.message) for w in caught if "TraceSTL_ELBO" in str(w.message)]


@pytest.mark.parametrize("make", MOVING.values(), ids=MOVING)
def test_supports_that_move_are_seen(make):
    p = torch.tensor(1.3, requires_grad=True)
    (told,) = warned_of(lambda: make(p))
    assert "its support has parameters" in told


@pytest.mark.parametrize("make", STILL.values(), ids=STILL)
def test_supports_that_stay_are_no_reason_to_warn(make):
    p = torch.tensor(1.3, requires_grad=True)
    assert not warned_of(lambda: make(p))


def test_flows_that_know_their_last_draw_alone_keep_their_gradient():
    flow = T.planar(2)
    base = dist.Normal(torch.zeros(2), torch.ones(2))
    (told,) = warned_of(lambda: dist.TransformedDistribution(base, [flow]))
    assert "can't score a draw" in told


def test_a_distribution_without_a_support_keeps_its_gradient():
    p = torch.tensor(1.3, requires_grad=True)

    class Odd(dist.TorchDistribution):
        arg_constraints = {}  # noqa: RUF012
        has_rsample = True

        def rsample(self, sample_shape=()):
            return p * torch.randn(())

        def log_prob(self, value):
            return -p.log() - 0.5 * (value / p) ** 2

    with pyro.validation_enabled(False):
        (told,) = warned_of(lambda: Odd(validate_args=False))
    assert "its support" in told


def test_graphs_outside_can_be_kept():
    p = torch.tensor(0.3, requires_grad=True)
    scale = (2 * p).exp()

    def model(scale):
        pyro.sample("z", dist.Normal(0.0, 1.0))

    def guide(scale):
        pyro.sample("z", dist.Normal(p, scale))

    found = []
    for elbo in (TraceSTL_ELBO, Trace_ELBO):
        loss = elbo(num_particles=2, retain_graph=True)
        for _ in range(2):
            loss.loss_and_grads(model, guide, scale)
        found.append(p.grad is not None)
    assert all(found)


def test_the_gradient_is_zero_at_the_posterior_beside_sites_without():
    loc = torch.tensor(0.4, requires_grad=True)

    def both(loc):
        z = pyro.sample("z", dist.Normal(loc, 1.0))
        pyro.sample("c", dist.Bernoulli(logits=z))

    loss = TraceSTL_ELBO()
    with pytest.warns(UserWarning, match="Site 'c' keeps the ordinary gradient"):
        loss.loss_and_grads(lambda: both(loc.detach()), lambda: both(loc))
    for _ in range(4):
        loss.loss_and_grads(lambda: both(loc.detach()), lambda: both(loc))
    assert loc.grad.abs() < 1e-12


@pytest.mark.parametrize("kind", [AutoIAF, AutoHierarchicalIAF])
def test_no_step_leaves_anything_behind(kind):
    model = regression if kind is AutoIAF else local
    guide = kind(model, hidden_dims=[6], init_scale=0.3)
    loss = TraceSTL_ELBO()
    sizes = []
    for _ in range(4):
        gradient(loss, model, guide)
        gc.collect()  # also of what the tests before have left
        parts = (pass_cache._forward, pass_cache._backward, pass_cache._aliases)
        sizes.append([len(part) for part in parts])
    assert sizes[1] == sizes[2] == sizes[3]
