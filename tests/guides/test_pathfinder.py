import math
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from example_models import MODELS, two_sites, values
from pyro import poutine
from pyro.distributions import constraints
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import init_to_value
from torch.testing import assert_close

from pyro_iaf import AutoIAF, diagnose
from pyro_iaf.guides import pathfinder


def start_of(model, *args, **settings):
    """The frame of a fresh guide: its loc, and its scale."""
    guide = AutoIAF(model, hidden_dims=[4], structure=False, **settings)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a path that fails is told by a warning
        warnings.filterwarnings("ignore", "Site '.' is masked")
        guide.setup(*args)
    loc, *scale = guide.transform.parts[-1].frame
    return loc, torch.stack(scale) if len(scale) > 1 else scale[0]


def gaussian(covariance, loc=None):
    loc = torch.zeros(len(covariance)) if loc is None else loc

    def model():
        pyro.sample("z", dist.MultivariateNormal(loc, covariance))

    return model


def regression(scales, dtype=None):
    """Regression on covariates in units of their own, under flat priors."""
    x = torch.randn(60, len(scales)) / torch.tensor(scales)
    y = x @ torch.tensor(scales) + 0.1 * torch.randn(60)
    x, y = x.to(dtype), y.to(dtype)

    def model():
        flat = dist.ImproperUniform(constraints.real_vector, (), (len(scales),))
        weights = pyro.sample("weights", flat)
        pyro.sample("y", dist.Normal((x * weights.unsqueeze(-2)).sum(-1), 0.1).to_event(1), obs=y)

    x, y = x.double(), y.double()
    covariance = 0.01 * (x.T @ x).inverse()
    return model, covariance @ x.T @ y / 0.01, covariance


def check_normal(found, loc, covariance, tolerance=1e-6):
    ours, root = found
    sd = covariance.diagonal().sqrt()
    assert ((ours - loc).abs() / sd).max() < tolerance
    whitened = torch.linalg.solve_triangular(root, torch.linalg.cholesky(covariance), upper=False)
    assert_close(whitened, torch.eye(len(loc)), atol=tolerance, rtol=0)


def test_a_normal_posterior_is_found_exactly():
    root = torch.randn(6, 6).tril() + 3 * torch.eye(6)
    check_normal(start_of(gaussian(root @ root.T)), torch.zeros(6), root @ root.T)


def test_a_correlation_next_to_one_is_found():
    covariance = torch.tensor([[1.0, -0.99999], [-0.99999, 1.0]])
    loc = torch.tensor([30.0, -20.0])
    check_normal(start_of(gaussian(covariance, loc)), loc, covariance)


def test_units_make_no_difference():
    model, loc, covariance = regression([1e-4, 1.0, 1e4, 30.0])
    check_normal(start_of(model), loc, covariance)


def test_models_in_single_precision_have_a_start():
    model, loc, covariance = regression([1e-2, 1.0, 1e2], torch.float32)
    ours, root = start_of(model, init_loc_fn=init_to_value(values={"weights": torch.ones(3)}))
    assert_close(ours.double(), loc, atol=0, rtol=0.02)
    assert_close((root @ root.T).double(), covariance, atol=0, rtol=0.05)

    def in_single_precision():
        z = pyro.sample("z", dist.Normal(torch.zeros(2, dtype=torch.float32), 1.0).to_event(1))
        assert z.dtype == torch.float32
        pyro.sample("y", dist.Normal(z.sum(-1), 0.5), obs=torch.tensor(1.0, dtype=torch.float32))

    loc, root = start_of(in_single_precision)
    assert loc.dtype == root.dtype == torch.float32
    assert_close(loc, torch.full((2,), 4.0 / 9, dtype=torch.float32), atol=1e-4, rtol=0)


def lad():
    """A regression by absolute deviations: the likelihood is linear between its kinks."""
    x = torch.linspace(-1.0, 1.0, 30)
    y = 2 * x + torch.linspace(-0.3, 0.3, 30).roll(11)
    slope = pyro.sample("slope", dist.Normal(0.0, 10.0))
    with pyro.plate("rows", 30):
        pyro.sample("y", dist.Laplace(slope * x, 0.3), obs=y)


def sum_is_known():
    z = pyro.sample("z", dist.Laplace(torch.zeros(2), 1.0).to_event(1))
    pyro.sample("y", dist.Normal(z.sum(-1), 0.1), obs=torch.tensor(0.0))


# Models whose density is flat or linear along some direction, and the standard deviations of their
# latents: of each given the other, where there are two.
WITHOUT_CURVATURE = {
    "kink": (lambda: pyro.sample("z", dist.Laplace(0.0, 1.0)), 1.4),
    "narrow kink": (lambda: pyro.sample("z", dist.Laplace(0.0, 1e-3)), 1.4e-3),
    "wide kink": (lambda: pyro.sample("z", dist.Laplace(0.0, 1e3)), 1.4e3),
    "two slopes": (lambda: pyro.sample("z", dist.AsymmetricLaplace(0.0, 1.0, 2.0)), 2.1),
    "likelihood": (lad, 0.1),
    "across": (sum_is_known, 0.1),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("beside", [1, 70])  # second derivatives on all paths, and on the best one
@pytest.mark.parametrize("name", WITHOUT_CURVATURE)
def test_a_density_without_curvature_has_a_start_of_its_size(name, beside, dtype):
    torch.set_default_dtype(dtype)
    linear, sd = WITHOUT_CURVATURE[name]

    def model():
        linear()
        pyro.sample("w", dist.Normal(torch.zeros(beside), 1.0).to_event(1))

    loc, scale = start_of(model, scale="diagonal")
    assert loc.isfinite().all()
    of_linear = scale[:-beside] / sd
    assert 0.1 < of_linear.min() <= of_linear.max() < 10  # near enough to train from
    assert_close(scale[-beside:], torch.ones(beside), rtol=0.2, atol=0)


def test_the_neck_of_a_funnel_is_passed_by():
    def model():  # the density has no upper bound where log_scale goes to minus infinity
        log_scale = pyro.sample("log_scale", dist.Normal(0.0, 3.0))
        scale = (log_scale / 2).exp().unsqueeze(-1)
        pyro.sample("x", dist.Normal(torch.zeros(9), scale).to_event(1))

    guide = AutoIAF(model, structure=False)
    guide.setup()
    assert guide.transform.parts[-1].loc[0] > -4  # the mode is at -40.5
    assert diagnose(model, guide).elbo > -5  # at the mode a normal has -20 and less


def test_regions_without_a_density_are_stayed_out_of():
    def model():
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 5.0).to_event(1))
        inside = 1 - z.square().sum(-1)
        pyro.factor("inside", torch.where(inside > 0, inside, torch.nan).log())

    loc, _ = start_of(model, init_loc_fn=init_to_value(values={"z": torch.tensor([0.3, 0.2])}))
    assert loc.norm() < 0.6


def test_matrices_without_a_factor_are_stayed_out_of():
    def model():
        r = pyro.sample("r", dist.Normal(0.0, 1.0))
        one = torch.ones_like(r)
        matrix = torch.stack([torch.stack([one, r], -1), torch.stack([r, one], -1)], -2)
        root = torch.linalg.cholesky(matrix)  # raises where |r| is 1 or more
        pyro.factor("likelihood", 20 * root.diagonal(dim1=-2, dim2=-1).log().sum(-1))

    loc, scale = start_of(model)
    assert abs(loc) < 0.1
    assert 0.1 < scale < 0.4


def test_subsamples_are_held_still():
    full = torch.randn(1000) + 3

    def model(data, size):
        z = pyro.sample("z", dist.Normal(0.0, 100.0))
        with pyro.plate("data", len(data), subsample_size=size) as i:
            pyro.sample("y", dist.Normal(z, 1.0), obs=data[i])

    loc, scale = start_of(model, full, 200)
    assert abs(loc - full.mean()) < 4 / 200**0.5
    assert scale.item() == pytest.approx(1000**-0.5, rel=1e-4)  # scaled to all the data
    loc, _ = start_of(model, full, 1000)
    assert loc.item() == pytest.approx(full.mean().item(), abs=1e-4)


def test_thousands_of_latents_need_no_square_of_them():
    D = 3000
    scales = torch.logspace(-2, 2, D)

    def model():
        z = pyro.sample("z", dist.Normal(torch.ones(D), scales).to_event(1))
        pyro.sample("sum", dist.Normal(z[..., :10].sum(-1), 1.0), obs=torch.tensor(9.0))

    loc, scale = start_of(model)
    assert scale.shape == (D,)
    assert ((loc - 1) / scales).abs().median() < 0.3
    guide = AutoIAF(model, hidden_dims=[4], start="init", init_scale=1.0)
    found = AutoIAF(model, hidden_dims=[4], name="found")
    elbos = [diagnose(model, g, num_samples=50, search=False).elbo for g in (guide, found)]
    assert elbos[1] > elbos[0] + 1000


def test_hundreds_of_latents_end_in_their_own_curvature():
    A = torch.randn(100, 100) / 10
    covariance = A @ A.T + 0.1 * torch.eye(100)
    check_normal(start_of(gaussian(covariance)), torch.zeros(100), covariance, 1e-4)


def test_models_that_run_one_by_one_have_the_same_start():
    y = torch.tensor([1.0, 2.0, 0.5, 1.5])

    def broadcasting():
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(z.sum(-1, keepdim=True), 1.0).expand([4]).to_event(1), obs=y)

    def not_broadcasting():
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(z.sum(), 1.0).expand([4]).to_event(1), obs=y)

    covariance = (torch.eye(2) + 4).inverse()
    loc = covariance @ torch.full((2,), y.sum().item())
    check_normal(start_of(not_broadcasting), loc, covariance)
    check_normal(start_of(broadcasting), loc, covariance)


def test_a_density_that_is_derived_once_only_will_do():
    class Square(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x.square()

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, slope):
            return 2 * ctx.saved_tensors[0] * slope

    def model():
        flat = dist.ImproperUniform(constraints.real_vector, (), (2,))
        z = pyro.sample("z", flat)
        pyro.factor("f", -(Square.apply(z - 3) * torch.tensor([0.5, 50.0])).sum(-1))

    loc, root = start_of(model)
    assert_close(loc, torch.full((2,), 3.0), atol=1e-3, rtol=0)
    assert_close(root @ root.T, torch.tensor([1.0, 0.01]).diag(), atol=0.05, rtol=0.2)


@pytest.mark.parametrize("name", MODELS)
def test_every_model_has_a_start(name):
    model, arguments = (make() for make in MODELS[name])
    start_of(model, *arguments)


# When and where


@pytest.fixture
def paths(monkeypatch):
    """Where paths began, call by call."""
    seen = []
    climb = pathfinder._climb

    def watch(joint, points, exact):
        seen.append(points)
        return climb(joint, points, exact)

    monkeypatch.setattr(pathfinder, "_climb", watch)
    return seen


def test_an_init_loc_fn_seeds_the_first_path(paths):
    start_of(MODELS["one latent"][0](), init_loc_fn=init_to_value(values={"z": torch.tensor(7.5)}))
    assert paths[0][0] == 7.5
    assert (paths[0][1:].abs() <= 2).all()


@pytest.mark.parametrize("settings", [{"init_scale": 0.3}, {"start": "init"}])
def test_it_is_left_out_where_a_scale_is_given(paths, settings):
    AutoIAF(two_sites, **settings).setup()
    assert not paths


def test_it_is_left_out_where_a_state_was_loaded(paths, tmp_path):
    trained = AutoIAF(two_sites)
    trained()
    assert len(paths) == 1
    fresh = AutoIAF(two_sites)
    fresh.load_state_dict(trained.state_dict())
    fresh.setup()
    pyro.get_param_store().save(tmp_path / "store")
    pyro.clear_param_store()
    pyro.get_param_store().load(tmp_path / "store")
    adopting = AutoIAF(two_sites)
    adopting()
    assert len(paths) == 1
    for name, value in values(trained).items():
        assert torch.equal(values(adopting)[name], value)
        assert torch.equal(values(fresh)[name], value)


def in_two_places(weight):
    """A posterior of two modes, one of which has this share of the mass."""
    locs = torch.tensor([-4.0, 4.0]).unsqueeze(-1)
    shares = torch.tensor([weight, 1 - weight])

    def model():
        prior = dist.Normal(0.0, 5.0).expand([2]).to_event(1)
        x = pyro.sample("x", prior)
        parts = dist.Normal(locs, 0.5).expand([2, 2]).to_event(1).log_prob(x.unsqueeze(-2))
        pyro.factor("target", (shares.log() + parts).logsumexp(-1) - prior.log_prob(x))

    return model


@pytest.mark.parametrize("weight", [0.2, 0.8])
def test_it_starts_in_the_mode_with_most_mass(weight):
    for seed in range(4):
        pyro.set_rng_seed(seed)
        pyro.clear_param_store()
        guide = AutoIAF(in_two_places(weight), hidden_dims=[4])
        guide.setup()
        side = 1.0 if weight < 0.5 else -1.0
        assert_close(guide.median()["x"], torch.full((2,), 4.0 * side), atol=0.2, rtol=0.0)


def test_an_improper_prior_has_no_draws_to_climb_from():
    def model():
        z = pyro.sample("z", dist.ImproperUniform(constraints.real_vector, (), (3,)))
        pyro.sample("y", dist.Normal(z, 0.5).to_event(1), obs=torch.arange(3.0))

    guide = AutoIAF(model, hidden_dims=[4])
    guide.setup()
    assert_close(guide.median()["z"], torch.arange(3.0), atol=0.05, rtol=0.0)


def test_the_callers_handlers_are_not_heard():
    frames = []
    model, _ = (make() for make in MODELS["plates"])

    def plain(guide):
        guide.setup()

    def in_a_loss(guide):
        elbo = Trace_ELBO(num_particles=7, vectorize_particles=True, max_plate_nesting=1)
        with poutine.scale(scale=100.0):
            elbo.loss(poutine.scale(model, 10.0), guide)

    for first_call in (plain, in_a_loss):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        guide = AutoIAF(model, hidden_dims=[4])
        first_call(guide)
        frames.append(guide.transform.parts[-1].frame)
    assert_close(frames[0], frames[1])  # a product's last bit depends on where in memory it is


def test_a_models_parameters_get_no_gradient():
    model, _ = (make() for make in MODELS["learnable prior"])
    start_of(model)
    assert all(p.grad is None for p in pyro.get_param_store()._params.values())
    loss = Trace_ELBO().differentiable_loss(model, AutoIAF(model))
    loss.backward()


def test_the_same_seed_gives_the_same_start():
    starts = []
    for _ in range(2):
        pyro.set_rng_seed(5)
        starts.append(start_of(MODELS["supports"][0]())[0])
    assert torch.equal(*starts)


def test_a_start_that_is_not_found_is_told_and_done_without():
    def model():
        z = pyro.sample("z", dist.Normal(3.0, 1.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=torch.randn(()))

    guide = AutoIAF(model)
    with pytest.warns(UserWarning, match="changes from one run to the next"):
        guide.setup()
    loc, scale = guide.transform.parts[-1].frame
    assert scale == 1
    assert guide.transform.parts[-1].coefficients[1] == math.log(0.1)
    assert abs(loc - 3) < 1.5  # the median of 15 draws

    def nowhere():
        pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.factor("f", torch.tensor(-math.inf))

    with pytest.warns(UserWarning, match="finite at no point"):
        AutoIAF(nowhere).setup()


@pytest.mark.parametrize(
    "wrong",
    [
        {"start": "here"},
        {"start": "pathfinder", "init_scale": 0.1},
        {"scale": "full"},
        {"context_dim": 3},
        {"encoder": 3},
    ],
)
def test_bad_settings_are_told(wrong):
    with pytest.raises(ValueError, match=min(wrong)):
        AutoIAF(two_sites, **wrong)


@pytest.mark.parametrize("scale", ["auto", "dense", "diagonal"])
def test_the_last_step_is_dense_or_diagonal(scale):
    guide = AutoIAF(two_sites, scale=scale)
    guide.setup()
    rows = len(guide.transform.parts[-1].coefficients)
    assert rows == (4 if scale == "diagonal" else 4 + 5)
