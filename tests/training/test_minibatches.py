"""Runs that see some rows at a time end at the posterior of all rows.

Truth is the posterior of a linear regression, which is normal, and the same runs on all rows.
"""

import functools
import warnings

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from pyro.infer.autoguide.initialization import init_to_value
from torch.testing import assert_close
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from pyro_iaf import Anchor, AutoHierarchicalIAF, AutoIAF, TraceSTL_ELBO, diagnose, fit, refine
from pyro_iaf.elbo.objectives import LatentLoss
from pyro_iaf.models.epoch import epoch_of
from pyro_iaf.models.log_joint import LogJoint
from pyro_iaf.models.rows import Part, RowsInTurn, all_rows, chosen_rows
from pyro_iaf.models.weighted import WeightedParticles
from pyro_iaf.models.whole import WholeParticles, on_all_rows

N, B, SIGMA = 2000, 50, 0.5
QUIET = {"seed": 0, "progress": False}


@functools.cache
def data():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(N, 3, generator=generator, dtype=torch.float64)
    y = x @ torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)
    return x, y + SIGMA * torch.randn(N, generator=generator, dtype=torch.float64)


def regression(size=B):
    """Rows by the subsample of a plate; the product does not broadcast over particles."""
    x, y = data()
    w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    with pyro.plate("rows", N, subsample_size=size) as rows:
        pyro.sample("y", dist.Normal(x[rows] @ w, SIGMA), obs=y[rows])


def given_rows(x, y):
    """Rows by minibatches, which the plate scales."""
    w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    with pyro.plate("rows", N, subsample_size=len(y)):
        pyro.sample("y", dist.Normal((w.unsqueeze(-2) * x).sum(-1), SIGMA), obs=y)


def scaled_rows(x, y):
    """Rows by minibatches, scaled by a number that holds for B of them only."""
    w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    with pyro.plate("rows", len(y)), poutine.scale(scale=N / B):
        pyro.sample("y", dist.Normal((w.unsqueeze(-2) * x).sum(-1), SIGMA), obs=y)


def posterior():
    x, y = data()
    precision = torch.eye(3) + x.mT @ x / SIGMA**2
    cov = precision.inverse()
    return cov @ x.mT @ y / SIGMA**2, cov


def loader(**settings):
    return DataLoader(TensorDataset(*data()), batch_size=B, **settings)


def assert_posterior(draws, mean_error=0.1, sd_error=0.07):
    mean, cov = posterior()
    sd = cov.diagonal().sqrt()
    assert ((draws.mean(0) - mean).abs() < mean_error * sd).all()
    assert_close(draws.std(0) / sd, torch.ones(3), atol=sd_error, rtol=0)


def traced(model, *args):
    return poutine.trace(model).get_trace(*args)


# All rows


def log_density(model, w, *args):
    trace = traced(poutine.condition(model, {"w": w}), *args)
    return trace.log_prob_sum()


def test_a_model_is_run_on_all_rows_of_its_plate():
    rows = all_rows(regression, traced(regression), (), {})
    assert torch.equal(rows["rows"], torch.arange(N))
    w = torch.tensor([0.1, 0.2, 0.3])
    with chosen_rows(rows):
        found = log_density(regression, w)
    assert_close(found, log_density(lambda: regression(None), w))
    assert traced(regression).nodes["rows"]["value"].shape == (B,)  # as before


def own_minibatch():
    given_rows(*(part[:B] for part in data()))


def one_row():
    given_rows(*(part[:1] for part in data()))


def fixed_size():
    _, y = data()
    w = pyro.sample("w", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", N, subsample_size=B) as rows:
        pyro.sample("y", dist.Normal(w.expand(B), 1.0), obs=y[rows])


def local_latents():
    _, y = data()
    with pyro.plate("rows", N, subsample_size=B) as rows:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=y[rows])


def not_additive():
    _, y = data()
    w = pyro.sample("w", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", N, subsample_size=B) as rows:
        y = y[rows]
        pyro.sample("y", dist.Normal(w + y.mean(), 1.0), obs=y)


@pytest.mark.parametrize(
    "model",
    [own_minibatch, one_row, fixed_size, local_latents, not_additive, lambda: regression(None)],
)
def test_other_models_are_not_run_on_other_rows(model):
    assert all_rows(model, traced(model), (), {}) == {}


def two_plates():
    x, y = data()
    w = pyro.sample("w", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", N, subsample_size=B) as rows:
        pyro.sample("y", dist.Normal(w, 1.0), obs=y[rows])
    with pyro.plate("others", N // 2, subsample_size=7) as others:
        pyro.sample("x", dist.Normal(w, 1.0), obs=x[others, 0])


def test_all_rows_of_several_plates():
    rows = all_rows(two_plates, traced(two_plates), (), {})
    assert {name: len(each) for name, each in rows.items()} == {"rows": N, "others": N // 2}
    x, y = data()
    w = torch.tensor(0.3)
    with chosen_rows(rows):
        found = log_density(two_plates, w)
    normal = dist.Normal(w, 1.0)
    expected = normal.log_prob(y).sum() + normal.log_prob(x[: N // 2, 0]).sum()
    assert_close(found, expected + dist.Normal(0.0, 1.0).log_prob(w))


def test_parts_of_the_rows_have_the_density_of_all():
    trace = traced(regression)
    joint = LogJoint(regression, trace, (), {})
    z = torch.randn(5, 3)
    joint.check(z)
    rows = torch.randperm(N)
    pieces = [Part(len(r) / N, {"rows": r}) for r in rows.split(700)]
    parts, whole = joint.on_parts(pieces), joint.on_parts([Part(1.0, {"rows": rows})])
    assert_close(parts(z), whole(z))
    for found, expected in zip(parts.gradient(z), whole.gradient(z), strict=True):
        assert_close(found, expected)
    assert_close(parts.hessian(z), whole.hessian(z))
    assert not whole.subsampled
    assert parts.work == pytest.approx(3 * parts.num_numbers)


@pytest.mark.parametrize("model", [given_rows, scaled_rows])
def test_minibatches_have_the_density_of_all_data(model):
    batches = [(x, y) for x, y in loader()]
    epoch = epoch_of(model, batches, lambda anew=False: ((batch, {}) for batch in batches))
    assert epoch.is_joined == (model is given_rows)
    assert sum(part.share for part in epoch) == pytest.approx(1.0)
    joint = LogJoint(model, traced(model, *batches[0]), batches[0], {}).on_parts(epoch)
    w = torch.randn(4, 3)
    joint.check(w)
    full = [log_density(lambda: regression(None), each) for each in w]
    assert_close(joint(w), torch.stack(full))


def test_large_minibatches_are_not_kept(monkeypatch):
    monkeypatch.setattr("pyro_iaf.models.epoch.MOST_KEPT", 100)
    monkeypatch.setattr("pyro_iaf.models.epoch.MOST_ROWS", 300)
    reads = []

    def each(anew=False):
        reads.append(1)
        return ((tuple(batch), {}) for batch in loader())

    epoch = epoch_of(given_rows, loader(), each)
    assert epoch.sizes == [300] * 6 + [200]
    before = len(reads)
    assert [part.share for part in epoch] == [0.15] * 6 + [0.1]
    assert len(reads) == before + 1
    some = epoch.some(600)
    assert len(some) == 2
    assert sum(part.share for part in some) == pytest.approx(1.0)


def as_epoch(batches):
    return lambda anew=False: ((tuple(batch), {}) for batch in batches)


def test_data_without_an_end_are_no_epoch(monkeypatch):
    monkeypatch.setattr("pyro_iaf.models.epoch.MOST_UNKNOWN", 50)

    def each(anew=False):
        while True:
            for batch in loader():
                yield tuple(batch), {}

    assert epoch_of(given_rows, iter(()), each) is None
    assert epoch_of(given_rows, iter(()), as_epoch(loader())) is not None


def drawn_at_random(x, y):
    rows = torch.randperm(len(y))[:10]
    given_rows(x[rows], y[rows])


def latents_of_rows(y):
    with pyro.plate("rows", len(y)), poutine.scale(scale=N / B):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=y)


def test_what_is_random_or_has_latents_of_its_rows_is_no_epoch():
    assert epoch_of(drawn_at_random, loader(), as_epoch(loader())) is None
    assert epoch_of(latents_of_rows, loader(), as_epoch([(y,) for _, y in loader()])) is None


def test_weights_on_all_rows_are_those_of_a_model_without_subsamples():
    guide = AutoIAF(regression)
    guide.setup()
    whole = on_all_rows(WeightedParticles(regression, guide, (), {}), regression)
    assert isinstance(whole, WholeParticles)
    found = whole.weighted(50)
    joint = LogJoint(regression, traced(lambda: regression(None)), (), {})
    full = torch.stack([log_density(lambda: regression(None), w) for w in found.sites["w"]])
    log_q = guide.get_posterior().log_prob(joint.unconstrained(found.sites))
    assert_close(found.log_weights, full - log_q)


# Rows in turn


def test_every_row_comes_once_in_an_epoch():
    turn, seen = RowsInTurn(), []
    turn.meet(traced(regression))
    for _ in range(2 * N // B):
        with turn:
            seen.append(traced(regression).nodes["rows"]["value"].clone())
        turn.step()
    first, second = torch.cat(seen).split(N)
    assert torch.equal(first.sort().values, torch.arange(N))
    assert torch.equal(second.sort().values, torch.arange(N))
    assert not torch.equal(first, second)


def test_rows_that_do_not_divide_the_plate_come_in_turn_too():
    turn = RowsInTurn()
    turn.meet(traced(lambda: regression(300)))
    seen = []
    for _ in range(20):  # three epochs
        with turn:
            seen.append(traced(lambda: regression(300)).nodes["rows"]["value"].clone())
        turn.step()
    counts = torch.cat(seen).bincount(minlength=N)
    assert set(counts.tolist()) == {3}


def test_a_shorter_last_minibatch_gets_fewer_rows():
    turn = RowsInTurn()
    turn.meet(traced(regression))
    with turn:
        assert len(traced(lambda: regression(20)).nodes["rows"]["value"]) == 20
        assert len(traced(lambda: regression(B + 1)).nodes["rows"]["value"]) == B + 1


def test_they_go_on_where_a_checkpoint_was_written():
    turn, other = RowsInTurn(), RowsInTurn()
    turn.meet(traced(lambda: regression(300)))
    for _ in range(8):
        turn.step()
    state = turn.state()
    generator = torch.get_rng_state()
    other.restore({name: tuple(map(copied, each)) for name, each in state.items()})
    assert torch.equal(torch.get_rng_state(), generator)
    for _ in range(8):
        torch.set_rng_state(generator)
        turn.step()
        torch.set_rng_state(generator)
        other.step()
        assert torch.equal(turn._plates["rows"].rows, other._plates["rows"].rows)


def copied(value):
    return value.clone() if isinstance(value, torch.Tensor) else value


# Anchors


@pytest.mark.parametrize("vectorized", [False, True])
@pytest.mark.parametrize("kind", ["AutoIAF", "AutoNormal"])
def test_an_anchor_takes_the_noise_away(kind, vectorized):
    def model():  # broadcasts
        x, y = data()
        w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        with pyro.plate("rows", N, subsample_size=B) as rows:
            mean = (w.unsqueeze(-2) * x[rows]).sum(-1) if w.dim() == 1 else (w * x[rows]).sum(-1)
            pyro.sample("y", dist.Normal(mean, SIGMA), obs=y[rows])

    mean, cov = posterior()
    at_mean = init_to_value(values={"w": mean})
    guide = AutoNormal(model, init_loc_fn=at_mean, init_scale=0.01)
    if kind == "AutoIAF":
        guide = AutoIAF(model)
    settings = {"num_particles": 4, "vectorize_particles": vectorized, "max_plate_nesting": 1}
    anchor = Anchor(model, {"w": mean + cov.diagonal().sqrt()})
    losses = []
    for anchored in (None, anchor):
        elbo = TraceSTL_ELBO(anchor=anchored, **settings)
        found = []
        for seed in range(12):
            pyro.set_rng_seed(seed)
            guide.zero_grad()
            found.append(elbo.loss_and_grads(model, guide))
        losses.append(torch.tensor(found))
    assert losses[1].std() < 0.05 * losses[0].std()
    full = Trace_ELBO(num_particles=200, vectorize_particles=False).loss(model, guide)
    assert losses[1].mean() == pytest.approx(full, abs=4 * losses[0].std().item())


def test_its_gradient_is_unbiased_wherever_it_is():
    """The mean over all minibatches of an epoch is the gradient on all rows."""
    mean, cov = posterior()
    guide = AutoIAF(regression)
    guide.setup()
    z = guide.sample_posterior(6)["w"]
    joint = LogJoint(regression, traced(regression), (), {})
    joint.check(z)
    whole = joint.on_parts([Part(1.0, {"rows": torch.arange(N)})])
    value, slope = whole.gradient(z)
    for away in (0.0, 30.0):
        anchor = Anchor(regression, {"w": mean + away * cov.diagonal().sqrt()})
        values, slopes = [], []
        for rows in torch.randperm(N).split(B):
            part = joint.with_data((), {})
            part.subsamples = {"rows": rows}
            own, own_slope = part.gradient(z)
            at_anchor, slope_there = part.gradient(anchor.point.unsqueeze(0))
            corrected, more = anchor.correct(own, z, at_anchor[0], slope_there[0])
            values.append(corrected)
            slopes.append(own_slope + more)
        assert_close(torch.stack(values).mean(0), value)
        assert_close(torch.stack(slopes).mean(0), slope)


def test_an_anchor_of_minibatches_knows_all_data():
    mean, _ = posterior()
    found = Anchor(given_rows, {"w": mean}, data=loader())
    expected = Anchor(regression, {"w": mean})
    for ours, theirs in zip(found.tensors, expected.tensors, strict=True):
        assert_close(ours, theirs)


def test_an_svi_loop_with_an_anchor_finds_the_posterior():
    mean, cov = posterior()
    away = mean + cov.diagonal().sqrt()
    guide = AutoMultivariateNormal(
        regression, init_loc_fn=init_to_value(values={"w": away}), init_scale=0.012
    )
    elbo = TraceSTL_ELBO(num_particles=4, anchor=Anchor(regression, {"w": away}))
    svi = SVI(regression, guide, pyro.optim.ClippedAdam({"lr": 0.02, "lrd": 0.98}), elbo)
    for _ in range(250):
        svi.step()
    normal = guide.get_posterior()
    sd = cov.diagonal().sqrt()
    assert ((normal.mean - mean).abs() < 0.2 * sd).all()
    assert_close(normal.stddev / sd, torch.ones(3), atol=0.07, rtol=0)


def test_errors_of_anchors_name_the_fix():
    mean, _ = posterior()
    with pytest.raises(ValueError, match="needs a model that sees some of its rows at a time"):
        Anchor(lambda: regression(None), {"w": mean})
    with pytest.raises(ValueError, match=r"site 'w' is not among \['v'\]"):
        Anchor(regression, {"v": mean})
    with pytest.raises(ValueError, match="anchor should be an Anchor"):
        TraceSTL_ELBO(anchor=mean)
    with pytest.raises(ValueError, match="anchor should be True or False"):
        fit(regression, AutoIAF(regression), anchor="yes")


# Fits


def by_plate(**settings):
    pyro.clear_param_store()
    return fit(regression, guide := AutoIAF(regression), **QUIET, **settings), guide


def by_minibatches(model, **settings):
    pyro.clear_param_store()
    data = settings.pop("data", None) or loader(shuffle=True)
    return fit(model, guide := AutoIAF(model), data=data, **QUIET, **settings), guide


FITS = {
    "plate": by_plate,
    "minibatches": lambda **settings: by_minibatches(given_rows, **settings),
    "scaled minibatches": lambda **settings: by_minibatches(scaled_rows, **settings),
    "list": lambda **settings: by_minibatches(given_rows, data=[*loader()], **settings),
}


@pytest.mark.parametrize("run", [FITS["plate"], FITS["minibatches"]], ids=["plate", "minibatches"])
def test_a_fit_is_certified_on_all_rows(run):
    result, guide = run()
    assert result.diagnosis.verdict == "good"
    assert not result.diagnosis.subsampled
    assert_posterior(guide.sample_posterior(20_000)["w"])


@pytest.mark.parametrize("run", FITS.values(), ids=FITS)
def test_an_anchor_leaves_little_of_the_noise(run):
    result, guide = run(num_steps=60)
    before, after = result.noise
    assert after < 0.1 * before  # what is left is of the rows' curvature
    assert_posterior(guide.sample_posterior(20_000)["w"], 0.2, 0.15)  # after few steps


@pytest.mark.parametrize("run", [FITS["plate"], FITS["minibatches"]], ids=["plate", "minibatches"])
def test_a_recorded_fit_has_the_losses_of_the_code(run):
    result, _ = run(num_steps=40, compile="graph")
    other, _ = run(num_steps=40, compile=False)
    assert result.backend == "graph"
    assert_close(result.losses, other.losses, rtol=1e-6, atol=1e-6)


def test_a_second_fit_of_a_guide_goes_through_the_rows_too():
    def losses(how):
        pyro.clear_param_store()
        guide = AutoIAF(regression)
        settings = {"num_steps": 30, "compile": how, **QUIET}
        return [fit(regression, guide, **settings).losses for _ in range(2)]

    for found, expected in zip(losses("graph"), losses(False), strict=True):
        assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_losses_on_minibatches_are_those_on_all_rows_nearly():
    with_anchor, _ = by_plate(num_steps=30)
    without, _ = by_plate(num_steps=30, anchor=False)
    assert without.noise is None
    assert with_anchor.losses.std() < 0.1 * without.losses.std()


@pytest.mark.parametrize("run", [FITS["plate"], FITS["minibatches"]], ids=["plate", "minibatches"])
def test_a_run_goes_on_in_mid_epoch(run, tmp_path, monkeypatch):
    whole, _ = run(num_steps=70)
    path = tmp_path / "run.pt"

    usual, calls = LatentLoss.__call__, []

    def stopping(self, *args):
        calls.append(1)
        if len(calls) == 33:
            raise KeyError
        return usual(self, *args)

    monkeypatch.setattr(LatentLoss, "__call__", stopping)
    with pytest.raises(KeyError):
        run(num_steps=70, compile=False, checkpoint=path)
    monkeypatch.undo()
    again, _ = run(num_steps=70, compile=False, checkpoint=path)
    assert again.resumed_at == 32
    assert_close(again.losses, whole.losses, rtol=0, atol=0)
    assert again.noise == whole.noise


def with_parameter():
    x, y = data()
    w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    shift = pyro.param("shift", torch.tensor(0.0))
    with pyro.plate("rows", N, subsample_size=B) as rows:
        pyro.sample("y", dist.Normal(shift + x[rows] @ w, SIGMA), obs=y[rows])


def test_a_model_with_parameters_has_no_anchor():
    result = fit(with_parameter, AutoIAF(with_parameter), num_steps=20, **QUIET)
    assert result.noise is None


@pytest.mark.parametrize("guide", [AutoNormal, AutoMultivariateNormal])
def test_guides_of_pyros_are_anchored(guide):
    made = guide(regression, init_scale=0.01)
    result = fit(regression, made, num_steps=20, compile=False, **QUIET)
    assert result.noise[1] < 0.1 * result.noise[0]


def test_a_hierarchical_guide_takes_rows_in_turn():
    guide = AutoHierarchicalIAF(local_latents, hidden_dims=[8], context_dim=1)
    result = fit(local_latents, guide, num_steps=5, **QUIET)
    assert result.noise is None
    assert result.diagnosis is None


class Stream(IterableDataset):
    def __iter__(self):
        yield from zip(*data(), strict=True)


def test_minibatches_that_can_be_had_once_or_are_a_stream():
    result = fit(given_rows, AutoIAF(given_rows), data=iter([*loader()]), num_steps=10, **QUIET)
    assert result.noise is None
    streamed = DataLoader(Stream(), batch_size=B)
    result = fit(given_rows, AutoIAF(given_rows), data=streamed, **QUIET)
    assert result.diagnosis.verdict == "good"


def test_the_generators_are_left_alone_by_looks_at_all_data():
    generator = torch.Generator().manual_seed(3)
    shuffled = loader(shuffle=True, generator=generator)
    by_minibatches(given_rows, data=shuffled, num_steps=3)
    here = generator.get_state()
    generator.manual_seed(3)
    next(iter(shuffled))
    assert torch.equal(generator.get_state(), here)


def test_a_subsample_is_diagnosed_on_all_rows():
    guide = AutoIAF(regression)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        diagnosis = diagnose(regression, guide)
    assert not diagnosis.subsampled
    assert diagnosis.verdict == "good"
    assert diagnosis.elbo_se < 0.05


def test_a_model_of_discrete_latents_alone_is_diagnosed_on_all_rows():
    def model():
        z = pyro.sample("z", dist.Categorical(torch.ones(2)))
        with pyro.plate("rows", N, subsample_size=B) as rows:
            pyro.sample("y", dist.Normal(z, 100.0), obs=data()[1][rows])

    def guide():
        pyro.sample("z", dist.Categorical(torch.ones(2)))

    assert not diagnose(model, guide, num_samples=200, search=False).subsampled


def test_minibatches_are_diagnosed_on_all_data():
    guide = AutoIAF(given_rows)
    fit(given_rows, guide, data=loader(shuffle=True), **QUIET)
    diagnosis = diagnose(given_rows, guide, data=loader(), num_samples=1000, search=False)
    x, y = data()
    on_all = diagnose(given_rows, guide, (x, y), num_samples=1000, search=False)
    assert diagnosis.verdict == on_all.verdict
    assert diagnosis.elbo == pytest.approx(on_all.elbo, abs=0.05)


class OnDisk:
    """Minibatches of rows in a file, read when they are needed."""

    def __init__(self, path, num_rows, size):
        self.table = np.memmap(path, dtype="float64", mode="r", shape=(num_rows, 4))
        self.size, self.num_reads = size, 0

    def __len__(self):
        return -(-len(self.table) // self.size)

    def __iter__(self):
        for k in torch.randperm(len(self)).tolist():
            self.num_reads += 1
            part = torch.from_numpy(np.array(self.table[k * self.size : (k + 1) * self.size]))
            yield part[:, :3], part[:, 3]


def test_rows_in_a_file_are_read_anew_each_time(tmp_path, monkeypatch):
    monkeypatch.setattr("pyro_iaf.models.epoch.MOST_KEPT", 1000)
    monkeypatch.setattr("pyro_iaf.models.epoch.MOST_ROWS", 5000)
    num_rows, path = 20_500, tmp_path / "rows"
    table = np.memmap(path, dtype="float64", mode="w+", shape=(num_rows, 4))
    rng = np.random.default_rng(0)
    table[:, :3] = rng.standard_normal((num_rows, 3))
    table[:, 3] = table[:, :3] @ [0.5, -1.0, 2.0] + SIGMA * rng.standard_normal(num_rows)
    table.flush()

    def model(x, y):
        w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        with pyro.plate("rows", num_rows, subsample_size=len(y)):
            pyro.sample("y", dist.Normal(x @ w, SIGMA), obs=y)

    minibatches = OnDisk(path, num_rows, 500)
    guide = AutoIAF(model)
    result = fit(model, guide, data=minibatches, **QUIET)
    assert result.diagnosis.verdict == "good"
    assert minibatches.num_reads > 3 * len(minibatches)
    x, y = (torch.from_numpy(np.array(part)) for part in (table[:, :3], table[:, 3]))
    cov = (torch.eye(3) + x.mT @ x / SIGMA**2).inverse()
    mean, sd = cov @ x.mT @ y / SIGMA**2, cov.diagonal().sqrt()
    draws = guide.sample_posterior(20_000)["w"]
    assert ((draws.mean(0) - mean).abs() < 0.1 * sd).all()
    assert_close(draws.std(0) / sd, torch.ones(3), atol=0.07, rtol=0)


def test_draws_are_resampled_and_refined_on_all_rows():
    guide = AutoIAF(regression)
    fit(regression, guide, num_steps=20, **QUIET)
    assert_posterior(guide.sample_posterior(4000, resample=True)["w"], 0.15, 0.1)
    refined = refine(regression, guide, num_samples=400, **QUIET)
    assert refined.converged


class Subsets:
    """Other rows in each epoch."""

    def __iter__(self):
        x, y = data()
        for rows in torch.randperm(N)[: N // 4].split(B):
            yield x[rows], y[rows]


def repeated():
    x, y = data()
    sampler = torch.utils.data.RandomSampler(range(N), replacement=True)
    return DataLoader(TensorDataset(x, y), batch_size=B, sampler=sampler)


def dropped():
    return DataLoader(TensorDataset(*data()), batch_size=700, shuffle=True, drop_last=True)


@pytest.mark.parametrize("make", [Subsets, repeated, dropped])
def test_epochs_of_other_rows_are_not_taken_for_all_data(make):
    result = fit(given_rows, AutoIAF(given_rows), data=make(), num_steps=10, **QUIET)
    assert result.noise is None


def test_a_guide_that_reads_its_minibatch_is_trained_as_it_was():
    sets = [(k + 0.1 * torch.randn(30),) for k in range(-3, 4)]

    def model(y):
        mean = pyro.sample("mean", dist.Normal(0.0, 10.0))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(mean, 1.0), obs=y)

    def guide(y):
        slope = pyro.param("slope", torch.tensor(0.5))
        pyro.sample("mean", dist.Normal(slope * y.mean(), 0.2))

    result = fit(model, guide, data=sets, num_steps=600, lr=0.02, **QUIET)
    assert result.noise is None
    assert pyro.param("slope").item() == pytest.approx(1.0, abs=0.05)


def of_groups(group, y):
    means = pyro.sample("means", dist.Normal(torch.zeros(2), 10.0).to_event(1))
    with pyro.plate("rows", 400, subsample_size=len(y)):
        pyro.sample("y", dist.Normal(means[..., group : group + 1], 1.0), obs=y)


@pytest.mark.parametrize("as_tensor", [False, True])
def test_only_minibatches_that_are_alike_become_one(as_tensor):
    y = torch.cat([torch.randn(200) - 2, torch.randn(200) + 8])
    groups = [torch.tensor(k // 10) if as_tensor else k // 10 for k in range(20)]
    batches = [*zip(groups, y.split(20), strict=True)]
    epoch = epoch_of(of_groups, batches, lambda anew=False: ((b, {}) for b in batches))
    assert epoch is None or len(epoch) >= 2
    guide = AutoIAF(of_groups)
    fit(of_groups, guide, data=batches, num_steps=300, **QUIET)
    found = guide.median()["means"]
    assert_close(found, torch.stack([y[:200].mean(), y[200:].mean()]), atol=0.1, rtol=0)


def test_minibatches_of_other_shapes_are_data_too():
    def model(x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", 15, subsample_size=len(x)):
            pyro.sample(
                "x", dist.Normal(z, 1.0).expand([len(x), 1]).to_event(1), obs=x.mean(-1, True)
            )

    batches = [torch.randn(5, 3), torch.randn(5, 3), torch.randn(5, 4)]
    assert fit(model, AutoIAF(model), data=batches, num_steps=10, **QUIET).num_steps == 10


def test_a_plate_over_the_rows_of_a_minibatch_draws_of_them():
    sizes = set()

    def model(y):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", len(y), subsample_size=10) as rows:
            sizes.add((len(y), int(rows.max()) >= 20))
            pyro.sample("y", dist.Normal(z, 1.0), obs=y[rows])

    batches = [torch.randn(50), torch.randn(20)]
    fit(model, AutoNormal(model), data=batches, num_steps=40, compile=False, **QUIET)
    assert (50, True) in sizes


class OneBuffer:
    """A loader that fills the same memory again."""

    def __iter__(self):
        x, y = (part.clone() for part in loader_parts()[0])
        for a, b in loader_parts():
            x.copy_(a)
            y.copy_(b)
            yield x, y


def loader_parts():
    return [*loader()]


def test_a_buffer_may_be_used_again():
    _, y = data()
    epoch = epoch_of(given_rows, OneBuffer(), as_epoch(OneBuffer()))
    assert_close(torch.cat([part.batch[0][1] for part in epoch]), y)


class OfOneIterator:
    def __init__(self, batches):
        self.batches = iter(batches)

    def __iter__(self):
        return self.batches

    def __len__(self):
        raise NotImplementedError


def test_minibatches_behind_one_iterator_are_left_to_the_steps():
    data = OfOneIterator(loader_parts())
    assert fit(given_rows, AutoIAF(given_rows), data=data, num_steps=20, **QUIET).num_steps == 20
    with pytest.raises(ValueError, match="got an iterator"):
        Anchor(given_rows, {"w": torch.zeros(3)}, data=iter(loader_parts()))


def improper(x, y):
    w = pyro.sample("w", dist.ImproperUniform(dist.constraints.real_vector, (), (3,)))
    with pyro.plate("rows", N, subsample_size=len(y)):
        pyro.sample("y", dist.Normal((w.unsqueeze(-2) * x).sum(-1), SIGMA), obs=y)


def test_a_prior_without_draws_leaves_minibatches_to_the_steps():
    assert fit(improper, AutoIAF(improper), data=loader(), num_steps=20, **QUIET).noise is None


def test_an_anchor_of_a_model_with_parameters_is_refused():
    with pytest.raises(ValueError, match="parameters of the model change"):
        Anchor(with_parameter, {"w": torch.zeros(3)})
