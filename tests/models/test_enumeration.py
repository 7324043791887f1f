"""Discrete latents are summed out: densities are those of sums written out by hand."""

import contextlib
import itertools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO, TraceEnum_ELBO, config_enumerate
from pyro.infer.reparam import LocScaleReparam
from pyro.optim import Adam
from torch.testing import assert_close

from pyro_iaf import AutoIAF, CompiledTrace_ELBO, TraceSTL_ELBO, fit
from pyro_iaf.models import log_einsum
from pyro_iaf.models.enumeration import summed_out
from pyro_iaf.models.matching import Mismatch
from pyro_iaf.models.weighted import WeightedParticles

Y = torch.tensor([-1.3, 0.4, 2.2, 0.9, -0.2], dtype=torch.float64)
TABLE = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.6, 0.3], [0.25, 0.25, 0.5]], dtype=torch.float64)
PARALLEL = {"enumerate": "parallel"}


def normal(y, loc, scale=0.8):
    return dist.Normal(loc, scale).log_prob(torch.as_tensor(y))


def of_two(theta):
    """The densities that all models here share: of a share and a level."""
    return dist.Beta(2.0, 3.0).log_prob(theta["p"]) + dist.Normal(1.0, 1.0).log_prob(theta["a"])


def two():
    return pyro.sample("p", dist.Beta(2.0, 3.0)), pyro.sample("a", dist.Normal(1.0, 1.0))


def mixture(y):
    p, a = two()
    with pyro.plate("rows", len(y)):
        z = pyro.sample("z", dist.Bernoulli(p), infer=PARALLEL)
        pyro.sample("y", dist.Normal(a * z, 0.8), obs=y)


def mixture_by_hand(theta, y):
    p, a = theta["p"], theta["a"]
    return sum(torch.logaddexp((1 - p).log() + normal(v, 0.0), p.log() + normal(v, a)) for v in y)


def nested(y):
    p, a = two()
    with pyro.plate("groups", 5, dim=-2):
        z = pyro.sample("z", dist.Bernoulli(p))
        with pyro.plate("rows", 3, dim=-1):
            w = pyro.sample("w", dist.Bernoulli(0.3 + 0.5 * z))
            pyro.sample("y", dist.Normal(a * w + z, 0.8), obs=y[:, None] + torch.arange(3.0))


def nested_by_hand(theta, y):
    p, a = theta["p"], theta["a"]
    total = 0.0
    for v in y:
        of_z = []
        for z, log_pz in ((0, (1 - p).log()), (1, p.log())):
            q = 0.3 + 0.5 * z
            for k in range(3):
                parts = [math.log(1 - q) + normal(v + k, z), math.log(q) + normal(v + k, a + z)]
                log_pz = log_pz + torch.logaddexp(*parts)
            of_z.append(log_pz)
        total = total + torch.logaddexp(*of_z)
    return total


def pair(y):
    p, a = two()
    with pyro.plate("rows", len(y)):
        z = pyro.sample("z", dist.Categorical(TABLE[0]), infer=PARALLEL)
        w = pyro.sample("w", dist.Categorical(TABLE[z]), infer=PARALLEL)
        pyro.sample("y", dist.Normal(a * z + p * w, 0.8), obs=y)


def pair_by_hand(theta, y):
    def row(v):
        terms = [
            TABLE[0, z].log() + TABLE[z, w].log() + normal(v, theta["a"] * z + theta["p"] * w)
            for z, w in itertools.product(range(3), repeat=2)
        ]
        return torch.stack(terms).logsumexp(0)

    return sum(map(row, y))


def chain(y, history=1):
    p, a = two()
    before = (0, 0)
    for t in pyro.markov(range(len(y)), history=history):
        up = p * (0.9 if t == 0 else 1 - 0.4 * before[-1])
        if history == 2:
            up = up * (1 - 0.3 * before[-2])
        z = pyro.sample(f"z_{t}", dist.Bernoulli(up), infer=PARALLEL)
        pyro.sample(f"y_{t}", dist.Normal(a * z, 0.8), obs=y[t])
        before = (before[-1], z)


def second_order(y):
    chain(y, history=2)


def chain_by_hand(theta, y, history=1):
    p, terms = theta["p"], []
    for path in itertools.product((0, 1), repeat=len(y)):
        term, before = torch.zeros_like(p), (0, 0)
        for t, z in enumerate(path):
            up = p * (0.9 if t == 0 else 1 - 0.4 * before[-1])
            if history == 2:
                up = up * (1 - 0.3 * before[-2])
            term = term + (up if z else 1 - up).log() + normal(y[t], theta["a"] * z)
            before = (before[-1], z)
        terms.append(term)
    return torch.stack(terms).logsumexp(0)


def second_order_by_hand(theta, y):
    return chain_by_hand(theta, y, history=2)


MASK = torch.tensor([True, False, True, True, False])


def masked(y):
    p, a = two()
    with pyro.plate("rows", len(y)), pyro.poutine.mask(mask=MASK):
        z = pyro.sample("z", dist.Bernoulli(p))
        pyro.sample("y", dist.Normal(a * z, 0.8), obs=y)


def masked_by_hand(theta, y):
    return mixture_by_hand(theta, y[MASK])


@pyro.poutine.scale(scale=2.5)
def scaled_likelihood(y, p, a):
    with pyro.plate("rows", len(y)):
        z = pyro.sample("z", dist.Bernoulli(p))
        pyro.sample("y", dist.Normal(a * z, 0.8), obs=y)


def scaled(y):
    scaled_likelihood(y, *two())


def scaled_by_hand(theta, y):
    return 2.5 * mixture_by_hand(theta, y)


CLASS = torch.tensor([0, 2, 1, 1, 0])


def observed(y):
    p, a = two()
    with pyro.plate("rows", len(y)):
        z = pyro.sample("z", dist.Categorical(TABLE[0]))
        pyro.sample("class", dist.Categorical(TABLE[z]), obs=CLASS)
        pyro.sample("y", dist.Normal(a * z + p, 0.8), obs=y)


def observed_by_hand(theta, y):
    def row(v, c):
        terms = [
            TABLE[0, z].log() + TABLE[z, c].log() + normal(v, theta["a"] * z + theta["p"])
            for z in range(3)
        ]
        return torch.stack(terms).logsumexp(0)

    return sum(map(row, y, CLASS))


ROWS = torch.tensor([0, 3, 4])


def subsampled(y):
    p, a = two()
    with pyro.plate("rows", len(y), subsample=ROWS) as rows:
        z = pyro.sample("z", dist.Bernoulli(p))
        pyro.sample("y", dist.Normal(a * z, 0.8), obs=y[rows])


def subsampled_by_hand(theta, y):
    return 5 / 3 * mixture_by_hand(theta, y[ROWS])


def spike_and_slab(y):
    p, a = two()
    z = pyro.sample("z", dist.Bernoulli(p))
    slope = pyro.sample("slope", dist.Normal(0.0, 0.1 + 2 * z))
    with pyro.plate("rows", len(y)):
        w = pyro.sample("w", dist.Bernoulli(0.2 + 0.6 * z))
        pyro.sample("y", dist.Normal(a + slope * w, 0.8), obs=y)


def spike_and_slab_by_hand(theta, y):
    p, a, slope = theta["p"], theta["a"], theta["slope"]
    of_z = []
    for z, term in ((0, (1 - p).log()), (1, p.log())):
        q = 0.2 + 0.6 * z
        term = term + normal(slope, 0.0, 0.1 + 2 * z)
        for v in y:
            parts = [math.log(1 - q) + normal(v, a), math.log(q) + normal(v, a + slope)]
            term = term + torch.logaddexp(*parts)
        of_z.append(term)
    return torch.logaddexp(*of_z)


def counts(y):
    p, a = two()
    with pyro.plate("rows", len(y)):
        n = pyro.sample("n", dist.Binomial(4, p))
        kind = pyro.sample("kind", dist.OneHotCategorical(TABLE[1]))
        pyro.sample("y", dist.Normal(a * n + kind @ torch.arange(3.0).double(), 0.8), obs=y)


def counts_by_hand(theta, y):
    p, a = theta["p"], theta["a"]

    def row(v):
        terms = [
            dist.Binomial(4, p).log_prob(torch.tensor(float(n)))
            + TABLE[1, k].log()
            + normal(v, a * n + k)
            for n, k in itertools.product(range(5), range(3))
        ]
        return torch.stack(terms).logsumexp(0)

    return sum(map(row, y))


def independent_of_the_rest(y):
    p, a = two()
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(a, 0.8), obs=y)
        pyro.sample("z", dist.Bernoulli(p))


def independent_of_the_rest_by_hand(theta, y):
    return normal(y, theta["a"]).sum()


def without_plates(y):
    p, a = two()
    z = pyro.sample("z", dist.Bernoulli(p))
    pyro.sample("y", dist.Normal(a * z, 0.8), obs=y)  # in no plate
    pyro.factor("more", -(a**2) * (1 + z))


def without_plates_by_hand(theta, y):
    p, a = theta["p"], theta["a"]
    low = (1 - p).log() + normal(y, 0.0).sum() - a**2
    return torch.logaddexp(low, p.log() + normal(y, a).sum() - 2 * a**2)


def branches(y):
    """Code that asks what a discrete latent is, and one more that depends on it."""
    p, a = two()
    z = pyro.sample("z", dist.Categorical(TABLE[0]), infer={"enumerate": "sequential"})
    if z == 2:
        loc = a
    else:
        w = pyro.sample("w", dist.Bernoulli(p), infer={"enumerate": "sequential"})
        loc = 2 * a + 1 if w else a - z
    with pyro.plate("rows", len(y)):
        u = pyro.sample("u", dist.Bernoulli(0.3), infer={"enumerate": "sequential"})
        pyro.sample("y", dist.Normal(loc + u, 0.8), obs=y)


def branches_by_hand(theta, y):
    p, a = theta["p"], theta["a"]
    cases = [
        (TABLE[0, 2].log(), a),
        *((TABLE[0, z].log() + (1 - p).log(), a - z) for z in (0, 1)),
        *((TABLE[0, z].log() + p.log(), 2 * a + 1) for z in (0, 1)),
    ]
    terms = []
    for term, loc in cases:
        for v in y:
            parts = [math.log(0.7) + normal(v, loc), math.log(0.3) + normal(v, loc + 1)]
            term = term + torch.logaddexp(*parts)
        terms.append(term)
    return torch.stack(terms).logsumexp(0)


def reparameterised(y):
    """A latent of each row that Pyro decentres, with what depends on a discrete one."""
    p, a = two()
    with pyro.plate("rows", len(y)):
        z = pyro.sample("z", dist.Bernoulli(p))
        with pyro.poutine.reparam(config={"b": LocScaleReparam(0.0)}):
            b = pyro.sample("b", dist.Normal(a * z, 0.5 + z))
        pyro.sample("y", dist.Normal(b, 0.8), obs=y)


def reparameterised_by_hand(theta, y):
    p, a, noise = theta["p"], theta["a"], theta["b_decentered"]
    rows = [
        torch.logaddexp((1 - p).log() + normal(v, 0.5 * e), p.log() + normal(v, a + 1.5 * e))
        for v, e in zip(y, noise, strict=True)
    ]
    return sum(rows) + dist.Normal(0.0, 1.0).log_prob(noise).sum()


def excluded(y):
    """Data that some values of a discrete latent exclude."""
    p, a = two()
    with pyro.plate("rows", len(y)):
        z = pyro.sample("z", dist.Categorical(TABLE[0]))
        width = 2.5 + a.square() + p
        pyro.sample("y", dist.Uniform(z - width, z + 1.5), obs=y)


def excluded_by_hand(theta, y):
    width = 2.5 + theta["a"].square() + theta["p"]
    total = 0.0
    for v in y:
        possible = [
            TABLE[0, z].log() - (width + 1.5).log() for z in range(3) if z - width <= v < z + 1.5
        ]
        total = total + torch.stack(possible).logsumexp(0)
    return total


MODELS = {
    name: (globals()[name], globals()[f"{name}_by_hand"])
    for name in [
        "mixture",
        "nested",
        "pair",
        "chain",
        "second_order",
        "masked",
        "scaled",
        "observed",
        "subsampled",
        "spike_and_slab",
        "counts",
        "independent_of_the_rest",
        "reparameterised",
        "excluded",
        "without_plates",
        "branches",
    ]
}


@pytest.mark.parametrize("name", MODELS)
def test_log_joint_and_gradient_are_those_of_sums_by_hand(name):
    model, by_hand = MODELS[name]
    guide = AutoIAF(model, start="init")
    guide.setup(Y)
    particles = WeightedParticles(model, guide, (Y,), {})
    assert particles.at_once
    joint = particles.log_joint()
    z = torch.randn(6, joint.latent_dim)
    value, slope = joint.gradient(z)
    z.requires_grad_()
    sites, log_det = joint.constrained(z)
    rows = [
        {n: v.reshape(len(z), -1)[k].squeeze() for n, v in sites.items()} for k in range(len(z))
    ]
    expected = torch.stack([of_two(theta) + by_hand(theta, Y) for theta in rows]) + log_det
    assert_close(value, expected, rtol=1e-10, atol=1e-10)
    (known,) = torch.autograd.grad(expected.sum(), z)
    assert_close(slope, known, rtol=1e-9, atol=1e-9)


# Pyro takes no values outside of a support, wants plates, and has "sequential" in guides alone.
@pytest.mark.parametrize("name", [*MODELS][:-3])
@pytest.mark.parametrize("particles", [(1, False), (3, True)], ids=str)
@pytest.mark.parametrize("kind", [CompiledTrace_ELBO, TraceSTL_ELBO])
def test_losses_and_gradients_are_those_of_trace_enum_elbo(name, particles, kind):
    model, _ = MODELS[name]
    guide = AutoIAF(model, start="init", hidden_dims=[8])
    guide.setup(Y)
    settings = {"backend": "graph"} if kind is CompiledTrace_ELBO else {}
    marked = config_enumerate(model)
    theirs = TraceEnum_ELBO(particles[0], 2, vectorize_particles=particles[1])
    ours = kind(particles[0], vectorize_particles=particles[1], **settings)
    ours.loss(model, guide, Y)  # finds how deep plates nest
    found = []
    for elbo, program in [(theirs, marked), *[(ours, model)] * 3]:
        pyro.set_rng_seed(0)
        guide.zero_grad()
        loss = elbo.loss_and_grads(program, guide, Y)
        found.append((loss, [p.grad.clone() for p in guide.parameters() if p.grad is not None]))
    for loss, gradients in found[1:]:
        assert loss == pytest.approx(found[0][0], rel=1e-9)
        if kind is CompiledTrace_ELBO:
            assert_close(gradients, found[0][1], rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize(
    "loss", [None, Trace_ELBO(2, 1, vectorize_particles=True), TraceSTL_ELBO(2)]
)
def test_recorded_steps_are_those_of_the_code(loss):
    found = []
    for way in (False, "graph"):
        pyro.clear_param_store()
        guide = AutoIAF(chain, start="init", hidden_dims=[8], name=f"of_{way}")
        settings = {"num_steps": 20, "compile": way, "progress": False, "seed": 0}
        found.append(fit(chain, guide, (Y,), loss=loss, **settings).losses)
    assert_close(*found, rtol=1e-6, atol=1e-6)


def test_any_optimiser_and_loss_of_pyro_takes_the_marginal():
    guide = AutoIAF(mixture, hidden_dims=[8])
    loss = TraceEnum_ELBO(max_plate_nesting=1)
    svi = SVI(mixture, guide, Adam({"lr": 0.01}), loss)
    assert all(math.isfinite(svi.step(Y)) for _ in range(3))


@pytest.mark.parametrize("program", [mixture, nested], ids=["marked", "unmarked"])
def test_fit_sums_them_out_for_losses_of_pyro(program):
    settings = {"num_steps": 5, "progress": False, "seed": 0, "compile": False}
    found = []
    for loss in (TraceEnum_ELBO(max_plate_nesting=2), Trace_ELBO(max_plate_nesting=2)):
        pyro.clear_param_store()
        guide = AutoIAF(program, start="init", hidden_dims=[8])
        found.append(fit(program, guide, (Y,), loss=loss, **settings).losses)
    assert_close(*found, rtol=1e-6, atol=1e-6)


def test_a_model_without_discrete_latents_is_left_alone():
    def model():
        pyro.sample("z", dist.Normal(0.0, 1.0))

    guide = AutoIAF(model)
    guide.setup()
    assert guide.discrete is None
    assert summed_out(model, lambda: None) is model


# Refusals


def test_infinitely_many_values_are_refused_by_name():
    def model():
        rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
        n = pyro.sample("n", dist.Poisson(rate))
        pyro.sample("y", dist.Normal(n, 1.0), obs=torch.tensor(1.0))

    with pytest.raises(ValueError, match=r"site 'n' is a Poisson.*Truncate it"):
        AutoIAF(model)()


UNLISTED = {
    "to_event": (dist.Bernoulli(torch.full((3,), 0.4)).to_event(1), "in a pyro.plate, without to_"),
    "counts": (dist.Multinomial(4, torch.ones(3) / 3), "as a dist.Categorical in a pyro.plate"),
    "by row": (dist.Binomial(torch.tensor([2.0, 3.0]), 0.4), "total_count differs by row.*-inf"),
}


@pytest.mark.parametrize(("fn", "cure"), UNLISTED.values(), ids=UNLISTED)
def test_what_has_no_list_of_values_is_refused_with_a_cure(fn, cure):
    def model():
        pyro.sample("a", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", *fn.batch_shape) if fn.batch_shape else contextlib.nullcontext():
            pyro.sample("n", fn)

    with pytest.raises(ValueError, match=cure):
        AutoIAF(model)()


@pytest.mark.parametrize("ask", [lambda z: 1.0 if z else 0.0, lambda z: [0.0, 1.0][int(z)]])
def test_code_that_asks_for_a_value_is_refused_with_a_cure(ask):
    def model():
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        z = pyro.sample("z", dist.Bernoulli(0.4))
        pyro.sample("y", dist.Normal(a + ask(z), 1.0), obs=torch.tensor(0.5))

    with pytest.raises(ValueError, match=r"can't ask which one it is.*torch.where.*sequential"):
        AutoIAF(model)()


def test_a_table_that_is_too_large_is_refused_by_name():
    def model():
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        z = [pyro.sample(f"z{k}", dist.Categorical(torch.ones(30) / 30)) for k in range(5)]
        shape = torch.broadcast_shapes(*(v.shape for v in z))
        pyro.sample("y", dist.Normal(a, 1.0).expand(shape), obs=torch.tensor(0.5))

    with pytest.raises(ValueError, match=r"at site 'y' there are 24300000"):
        AutoIAF(model)()


def test_discrete_latents_want_their_plates():
    def model():
        p = pyro.sample("p", dist.Beta(1.0, 1.0))
        z = pyro.sample("z", dist.Bernoulli(p).expand([3]))
        pyro.sample("y", dist.Normal(z.sum(-1), 1.0), obs=torch.tensor(0.5))

    with pytest.raises(ValueError, match=r"site 'z' has shape \(3,\), and dimension -1 is in none"):
        AutoIAF(model)()


REDUCED = {
    "sum": lambda z: z.sum(),
    "mean": lambda z: z.mean(),
    "cumsum": lambda z: z.cumsum(-1),
    "share": lambda z: (1 + z) / (1 + z).sum(-1, keepdim=True),
}


@pytest.mark.parametrize("combine", REDUCED.values(), ids=REDUCED)
def test_code_that_combines_rows_is_refused(combine):
    def model(y):
        p, a = two()
        with pyro.plate("rows", len(y)):
            z = pyro.sample("z", dist.Bernoulli(p))
            pyro.sample("y", dist.Normal(a * combine(z), 0.8), obs=y)

    with pytest.raises(ValueError, match="should use each value by itself; at site 'y'"):
        AutoIAF(model)(Y)


def test_losses_of_ours_refuse_what_another_guide_leaves_out():
    def guide(y):
        pyro.sample("p", dist.Beta(2.0, 2.0))
        pyro.sample("a", dist.Normal(1.0, 0.5))

    for elbo in (CompiledTrace_ELBO(backend="graph"), TraceSTL_ELBO()):
        with (
            pytest.warns(UserWarning, match="Found vars in model but not guide"),  # by Pyro
            pytest.raises(Mismatch, match=r"site '.' would be drawn from its prior"),
        ):
            elbo.loss(nested, guide, Y)


def test_rows_of_ragged_groups_are_refused_with_a_cure():
    def model(y):
        p, a = two()
        with pyro.plate("groups", 2):
            z = pyro.sample("z", dist.Bernoulli(p))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(a * z[..., torch.tensor([0, 0, 1, 1, 1])], 0.8), obs=y)

    with pytest.raises(ValueError, match="Write groups as rows of a matrix, and mask"):
        AutoIAF(model)(Y)


def test_plates_nest_as_at_the_setup():
    guide = AutoIAF(chain, start="init")
    guide.setup(Y)
    with pytest.raises(Mismatch, match="in 0 dimensions; plate 'rows' is in dimension -1"):
        WeightedParticles(mixture, guide, (Y,), {})


def test_what_depends_on_a_latent_is_in_its_plates():
    def model():
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        with pyro.plate("groups", 3):
            z = pyro.sample("z", dist.Bernoulli(0.3))
        with pyro.plate("others", 3):
            pyro.sample("y", dist.Normal(a * z, 1.0), obs=Y[:3])

    with pytest.raises(ValueError, match="'y' depends on 'z' and is not in plate 'groups'"):
        AutoIAF(model)()


def test_crossed_plates_that_make_all_rows_depend_are_refused():
    def model():
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        rows, columns = pyro.plate("rows", 3, dim=-2), pyro.plate("columns", 5, dim=-1)
        with rows:
            z = pyro.sample("z", dist.Bernoulli(0.3))
        with columns:
            w = pyro.sample("w", dist.Bernoulli(0.4))
        with rows, columns:
            pyro.sample("y", dist.Normal(a * z + w, 1.0), obs=Y.expand(3, 5))

    with pytest.raises(ValueError, match="depend on each other through another"):
        AutoIAF(model)()


def test_a_support_that_depends_on_a_discrete_latent_is_refused():
    def model():
        z = pyro.sample("z", dist.Bernoulli(0.3))
        a = pyro.sample("a", dist.Uniform(0.0, 1.0 + z))
        pyro.sample("y", dist.Normal(a, 1.0), obs=Y[0])

    with pytest.raises(ValueError, match="that of site 'a' depends on discrete latents"):
        AutoIAF(model)()


def test_a_masked_latent_that_depends_on_a_discrete_one_is_refused():
    def model():
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", 5):
            z = pyro.sample("z", dist.Bernoulli(0.3))
            pyro.sample("y", dist.Normal(a * z, 1.0), obs=Y, obs_mask=MASK)

    with pytest.raises(ValueError, match="'y_unobserved' is masked, and its prior depends on disc"):
        AutoIAF(model)()


def test_one_scale_for_what_hangs_together():
    def model():
        p = pyro.sample("p", dist.Beta(1.0, 1.0))
        z = pyro.sample("z", dist.Bernoulli(p))
        with pyro.plate("rows", 10, subsample=torch.arange(5)):
            pyro.sample("y", dist.Normal(z, 1.0), obs=Y)

    with pytest.raises(ValueError, match="should have one scale"):
        AutoIAF(model)()


def test_branches_want_the_same_latents():
    def model():
        z = pyro.sample("z", dist.Bernoulli(0.5), infer={"enumerate": "sequential"})
        if z:
            pyro.sample("a", dist.Normal(0.0, 1.0))
        pyro.sample("b", dist.Normal(z, 1.0))

    with pytest.raises(ValueError, match="'a' is there for some values alone"):
        AutoIAF(model)()


def test_marks_that_would_draw_values_are_left_out():
    def model(y):
        p, a = two()
        with pyro.plate("rows", len(y)):
            infer = {"enumerate": "parallel", "num_samples": 3, "expand": True}
            z = pyro.sample("z", dist.Bernoulli(p), infer=infer)
            pyro.sample("y", dist.Normal(a * z, 0.8), obs=y)

    found = []
    for program in (model, mixture):
        guide = AutoIAF(program, start="init", name=f"of_{program.__name__}")
        guide.setup(Y)
        joint = WeightedParticles(program, guide, (Y,), {}).log_joint()
        found.append(joint(torch.tensor([[0.3, 0.5], [-1.0, 2.0]])))
    assert_close(*found)


def test_sequential_latents_are_not_drawn():
    guide = AutoIAF(branches, start="init")
    with pytest.raises(ValueError, match="'w', 'z' is enumerated sequentially"):
        guide.sample_posterior(3, Y, discrete=True)


@pytest.mark.parametrize("equation", ["ab,bc->ac", "abc,c->ab", "ba->b", "ab,ab->ba", "a,b->ab"])
def test_sums_in_log_space_are_those_of_einsum(equation):
    sizes = dict(zip("abc", (3, 4, 2), strict=True))
    terms = equation.partition("->")[0].split(",")
    operands = [torch.randn([sizes[d] for d in term]) for term in terms]
    operands[0].view(-1)[0] = -torch.inf
    found = log_einsum.einsum(equation, *operands)
    assert_close(found.exp(), torch.einsum(equation, *(o.exp() for o in operands)))


def test_what_is_impossible_for_all_values_has_no_gradient_that_is_nan():
    table = torch.full((2, 3), -torch.inf, requires_grad=True)
    other = torch.zeros(3, requires_grad=True)
    found = log_einsum.einsum("ab,b->a", table, other)
    assert (log_einsum.with_zeros(found) == -torch.inf).all()
    (slope,) = torch.autograd.grad(found.clamp(min=-1.0).sum(), other)
    assert slope.isfinite().all()


def test_in_a_subsample_they_are_not_drawn():
    def model(y):
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", len(y), subsample_size=3) as rows:
            z = pyro.sample("z", dist.Bernoulli(0.5))
            pyro.sample("y", dist.Normal(a + z, 1.0), obs=y[rows])

    guide = AutoIAF(model, start="init")
    with pytest.raises(ValueError, match="subsample"):
        guide.sample_posterior(4, Y, discrete=True)


def test_an_impossible_start_of_a_chain_has_a_gradient():
    def model(y):
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        z = torch.tensor(0.0)
        for t in pyro.markov(range(3)):  # it can't go back
            z = pyro.sample(
                f"z_{t}", dist.Categorical(torch.tensor([[0.5, 0.5], [0.0, 1.0]])[z.long()])
            )
            pyro.sample(f"y_{t}", dist.Normal(a * z, 1.0), obs=y[t])

    guide = AutoIAF(model, start="init")
    guide.setup(Y)
    value, slope = WeightedParticles(model, guide, (Y,), {}).log_joint().gradient(torch.randn(4, 1))
    assert value.isfinite().all()
    assert slope.isfinite().all()
