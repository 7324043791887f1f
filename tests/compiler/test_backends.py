import pyro
import pytest
import torch
from example_models import plates
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from torch.testing import assert_close

from pyro_iaf import CompiledTrace_ELBO, fit
from pyro_iaf.compiler.lowering import (
    BACKENDS,
    Backend,
    CudaGraphs,
    Inductor,
    Replay,
    choose_backend,
    lower,
    worthwhile_backend,
)

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


class Toy(Backend):
    """Calls the function as it is: nothing to build, nothing gained."""

    name = "toy"
    seconds_saved = (0.0, 0.0)
    fails = False

    def is_available(self, device):
        return True

    def lower(self, fn, example):
        if self.fails:
            raise RuntimeError("a toy breaks")
        return lambda tensors: fn(*tensors)


@pytest.fixture
def toy():
    BACKENDS.insert(0, toy := Toy())
    yield toy
    BACKENDS.remove(toy)


# Each with a device that it is for.
KINDS = {"replay": (Replay, CPU), "inductor": (Inductor, CPU), "cuda": (CudaGraphs, CUDA)}
KINDS["toy"] = (Toy, CPU)


@pytest.fixture(params=KINDS.values(), ids=KINDS)
def backend(request):
    kind, device = request.param
    if device == CUDA and not torch.cuda.is_available():
        pytest.skip("there is no GPU")
    backend = kind()
    if not backend.is_available(device):
        pytest.skip("there is no C++ compiler")
    backend.device = device
    return backend


def test_functions_stay_what_they_are(backend):
    def fn(x, y):
        return (x @ y).exp(), (x * y).sum(), x.T

    inputs = [torch.randn(2, 4, 4, device=backend.device) for _ in range(3)]
    run = backend.lower(fn, list(inputs[0]))
    found = [run(list(pair)) for pair in inputs]  # compared when all is done
    for pair, outputs in zip(inputs, found, strict=True):
        assert_close(list(outputs), list(fn(*pair)))


def test_what_is_written_is_the_argument_and_no_example(backend):
    def count(state, x):
        state.add_(x @ x)
        return (state.sum(),)

    x, state = torch.randn(4, 4, device=backend.device), torch.zeros(4, 4, device=backend.device)
    run = backend.lower(count, [state, x])
    assert not state.any()
    for k in range(1, 4):
        (total,) = run([state, x])
        assert_close(state, k * (x @ x))
        assert_close(total, state.sum())


def test_each_says_what_it_is_for_and_what_it_costs(backend):
    assert backend.can_take([torch.zeros(2, device=backend.device)])
    assert backend.name
    backend.warm_up()
    short, long = (backend.gain(num_steps, 1000) for num_steps in (0, 100_000))
    assert short <= 0 <= long


def test_cuda_graphs_are_for_gpus_and_cpp_is_not():
    assert CudaGraphs().is_available(CUDA)
    assert not CudaGraphs().is_available(CPU)
    assert not Inductor().is_available(CUDA)
    assert not CudaGraphs().can_take([torch.zeros(2)])


def test_some_words_stand_for_several():
    for name in ("auto", "inductor"):
        assert isinstance(choose_backend(name, CUDA), CudaGraphs)
    assert isinstance(choose_backend("inductor", CPU), Inductor)
    assert isinstance(worthwhile_backend(CUDA, 100_000, 1000), CudaGraphs)


def test_long_runs_are_compiled_and_short_ones_replayed(monkeypatch):
    monkeypatch.setattr(Inductor, "is_available", lambda *_: True)
    assert worthwhile_backend(CPU, 500, 1000).name == "graph"
    assert worthwhile_backend(CPU, 50_000, 1000).name == "inductor"


# One more


def test_one_more_is_used_by_losses(toy):
    guide, found = AutoNormal(plates), []
    guide()
    loss = CompiledTrace_ELBO(3, backend="toy")
    for elbo in (Trace_ELBO(3), loss):
        pyro.set_rng_seed(0)
        found.append([elbo.loss_and_grads(plates, guide) for _ in range(5)])
    assert_close(found[1], found[0])
    assert loss.backend == "toy"


@pytest.mark.parametrize("how", [True, "auto"])
def test_one_more_is_used_by_fit(toy, how):
    toy.fewest_steps, toy.seconds_saved = 10, (1.0, 0.0)
    found = []
    for compile_ in (how, False):
        pyro.clear_param_store()
        guide = AutoNormal(plates)
        found.append(fit(plates, guide, num_steps=30, seed=0, progress=False, compile=compile_))
    assert [result.backend for result in found] == ["toy", "eager"]
    assert_close(found[0].losses, found[1].losses)


def test_one_that_fails_is_done_without(toy):
    toy.fails = True
    with pytest.warns(UserWarning, match="The compiler failed.*a toy breaks"):
        run, name = lower(lambda x: (x.exp(),), [torch.zeros(2)], "toy")
    assert name == "graph"
    assert_close(run([torch.zeros(2)])[0], torch.ones(2))


def test_one_that_repays_nothing_is_not_chosen(toy):
    assert choose_backend("auto", CPU) is choose_backend("toy", CPU) is toy
    assert worthwhile_backend(CPU, 1000, 1000) is not toy
