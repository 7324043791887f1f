import copy
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from bijections import BACKEND
from hypothesis import given, settings
from hypothesis import strategies as st
from pyro.infer import SVI, TraceMeanField_ELBO
from torch.distributions import kl_divergence
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing import assert_close

from pyro_iaf import DiagonalNormal

SHAPES = {  # loc, scale
    "one coordinate": ((1,), (1,)),
    "vector": ((4,), (4,)),
    "batch": ((5, 4), (5, 4)),
    "shared scale": ((5, 4), (4,)),
    "shared loc": ((4,), (3, 1, 4)),
    "broadcast scale": ((2, 4), (1,)),
    "both broadcast": ((5, 1, 4), (1, 3, 1)),
}


@pytest.fixture(params=SHAPES.values(), ids=SHAPES)
def pair(request):
    """A diagonal normal, and what it has to equal."""
    loc_shape, scale_shape = request.param
    loc, scale = torch.randn(loc_shape), torch.rand(scale_shape) + 0.1
    return DiagonalNormal(loc, scale), dist.Normal(loc, scale).to_event(1)


def test_equals_independent_normals(pair):
    ours, theirs = pair
    assert ours.batch_shape == theirs.batch_shape
    assert ours.event_shape == theirs.event_shape
    value = torch.randn(6, *ours.batch_shape, *ours.event_shape)
    assert_close(ours.log_prob(value), theirs.log_prob(value))
    for name in ("mean", "mode", "variance", "stddev"):
        assert_close(getattr(ours, name), getattr(theirs, name))
    assert_close(ours.entropy(), theirs.entropy())
    assert ours.has_rsample
    assert ours.support.event_dim == 1


def test_draws_what_independent_normals_draw(pair):
    ours, theirs = pair
    for shape in (torch.Size(), torch.Size([3]), (2, 3)):
        pyro.set_rng_seed(1)
        draws = ours.rsample(shape)
        pyro.set_rng_seed(1)
        assert_close(draws, theirs.rsample(shape))
    assert not ours.sample().requires_grad


def test_matrices_agree_with_a_multivariate_normal(pair):
    ours, _ = pair
    full = dist.MultivariateNormal(ours.loc, scale_tril=ours.scale_tril)
    assert_close(ours.covariance_matrix, full.covariance_matrix)
    assert_close(ours.precision_matrix, full.precision_matrix)
    assert_close(ours.log_prob(ours.loc + 1), full.log_prob(ours.loc + 1))


def test_expanding_repeats(pair):
    ours, theirs = pair
    batch_shape = torch.Size([2, *ours.batch_shape])
    ours, theirs = ours.expand(batch_shape), theirs.expand(batch_shape)
    assert type(ours) is DiagonalNormal
    assert ours.batch_shape == batch_shape
    value = torch.randn(batch_shape + ours.event_shape)
    assert_close(ours.log_prob(value), theirs.log_prob(value))
    assert_close(ours.entropy(), theirs.entropy())
    assert ours.entropy().shape == batch_shape
    assert ours.rsample((3,)).shape == (3, *batch_shape, *ours.event_shape)


@given(
    shape=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    sample_shape=st.lists(st.integers(1, 3), max_size=2),
    drop=st.integers(0, 3),
)
@settings(max_examples=40, deadline=None, derandomize=True)
def test_shapes_are_those_of_independent_normals(shape, sample_shape, drop):
    loc, scale = torch.randn(shape), torch.rand(shape[min(drop, len(shape) - 1) :])
    ours, theirs = DiagonalNormal(loc, scale), dist.Normal(loc, scale).to_event(1)
    draws = ours.rsample(sample_shape)
    assert draws.shape == theirs.rsample(torch.Size(sample_shape)).shape
    assert_close(ours.log_prob(draws), theirs.log_prob(draws))
    inferred = DiagonalNormal.infer_shapes(loc=loc.shape, scale=scale.shape)
    assert inferred == (ours.batch_shape, ours.event_shape)


def test_gradients_are_those_of_independent_normals():
    loc, scale = torch.randn(5, 3, requires_grad=True), torch.rand(3).add(0.1).requires_grad_()
    value = torch.randn(5, 3, requires_grad=True)
    score = lambda make: make(loc, scale).log_prob(value).sum() + make(loc, scale).entropy().sum()  # noqa: E731
    ours = torch.autograd.grad(score(DiagonalNormal), (loc, scale, value))
    theirs = torch.autograd.grad(
        score(lambda loc, scale: dist.Normal(loc, scale).to_event(1)), (loc, scale, value)
    )
    assert_close(ours, theirs)
    assert torch.autograd.gradgradcheck(
        lambda *args: DiagonalNormal(*args[:2]).log_prob(args[2]), (loc, scale, value)
    )


def test_dtype_follows_the_arguments():
    for dtype in (torch.float32, torch.float64):
        d = DiagonalNormal(torch.zeros(3, dtype=dtype), torch.ones(3, dtype=dtype))
        assert d.rsample().dtype == d.log_prob(d.sample()).dtype == dtype
    mixed = DiagonalNormal(torch.zeros(3), torch.ones(3, dtype=torch.float32))
    assert mixed.rsample().dtype == mixed.entropy().dtype == torch.float64
    assert DiagonalNormal(torch.zeros(3), 2.0).scale.shape == (3,)


# Divergences


def spread(*shape):
    half = torch.randn(*shape, shape[-1])
    return half @ half.mT + 0.5 * torch.eye(shape[-1])


OTHERS = {
    "diagonal": lambda *shape: DiagonalNormal(torch.randn(shape), torch.rand(shape) + 0.2),
    "multivariate": lambda *shape: dist.MultivariateNormal(torch.randn(shape), spread(*shape)),
    "low rank": lambda *shape: dist.LowRankMultivariateNormal(
        torch.randn(shape), torch.randn(*shape, 2), torch.rand(shape) + 0.2
    ),
    "independent": lambda *shape: dist.Normal(torch.randn(shape), torch.rand(shape) + 0.2).to_event(
        1
    ),
}


def full(d):
    """The same distribution, as torch's own multivariate normal."""
    if isinstance(d, dist.Independent):
        return dist.MultivariateNormal(d.mean, torch.diag_embed(d.variance))
    return dist.MultivariateNormal(d.loc, d.covariance_matrix)


@pytest.mark.parametrize("shapes", [((1,), (1,)), ((5,), (5,)), ((3, 5), (5,)), ((5,), (2, 1, 5))])
@pytest.mark.parametrize("other", OTHERS)
def test_divergences_agree_with_the_full_matrix_both_ways(other, shapes):
    ours, theirs = OTHERS["diagonal"](*shapes[0]), OTHERS[other](*shapes[1])
    assert_close(kl_divergence(ours, theirs), kl_divergence(full(ours), full(theirs)))
    assert_close(kl_divergence(theirs, ours), kl_divergence(full(theirs), full(ours)))


@pytest.mark.parametrize("other", OTHERS)
def test_divergences_of_expanded_distributions_agree(other):
    ours, theirs = OTHERS["diagonal"](4), OTHERS[other](4)
    wide = kl_divergence(ours.expand([3]), theirs.expand([3]))
    assert_close(wide, kl_divergence(ours, theirs).expand(3))
    wide = kl_divergence(theirs.expand([3]), ours.expand([3]))
    assert_close(wide, kl_divergence(theirs, ours).expand(3))


@pytest.mark.parametrize("scale", [1e-25, 1e25])
def test_divergences_hold_at_scales_whose_squares_do_not(scale):
    small, loc = torch.full((2,), scale), torch.zeros(2)
    diagonal, unit = DiagonalNormal(loc, small), DiagonalNormal(loc, torch.ones(2))
    full = dist.MultivariateNormal(loc, scale_tril=small.diag())
    one = dist.MultivariateNormal(loc, scale_tril=torch.eye(2))
    log_ratio = small.double().log()
    from_small = 0.5 * (small.double().square() - 1) - log_ratio
    to_small = 0.5 * (small.double() ** -2 - 1) + log_ratio
    if scale < 1:
        assert_close(kl_divergence(diagonal, one).double(), from_small.sum(), rtol=1e-5, atol=0)
    else:
        assert_close(kl_divergence(unit, full).double(), to_small.sum(), rtol=1e-5, atol=0)
    assert_close(kl_divergence(diagonal, full), torch.tensor(0.0), rtol=0, atol=1e-5)


def test_divergence_from_other_independents_is_not_there():
    ours = DiagonalNormal(torch.zeros(3), torch.ones(3))
    with pytest.raises(NotImplementedError, match=r"Laplace\(...\).to_event\(1\)"):
        kl_divergence(ours, dist.Laplace(torch.zeros(3), torch.ones(3)).to_event(1))


def test_divergence_between_other_spaces_is_refused():
    one, four = (DiagonalNormal(torch.zeros(D), torch.ones(D)) for D in (1, 4))
    with pytest.raises(ValueError, match=r"event shapes \(1,\) and \(4,\)"):
        kl_divergence(one, four)


def test_masked_divergences_are_zero_where_masked():
    ours, theirs = OTHERS["diagonal"](2, 3), OTHERS["independent"](2, 3)
    mask = torch.tensor([True, False])
    kl = kl_divergence(ours.mask(mask), theirs.mask(mask))
    assert_close(kl, kl_divergence(ours, theirs) * mask)
    assert_close(ours.mask(mask).log_prob(ours.loc), ours.log_prob(ours.loc) * mask)


def test_mean_field_elbo_uses_the_closed_form():
    ours = lambda: DiagonalNormal(torch.ones(3), 0.5 * torch.ones(3))  # noqa: E731
    prior = dist.Normal(torch.zeros(3), 1.0).to_event(1)
    loss = TraceMeanField_ELBO().loss(
        lambda: pyro.sample("z", prior), lambda: pyro.sample("z", ours())
    )
    assert loss == pytest.approx(kl_divergence(ours(), prior).item())


# Composition


def run(loc, scale, value):
    d = DiagonalNormal(loc, scale)
    return d.log_prob(value), d.entropy(), d.variance


def arguments():
    return torch.randn(6, 3), torch.rand(6, 3) + 0.1, torch.randn(6, 3)


def test_works_under_vmap():
    args = arguments()
    assert_close(torch.func.vmap(run)(*args), run(*args))
    draw = torch.func.vmap(lambda *a: DiagonalNormal(*a).rsample((4,)), randomness="different")
    draws = draw(*args[:2])
    assert draws.shape == (6, 4, 3)
    assert draws.unique().numel() == draws.numel()


def test_compiles_and_traces():
    args = arguments()
    compiled = torch.compile(run, fullgraph=True, backend=BACKEND)
    assert_close(compiled(*args), run(*args))
    rsample = lambda *a: DiagonalNormal(*a).rsample((4,))  # noqa: E731
    draw = torch.compile(rsample, fullgraph=True, backend=BACKEND)
    assert draw(*args[:2]).shape == (4, 6, 3)
    assert_close(make_fx(run)(*args)(*args), run(*args))


def test_copies_and_pickles():
    d = DiagonalNormal(torch.randn(5, 3), torch.rand(3) + 0.1).expand([2, 5])
    for twin in (copy.deepcopy(d), pickle.loads(pickle.dumps(d))):
        assert_close(twin.log_prob(d.loc), d.log_prob(d.loc))


def test_a_guide_learns_it():
    target = dist.Normal(torch.tensor([1.0, -2.0]), torch.tensor([0.5, 3.0])).to_event(1)

    def guide():
        loc = pyro.param("loc", torch.zeros(2))
        scale = pyro.param("scale", torch.ones(2), constraint=dist.constraints.positive)
        with pyro.plate("rows", 3):
            pyro.sample("z", DiagonalNormal(loc, scale))

    def model():
        with pyro.plate("rows", 3):
            pyro.sample("z", target)

    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.02}), TraceMeanField_ELBO())
    for _ in range(800):
        svi.step()
    assert_close(pyro.param("loc").detach(), target.mean, atol=0.01, rtol=0)
    assert_close(pyro.param("scale").detach(), target.stddev, atol=0.02, rtol=0)


# Bad input


@pytest.mark.parametrize("loc", [torch.tensor(0.0), 0.0, [0.0, 1.0]])
def test_loc_has_to_be_a_vector(loc):
    with pytest.raises(ValueError, match="loc to be a tensor of shape"):
        DiagonalNormal(loc, torch.ones(2))


def test_shapes_have_to_broadcast():
    with pytest.raises(ValueError, match=r"shape \(3,\) and scale a tensor of shape \(4,\)"):
        DiagonalNormal(torch.zeros(3), torch.ones(4))


@pytest.mark.parametrize("scale", [None, [1.0, 1.0]])
def test_a_scale_has_to_be_a_tensor_or_a_number(scale):
    with pytest.raises(ValueError, match="expects loc and scale to broadcast"):
        DiagonalNormal(torch.zeros(2), scale)


def test_integers_are_refused():
    with pytest.raises(ValueError, match="floating-point"):
        DiagonalNormal(torch.zeros(3, dtype=torch.long), torch.ones(3, dtype=torch.long))


@pytest.mark.parametrize("bad", [-1.0, 0.0, float("nan"), float("inf"), float("-inf")])
def test_a_scale_has_to_be_positive_and_finite(bad):
    scale = torch.tensor([1.0, bad])
    for shape in ((2,), (3, 2)):
        with pytest.raises(ValueError, match=rf"finite scale; got .*\) with \d .*, as {bad}\."):
            DiagonalNormal(torch.zeros(2), scale.expand(shape))
    with pytest.raises(ValueError, match="finite scale"):
        DiagonalNormal(torch.zeros(2), bad)
    DiagonalNormal(torch.zeros(2), scale, validate_args=False)
    with pyro.validation_enabled(False):
        DiagonalNormal(torch.zeros(2), scale)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_loc_has_to_be_finite(bad):
    loc = torch.tensor([0.0, bad])
    with pytest.raises(ValueError, match=r"finite loc; got .*\(2,\) with 1 entries"):
        DiagonalNormal(loc, torch.ones(2))
    with pyro.validation_enabled(False):
        DiagonalNormal(loc, torch.ones(2))


def test_checks_stay_out_of_graphs_and_of_vmap():
    def density(loc, scale):
        return DiagonalNormal(loc, scale).log_prob(torch.zeros(2))

    loc, scale = torch.randn(5, 2), torch.rand(5, 2) + 0.1
    expected = density(loc, scale)
    compiled = torch.compile(density, backend="aot_eager", fullgraph=True)
    assert_close(compiled(loc, scale), expected)
    assert_close(make_fx(density)(loc, scale)(loc, scale), expected)
    assert_close(torch.func.vmap(density)(loc, scale), expected)
    slope = torch.func.vmap(torch.func.grad(density))(loc, scale)
    assert_close(slope, -loc / scale**2)


def test_values_that_are_nan_are_refused():
    nan = torch.tensor([0.0, float("nan")])
    d = DiagonalNormal(torch.zeros(2), torch.ones(2))
    with pytest.raises(ValueError, match="within the support"):
        d.log_prob(nan)
    with pytest.raises(ValueError, match="event_shape"):
        d.log_prob(torch.zeros(3))
    with pyro.validation_enabled(False):
        assert d.log_prob(nan).isnan()
