"""Fits without a number of steps: they go on until they are certified, and say why they stopped."""

import itertools
import math
import subprocess
import sys
from contextlib import suppress
from types import SimpleNamespace

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoDelta, AutoNormal
from torch.testing import assert_close

from pyro_iaf import AutoHierarchicalIAF, AutoIAF, fit
from pyro_iaf.compiler.lowering import BACKENDS, Backend
from pyro_iaf.diagnostics import diagnose as diagnosing
from pyro_iaf.training import certificate, checkpoints, schedule
from pyro_iaf.training.averages import Averages
from pyro_iaf.training.certificate import Certificate
from pyro_iaf.training.schedule import Rounds

Y = torch.tensor([1.0, 2.0, 0.5, 1.5])


def conjugate():
    z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    pyro.sample("y", dist.Normal(z.sum(-1, keepdim=True), torch.ones(4)).to_event(1), obs=Y)


def banana():
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(0.5 * x**2, 0.5))


def scales():
    """Ten variances of one observation each: no guide is exact after a few hundred steps."""
    log_scale = pyro.sample("log_scale", dist.Normal(0.0, 2.0))
    pyro.sample("x", dist.Normal(torch.zeros(10), log_scale.exp().unsqueeze(-1)).to_event(1))


def quick(model, guide, *args, **settings):
    return fit(model, guide, *args, **{"progress": False, "seed": 0, **settings})


@pytest.fixture
def short_rounds(monkeypatch):
    """Rounds that end after 20, 40 and 80 steps."""
    monkeypatch.setattr(schedule, "FIRST_END", 20)
    monkeypatch.setattr(schedule, "LAST_END", 80)


# Why it stops


def test_it_stops_where_more_steps_would_change_nothing():
    guide = AutoIAF(conjugate)
    result = quick(conjugate, guide)
    assert result.num_steps == len(result.losses) == 100
    assert result.stopped == "more of them would change nothing"
    assert result.diagnosis.verdict == "good"
    assert len(result.diagnosis.log_weights) == 4000
    text = str(result)
    assert text.startswith("ELBO ")
    assert f"after 100 steps: {result.stopped}" in text
    assert "\nGood: the guide is close to the posterior.\n" in text
    draws = guide.sample_posterior(20_000)["z"]
    precision = torch.eye(2) + 4 * torch.ones(2, 2)
    assert_close(draws.mean(0), torch.full((2,), 5.0 / 9), atol=0.03, rtol=0)
    assert_close(draws.T.cov(), precision.inverse(), atol=0.05, rtol=0)


def test_it_goes_on_where_it_has_to():
    result = quick(banana, AutoIAF(banana))
    assert result.num_steps > 100
    assert result.stopped.startswith("more of them would ")
    assert result.diagnosis.verdict in ("good", "usable")  # by its tail, which wavers
    assert result.diagnosis.largest_change < 0.1


def test_it_stops_where_the_guide_can_do_no_better():
    result = quick(conjugate, AutoNormal(conjugate), lr=0.02)
    assert result.stopped == "the ELBO no longer rises"
    assert 800 <= result.num_steps < 6400
    assert result.diagnosis.verdict != "good"  # it is too narrow by half


def test_a_hard_posterior_has_a_bound(short_rounds):
    result = quick(scales, AutoIAF(scales, start="init"))
    assert result.num_steps == 80
    assert "fit takes no more by itself" in result.stopped
    assert "num_steps" in result.stopped
    assert result.diagnosis.verdict != "good"


def certificate_after(*elbos, error=0.01):
    particles = SimpleNamespace(at_once=True)
    made = Certificate(particles, lambda: None, 16, Averages({}), Rounds(1e-3, None))
    made.elbos = [(elbo, error) for elbo in elbos]
    return made


@pytest.mark.parametrize(
    ("elbos", "gap", "num_rounds_left", "expected"),
    [
        ((-9.0, -8.0, -7.0, -6.0, -5.0), 1.5, 2, False),  # two more rounds bring two nats
        ((-9.0, -8.0, -7.0, -6.0, -5.9), 1.5, 2, True),
        ((-9.0, -8.0, -7.0, -6.0, -6.1), 1.5, 2, True),
        ((-9.0, -8.0, -7.0, -6.0, -6.1), 0.05, 2, False),  # it is as good as there
        ((-7.0, -6.0, -5.9), 1.5, 4, False),  # too early to tell
    ],
)
def test_what_is_out_of_reach(elbos, gap, num_rounds_left, expected):
    assert certificate_after(*elbos)._is_out_of_reach(gap, num_rounds_left) is expected


@pytest.mark.parametrize(
    ("elbos", "error", "gap", "expected"),
    [
        ((-9.0, -5.0, -5.005, -5.0), 0.01, 0.3, True),
        ((-9.0, -5.0, -5.005, -4.9), 0.01, 0.3, False),  # it rises again
        ((-9.0, -5.1, -5.0, -5.0), 0.01, 0.3, False),  # once is not enough
        ((-5.0, -5.0, -5.0), 0.01, 0.3, False),  # it is early, and looks are of few draws
        ((-9.0, -5.0, -5.0, -5.0), 0.5, 0.3, False),  # nothing is known of it
        ((-9.0, -5.0, -5.0, -5.0), 0.5, 9.0, True),  # what it lacks is much more
    ],
)
def test_when_the_elbo_has_settled(elbos, error, gap, expected):
    assert certificate_after(*elbos, error=error)._has_settled(gap) is expected


# What it is judged by


def test_the_verdict_is_of_draws_that_decided_nothing(monkeypatch):
    judged, seen = diagnosing.judged, []

    def watch(particles, draws):
        seen.append(judged(particles, draws))
        return seen[-1]

    monkeypatch.setattr(diagnosing, "judged", watch)
    result = quick(conjugate, AutoIAF(conjugate))
    *decided, last = seen
    assert result.diagnosis is last
    for other in decided:
        assert not set(other.log_weights.tolist()) & set(last.log_weights.tolist())


def test_looks_leave_the_generator_alone(short_rounds):
    after = []
    for settings in ({}, {"num_steps": 80, "early_stop": False}):
        pyro.clear_param_store()
        result = quick(scales, AutoNormal(scales), **settings)
        assert result.num_steps == 80
        after.append(torch.rand(3))
    assert torch.equal(*after)


def test_the_same_seed_gives_the_same_run():
    runs = []
    for _ in range(2):
        pyro.clear_param_store()
        runs.append(quick(banana, AutoIAF(banana)))
    assert torch.equal(runs[0].losses, runs[1].losses)
    assert torch.equal(*(run.diagnosis.log_weights for run in runs))
    assert runs[0].stopped == runs[1].stopped


def test_an_int_gives_no_verdict():
    assert quick(conjugate, AutoIAF(conjugate), num_steps=50).diagnosis is None


# Other guides, losses and data


def test_a_point_has_no_verdict_but_an_end():
    def model():
        z = pyro.sample("z", dist.Normal(0.0, 100.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=torch.tensor(20.0))

    guide = AutoDelta(model)
    result = quick(model, guide, lr=0.05)
    assert result.diagnosis is None
    assert result.num_steps <= schedule.MAX_STEPS
    assert_close(guide.median()["z"], torch.tensor(20.0), atol=0.1, rtol=0)


def test_so_has_a_guide_whose_sites_vary(monkeypatch):
    monkeypatch.setattr(schedule, "MAX_STEPS", 150)

    def model(loc=0.0):
        if pyro.sample("a", dist.Normal(loc, 1.0)) > 0:
            pyro.sample("b", dist.Normal(0.0, 1.0))

    def guide():
        model(pyro.param("loc", torch.tensor(0.1)))

    result = quick(model, guide, loss=Trace_ELBO(), compile=False)
    assert result.num_steps == 150  # past the first look of others
    assert result.diagnosis is None


def test_a_loss_of_pyros_is_certified_too():
    guide = AutoIAF(conjugate)
    result = quick(conjugate, guide, loss=TraceMeanField_ELBO(4, vectorize_particles=True))
    assert result.diagnosis.verdict == "good"


def test_minibatches_that_are_had_once_go_on_until_the_elbo_has_settled(monkeypatch):
    monkeypatch.setattr(schedule, "MAX_STEPS", 60)

    def model(y):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 4, subsample_size=2):
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    result = quick(model, AutoIAF(model), data=itertools.cycle([(Y[:2],), (Y[2:],)]))
    assert result.num_steps == 60
    assert result.diagnosis is None


def test_a_model_with_latents_of_its_rows_does_too(monkeypatch):
    monkeypatch.setattr(schedule, "MAX_STEPS", 60)

    def model():
        with pyro.plate("data", 4, subsample_size=2) as rows:
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=Y[rows])

    result = quick(model, AutoHierarchicalIAF(model))
    assert result.num_steps == 60
    assert result.diagnosis is None


def test_a_round_that_makes_a_guide_worse_is_taken_back(monkeypatch):
    """Where it starts at the posterior, large steps with a noisy gradient lead away from it."""
    monkeypatch.setattr(schedule, "SLOWER", 1e-3)
    guide = AutoIAF(conjugate)
    guide.setup()
    result = quick(conjugate, guide, lr=1.0)
    assert result.diagnosis.verdict == "good"


def test_what_was_kept_comes_back():
    params = {"a": torch.tensor([1.0])}
    averages, rounds = Averages(params), Rounds(1e-3, None)
    made = Certificate(SimpleNamespace(at_once=True), lambda: None, 16, averages, rounds)
    near = SimpleNamespace(elbo=-5.0, elbo_se=0.01, gap=0.1)
    assert not made._is_worse(near)
    params["a"].fill_(2.0)
    assert made._is_worse(SimpleNamespace(elbo=-5.2, elbo_se=0.01, gap=0.3))
    assert not made._is_worse(SimpleNamespace(elbo=-5.02, elbo_se=0.01, gap=0.3))
    averages.restore()
    assert params["a"].item() == 1.0
    before = rounds.rate(10)
    rounds.slow_down()
    assert rounds.rate(10) == pytest.approx(schedule.SLOWER * before)


@pytest.mark.parametrize("num_steps", [0, -1, 1.5, True, "100"])
def test_numbers_of_steps_that_are_none_are_refused(num_steps):
    with pytest.raises(ValueError, match="num_steps"):
        quick(conjugate, AutoIAF(conjugate), num_steps=num_steps)


def test_without_an_early_stop_there_is_a_number_of_steps():
    with pytest.raises(ValueError, match="give their number as num_steps"):
        quick(conjugate, AutoIAF(conjugate), early_stop=False)


# Checkpoints


class StopError(Exception):
    pass


def interrupted_at(step, **settings):
    """A run of rounds that ends at its 80th step, or with an error in a step before it."""
    pyro.clear_param_store()

    def anneal(k):
        if k == step:
            raise StopError
        return 1.0

    guide = AutoNormal(scales)
    try:
        result = quick(scales, guide, annealing=anneal, num_particles=4, **settings)
    except StopError as error:
        return error.result, guide
    return result, guide


@pytest.mark.parametrize("mode", [False, "graph"])
@pytest.mark.parametrize("step", [5, 19, 20, 33, 41])
def test_a_resumed_run_is_the_same_to_the_bit(short_rounds, tmp_path, step, mode):
    settings = {"checkpoint": tmp_path / "run", "compile": mode, "checkpoint_every": 7}
    part, _ = interrupted_at(step, **settings)
    assert part.num_steps <= step
    assert part.stopped == "something else ended it"
    found, guide = interrupted_at(None, **settings)
    whole, other = interrupted_at(None, compile=mode)
    assert found.num_steps == whole.num_steps == 80
    assert 0 < found.resumed_at <= step or step == 5
    assert torch.equal(found.losses, whole.losses)
    assert torch.equal(found.diagnosis.log_weights, whole.diagnosis.log_weights)
    for ours, theirs in zip(guide.parameters(), other.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_a_run_that_was_over_is_judged_again_alike(short_rounds, tmp_path):
    first, second = (interrupted_at(None, checkpoint=tmp_path / "run")[0] for _ in range(2))
    assert second.resumed_at == second.num_steps == 80
    assert torch.equal(first.diagnosis.log_weights, second.diagnosis.log_weights)


def test_a_checkpoint_is_not_of_a_run_with_a_number_of_steps(short_rounds, tmp_path):
    quick(conjugate, AutoNormal(conjugate), checkpoint=tmp_path / "run")
    assert checkpoints.load(tmp_path / "run")["settings"]["num_steps"] is None
    with pytest.raises(ValueError, match="num_steps=None; this one has 3000"):
        quick(conjugate, AutoNormal(conjugate), num_steps=3000, checkpoint=tmp_path / "run")


def test_an_error_in_a_look_leaves_the_parameters_of_the_last_step(
    short_rounds, monkeypatch, tmp_path
):
    guide = AutoIAF(conjugate)

    def fail(*args):
        guide.widen_tails(0.04)  # as while it is tried
        raise KeyboardInterrupt

    monkeypatch.setattr(Certificate, "look", fail)
    with pytest.raises(KeyboardInterrupt) as caught:
        quick(conjugate, guide, checkpoint=tmp_path / "run")
    assert caught.value.result.num_steps == 20
    saved = checkpoints.load(tmp_path / "run")["params"]
    for name, param in guide.transform.named_parameters():
        assert torch.equal(saved[f"AutoIAF.transform$$${name}"], param)


def test_an_error_early_in_a_round_leaves_a_sensible_summary(short_rounds):
    part, _ = interrupted_at(41)
    assert part.num_steps == 41
    assert part.settled[1] > 0


def test_what_is_compiled_may_come_from_an_earlier_fit(short_rounds):
    guide = AutoNormal(scales)
    quick(scales, guide, num_steps=30, num_particles=4, compile="graph")
    assert quick(scales, guide, num_particles=4).num_steps == 80


def test_a_compiler_that_fails_is_tried_once(short_rounds, monkeypatch):
    calls = []

    def fail(fn, example):
        calls.append(fn)
        raise RuntimeError("no header")

    slow, replay = Slow(), BACKENDS[-1]
    monkeypatch.setattr("pyro_iaf.compiler.lowering.BACKENDS", [slow, replay])
    for backend in (slow, replay):
        monkeypatch.setattr(type(backend), "fewest_steps", 10)
    monkeypatch.setattr(slow, "lower", fail)
    monkeypatch.setattr(slow, "seconds_saved", (1.0, 0.0))
    with pytest.warns(UserWarning, match="no header"):
        result = quick(scales, AutoNormal(scales), num_particles=4)
    assert result.backend == "graph"
    assert len(calls) == 1


# What it costs


class Slow(Backend):
    """It takes long to build, and repays that in long runs."""

    name = "slow"
    seconds_to_build = (1.0, 0.0)
    seconds_saved = (1e-3, 0.0)

    def is_available(self, device):
        return True

    def lower(self, fn, example):
        return lambda tensors: fn(*tensors)


def test_steps_are_compiled_once_that_repays(monkeypatch):
    monkeypatch.setattr(schedule, "FIRST_END", 20)
    monkeypatch.setattr(schedule, "LAST_END", 160)
    slow = Slow()
    monkeypatch.setattr("pyro_iaf.compiler.lowering.BACKENDS", [slow, BACKENDS[-1]])
    replay = BACKENDS[-1]
    monkeypatch.setattr(type(replay), "fewest_steps", 10)
    monkeypatch.setattr(slow, "fewest_steps", 10)
    found = []
    for saved in (1e-9, 1.0 / 60 / 60, 1e-2):
        monkeypatch.setattr(slow, "seconds_saved", (saved, 0.0))
        pyro.clear_param_store()
        found.append(quick(scales, AutoNormal(scales), num_particles=4))
    assert [result.backend for result in found] == ["graph", "slow", "slow"]
    for result in found[1:]:
        assert_close(result.losses, found[0].losses, rtol=1e-4, atol=1e-4)


def test_a_small_step_takes_one_thread_and_leaves_the_setting_alone():
    seen = []

    def model():
        seen.append(torch.get_num_threads())
        conjugate()

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        quick(model, AutoIAF(model), num_steps=3, compile=False)
        assert seen[-1] == 1
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_after_an_error_the_threads_are_as_before(error):
    calls = []

    def model():
        calls.append(torch.get_num_threads())
        if len(calls) > 120:
            raise error
        conjugate()

    guide = AutoIAF(model, start="init")
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        with suppress(error):  # Ctrl-C between steps ends a fit without an error
            quick(model, guide, num_steps=200, compile=False)
        assert len(calls) > 120
        assert calls[-1] == 1
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_the_reason_and_the_verdict_agree(monkeypatch):
    """A tail that the last draws find alone is no reason to call the fit unfinished."""
    conclude = certificate.conclude

    def find_a_tail(*args):
        found = conclude(*args)
        found.khat, found.ess = 0.65, 3500.0
        return found

    monkeypatch.setattr(certificate, "conclude", find_a_tail)
    result = quick(conjugate, AutoIAF(conjugate))
    assert result.diagnosis.verdict == "usable"
    assert result.stopped == "more of them would move no mean or spread that you see"


def test_a_short_fit_imports_no_compiler():
    program = """
import sys, torch, pyro, pyro.distributions as dist, pyro_iaf

def model():
    z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    s = pyro.sample("s", dist.HalfCauchy(1.0))
    pyro.sample("y", dist.Normal(z.sum(-1), s), obs=torch.tensor(1.0))

print(pyro_iaf.fit(model, pyro_iaf.AutoIAF(model), num_steps=20, progress=False))
print(sorted({"torch._dynamo", "torch._inductor", "sympy"} & sys.modules.keys()))
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines()[-1] == "[]"


def test_the_rate_rises_and_falls_in_each_round():
    rounds = schedule.Rounds(0.1, None)
    ends = []
    while True:
        rates = [rounds.rate(step) for step in range(rounds.begin, rounds.end)]
        assert max(rates) == pytest.approx(0.1)
        assert rates[0] < 0.011
        assert rates[-1] < 0.0012
        ends.append(rounds.end)
        if rounds.is_last:
            break
        rounds.next_round()
    assert ends == [100 * 2**k for k in range(7)]
    assert math.log2(schedule.LAST_END / ends[0]) == rounds.num_rounds_left + 6
