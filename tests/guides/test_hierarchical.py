import copy
import gc
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoGuideList, AutoNormal
from torch import nn
from torch.testing import assert_close

from pyro_iaf import AutoHierarchicalIAF, AutoIAF, diagnose, fit
from pyro_iaf.compiler.capture import Refused
from pyro_iaf.guides.plates import _Subsample

FAST = {"num_steps": 5, "progress": False}


def small(model, **settings):
    return AutoHierarchicalIAF(model, **{"hidden_dims": [8], "context_dim": 3} | settings)


def simple():
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", 12, subsample_size=4) as rows:
        effect = pyro.sample("effect", dist.Normal(mean, 1.0))
        pyro.sample("y", dist.Normal(effect, 1.0), obs=torch.linspace(-2, 2, 12)[rows])


def nested():
    scale = pyro.sample("scale", dist.HalfNormal(1.0))
    with pyro.plate("schools", 4, dim=-2, subsample_size=2) as schools:
        school = pyro.sample("school", dist.Normal(0.0, scale))
        with pyro.plate("pupils", 6, dim=-1, subsample_size=3) as pupils:
            pupil = pyro.sample("pupil", dist.LogNormal(school, 1.0))
            y = torch.linspace(0, 2, 24).reshape(4, 6)[schools][:, pupils]
            pyro.sample("y", dist.Normal(pupil, 1.0), obs=y)


def several():
    mean = pyro.sample("mean", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    rows = pyro.plate("rows", 5, dim=-1)
    columns = pyro.plate("columns", 3, dim=-2)
    with rows:
        shares = pyro.sample("shares", dist.Dirichlet(torch.ones(3)))
        row = pyro.sample("row", dist.Normal(mean.sum(-1), 1.0))
    with columns:
        column = pyro.sample("column", dist.Beta(torch.tensor(2.0), 2.0))
    with rows, columns:
        both = pyro.sample("both", dist.Normal(row + column, 1.0))
        pyro.sample("y", dist.Normal(both + shares[..., 0], 1.0), obs=torch.ones(3, 5))


def matrices():
    with pyro.plate("rows", 6):
        factor = pyro.sample("factor", dist.LKJCholesky(3, torch.tensor(1.0)))
        scale = pyro.sample("scale", dist.HalfCauchy(1.0).expand([3]).to_event(1))
        pyro.sample(
            "y",
            dist.MultivariateNormal(torch.zeros(3), scale_tril=scale.unsqueeze(-1) * factor),
            obs=torch.ones(6, 3),
        )


def local_alone():
    with pyro.plate("rows", 3, dim=-2):
        w = pyro.sample("w", dist.Gamma(torch.tensor(2.0), 1.0))
        pyro.sample("y", dist.Normal(w, 1.0), obs=torch.ones(3, 1))


def no_plates():
    w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    pyro.sample("y", dist.Normal(w.sum(-1), 1.0), obs=torch.tensor(1.0))


MODELS = {
    "simple": simple,
    "nested": nested,
    "several": several,
    "matrices": matrices,
    "local alone": local_alone,
    "no plates": no_plates,
}


@pytest.fixture(params=MODELS.values(), ids=MODELS)
def model(request):
    return request.param


def shapes(trace):
    return {
        name: tuple(site["value"].shape)
        for name, site in trace.iter_stochastic_nodes()
        if not name.startswith("_")
    }


def test_it_draws_what_the_model_draws(model):
    guide = small(model)
    poutine.trace(guide).get_trace()
    drawn = poutine.trace(guide).get_trace()
    replayed = poutine.trace(poutine.replay(model, drawn)).get_trace()
    assert shapes(drawn) == shapes(replayed)
    replayed.compute_log_prob()
    drawn.compute_log_prob()
    for name, site in replayed.iter_stochastic_nodes():
        assert site["log_prob"].shape == drawn.nodes[name]["log_prob"].shape, name


@pytest.mark.parametrize("vectorize", [False, True])
def test_svi_runs_and_gradients_reach_every_parameter(model, vectorize):
    guide = small(model)
    elbo = Trace_ELBO(num_particles=3, vectorize_particles=vectorize, max_plate_nesting=2)
    guide.setup()
    with torch.no_grad():
        for param in guide.parameters():
            param.add_(0.1 * torch.randn_like(param))
    for _ in range(20):  # until all rows had their turn
        elbo.loss_and_grads(model, guide)
    for name, param in guide.named_parameters():
        assert param.grad is not None, name
        assert param.grad.abs().sum() > 0, name


@pytest.mark.parametrize("name", ["several", "matrices", "local alone", "no plates"])
def test_particles_at_once_are_as_good_as_one_after_the_other(name):
    model, losses = MODELS[name], []
    guide = small(model)
    guide.setup()
    for vectorize in (False, True):
        elbo = Trace_ELBO(200, vectorize_particles=vectorize, max_plate_nesting=2)
        with torch.no_grad():
            losses.append(elbo.loss(model, guide))
    assert losses[0] == pytest.approx(losses[1], rel=0.1)  # a fresh guide is narrow


def test_the_density_of_a_draw_is_that_of_its_flows(model):
    # The same numbers by way of the inverse, in a replay on copies of the values.
    guide = small(model)
    guide.setup()
    with torch.no_grad():
        for param in guide.parameters():
            param.add_(0.1 * torch.randn_like(param))
    drawn = poutine.trace(guide).get_trace()
    copies = drawn.copy()
    for name, site in drawn.iter_stochastic_nodes():
        copies.nodes[name] = {**site, "value": site["value"].clone()}
    again = poutine.trace(poutine.replay(guide, trace=copies)).get_trace()
    assert_close(again.log_prob_sum(), drawn.log_prob_sum())


def test_fit_and_diagnose_take_it(model):
    guide = small(model)
    result = fit(model, guide, **FAST)
    assert result.losses.isfinite().all()
    assert diagnose(model, guide, num_samples=50).log_weights.isfinite().all()


def test_posterior_draws_hold_all_rows(model):
    guide = small(model)
    draws = guide.sample_posterior(7)
    whole = {
        "simple": {"mean": (), "effect": (12,)},
        "nested": {"scale": (), "school": (4, 1), "pupil": (4, 6)},
        "several": {"mean": (2,), "shares": (5, 3), "row": (5,), "column": (3, 1), "both": (3, 5)},
        "matrices": {"factor": (6, 3, 3), "scale": (6, 3)},
        "local_alone": {"w": (3, 1)},
        "no_plates": {"w": (3,)},
    }[model.__name__]
    assert {name: tuple(value.shape) for name, value in draws.items()} == {
        name: (7, *shape) for name, shape in whole.items()
    }
    low, high = guide.quantiles([0.1, 0.9])["effect" if model is simple else next(iter(whole))]
    assert (low <= high).all()
    again, median = guide.median(), guide.median()
    for name, shape in whole.items():
        assert median[name].shape == shape
        assert_close(median[name], again[name])


def test_rows_may_be_chosen():
    guide = small(nested)
    guide.setup()
    with torch.no_grad():
        guide.tables[1].normal_(std=5.0)
    everything = guide.median()["pupil"]
    chosen = guide.median(rows={"schools": [3, 1], "pupils": torch.tensor([5])})["pupil"]
    assert chosen.shape == (2, 1)
    # Of 4001 draws, a standard error of some 0.02 in the logarithm.
    assert_close(chosen.log(), everything.log()[[3, 1]][:, [5]], atol=0.15, rtol=0)
    with pytest.raises(ValueError, match="no plate 'school'"):
        guide.sample_posterior(2, rows={"school": [1]})
    with pytest.raises(ValueError, match="between 0 and 3"):
        guide.sample_posterior(2, rows={"schools": [4]})
    with pytest.raises(ValueError, match="indices"):
        guide.sample_posterior(2, rows={"schools": [0.5]})


def test_a_row_listens_to_its_own_context_and_to_the_globals():
    guide = small(simple)
    guide.setup()
    with torch.no_grad():
        for param in guide.parameters():
            param.add_(0.3 * torch.randn_like(param))
    rows = {"rows": torch.tensor([2, 7])}

    def run(table):
        pyro.set_rng_seed(0)
        with torch.no_grad():
            guide.tables[0].copy_(table)
        return guide.sample_posterior(5, rows=rows)["effect"]

    table = guide.tables[0].detach().clone()
    other = table.clone()
    other[7] += 1
    before, after = run(table), run(other)
    assert torch.equal(before[:, 0], after[:, 0])
    assert (before[:, 1] != after[:, 1]).all()
    draws = guide.sample_posterior(4000)
    together = torch.stack([draws["mean"], draws["effect"][:, 3]])
    assert torch.corrcoef(together)[0, 1].abs() > 0.05


def gaussian(num_rows, batch_size, y):
    def model():
        mean = pyro.sample("mean", dist.Normal(0.0, 3.0))
        with pyro.plate("rows", num_rows, subsample_size=batch_size) as rows:
            effect = pyro.sample("effect", dist.Normal(mean, 2.0))
            pyro.sample("y", dist.Normal(effect, 0.7), obs=y[rows])

    return model


def exact(y):
    """Mean and standard deviation of the global and of each row."""
    precision = 1 / 9 + len(y) / 4.49
    mean = y.sum() / 4.49 / precision
    variance = 1 / (1 / 4 + 1 / 0.49)
    effects = variance * (y / 0.49 + mean / 4)
    return (mean, precision**-0.5), (effects, (variance + (variance / 4) ** 2 / precision) ** 0.5)


@pytest.mark.parametrize(("batch_size", "num_steps"), [(40, 300), (10, 1500)])
def test_it_finds_the_posterior_of_a_hierarchical_gaussian(batch_size, num_steps):
    y = 1.5 + 2.1 * torch.randn(40)
    guide = AutoHierarchicalIAF(gaussian(40, batch_size, y), hidden_dims=[32])
    settings = {"num_steps": num_steps, "num_particles": 4, "early_stop": False, "progress": False}
    fit(gaussian(40, batch_size, y), guide, **settings)
    draws = guide.sample_posterior(10_000)
    (mean, sd), (effects, sds) = exact(y)
    assert_close(draws["mean"].mean(), mean, atol=0.15 * sd, rtol=0)
    assert_close(draws["mean"].std(), torch.tensor(sd), rtol=0.15, atol=0)
    error = (draws["effect"].mean(0) - effects) / sds
    assert error.square().mean().sqrt() < 0.15  # 0.03 to 0.1 with other seeds
    assert_close(draws["effect"].std(0), torch.full((40,), sds), rtol=0.15, atol=0)
    whole = diagnose(gaussian(40, 40, y), guide_on_all(guide, gaussian(40, 40, y)))
    evidence = dist.MultivariateNormal(torch.zeros(40), 4.49 * torch.eye(40) + 9).log_prob(y)
    assert whole.elbo == pytest.approx(evidence.item(), abs=0.5)
    assert whole.iw_elbo == pytest.approx(evidence.item(), abs=0.1)


def guide_on_all(guide, model):
    """The same guide for a model that doesn't subsample."""
    twin = AutoHierarchicalIAF(model, hidden_dims=[32])
    twin.load_state_dict(guide.state_dict())
    return twin


def test_it_agrees_with_a_guide_over_all_latents():
    x = torch.randn(8, 5)
    y = 0.5 + torch.randn(8, 1) + 0.8 * x + 0.3 * torch.randn(8, 5)

    def model():
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        spread = pyro.sample("spread", dist.HalfNormal(torch.tensor(1.0)))
        slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
        with pyro.plate("groups", 8, dim=-2):
            effect = pyro.sample("effect", dist.Normal(mean, spread))
            with pyro.plate("measured", 5, dim=-1):
                pyro.sample("y", dist.Normal(effect + slope * x, 0.3), obs=y)

    settings = {"num_steps": 600, "progress": False, "early_stop": False}
    guide, other = AutoHierarchicalIAF(model), AutoIAF(model)
    fit(model, guide, **settings)
    fit(model, other, **settings)
    one, two = diagnose(model, guide), diagnose(model, other)
    assert one.khat < 0.7
    assert one.elbo == pytest.approx(two.elbo, abs=0.15)
    draws, others = guide.sample_posterior(10_000), other.sample_posterior(10_000, resample=True)
    for name, value in draws.items():
        sd = others[name].std(0)
        assert ((value.mean(0) - others[name].mean(0)) / sd).abs().max() < 0.15
        assert (value.std(0) / sd - 1).abs().max() < 0.15


# Encoders


class Encoder(nn.Module):
    def __init__(self, size=2):
        super().__init__()
        self.linear = nn.Linear(2, size)

    def forward(self, data, size=None):
        return self.linear(data)


def amortised(data, size=None):
    with pyro.plate("rows", len(data)):
        w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(w, 0.5).to_event(1), obs=data)


def subsampled(data, size=None):
    with pyro.plate("rows", len(data), subsample_size=4 + len(data) // 10):
        batch = pyro.subsample(data, event_dim=1)
        w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(w, 0.5).to_event(1), obs=batch)


class InPlate(Encoder):
    """An encoder that reads the minibatch of the plate around it."""

    def forward(self, data, size=None):
        return self.linear(pyro.subsample(data, event_dim=1))


@pytest.mark.parametrize("model", [amortised, subsampled])
@pytest.mark.parametrize("encoder", [Encoder, InPlate])
def test_an_encoder_finds_a_conjugate_posterior_of_new_data_too(model, encoder):
    data = torch.randn(200, 2) * 1.1
    guide = AutoHierarchicalIAF(model, encoder=encoder(), hidden_dims=[16])
    batches = [(part,) for part in data.split(20)] if model is amortised else None
    args = () if batches else (data,)
    fit(model, guide, args, data=batches, num_steps=1000, num_particles=2, progress=False)
    new = torch.tensor([[1.0, -0.5], [0.3, 2.0], [0.0, 0.0]])
    draws = guide.sample_posterior(4000, new)["w"]
    assert draws.shape == (4000, 3, 2)
    assert_close(draws.mean(0), 0.8 * new, atol=0.1, rtol=0)  # precisions 4 and 1
    assert_close(draws.std(0), torch.full((3, 2), 0.2**0.5), atol=0.06, rtol=0)
    chosen = guide.sample_posterior(4000, new, rows={"rows": [1]})["w"]
    assert_close(chosen.mean(0), draws.mean(0)[[1]], atol=0.05, rtol=0)
    assert guide.median(new)["w"].shape == (3, 2)


def test_minibatches_may_have_several_sizes():
    guide = AutoHierarchicalIAF(amortised, encoder=Encoder(), hidden_dims=[8])
    svi = SVI(amortised, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    for size in (5, 8, 3):
        assert svi.step(torch.randn(size, 2)) < 1e6


def test_a_compiled_fit_of_an_encoder_takes_the_same_steps():
    losses = {}
    for how in (False, "graph"):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        guide = AutoHierarchicalIAF(subsampled, encoder=InPlate(), hidden_dims=[8])
        data = torch.linspace(-2, 2, 24).reshape(12, 2)
        settings = {"num_steps": 20, "seed": 1, "progress": False, "compile": how}
        losses[how] = fit(subsampled, guide, (data,), **settings).losses
    assert_close(losses[False], losses["graph"])


def test_each_plate_may_have_its_encoder():
    def model(data):
        with pyro.plate("outer", 3, dim=-2):
            a = pyro.sample("a", dist.Normal(0.0, 1.0))
            with pyro.plate("inner", 4, dim=-1):
                b = pyro.sample("b", dist.Normal(a, 1.0))
                pyro.sample("y", dist.Normal(b, 1.0), obs=data)

    encoder = {"outer": lambda data: data.mean(-1, keepdim=True).unsqueeze(-1)}
    guide = small(model, encoder=encoder, context_dim=None)
    draws = guide.sample_posterior(5, torch.randn(3, 4))
    assert draws["b"].shape == (5, 3, 4)
    assert [len(table) for table in guide.tables] == [12]
    both = {**encoder, "outer/inner": lambda data: data.unsqueeze(-1)}
    guide = small(model, encoder=both, context_dim=None)
    fit(model, guide, (torch.randn(3, 4),), **FAST)
    assert not len(guide.tables)
    modules = {"outer": nn.Sequential(nn.Identity())}
    guide = small(model, encoder=modules, context_dim=None)
    with pytest.raises(ValueError, match=r"plate 'outer'.*\(3, 1, 'context_dim'\)"):
        guide(torch.randn(3, 4))


def test_indices_may_be_an_argument():
    y = torch.linspace(-2, 2, 12)

    def model(rows):
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", 12, subsample=rows):
            effect = pyro.sample("effect", dist.Normal(mean, 1.0))
            pyro.sample("y", dist.Normal(effect, 1.0), obs=y[rows])

    def plates(rows):
        return pyro.plate("rows", 12, subsample=rows)

    guide = small(model, create_plates=plates)
    fit(model, guide, data=[torch.tensor([k, 11 - k]) for k in range(6)], **FAST)
    trace = poutine.trace(guide).get_trace(torch.tensor([3, 5, 7]))
    assert trace.nodes["effect"]["value"].shape == (3,)
    assert trace.nodes["effect"]["scale"] == 4
    assert guide.sample_posterior(2)["effect"].shape == (2, 12)


# Bad input


def test_an_encoder_of_another_shape_is_an_error():
    data = torch.randn(6, 2)
    cases = {
        r"\(6, 3\); got \(6, 2\)": {"encoder": Encoder(), "context_dim": 3},
        r"\(4, 'context_dim'\); got \(3, 2\)": {"encoder": lambda data: data[:3]},
        r"got \(6,\)": {"encoder": lambda data: data[:, 0]},
        "got str": {"encoder": lambda data: "context"},
    }
    for message, settings in cases.items():
        guide = AutoHierarchicalIAF(subsampled if "3, 2" in message else amortised, **settings)
        with pytest.raises(ValueError, match=message):
            guide(data)


def test_plates_that_one_encoder_cant_tell_apart_are_an_error():
    with pytest.raises(ValueError, match="'schools', 'schools/pupils'"):
        small(nested, encoder=Encoder())()
    with pytest.raises(ValueError, match="encoder for plate 'pupils'"):
        small(nested, encoder={"pupils": Encoder()})()
    with pytest.raises(ValueError, match="no latent of this model is in a plate"):
        small(no_plates, encoder=Encoder())()


def test_an_encoder_wants_the_arguments():
    guide = AutoHierarchicalIAF(amortised, encoder=Encoder())
    guide(torch.randn(3, 2))
    with pytest.raises(ValueError, match="needs the model's arguments"):
        guide.sample_posterior(3)


def test_batch_dimensions_that_are_no_plate_are_an_error():
    def model():
        with pyro.plate("rows", 3, dim=-2):
            pyro.sample("w", dist.Normal(torch.zeros(4), 1.0))

    with pytest.raises(ValueError, match=r"to_event\(1\)"):
        small(model)()


def test_supports_that_change_from_row_to_row_are_an_error():
    def model():
        with pyro.plate("rows", 3):
            pyro.sample("w", dist.Uniform(torch.zeros(3), torch.arange(1.0, 4.0)))

    with pytest.raises(NotImplementedError, match="differs between the rows"):
        small(model)()


def test_sequential_plates_are_an_error():
    def model():
        for k in pyro.plate("rows", 2):
            pyro.sample(f"w_{k}", dist.Normal(0.0, 1.0))

    with pytest.raises(NotImplementedError, match="sequential"):
        small(model)()


def test_a_plate_of_another_size_is_an_error():
    guide = small(simple, create_plates=lambda: pyro.plate("rows", 10, subsample_size=4))
    with pytest.raises(ValueError, match="10 rows of plate 'rows'; the guide has"):
        guide()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"embedding_grad": "rowwise"}, "embedding_grad"),
        ({"encoder": 3}, "encoder should be a callable"),
        ({"encoder": {"rows": 3}}, r"encoder\['rows'\] should be a callable"),
        ({"context_dim": 0}, "context_dim"),
        ({"num_flows": 0}, "num_flows"),
        ({"name": ""}, "name"),
        ({"scale": "full"}, "scale"),
    ],
)
def test_bad_arguments_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        AutoHierarchicalIAF(simple, **settings)


def test_tables_are_not_compiled():
    with pytest.raises(Refused, match="table"):
        fit(simple, small(simple), compile="graph", **FAST)
    assert fit(simple, small(simple), **FAST).backend == "eager"


def test_resampling_wants_all_rows():
    with pytest.raises(ValueError, match="all rows have to be there"):
        small(simple).sample_posterior(10, resample=True)
    guide = small(several)
    fit(several, guide, num_steps=100, progress=False)
    assert guide.sample_posterior(10, resample=True)["both"].shape == (10, 3, 5)


# Tables


def test_only_rows_that_were_drawn_move_under_fit():
    guide = small(simple)
    guide.setup()
    table = guide.tables[0]
    with torch.no_grad():
        table.normal_()
    before = table.detach().clone()
    fit(simple, guide, num_steps=1, num_particles=1, seed=3, progress=False)
    moved = (table != before).any(-1).nonzero().squeeze(-1).tolist()
    assert len(moved) == 4
    assert guide.rows_alone is False


def test_sparse_gradients_are_for_sparse_adam():
    pyro.set_rng_seed(0)
    guide = small(simple, embedding_grad="sparse")
    svi = SVI(simple, guide, pyro.optim.SparseAdam({"lr": 0.01}), Trace_ELBO())
    losses = [svi.step() for _ in range(300)]
    assert sum(losses[-50:]) < sum(losses[:50])
    twin = copy.deepcopy(guide)
    svi = SVI(simple, twin, pyro.optim.SparseAdam({"lr": 0.01}), Trace_ELBO())
    pyro.clear_param_store()
    assert svi.step() < 1e6
    pickle.loads(pickle.dumps(guide)).sample_posterior(3)


def test_a_gradient_by_rows_is_the_gradient():
    guide = small(simple)
    guide.setup()
    with torch.no_grad():
        for param in guide.parameters():
            param.add_(0.1 * torch.randn_like(param))
    found = {}
    for alone in (False, True):
        guide.rows_alone = alone
        pyro.set_rng_seed(1)
        guide.zero_grad()
        Trace_ELBO().loss_and_grads(simple, guide)
        gradient = guide.tables[0].grad
        found[alone] = gradient.to_dense() if alone else gradient
        assert gradient.is_sparse == alone
    assert_close(found[True], found[False])


def test_subsamples_of_large_plates_are_fair_and_quick():
    size, count = 100_003, 50
    counts = torch.zeros(10)
    for _ in range(2000):
        rows = _Subsample(size, count).sample()
        assert len(rows.unique()) == count
        counts += torch.bincount(rows * 10 // size, minlength=10)
    assert_close(counts / counts.sum(), torch.full((10,), 0.1), atol=0.005, rtol=0)
    small_one = torch.stack([_Subsample(7, 3).sample() for _ in range(7000)])
    shares = torch.bincount(small_one.flatten(), minlength=7) / 7000
    assert_close(shares, torch.full((7,), 3 / 7), atol=0.03, rtol=0)  # 5 se


# State


def test_a_state_builds_a_guide_that_was_never_called(model):
    guide = small(model)
    fit(model, guide, **FAST)
    twin = small(model, hidden_dims=[4], context_dim=5)
    twin.load_state_dict(guide.state_dict(), strict=True)
    twin.setup()
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    draws = guide.sample_posterior(5)
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    others = twin.sample_posterior(5)
    for name, value in draws.items():
        assert_close(others[name], value, msg=name)


def test_a_state_of_another_model_is_an_error():
    guide, twin = small(simple), small(nested)
    guide.setup()
    twin.load_state_dict(guide.state_dict())
    with pytest.raises(ValueError, match="guide with sites 'effect', 'mean'; in this run"):
        twin()


@pytest.mark.filterwarnings("ignore:Another guide named")  # the copy takes the first one's place
def test_a_guide_can_be_pickled_and_copied(model):
    guide = small(model)
    fit(model, guide, **FAST)
    for twin in (pickle.loads(pickle.dumps(guide)), copy.deepcopy(guide)):
        pyro.set_rng_seed(0)
        draws = guide.sample_posterior(3)
        pyro.set_rng_seed(0)
        others = twin.sample_posterior(3)
        for name, value in draws.items():
            assert torch.equal(others[name], value)
    fit(model, copy.deepcopy(guide), **FAST)


def test_the_store_has_its_parameters(tmp_path):
    guide = small(simple)
    fit(simple, guide, **FAST)
    names = set(pyro.get_param_store().keys())
    assert "AutoHierarchicalIAF.tables$$$0" in names
    pyro.get_param_store().save(tmp_path / "store")
    values = [p.detach().clone() for p in guide.parameters()]
    del guide
    gc.collect()
    pyro.clear_param_store()
    pyro.get_param_store().load(tmp_path / "store")
    twin = small(simple)
    twin()
    assert all(map(torch.equal, twin.parameters(), values))


def test_a_run_goes_on_from_its_checkpoint(tmp_path):
    class KilledError(Exception):
        pass

    def run(path, num_alive):
        pyro.clear_param_store()
        calls = []

        def model():
            calls.append(1)
            if len(calls) > num_alive:
                raise KilledError
            simple()

        guide = small(model)
        settings = {"num_steps": 20, "num_particles": 1, "seed": 5, "checkpoint_every": 5}
        try:
            fit(model, guide, checkpoint=path, progress=False, **settings)
        except KilledError:
            return None
        return guide.tables[0].detach().clone()

    whole = run(tmp_path / "whole", 10_000)
    assert run(tmp_path / "killed", 23) is None
    assert_close(run(tmp_path / "killed", 10_000), whole)


def test_it_is_part_of_a_list_of_guides():
    guide = AutoGuideList(simple)
    guide.append(AutoNormal(poutine.block(simple, expose=["mean"])))
    guide.append(small(poutine.block(simple, expose=["effect"])))
    svi = SVI(simple, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    assert all(loss < 1e6 for loss in [svi.step() for _ in range(3)])


def test_fit_moves_the_rows_drawn_alone_within_a_list_of_guides_too():
    guide = AutoGuideList(simple)
    guide.append(AutoNormal(poutine.block(simple, expose=["mean"])))
    guide.append(small(poutine.block(simple, expose=["effect"])))
    guide()
    table = guide[1].tables[0]
    with torch.no_grad():
        table.normal_()
    before = table.detach().clone()
    fit(simple, guide, num_steps=1, num_particles=1, seed=3, progress=False)
    assert (table != before).any(-1).sum() == 4


def test_mean_field_elbos_and_double_precision():
    guide = small(simple).double()
    svi = SVI(simple, guide, pyro.optim.Adam({"lr": 0.01}), TraceMeanField_ELBO())
    svi.step()
    assert {p.dtype for p in guide.parameters()} == {torch.float64}


def whole(x):
    scale = pyro.sample("scale", dist.HalfNormal(1.0))
    with pyro.plate("rows", len(x)):
        w = pyro.sample("w", dist.Normal(0.0, scale))
        pyro.sample("x", dist.Normal(w, 1.0), obs=x)


@pytest.mark.parametrize("num_rows", [1, 7])
def test_an_encoder_has_to_return_the_rows_that_the_model_has(num_rows):
    guide = small(whole, encoder=lambda x: x.new_ones(num_rows, 3))
    with pytest.raises(ValueError, match=rf"\(25, 3\); got \({num_rows}"):
        guide(torch.randn(25))


def test_fit_and_other_optimisers_take_a_guide_made_for_sparse_adam():
    guide = small(simple, embedding_grad="sparse")
    svi = SVI(simple, guide, pyro.optim.SparseAdam({"lr": 0.01}), Trace_ELBO())
    svi.step()
    fit(simple, guide, **FAST)
    svi.step()
    guide.embedding_grad = "dense"
    SVI(simple, guide, pyro.optim.ClippedAdam({"lr": 0.01}), Trace_ELBO()).step()


def test_fit_begins_without_the_gradients_of_others():
    guide = small(simple)
    guide.setup()
    SVI(simple, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO()).step()
    guide.tables[0].grad = torch.full_like(guide.tables[0], 1e3)
    before = guide.tables[0].detach().clone()
    fit(simple, guide, num_steps=1, num_particles=1, progress=False)
    assert (guide.tables[0] != before).any(-1).sum() == 4


def test_many_draws_are_made_in_parts(monkeypatch):
    guide = small(nested)
    guide()
    monkeypatch.setattr("pyro_iaf.models.particles.MAX_NUMBERS", 1000)
    sizes = []
    original = AutoHierarchicalIAF._draw

    def draw(self, *args):
        drawn = original(self, *args)
        sizes.append(drawn["school"][0].numel())
        return drawn

    monkeypatch.setattr(AutoHierarchicalIAF, "_draw", draw)
    draws = guide.sample_posterior(50)
    assert draws["pupil"].shape == (50, 4, 6)
    assert draws["scale"].shape == (50,)
    assert len(sizes) > 5
    assert max(sizes) < 50


def test_a_subsample_that_the_model_is_given_needs_create_plates():
    def model(rows):
        with pyro.plate("rows", 12, subsample=rows):
            w = pyro.sample("w", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(w, 1.0), obs=torch.linspace(-2, 2, 12)[rows])

    rows = torch.tensor([1, 5, 7])
    with pytest.raises(ValueError, match="Give create_plates"):
        small(model)(rows)
    guide = small(model, create_plates=lambda rows: pyro.plate("rows", 12, subsample=rows))
    assert guide(rows)["w"].shape == (3,)


def test_encoders_may_be_modules_and_functions_under_any_names():
    def model(x):
        with pyro.plate("items", 4, dim=-1):
            pyro.sample("a", dist.Normal(0.0, 1.0))
        with pyro.plate("user.name", 3, dim=-2):
            pyro.sample("b", dist.Normal(0.0, 1.0))

    class PerItem(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(4, 3))

        def forward(self, x):
            return self.weight

    encoders = {"user.name": lambda x: x.new_ones(3, 1, 3), "items": PerItem()}
    guide = small(model, encoder=encoders)
    x = torch.tensor(0.0)
    guide(x)
    before = encoders["items"].weight.detach().clone()
    fit(model, guide, (x,), **FAST)
    assert not torch.equal(before, encoders["items"].weight)
    assert "encoder.parts.0.weight" in guide.state_dict()
    assert guide.sample_posterior(5, x)["b"].shape == (5, 3, 1)


def test_an_encoder_of_no_layers_is_one():
    guide = small(whole_rows, encoder=nn.Sequential())
    guide(torch.randn(5, 3))
    assert not list(guide.tables)


def whole_rows(x):
    with pyro.plate("rows", len(x)):
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(w.unsqueeze(-1), 1.0).expand([*w.shape, 3]).to_event(1), obs=x)


def test_plates_whose_joint_names_are_alike_have_draws_of_their_own():
    def model():
        with pyro.plate("a_b", 2, dim=-1):
            pyro.sample("u", dist.Normal(0.0, 1.0))
        with pyro.plate("a", 3, dim=-3), pyro.plate("b", 4, dim=-2):
            pyro.sample("v", dist.Normal(0.0, 1.0))

    assert small(model)()["v"].shape == (3, 4, 1)


def test_globals_may_have_a_batch_that_no_plate_declares():
    def model():
        w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0))
        pyro.sample("y", dist.Normal(w, 1.0).to_event(1), obs=torch.ones(3))

    guide = small(model)
    guide()
    assert guide.sample_posterior(7)["w"].shape == (7, 3)
    assert guide.median()["w"].shape == (3,)
    assert guide.quantiles([0.1, 0.9])["w"].shape == (2, 3)


def test_supports_may_be_written_out_for_all_rows():
    def model():
        with pyro.plate("rows", 12, subsample_size=4):
            pyro.sample("u", dist.Uniform(torch.zeros(4), 2 * torch.ones(4)))
            pyro.sample("p", dist.Pareto(torch.tensor(1.0), torch.tensor(3.0)))

    guide = small(model)
    fit(model, guide, **FAST)
    draws = guide.sample_posterior(100)
    assert draws["u"].shape == (100, 12)
    assert 0 < draws["u"].min() < draws["u"].max() < 2
    assert draws["p"].min() > 1


def test_more_rows_than_a_table_has_are_an_error():
    def model(x):
        with pyro.plate("a", len(x), dim=-2):
            u = pyro.sample("u", dist.Normal(0.0, 1.0))
            with pyro.plate("b", 2, dim=-1):
                w = pyro.sample("w", dist.Normal(u, 1.0))
                pyro.sample("x", dist.Normal(w, 1.0), obs=x)

    guide = small(model, encoder={"a/b": lambda x: x.unsqueeze(-1).expand(-1, -1, 3)})
    guide(torch.randn(4, 2))
    for size in (3, 5):
        with pytest.raises(ValueError, match=f"{size} rows of plate 'a'; the guide has"):
            guide.sample_posterior(2, torch.randn(size, 2))


def test_rows_have_to_be_a_dict():
    guide = small(simple)
    with pytest.raises(ValueError, match="rows should be a dict"):
        guide.sample_posterior(2, rows=[1, 2])


@pytest.mark.parametrize("none", [[], torch.tensor([], dtype=torch.long)], ids=["list", "tensor"])
def test_no_row_is_no_choice(none):
    guide = small(simple)
    with pytest.raises(ValueError, match="at least one row"):
        guide.sample_posterior(2, rows={"rows": none})


def test_minibatches_of_another_size_lead_to_create_plates():
    def model(x):
        with pyro.plate("rows", 25, subsample_size=len(x)):
            w = pyro.sample("w", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(w, 1.0), obs=x)

    def encoder(x):
        return x.unsqueeze(-1).expand(-1, 3)

    guide = small(model, encoder=encoder)
    guide(torch.randn(10))
    with pytest.raises(ValueError, match="create_plates=lambda"):
        guide(torch.randn(5))
    made = small(
        model, encoder=encoder, create_plates=lambda x: pyro.plate("rows", 25, len(x)), name="made"
    )
    fit(model, made, data=[(torch.randn(10),), (torch.randn(10),), (torch.randn(5),)], **FAST)


def test_nothing_has_settled_before_the_rows_were_visited():
    for num_rows, stopped in ((8, "the ELBO had settled"), (4000, "all steps were taken")):

        def model(num_rows=num_rows):
            with pyro.plate("rows", num_rows, subsample_size=8):
                pyro.sample("w", dist.Normal(0.0, 1.0))

        pyro.clear_param_store()
        guide = small(model)
        # Of the ordinary gradient, whose noise hides what is still gained.
        result = fit(model, guide, num_steps=1000, loss=Trace_ELBO(), seed=0, progress=False)
        assert result.stopped == stopped
