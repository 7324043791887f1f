import copy
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from example_models import MODELS, learnable_prior, plates
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoNormal
from torch.testing import assert_close
from torch.utils.data import DataLoader, TensorDataset

from pyro_iaf import AutoIAF, CompiledTrace_ELBO, fit
from pyro_iaf.compiler import lowering
from pyro_iaf.compiler.lowering import Backend, Inductor, worthwhile_backend
from pyro_iaf.training import compiled_step
from pyro_iaf.training import run as running

needs_compiler = pytest.mark.skipif(
    not lowering.has_compiler(torch.device("cpu")), reason="there is no C++ compiler"
)


def run(name_or_model, *args, kind=AutoIAF, compile=False, data=None, **settings):  # noqa: A002
    """A fit in a world of its own: its result, and the guide's parameters."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    model = name_or_model
    if isinstance(model, str):
        model, args = (make() for make in MODELS[model])
    guide = kind(model, hidden_dims=[8]) if kind is AutoIAF else kind(model)
    settings = {"num_steps": 40, "num_particles": 5, "seed": 0, "progress": False} | settings
    data = data() if callable(data) else data
    result = fit(model, guide, args, compile=compile, data=data, **settings)
    return result, torch.cat([p.detach().reshape(-1) for p in guide.parameters()]), guide


def assert_same(eager, compiled, rtol=1e-7):
    (result, params, _), (other, others, _) = eager, compiled
    assert result.backend == "eager"
    assert other.backend in ("graph", "inductor")
    assert (result.skipped, result.num_steps) == (other.skipped, other.num_steps)
    assert_close(other.losses, result.losses, rtol=rtol, atol=rtol)
    assert_close(others, params, rtol=rtol, atol=rtol)


@pytest.mark.parametrize("name", MODELS)
def test_replayed_steps_are_those_of_the_code(name):
    rtol, settings = 1e-7, {}
    if name == "single precision":
        # Pathfinder starts at the posterior of this model. There the gradient is nothing but
        # rounding, of which Adam makes whole steps: a processor decides where they go.
        rtol, settings = 1e-3, {"kind": lambda model: AutoIAF(model, hidden_dims=[8], start="init")}
    assert_same(run(name, **settings), run(name, compile="graph", **settings), rtol=rtol)


@needs_compiler
@pytest.mark.parametrize("name", ["plates", "mask and scale"])
def test_compiled_steps_are_too(name):
    compiled = run(name, compile=True)
    assert compiled[0].backend == "inductor"
    assert_same(run(name), compiled)


@pytest.mark.parametrize("kind", [AutoNormal, AutoIAF])
@pytest.mark.parametrize("annealing", [20, lambda step: min(1.0, 0.1 + step / 10)])
def test_so_are_annealed_ones(kind, annealing):
    settings = {"kind": kind, "annealing": annealing}
    assert_same(run("plates", **settings), run("plates", compile="graph", **settings))


@pytest.mark.parametrize("loss", [Trace_ELBO(3), CompiledTrace_ELBO(3, backend="graph")])
def test_so_are_those_of_a_loss_of_theirs(loss):
    eager = run("plates", loss=Trace_ELBO(3))
    assert_same(eager, run("plates", loss=loss, compile="graph"))


def test_many_steps_stay_together():
    eager = run("plates", num_steps=1200)
    assert eager[0].stopped == "the ELBO had settled"
    assert_same(eager, run("plates", compile="graph", num_steps=1200), rtol=1e-5)


def regression(x, y=None):
    w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("data", 20, subsample_size=len(x)):
        pyro.sample("y", dist.Normal((x * w).sum(-1), 1.0), obs=y)


def minibatches():
    x = torch.linspace(-1, 1, 40).reshape(20, 2)
    return DataLoader(TensorDataset(x, x.sum(-1)), batch_size=6, shuffle=True)  # the last has 2


def test_minibatches_are_inputs_and_rare_shapes_go_uncompiled():
    eager = run(regression, data=minibatches, num_steps=30)
    compiled = run(regression, data=minibatches, num_steps=30, compile="graph")
    compiled[0].backend = "graph"  # the very last step was one or the other
    assert_same(eager, compiled)


def fragile():
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.factor("f", torch.where(z > 1.5, torch.nan, -0.5 * z**2))


def test_steps_that_are_not_finite_are_skipped_in_graphs_too():
    eager = run(fragile, num_particles=2, num_steps=60)
    assert eager[0].skipped
    assert_same(eager, run(fragile, num_particles=2, num_steps=60, compile="graph"))


@pytest.mark.parametrize(
    ("before", "after"), [("graph", "graph"), ("graph", False), (False, "graph")]
)
def test_a_run_can_be_resumed_in_any_mode(tmp_path, monkeypatch, before, after):
    whole = run("plates", num_steps=60)
    path = tmp_path / "run.pt"

    def stop(bar, step, *_):
        if step >= 30:
            raise KeyboardInterrupt

    settings = {"num_steps": 60, "checkpoint": path, "checkpoint_every": 10}
    with monkeypatch.context() as patch:
        patch.setattr(running, "show", stop)
        with pytest.raises(KeyboardInterrupt):
            run("plates", compile=before, **settings)
    assert path.exists()
    result, params, _ = run("plates", compile=after, **settings)
    assert_close(result.losses, whole[0].losses, rtol=1e-7, atol=1e-7)
    assert_close(params, whole[1], rtol=1e-7, atol=1e-7)


def test_an_interrupted_run_keeps_what_it_reached(monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    guide = AutoIAF(plates, hidden_dims=[8])
    guide.setup()
    before = copy.deepcopy(guide.state_dict())
    monkeypatch.setattr(running, "show", stop)
    with pytest.raises(KeyboardInterrupt):
        fit(plates, guide, num_steps=100, compile="graph", progress=False)
    moved = [not torch.equal(v, guide.state_dict()[k]) for k, v in before.items()]
    assert any(moved)


def test_a_second_fit_finds_the_step(monkeypatch):
    guide = AutoIAF(plates, hidden_dims=[8])
    settings = {"num_steps": 20, "compile": "graph", "progress": False}
    fit(plates, guide, **settings)
    monkeypatch.setattr(compiled_step, "record", None)
    fit(plates, guide, **settings)
    guide.load_state_dict(AutoIAF_state(guide))
    result = fit(plates, guide, **settings, seed=0)
    monkeypatch.undo()
    guide.load_state_dict(AutoIAF_state(guide))
    again = fit(plates, guide, num_steps=20, compile=False, progress=False, seed=0)
    assert len(result.losses) == len(again.losses) == 20


def AutoIAF_state(guide):  # noqa: N802
    return {name: value.clone() for name, value in guide.state_dict().items()}


def test_a_second_fit_sees_other_data_under_the_same_name():
    held = {"y": torch.tensor(1.0)}

    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(z, 0.5), obs=held["y"])

    guide = AutoNormal(model)
    settings = {"num_steps": 40, "progress": False, "seed": 0}
    fit(model, guide, compile="graph", **settings)
    held["y"] = torch.tensor(-3.0)
    for param in guide.parameters():
        param.data.zero_()
    fit(model, guide, compile="graph", **settings)
    found = [param.detach().clone() for param in guide.parameters()]
    for param in guide.parameters():
        param.data.zero_()
    fit(model, guide, compile=False, **settings)
    assert_close(found, [param.detach() for param in guide.parameters()])


def test_checkpoints_change_nothing(tmp_path):
    settings = {"num_steps": 60, "compile": "graph"}
    plain = run("plates", **settings)
    kept = run("plates", checkpoint=tmp_path / "run.pt", checkpoint_every=7, **settings)
    assert_close(kept[1], plain[1], rtol=1e-9, atol=1e-9)


def test_arguments_that_cant_be_watched_are_no_obstacle():
    def model(x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=torch.as_tensor(x[0]))

    x = torch.ones(3).numpy()
    with pytest.warns(UserWarning, match="uncompiled: An argument is of type ndarray"):
        assert run(model, x, kind=AutoNormal, compile="auto")[0].backend == "eager"
    with pytest.raises(ValueError, match="type ndarray"):
        run(model, x, kind=AutoNormal, compile="graph")


def test_parameters_that_take_turns_are_trained():
    def model(which):
        w = [pyro.param(f"w{k}", torch.tensor(0.5)) for k in range(2)][which]
        z = pyro.sample("z", dist.Normal(w, 1.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=torch.tensor(2.0))

    batches = 30 * [(0,)] + 30 * [(1,)]
    found = []
    for how in (False, "graph"):
        pyro.clear_param_store()
        guide = AutoNormal(model)
        settings = {"num_steps": 60, "progress": False, "seed": 0, "early_stop": False}
        fit(model, guide, data=batches, compile=how, **settings)
        found.append([pyro.param(f"w{k}").item() for k in range(2)])
    assert_close(found[0], found[1])


def test_what_the_guide_remembers_is_forgotten_after_compiled_steps():
    guide = AutoIAF(plates, hidden_dims=[8])
    guide.setup()
    posterior = guide.get_posterior()
    value = posterior.rsample()
    before = posterior.log_prob(value).detach()
    fit(plates, guide, num_steps=40, compile="graph", progress=False)
    now = guide.get_posterior().log_prob(value.detach().clone())
    assert_close(posterior.log_prob(value).detach(), now.detach())
    assert not torch.allclose(before, now)


def test_parameters_of_a_model_are_trained_too():
    assert_same(run(learnable_prior), run(learnable_prior, compile="graph"))
    assert pyro.param("prior_loc").item() != 0.5


def test_auto_compiles_what_repays_it(monkeypatch):
    assert run("plates", compile="auto")[0].backend == "eager"  # forty steps don't
    monkeypatch.setattr(Backend, "fewest_steps", 10)
    monkeypatch.setattr(Inductor, "is_available", lambda *_: False)
    assert run("plates", compile="auto")[0].backend == "graph"


def test_auto_does_not_replay_what_is_slower_replayed(monkeypatch):
    def many():
        z = pyro.sample("z", dist.Normal(torch.zeros(70), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(z.sum(-1), 1.0), obs=torch.tensor(1.0))

    monkeypatch.setattr(Backend, "fewest_steps", 10)
    monkeypatch.setattr(Inductor, "is_available", lambda *_: False)
    assert run(many, compile="auto")[0].backend == "eager"


@pytest.mark.parametrize("num_operations", [100, 600, 5000])
def test_long_runs_are_compiled_and_short_ones_replayed(num_operations, monkeypatch):
    monkeypatch.setattr(Inductor, "is_available", lambda *_: True)
    cpu = torch.device("cpu")
    assert worthwhile_backend(cpu, 500, num_operations).name == "graph"
    assert worthwhile_backend(cpu, 50_000, num_operations).name == "inductor"


def branching():
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    if z.mean() > 0:
        z = z * 1.0
    pyro.sample("y", dist.Normal(z, 0.5), obs=torch.tensor(1.0))


def test_what_cant_be_compiled_is_refused_or_done_without(monkeypatch):
    with pytest.raises(
        ValueError, match=r"test_compiled_step.py, line \d+, in branching: `if z.mean"
    ):
        run(branching, compile=True)
    with pytest.raises(ValueError, match=r"TraceMeanField_ELBO can't be compiled"):
        run("plates", kind=AutoNormal, loss=TraceMeanField_ELBO(), compile="graph")
    monkeypatch.setattr(Backend, "fewest_steps", 10)
    with pytest.warns(UserWarning, match=r"steps uncompiled: .*if z.mean"):
        result, *_ = run(branching, compile="auto")
    assert result.backend == "eager"
    with pytest.raises(ValueError, match='compile should be True, False, "auto" or "graph"'):
        run("plates", compile="yes")


def test_a_graph_that_is_wrong_is_not_used(monkeypatch):
    counter = iter(range(1000))

    def changing():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(z + next(counter), 0.5), obs=torch.tensor(1.0))

    with (
        pytest.warns(UserWarning, match="one after the other"),
        pytest.raises(ValueError, match="changes from run to run"),
    ):
        run(changing, compile="graph", kind=AutoNormal)


def test_the_bar_says_that_it_compiles(capsys, monkeypatch):
    monkeypatch.setattr(Inductor, "lower", lambda _, fn, *__: lambda tensors: fn(*tensors))
    monkeypatch.setattr(Inductor, "is_available", lambda *_: True)
    run("plates", compile=True, progress=True)
    assert "compiling the step" in capsys.readouterr().err


def test_the_generator_stands_where_it_would():
    guide = AutoNormal(plates)
    guide()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit(plates, guide, num_steps=20, compile="graph", progress=False, seed=3)
    after = torch.rand(3)
    pyro.clear_param_store()
    guide = AutoNormal(plates)
    guide()
    fit(plates, guide, num_steps=20, compile=False, progress=False, seed=3)
    assert_close(torch.rand(3), after)


def test_minibatches_of_one_kind_are_taken_in_chunks(monkeypatch):
    chunks = []
    replay = running.Run._replay

    def spy(self, *args):
        before = self.step
        left = replay(self, *args)
        chunks.append(self.step - before)
        return left

    monkeypatch.setattr(running.Run, "_replay", spy)

    def model(x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", len(x)):
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    data = DataLoader(TensorDataset(torch.randn(40)), batch_size=10)
    run(model, data=lambda: data, compile="graph", num_steps=300, early_stop=False)
    assert max(chunks) > 10
    assert len(chunks) < 40


def test_minibatches_that_are_each_of_a_kind_of_their_own_are_not_compiled(monkeypatch):
    def model(x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", len(x)):
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def record(self, *args):
        raise AssertionError("recorded for one step")

    monkeypatch.setattr(compiled_step.CompiledSteps, "record", record)
    data = [(torch.zeros(k),) for k in range(1, 11)]
    result, *_ = run(model, data=data, compile="auto", num_steps=600, early_stop=False)
    assert result.backend == "eager"
