import copy
import math
import warnings

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from example_models import MODELS, Regression, data
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO, TraceEnum_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoDelta, AutoMultivariateNormal, AutoNormal
from torch.testing import assert_close
from torch.utils.data import DataLoader

from pyro_iaf import (
    AutoIAF,
    DiagonalNormal,
    FitResult,
    diagnose,
    fit,
    inverse_autoregressive_flow,
    to_arviz,
)
from pyro_iaf.elbo.objectives import LatentLoss
from pyro_iaf.models.log_joint import LogJoint
from pyro_iaf.models.weighted import WeightedParticles
from pyro_iaf.training.optimizers import Adam

Y = torch.tensor([1.0, 2.0, 0.5, 1.5])


def conjugate(y=None):
    """Posterior N(20 / 17, 4 / 17) each, correlated; evidence in closed form."""
    y = Y.to(torch.get_default_dtype()) if y is None else y
    z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(z.sum(-1), 1.0), obs=y)


def evidence():
    covariance = 2 * torch.ones(4, 4) + torch.eye(4)
    return dist.MultivariateNormal(torch.zeros(4), covariance).log_prob(Y.double()).item()


def quick(model, guide, *args, **settings):
    settings = {"num_steps": 60, "progress": False, "seed": 0, **settings}
    return fit(model, guide, *args, **settings)


def test_it_finds_the_posterior_and_its_evidence():
    guide = AutoIAF(conjugate)
    result = quick(conjugate, guide, num_steps=600)
    draws = guide.sample_posterior(20_000)["z"]
    precision = torch.eye(2) + 4 * torch.ones(2, 2)
    assert_close(draws.mean(0), torch.full((2,), 5.0 / 9), atol=0.02, rtol=0)  # 3 se
    assert_close(draws.T.cov(), precision.inverse(), atol=0.03, rtol=0)  # 3 se
    assert -result.settled[0] == pytest.approx(evidence(), abs=0.002)
    assert str(result).startswith(f"ELBO {evidence():.2f}")


@pytest.mark.parametrize("name", MODELS)
def test_it_fits_every_model(name):
    model, arguments = (make() for make in MODELS[name])
    guide = AutoIAF(model, hidden_dims=[16])
    result = quick(model, guide, arguments, num_steps=15)
    assert len(result.losses) + result.skipped == result.num_steps == 15
    assert result.losses.isfinite().all()
    # A support that is learnt may leave a draw outside.
    assert result.skipped <= (5 if name == "learnable prior" else 0)


@pytest.mark.parametrize("kind", [AutoNormal, AutoMultivariateNormal, AutoDelta])
def test_it_fits_other_guides(kind):
    result = quick(conjugate, kind(conjugate), num_steps=300, lr=0.02)
    if kind is not AutoDelta:
        assert -result.settled[0] <= evidence() + 0.05
    assert result.settled[0] < result.losses[:10].mean() - 0.2


def test_it_fits_guides_by_hand():
    def guide():
        loc = pyro.param("loc", torch.zeros(2))
        scale = pyro.param("scale", torch.ones(2), constraint=dist.constraints.positive)
        pyro.sample("z", dist.Normal(loc, scale).to_event(1))

    quick(conjugate, guide, num_steps=800, lr=0.02)
    assert_close(pyro.param("loc").detach(), torch.full((2,), 5.0 / 9), atol=0.1, rtol=0)
    exact = torch.full((2,), 5.0).rsqrt()
    assert_close(pyro.param("scale").detach(), exact, atol=0.05, rtol=0)


def test_it_takes_one_of_pyros_losses():
    result = quick(conjugate, AutoNormal(conjugate), loss=TraceMeanField_ELBO(num_particles=4))
    assert result.losses.isfinite().all()


def test_it_learns_a_models_own_parameters():
    model = Regression()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    quick(model, AutoIAF(model), data(), num_steps=30)
    after = dict(model.named_parameters())
    assert all((after[name] != value).all() for name, value in before.items())


def test_the_same_seed_gives_the_same_run():
    first, second = (quick(conjugate, AutoIAF(conjugate), seed=3).losses for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(first, quick(conjugate, AutoIAF(conjugate), seed=4).losses)


@pytest.mark.parametrize("weight", [1.0, 0.3])
@pytest.mark.parametrize("name", ["plates", "supports", "mask and scale", "arguments"])
def test_its_gradient_is_that_of_the_elbo_in_mean(name, weight):
    model, arguments = (make() for make in MODELS[name])
    guide = AutoIAF(model, hidden_dims=[8], start="init", init_scale=0.5)
    guide.setup(*arguments)
    particles = WeightedParticles(model, guide, arguments, {})
    joint = LogJoint(model, particles.first_model, arguments, {}, guide._latent_sites())
    sticking = LatentLoss(model, guide, 4000, joint)

    def plain():
        x = guide.get_base_dist().rsample((4000,))
        z = guide.transform(x)
        log_q = guide.get_base_dist().log_prob(x) - guide.transform.log_abs_det_jacobian(x, z)
        return (weight * log_q - joint.with_data(arguments, {}, weight).density(z)).mean()

    affine = guide.transform.parts[-1].coefficients
    ours, theirs, losses = [], [], []
    for _ in range(12):
        guide.zero_grad()
        losses.append(sticking(arguments, {}, weight).item() - plain().item())
        ours.append(affine.grad.clone())
        theirs.append(torch.autograd.grad(plain(), affine)[0])
    ours, theirs = torch.stack(ours), torch.stack(theirs)
    error = ((ours.var(0) + theirs.var(0)) / 12).sqrt()
    assert ((ours.mean(0) - theirs.mean(0)).abs() <= 5 * error + 1e-9).all()
    assert abs(torch.tensor(losses).mean()) < 5 * torch.tensor(losses).std() / 12**0.5


def test_its_gradient_has_no_noise_at_the_posterior():
    pyro.set_rng_seed(1)
    guide = AutoIAF(conjugate)
    guide.setup()
    with torch.no_grad():  # the flows become the identity; Pathfinder's normal is the posterior
        for part in guide.transform.parts[:-1]:
            part.network.weights[0].zero_()
    particles = WeightedParticles(conjugate, guide, (), {})
    joint = LogJoint(conjugate, particles.first_model, (), {}, guide._latent_sites())
    loss = LatentLoss(conjugate, guide, 16, joint)((), {}, 1.0)
    assert loss.item() == pytest.approx(-evidence(), abs=1e-9)
    assert all(p.grad.abs().max() < 1e-9 for p in guide.parameters() if p.grad is not None)


def test_particles_go_one_by_one_where_they_have_to():
    def model():
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        assert float(z.detach().sum()) < 100  # asks for one value
        pyro.sample("y", dist.Normal(torch.ones(4, 2) @ z.reshape(2), 1.0).to_event(1), obs=Y.to(z))

    guide = AutoIAF(model)
    with pytest.warns(UserWarning, match="one after the other"):
        result = quick(model, guide, num_steps=40, num_particles=4)
    assert -result.settled[0] == pytest.approx(evidence(), abs=0.05)


# The rate, the end, and steps that fail


def test_it_stops_where_the_elbo_has_settled():
    result = quick(conjugate, AutoIAF(conjugate), num_steps=3000)
    assert result.stopped == "the ELBO had settled"
    assert result.num_steps < 3000
    assert len(result.losses) == result.num_steps
    assert "had settled" in str(result)


def test_it_goes_on_where_it_should():
    result = quick(conjugate, AutoIAF(conjugate), num_steps=700, early_stop=False)
    assert result.num_steps == 700
    assert result.stopped == "all steps were taken"


@pytest.mark.parametrize("num_steps", [1, 2, 5])
def test_few_steps_are_steps_too(num_steps):
    assert len(quick(conjugate, AutoIAF(conjugate), num_steps=num_steps).losses) == num_steps


class ByHand(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.loc = torch.nn.Parameter(torch.zeros(2))
        self.flow = inverse_autoregressive_flow(2, [4])

    def forward(self):
        pyro.module("by_hand", self)
        base = DiagonalNormal(self.loc, torch.ones(2))
        pyro.sample("z", dist.TransformedDistribution(base, [self.flow]))

    def guide(self):
        self()


def test_weights_of_networks_move_by_four_times_the_rate():
    def model():
        pyro.sample("z", dist.Normal(torch.ones(2), 1.0).to_event(1))

    for of in ("module", "method"):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        by_hand = ByHand()
        weights = by_hand.flow.network.weights[0]
        before = weights.detach().clone()
        guide = by_hand if of == "module" else by_hand.guide
        fit(model, guide, num_steps=1, num_particles=1, lr=0.01, progress=False)
        moved = (weights - before).abs().max() / by_hand.loc.abs().max()
        assert_close(moved, torch.tensor(4.0), rtol=1e-3, atol=0.0)  # Adam's first step is the rate


def test_the_last_iterates_are_averaged(monkeypatch):
    guide = AutoIAF(conjugate)
    guide.setup()
    seen, step = [], Adam.step

    def watch(*args):
        step(*args)
        seen.append(guide.transform.parts[0].network.weights[0].detach().clone())

    monkeypatch.setattr(Adam, "step", watch)
    quick(conjugate, guide, num_steps=50)
    average = torch.stack(seen[-10:]).mean(0)
    assert_close(guide.transform.parts[0].network.weights[0].detach(), average)


def sometimes(share):
    """A model whose density is not a number in some of its runs."""

    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        bad = torch.rand(()) < share
        pyro.sample("y", dist.Normal(z, 1.0), obs=torch.where(bad, torch.nan, torch.tensor(0.5)))

    return model


@pytest.mark.parametrize("kind", [lambda model: AutoIAF(model, start="init"), AutoNormal])
def test_steps_that_are_not_finite_are_skipped_and_counted(kind):
    model = sometimes(0.05)
    guide = kind(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the model is random, so particles go one by one
        result = quick(model, guide, num_steps=200, num_particles=1)
    assert 0 < result.skipped < 40
    assert len(result.losses) + result.skipped == result.num_steps == 200
    assert result.losses.isfinite().all()
    assert all(p.isfinite().all() for p in guide.parameters())


@pytest.mark.parametrize("kind", [lambda model: AutoIAF(model, start="init"), AutoNormal])
def test_too_many_of_them_name_the_sites_at_fault(kind):
    def model():
        scale = pyro.sample("scale", dist.HalfNormal(torch.tensor(1.0)))
        pyro.sample("fine", dist.Normal(0.0, 1.0), obs=torch.tensor(0.0))
        pyro.sample("broken", dist.Normal((scale - 50).log(), 1.0), obs=torch.tensor(0.0))

    with (
        pytest.warns(UserWarning, match="Encountered NaN: loss"),
        pytest.raises((FloatingPointError, ValueError), match="broken"),
        pyro.validation_enabled(False),
    ):
        quick(model, kind(model), num_steps=200)


def test_tails_get_heavier_where_that_costs_little():
    def model():  # heavier tails than a guide of normals has
        pyro.sample("z", dist.StudentT(20.0, torch.zeros(2), 1.0).to_event(1))

    guide = AutoIAF(model, num_flows=1, hidden_dims=[4])
    quick(model, guide, num_steps=400)
    log_weights = WeightedParticles(model, guide, (), {}).weighted(4000).log_weights
    assert log_weights.std() < 0.2


# Data


def test_minibatches_from_a_loader():
    x = torch.linspace(-1, 1, 40).unsqueeze(-1)
    y = 2 * x.squeeze(-1) + 0.1 * torch.randn(40)

    def model(x, y):
        weight = pyro.sample("weight", dist.Normal(0.0, 10.0))
        with pyro.plate("data", 40, subsample_size=len(y)):
            pyro.sample("y", dist.Normal(weight * x.squeeze(-1), 0.1), obs=y)

    pairs = list(zip(x, y, strict=True))
    guide = AutoIAF(model)
    result = quick(model, guide, num_steps=400, data=DataLoader(pairs, batch_size=8, shuffle=True))
    assert not result.losses.isnan().any()
    exact = (x.squeeze(-1) * y).sum() / (x.square().sum() + 1e-4)
    sd = 0.1 / x.norm()
    assert abs(guide.median()["weight"] - exact) < 2 * sd  # minibatches leave some noise


def test_one_fit_serves_all_data_sets():
    class Encoder(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.net = torch.nn.Linear(3, 4)

        def forward(self, y=None):
            return self.net(y)

    def model(y=None):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 3):
            return pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    guide = AutoIAF(model, encoder=Encoder())
    with pytest.raises(ValueError, match="needs the model's arguments"):
        quick(model, guide)
    with pytest.raises(ValueError, match="one context for all the data"):
        AutoIAF(model, encoder=lambda y: y.expand(2, 3)).setup(torch.zeros(3))
    quick(model, guide, num_steps=1500, simulate=["y"])
    for _ in range(5):
        y = model()
        draws = guide.sample_posterior(4000, y=y)["z"]
        assert abs(draws.mean() - y.sum() / 4) < 0.15 * 0.5  # of the posterior's 0.5
        assert draws.std() == pytest.approx(0.5, rel=0.15)


def test_annealing_raises_the_weight_of_the_divergence():
    weights = []

    def record(step):
        weights.append(step)
        return min(1.0, 0.1 * (step + 1))

    early = quick(conjugate, AutoIAF(conjugate), num_steps=40, annealing=10).losses[:5]
    same = quick(conjugate, AutoIAF(conjugate), num_steps=40, annealing=record).losses[:5]
    plain = quick(conjugate, AutoIAF(conjugate), num_steps=40).losses[:5]
    assert torch.equal(early, same)
    assert (early < plain).all()  # the divergence counts less
    assert weights[0] == 0


# Arguments


@pytest.mark.parametrize(
    "wrong",
    [
        {"num_steps": 0},
        {"num_particles": -1},
        {"lr": 0.0},
        {"clip_norm": -1.0},
        {"checkpoint_every": 0},
        {"annealing": 0},
        {"data": 3},
        {"data": Y},
        {"data": [(Y,)], "args": (Y,)},
        {"kwargs": Y, "args": (Y,)},
        {"simulate": True},
        {"annealing": "slowly"},
        {"annealing": 0.5},
        {"loss": Trace_ELBO},
        {"checkpoint": "."},
        {"checkpoint": 3},
        {"seed": -1},
        {"seed": True},
        {"seed": 2**32},
        {"seed": "a"},
        {"lr": math.inf},
        {"lr": math.nan},
        {"lr": True},
        {"lr": "fast"},
        {"lr": torch.tensor(0.1)},
        {"clip_norm": math.nan},
        {"clip_norm": True},
        {"clip_norm": None},
        {"early_stop": "no"},
        {"progress": "no"},
        {"compile": "no"},
        {"annealing": lambda step: "0.5"},
        {"annealing": lambda step: math.nan},
        {"annealing": lambda step: -0.1},
        {"annealing": lambda step: None},
        {"annealing": lambda step: torch.ones(2)},
        {"data": "abc"},
        {"data": {"y": Y}},
        {"data": Y.numpy()},
        {"data": ["abc"]},
        {"data": [None]},
    ],
)
def test_bad_arguments_are_told(wrong):
    (name,) = [key for key in wrong if key != "args"]
    with pytest.raises(ValueError, match=name):
        fit(conjugate, AutoIAF(conjugate), **{"num_steps": 3, "progress": False, **wrong})


def test_what_is_no_model_and_no_guide_is_named():
    guide = AutoIAF(conjugate)
    for name, call in {"model": (None, guide), "guide": (conjugate, None)}.items():
        with pytest.raises(ValueError, match=f"a model and then a guide.*got as {name} None"):
            quick(*call)
    with pytest.raises(ValueError, match=r"a model and then a guide.*got as guide 'x'"):
        quick(conjugate, "x")


def test_a_minibatch_that_the_model_doesnt_take_is_told():
    for batch in ((Y, Y), {"x": Y}):
        with pytest.raises(TypeError, match=r"takes \(y=None\).*Each minibatch"):
            quick(conjugate, AutoNormal(conjugate), data=[batch])


@pytest.mark.parametrize("y", ["abc", ["1", "2"], np.array(["a"]), [1.0, 2.0], np.ones(2)])
@pytest.mark.parametrize("kind", [AutoIAF, AutoNormal])
def test_data_that_are_no_numbers_are_named(y, kind):
    def model(y):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    match = f"data of site 'y' should be a tensor or a number; got a {type(y).__name__}"
    with pytest.raises(ValueError, match=match):
        quick(model, kind(model), args=(y,))


def test_complex_data_are_told():
    def model(y):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    with pytest.raises(ValueError, match="data of site 'y' should be real"):
        quick(model, AutoIAF(model), args=(torch.tensor(1.0 + 2.0j),))


def test_what_is_computed_may_be_complex():
    def model():
        x = pyro.sample("x", dist.Normal(torch.zeros(4), 1.0).to_event(1))
        pyro.deterministic("f", torch.fft.fft(x), event_dim=1)
        pyro.sample("y", dist.Normal(x.sum(-1), 1.0), obs=torch.tensor(1.0))

    assert len(quick(model, AutoNormal(model), num_steps=5).losses) == 5


@pytest.mark.parametrize("number", [np.float32(0.25), np.int64(1), 1])
def test_numbers_of_any_kind_will_do(number):
    settings = {"lr": number, "clip_norm": number, "num_steps": np.int16(3), "seed": np.int64(3)}
    settings |= {"early_stop": np.True_, "compile": np.False_}
    assert quick(conjugate, AutoNormal(conjugate), **settings).num_steps == 3


@pytest.mark.parametrize("compile_step", [False, "graph"])
def test_a_norm_without_a_limit_leaves_gradients_as_they_are(compile_step):
    def run(clip_norm):
        pyro.clear_param_store()
        guide = AutoNormal(conjugate)
        return quick(conjugate, guide, clip_norm=clip_norm, compile=compile_step).losses

    assert torch.equal(run(math.inf), run(1e9))
    assert not torch.equal(run(math.inf), run(0.1))


def test_annealing_may_return_a_tensor_of_one_number():
    def run(weight):
        pyro.clear_param_store()
        settings = {"annealing": lambda step: weight, "num_steps": 5}
        return quick(conjugate, AutoNormal(conjugate), **settings).losses

    assert torch.equal(run(torch.tensor(0.5)), run(0.5))


# Surroundings


def test_it_trains_where_gradients_are_off():
    expected = quick(conjugate, AutoIAF(conjugate), num_steps=20, compile=False).losses
    pyro.clear_param_store()
    with torch.no_grad():
        found = quick(conjugate, AutoIAF(conjugate), num_steps=20, compile=False).losses
        assert not torch.is_grad_enabled()
    assert torch.equal(found, expected)


def test_inference_mode_is_told_at_once():
    def model(y=None):
        raise AssertionError

    with torch.inference_mode():
        y = Y.clone()
        with pytest.raises(ValueError, match=r"outside.*inference_mode|inference_mode.*outside"):
            quick(model, AutoNormal(model))
    for given in ({"args": (y,)}, {"data": [(y,)]}):
        with pytest.raises(ValueError, match=r"made within torch.inference_mode.*clone"):
            quick(model, AutoNormal(model), **given)


def test_handlers_around_it_are_told():
    def model():
        raise AssertionError

    for handler in (
        poutine.trace(),
        poutine.condition(data={"z": torch.zeros(2)}),
        poutine.scale(scale=2.0),
        pyro.plate("rows", 3),
    ):
        name = type(handler).__name__
        with handler, pytest.raises(ValueError, match=f"within {name}.*Handle the model"):
            quick(model, AutoNormal(model))
    with poutine.trace() as seen, poutine.block(), poutine.seed(rng_seed=0):
        assert quick(conjugate, AutoNormal(conjugate), num_steps=3).num_steps == 3
    assert not seen.trace.nodes


def test_what_is_printed_is_ascii():
    guide = AutoIAF(conjugate)
    result = quick(conjugate, guide)
    for thing in (result, diagnose(conjugate, guide, num_samples=100), guide):
        assert str(thing).isascii()
        assert repr(thing).isascii()


def test_calls_that_went_wrong_are_told():
    with pytest.raises(ValueError, match=r"args=\(x,\)"):
        fit(conjugate, AutoIAF(conjugate), Y)
    for swapped in ((AutoIAF(conjugate), conjugate), (conjugate, AutoIAF)):
        with pytest.raises(ValueError, match=r"fit\(model, AutoIAF\(model\)\)"):
            fit(*swapped)


def test_arguments_that_were_forgotten_are_named():
    def model(x, y):
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(w * x, 1.0), obs=y)

    guide = AutoIAF(model)
    for call in (fit, diagnose, to_arviz):
        for wrapped in (model, poutine.block(model)):
            with pytest.raises(TypeError, match=r"takes \(x, y\): .*'x'.*args=\(x, y\)"):
                call(wrapped, guide)


def test_a_short_run_that_failed_throughout_is_told():
    def model():
        pyro.factor("f", pyro.sample("z", dist.Normal(0.0, 1.0)) * torch.nan)

    with pytest.raises(FloatingPointError, match=r"20 of 20 steps.*site 'f'"):
        quick(model, AutoIAF(model, start="init"), num_steps=20)


def test_a_bar_shows_elbo_trend_and_speed(capfd):
    fit(conjugate, AutoIAF(conjugate), num_steps=300, seed=0)
    shown = capfd.readouterr().err
    assert "ELBO=" in shown
    assert "/100 steps" in shown
    assert "step/s" in shown


def test_svi_goes_on_where_fit_ended():
    guide = AutoIAF(conjugate)
    quick(conjugate, guide)
    before = copy.deepcopy(guide.state_dict())
    svi = SVI(conjugate, guide, pyro.optim.Adam({"lr": 1e-3}), Trace_ELBO(num_particles=4))
    assert svi.step() == pytest.approx(-evidence(), abs=1.0)
    moved = (
        guide.state_dict()["transform.parts.2.coefficients"]
        - before["transform.parts.2.coefficients"]
    )
    assert 0 < moved.abs().max() < 0.01


def test_a_result_says_what_happened():
    result = FitResult(torch.tensor([3.0, 1.0, 1.0, 1.0, 1.0]), 6, "of a whim", 1, 2.0)
    assert str(result) == (
        "ELBO -1.00 +/- 0 nats after 6 steps: of a whim; 1 of them were skipped, since they were "
        "not finite; 2.0 s"
    )


def test_shapes_that_pyro_would_refuse_are_refused():
    x = torch.randn(20, 2)
    y = x.sum(-1, keepdim=True)  # a column beside a row

    def model():
        w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("rows", 20):
            pyro.sample("y", dist.Normal((w * x).sum(-1), 1.0), obs=y)

    for guide in (AutoIAF(model), AutoNormal(model)):
        with pytest.raises(ValueError, match=r'at site "y", invalid log_prob shape'):
            quick(model, guide)


@pytest.mark.parametrize(
    ("fn", "data"),
    [
        (lambda z: dist.Normal(z, 1.0), [0.0, torch.nan, 1.0]),
        (lambda z: dist.Bernoulli(logits=z), [0.0, 2.0, 1.0]),
        (lambda z: dist.Poisson(z.exp()), [1.0, 1.5, 1.0]),
        (lambda z: dist.LogNormal(z, 1.0), [1.0, -1.0, 1.0]),
    ],
)
def test_data_that_cant_be_are_named(fn, data):
    def model(mask):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", 3), poutine.mask(mask=mask):
            pyro.sample("y", fn(z), obs=torch.tensor(data))

    with pytest.raises(ValueError, match=r"data of site 'y' should be .*1 of 3 .*index \[1\]"):
        quick(model, AutoIAF(model, start="init"), args=(torch.tensor(True),))


def test_simulated_data_are_for_guides_that_listen():
    with pytest.raises(ValueError, match=r"give it an encoder, AutoIAF\(model, encoder="):
        fit(conjugate, AutoIAF(conjugate), num_steps=3, simulate=["y"])


def test_what_is_to_be_enumerated_wants_a_loss_that_does():
    def mixture():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        k = pyro.sample("k", dist.Bernoulli(0.5), infer={"enumerate": "parallel"})
        pyro.sample("y", dist.Normal(z * k, 1.0), obs=torch.tensor(1.0))

    guide = AutoIAF(poutine.block(mixture, hide=["k"]), start="init")
    with (
        pytest.warns(UserWarning, match="in model but not guide: {'k'}"),
        pytest.raises(ValueError, match="Site 'k' is to be enumerated"),
    ):
        quick(mixture, guide)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss = TraceEnum_ELBO(max_plate_nesting=0)
        quick(mixture, guide, num_steps=600, loss=loss, early_stop=False)
