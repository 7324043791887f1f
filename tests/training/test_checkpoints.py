"""Work that a run has done is not lost, and a checkpoint answers for its own run alone."""

import copy
import dataclasses
import errno
import itertools
import os
import signal
import stat
import subprocess
import sys
import textwrap
import threading
import warnings

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from example_models import MODELS
from pyro import poutine
from pyro.distributions import constraints
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoDelta, AutoNormal
from torch.distributions import AffineTransform
from torch.testing import assert_close
from torch.utils.data import DataLoader

from pyro_iaf import AutoIAF, TraceSTL_ELBO, fit
from pyro_iaf.compiler.lowering import Backend, Inductor
from pyro_iaf.training import checkpoints
from pyro_iaf.training.digests import digest, digests_of_sites
from pyro_iaf.training.optimizers import Adam

Y = torch.tensor([1.0, 2.0, 0.5, 1.5])


def conjugate(y=None):
    y = Y.to(torch.get_default_dtype()) if y is None else y
    z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(z.sum(-1), 1.0), obs=y)


def quick(model, guide, *args, **settings):
    settings = {"num_steps": 60, "progress": False, "seed": 0, **settings}
    return fit(model, guide, *args, **settings)


# Checkpoints

RUN = textwrap.dedent(
    """
    import os, signal, sys
    import pyro, pyro.distributions as dist, torch
    from torch.utils.data import DataLoader
    from pyro_iaf import AutoIAF, fit

    def model(y):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("data", 40, subsample_size=len(y)):
            pyro.sample("y", dist.Normal(z.sum(-1), 1.0), obs=y)

    path, last = sys.argv[1], int(sys.argv[2])
    rows = DataLoader(torch.linspace(-1, 1, 40), batch_size=7, shuffle=True)
    taken = []

    class Deadly:
        def __iter__(self):
            for batch in rows:
                if len(taken) == last:
                    os.kill(os.getpid(), signal.SIGKILL)
                taken.append(batch)
                yield batch

    guide = AutoIAF(model)
    result = fit(model, guide, data=Deadly(), num_steps=150, seed=1, progress=False,
                 checkpoint=path, checkpoint_every=7)
    torch.save({"losses": result.losses, "guide": guide.state_dict()}, path + ".result")
    """
)


def test_a_killed_run_goes_on_as_if_it_had_not_been(tmp_path):
    def run(name, last=-1):
        command = [sys.executable, "-c", RUN, str(tmp_path / name), str(last)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.run(command, env=environment, check=False).returncode

    assert run("killed", last=60) == -signal.SIGKILL  # between two checkpoints
    assert (tmp_path / "killed").exists()
    assert not (tmp_path / "killed.result").exists()
    assert run("killed") == run("whole") == 0
    expected, got = (
        torch.load(tmp_path / f"{name}.result", weights_only=True) for name in ("whole", "killed")
    )
    assert torch.equal(got["losses"], expected["losses"])
    for name, value in expected["guide"].items():
        assert torch.equal(got["guide"][name], value), name


# The guide of a run that is taken up again takes the place of the first on purpose.
taken_up = pytest.mark.filterwarnings("ignore:Another guide named")


@taken_up
def test_a_finished_run_is_not_run_again(tmp_path):
    first, second = AutoIAF(conjugate), AutoIAF(conjugate)
    once = quick(conjugate, first, checkpoint=tmp_path / "run")
    again = quick(conjugate, second, checkpoint=tmp_path / "run")
    assert torch.equal(once.losses, again.losses)
    assert_close(second.state_dict(), first.state_dict(), atol=0, rtol=0)


def test_a_checkpoint_loads_without_running_code(tmp_path):
    quick(conjugate, AutoIAF(conjugate), checkpoint=tmp_path / "run")
    state = torch.load(tmp_path / "run", weights_only=True)
    assert state["format"].startswith("pyro_iaf.fit")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]  # nothing left beside it


def test_a_damaged_file_is_told(tmp_path):
    path = tmp_path / "run"
    quick(conjugate, AutoIAF(conjugate), checkpoint=path)
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(ValueError, match="damaged"):
        quick(conjugate, AutoIAF(conjugate), checkpoint=path)
    assert len(path.read_bytes()) == 500  # and left as it is


def test_a_foreign_file_is_told(tmp_path):
    torch.save({"weights": torch.zeros(3)}, tmp_path / "run")
    with pytest.raises(ValueError, match="something else"):
        quick(conjugate, AutoIAF(conjugate), checkpoint=tmp_path / "run")


def test_a_checkpoint_of_other_settings_or_another_model_is_told(tmp_path):
    path = tmp_path / "run"
    quick(conjugate, AutoIAF(conjugate), checkpoint=path)
    with pytest.raises(ValueError, match="num_steps=60; this one has 61"):
        quick(conjugate, AutoIAF(conjugate), checkpoint=path, num_steps=61)
    model = MODELS["plates"][0]()
    with pytest.raises(ValueError, match="of another guide or model"):
        quick(model, AutoIAF(model), checkpoint=path)
    with pytest.raises(ValueError, match="of another guide or model"):
        quick(conjugate, AutoNormal(conjugate), checkpoint=path)


@taken_up
def test_an_interrupted_run_leaves_a_guide_and_a_checkpoint(tmp_path):
    def run(guide, rows):
        return quick(conjugate, guide, data=rows, checkpoint=tmp_path / "run", checkpoint_every=10)

    def until_interrupted():
        for _ in range(35):
            yield (Y,)
        raise KeyboardInterrupt

    guide = AutoIAF(conjugate)
    with pytest.raises(KeyboardInterrupt):
        run(guide, until_interrupted())
    assert guide.median()["z"].isfinite().all()
    result = run(AutoIAF(conjugate), itertools.repeat((Y,)))
    expected = quick(conjugate, AutoIAF(conjugate), data=itertools.repeat((Y,)))
    assert torch.equal(result.losses, expected.losses)


def test_a_checkpoint_of_other_data_is_not_gone_on_with(tmp_path):
    def model(y):
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("n", len(y)):
            pyro.sample("y", dist.Normal(w, 1.0), obs=y)

    def run(y):
        pyro.clear_param_store()
        return quick(model, AutoIAF(model), args=(y,), num_steps=50, checkpoint=tmp_path / "c")

    assert run(torch.ones(5)).resumed_at == 0
    again = run(torch.ones(5))
    assert again.resumed_at == 50
    assert "the first 50 are from a checkpoint" in str(again)
    with pytest.raises(ValueError, match="of a run on other data"):
        run(-torch.ones(5))


# What a checkpoint is of


def number_of(thing):
    """Some number that is in a nested thing of any kind, as a tensor."""
    if isinstance(thing, dict):
        return number_of(next(iter(thing.values())))
    if isinstance(thing, list | tuple):
        return number_of(thing[-1])
    if hasattr(thing, "y"):
        return number_of(thing.y)
    number = thing.to_dense().sum() if isinstance(thing, torch.Tensor) else np.sum(thing)
    return torch.tensor(float(number))


def simple(y, *_, **__):
    z = pyro.sample("z", dist.Normal(0.0, 10.0))
    pyro.sample("y", dist.Normal(z, 1.0), obs=number_of(y))


@dataclasses.dataclass
class Record:
    y: torch.Tensor
    name: str = ""


@dataclasses.dataclass
class Slotted:
    __slots__ = ("y",)
    y: float


class Holder:
    def __init__(self, y):
        self.y = y


def sparse(number):
    return torch.tensor([0.0, number, 0.0]).to_sparse()


LEAVES = {
    "number": (1.0, -50.0),
    "int and float": (1, 1.0),
    "tensor": (torch.ones(3), -50 * torch.ones(3)),
    "dtype": (torch.ones(3, dtype=torch.float64), torch.ones(3, dtype=torch.float32)),
    "one of many numbers": (
        torch.ones(10_000),
        torch.ones(10_000).index_fill(0, torch.tensor(7), 2),
    ),
    "order": (torch.tensor([1.0, 2.0]), torch.tensor([2.0, 1.0])),
    "list": ([1.0], [-50.0]),
    "array": (np.ones(3), -50 * np.ones(3)),
    "array of objects": (np.array([1.0, 2.0], dtype=object), np.array([1.0, 3.0], dtype=object)),
    "NumPy's number": (np.float32(1), np.float32(2)),
    "nested": ({"a": [(1.0, torch.ones(2))]}, {"a": [(1.0, torch.zeros(2))]}),
    "dataclass": (Record(torch.ones(2)), Record(torch.zeros(2))),
    "slots": (Slotted(1.0), Slotted(2.0)),
    "object": (Holder(torch.ones(2)), Holder(torch.zeros(2))),
    "sparse": (sparse(1.0), sparse(2.0)),
    "rows of a sparse one": (sparse(1.0), torch.tensor([0.0, 0.0, 1.0]).to_sparse()),
    "None": ([None, 1.0], [0, 1.0]),
    "string": (["a", 1.0], ["b", 1.0]),
}


@pytest.mark.filterwarnings("ignore:fit takes its steps uncompiled")
@pytest.mark.parametrize(("one", "other"), LEAVES.values(), ids=LEAVES)
def test_every_leaf_of_the_arguments_counts(tmp_path, one, other):
    def run(args=(), kwargs=None):
        pyro.clear_param_store()
        settings = {"num_steps": 4, "checkpoint": tmp_path / "run"}
        return quick(simple, AutoNormal(simple), args=args, kwargs=kwargs, **settings)

    assert digest(copy.deepcopy(one)) == digest(one)
    run((one,))
    assert run((copy.deepcopy(one),)).resumed_at == 4
    with pytest.raises(ValueError, match="of a run on other data: what differs is args"):
        run((other,))
    (tmp_path / "run").unlink()
    run(kwargs={"y": one})
    with pytest.raises(ValueError, match="of a run on other data: what differs is kwargs"):
        run(kwargs={"y": other})


def test_tensors_of_any_layout_are_told_apart():
    def layouts(k):
        matrix = k * torch.eye(2)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # PyTorch's, of its beta state
            yield from (matrix.to_sparse_csr(), matrix.to_sparse_csc(), matrix.to_sparse_bsr(1))
            yield torch.nested.nested_tensor([matrix[0], matrix[0, 1:]])
        yield from (
            matrix.to(torch.complex64).conj(),
            matrix.bfloat16(),
            matrix[:, :1].expand(2, 9),
        )
        yield torch.quantize_per_tensor(matrix.float(), 0.1, 0, torch.qint8)

    for one, same, other in zip(layouts(1), layouts(1), layouts(2), strict=True):
        assert digest(one) == digest(same) != digest(other)


def test_a_thing_that_holds_itself_is_digested():
    def loop(number):
        things = [number]
        things.append(things)
        return things

    assert digest(loop(1)) == digest(loop(1)) != digest(loop(2))


THINGS = "[{'b', 'a', 'c'}, {'x': 1, 'y': object()}, print, dict]"


def test_equal_things_are_equal_in_every_process():
    code = f"from pyro_iaf.training.digests import digest; print(digest({THINGS}))"
    command = [sys.executable, "-c", code]  # where strings have other hashes
    other = subprocess.run(command, capture_output=True, text=True, check=True)
    assert other.stdout.strip() == digest(eval(THINGS))


def normal(loc=0.0, scale=10.0, noise=1.0, y=1.0, name="z", kind=dist.Normal):
    def model():
        z = pyro.sample(name, kind(torch.tensor(loc), scale))
        pyro.sample("y", dist.Normal(z, noise), obs=torch.tensor(y))

    return model


MODELS_OF_ONE_SHAPE = {
    "another prior": (normal(scale=1.0), "site 'z' of the model"),
    "another mean": (normal(loc=3.0), "site 'z' of the model"),
    "another family": (normal(kind=dist.Cauchy), "site 'z' of the model"),
    "another support": (normal(kind=dist.LogNormal), "site 'z' of the model"),
    "another likelihood": (normal(noise=2.0), "site 'y' of the model"),
    "another name": (normal(name="x"), "site 'x' of the model"),
    "other data in it": (normal(y=-50.0), "the data of site 'y'"),
}


@pytest.mark.parametrize(("other", "site"), MODELS_OF_ONE_SHAPE.values(), ids=MODELS_OF_ONE_SHAPE)
@pytest.mark.parametrize("loss", [None, Trace_ELBO()])
def test_a_model_of_the_same_shapes_is_another(tmp_path, other, site, loss):
    def run(model):
        pyro.clear_param_store()
        guide = AutoIAF(model, hidden_dims=[4], start="init")
        return quick(model, guide, num_steps=4, loss=loss, checkpoint=tmp_path / "run")

    run(normal())
    assert run(normal()).resumed_at == 4
    with pytest.raises(ValueError, match=f"what differs is {site}"):
        run(other)


def with_numbers(prior=(0.0, 1.0), slope=1.0, link=torch.sin, seen=(True, False), goal=1.0):
    """A model whose data and constants are in it, where nothing but a density tells of them."""

    def model():
        with pyro.plate("rows", 2), poutine.mask(mask=torch.tensor(seen)):
            z = pyro.sample("z", dist.Normal(torch.tensor(prior), 1.0))
            pyro.sample("y", dist.Normal(link(slope * z), 1.0), obs=torch.ones(2))
        pyro.factor("f", -((z.sum(-1) - goal) ** 2))

    return model


OTHER_NUMBERS = {
    "order of a prior": {"prior": (1.0, 0.0)},
    "slope": {"slope": -50.0},
    "slopes": {"slope": torch.tensor([2.0, 1.0])},
    "link": {"link": torch.cos},
    "mask": {"seen": (False, True)},
    "factor": {"goal": -50.0},
}


@pytest.mark.parametrize("other", OTHER_NUMBERS.values(), ids=OTHER_NUMBERS)
def test_a_model_with_other_numbers_in_it_is_another(tmp_path, other):
    def run(model):
        pyro.clear_param_store()
        settings = {"num_steps": 4, "num_particles": 1, "checkpoint": tmp_path / "run"}
        return quick(model, AutoNormal(model), **settings)

    run(with_numbers())
    assert run(with_numbers()).resumed_at == 4
    with pytest.raises(ValueError, match=r"what differs is .*site '[zyf]'"):
        run(with_numbers(**other))


def discrete():
    b = pyro.sample("b", dist.Bernoulli(0.3))
    c = pyro.sample("c", dist.OneHotCategorical(torch.ones(3)))
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(3 * b + z + c[..., 0], 1.0), obs=torch.tensor(3.0))


def of_discrete():
    q = pyro.param("q", torch.tensor(0.01), constraint=constraints.unit_interval)
    p = pyro.param("p", torch.tensor([0.9, 0.05, 0.05]), constraint=constraints.simplex)
    pyro.sample("b", dist.Bernoulli(q))
    pyro.sample("c", dist.OneHotCategorical(p))
    pyro.sample("z", dist.Normal(pyro.param("l", torch.tensor(0.0)), 1.0))


def within_another():
    z = pyro.sample("z", dist.Gamma(2.0, 1.0))
    u = pyro.sample("u", dist.Uniform(0.0, z))
    pyro.sample("y", dist.Normal(u, 1.0), obs=torch.tensor(2.0))


def of_within_another():
    z = pyro.sample("z", dist.LogNormal(pyro.param("l", torch.tensor(0.0)), 0.3))
    a = pyro.param("a", torch.tensor(2.0), constraint=constraints.positive)
    share = dist.TransformedDistribution(dist.Beta(a, 2.0), [AffineTransform(0.0, z)])
    pyro.sample("u", share)


@pytest.mark.parametrize(
    ("model", "guide"), [(discrete, of_discrete), (within_another, of_within_another)]
)
def test_a_guide_that_has_learnt_makes_the_data_no_other(model, guide):
    guide()
    data, sites = digests_of_sites(model, guide, (), {})
    assert "the density of site 'y'" in data
    pyro.get_param_store()["q" if model is discrete else "a"] = torch.tensor(0.95)
    pyro.get_param_store()["l"] = torch.tensor(1.0)
    assert digests_of_sites(model, guide, (), {}) == (data, sites)


def test_what_a_model_learns_makes_it_no_other(tmp_path):
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(1, 1)

        def forward(self):
            pyro.module("net", self)
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(self.layer(z.reshape(1))[0], 1.0), obs=torch.tensor(1.0))

    model = Net()
    for resumed_at in (0, 4):
        settings = {"num_steps": 4, "num_particles": 1, "checkpoint": tmp_path / "run"}
        assert quick(model, AutoNormal(model), **settings).resumed_at == resumed_at
        pyro.clear_param_store()


OTHER_SETTINGS = {
    "seed": ({}, {"seed": 1}),
    "no seed": ({}, {"seed": None}),
    "loss": ({"loss": Trace_ELBO()}, {"loss": Trace_ELBO(num_particles=2)}),
    "kind of loss": ({"loss": Trace_ELBO()}, {"loss": TraceSTL_ELBO()}),
    "annealing": ({"annealing": lambda step: 1.0}, {"annealing": lambda step: 0.5 + step / 10}),
    "lr": ({}, {"lr": 0.1}),
    "clip_norm": ({}, {"clip_norm": 1.0}),
}


@pytest.mark.parametrize(("first", "second"), OTHER_SETTINGS.values(), ids=OTHER_SETTINGS)
def test_other_settings_are_named(tmp_path, first, second):
    def run(settings):
        pyro.clear_param_store()
        path = tmp_path / "run"
        return quick(conjugate, AutoNormal(conjugate), num_steps=4, checkpoint=path, **settings)

    run(first)
    assert run(first).resumed_at == 4
    (name,) = second
    with pytest.raises(ValueError, match=rf"of a run with (another )?{name}"):
        run(second)


def test_another_precision_is_told(tmp_path):
    def run(guide):
        pyro.clear_param_store()
        return quick(conjugate, guide, num_steps=4, checkpoint=tmp_path / "run")

    run(AutoIAF(conjugate))
    torch.set_default_dtype(torch.float32)
    with pytest.raises(ValueError, match=r"default dtype='torch.float64'"):
        run(AutoIAF(conjugate))
    torch.set_default_dtype(torch.float64)
    with pytest.raises(ValueError, match="of another guide or model"):
        run(AutoIAF(conjugate).float())


def test_another_guide_of_the_same_shapes_is_told(tmp_path):
    def run(guide):
        pyro.clear_param_store()
        return quick(conjugate, guide, num_steps=4, checkpoint=tmp_path / "run")

    def by_hand(kind):
        def guide():
            loc = pyro.param("loc", torch.zeros(2))
            pyro.sample("z", kind(loc, 1.0).to_event(1))

        return guide

    run(by_hand(dist.Normal))
    assert run(by_hand(dist.Normal)).resumed_at == 4
    with pytest.raises(ValueError, match="what differs is site 'z' of the guide"):
        run(by_hand(dist.Laplace))
    (tmp_path / "run").unlink()
    run(AutoIAF(conjugate, univariate="gated"))
    with pytest.raises(ValueError, match="of another guide or model"):
        run(AutoIAF(conjugate, univariate="affine"))


def shuffled(generator=None):
    rows = torch.linspace(-1, 1, 12)
    return DataLoader(rows, batch_size=4, shuffle=True, generator=generator)


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("seed", [None, 3])
def test_data_that_shuffle_are_the_same_data(tmp_path, own, seed):
    def model(y):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", 12, subsample_size=4):
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    def run(data):
        pyro.clear_param_store()
        path = tmp_path / "run"
        return quick(model, AutoNormal(model), data=data, num_steps=7, seed=seed, checkpoint=path)

    run(shuffled(torch.Generator().manual_seed(1) if own else None))
    torch.rand(5)  # another process is elsewhere
    assert run(shuffled(torch.Generator().manual_seed(2) if own else None)).resumed_at == 7
    other = DataLoader(torch.linspace(-2, 2, 12), batch_size=4, shuffle=True)
    with pytest.raises(ValueError, match="what differs is the first minibatch"):
        run(other)


def test_a_run_on_subsamples_of_its_own_goes_on(tmp_path):
    y = torch.linspace(-1, 1, 12)

    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", 12, subsample_size=4) as index:
            pyro.sample("y", dist.Normal(z, 1.0), obs=y[index])

    guide = AutoIAF(model)
    for resumed_at in (0, 5):  # the guide is there already the second time
        result = quick(model, guide, num_steps=5, seed=None, checkpoint=tmp_path / "run")
        assert result.resumed_at == resumed_at
    y += 1
    with pytest.raises(ValueError, match="what differs is the data of site 'y'"):
        quick(model, guide, num_steps=5, seed=None, checkpoint=tmp_path / "run")


@pytest.mark.parametrize("name", MODELS)
def test_a_run_on_any_model_goes_on_with_itself(tmp_path, name):
    model, arguments = (make() for make in MODELS[name])
    guide = AutoIAF(model, hidden_dims=[4])
    settings = {"num_steps": 6, "num_particles": 2, "checkpoint": tmp_path / "run"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of models that are there to be warned of
        once = quick(model, guide, arguments, **settings)
        again = quick(model, guide, arguments, **settings)  # its parameters are trained by now
    assert again.resumed_at == 6
    assert torch.equal(once.losses, again.losses)


def test_a_run_with_discrete_latents_goes_on_and_knows_its_data(tmp_path):
    def model(y):
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", len(y)):
            z = pyro.sample("z", dist.Bernoulli(0.4))
            pyro.sample("y", dist.Normal(a * z, 0.5), obs=y)

    def run(y, num_steps, name):
        settings = {"num_steps": num_steps, "checkpoint": tmp_path / name, "seed": 1}
        pyro.clear_param_store()
        return quick(model, AutoIAF(model, hidden_dims=[4]), (y,), **settings)

    y = torch.randn(4)
    whole = run(y, 6, "whole")
    assert run(y, 6, "whole").resumed_at == 6
    assert torch.equal(run(y, 6, "whole").losses, whole.losses)
    with pytest.raises(ValueError, match="what differs is args"):
        run(y + 1, 6, "whole")


def test_what_a_restart_may_change_is_no_other_run(tmp_path):
    def run(how, y, threads, **settings):
        pyro.clear_param_store()
        torch.set_num_threads(threads)
        path = tmp_path / "run"
        return quick(conjugate, AutoIAF(conjugate), (y,), checkpoint=path, num_steps=4, **settings)

    threads = torch.get_num_threads()
    try:
        run("first", Y.double(), 1, compile=False)
        settings = {"compile": "graph", "checkpoint_every": 3}
        assert run("then", Y.double().clone(), 2, **settings).resumed_at == 4
    finally:
        torch.set_num_threads(threads)


def test_numbers_of_numpy_are_settings_too(tmp_path):
    settings = {"num_steps": np.int64(4), "lr": np.float32(0.25), "seed": np.int64(1)}
    settings |= {"num_particles": np.int32(2), "checkpoint": str(tmp_path / "run")}
    quick(conjugate, AutoNormal(conjugate), **settings)
    assert quick(conjugate, AutoNormal(conjugate), **settings).resumed_at == 4


# Files


def test_no_bit_may_change(tmp_path):
    path = tmp_path / "run"
    quick(conjugate, AutoDelta(conjugate), num_steps=2, checkpoint=path)
    whole = path.read_bytes()
    assert checkpoints.load(path)["progress"][0] == 2
    for bit in range(0, 8 * len(whole), 997):
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        with pytest.raises(ValueError, match=r"damaged|another version"):
            checkpoints.load(path)
    for size in (0, 1, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match="damaged"):
            checkpoints.load(path)


def test_parts_that_are_missing_are_told(tmp_path):
    path = tmp_path / "run"
    quick(conjugate, AutoDelta(conjugate), num_steps=2, checkpoint=path)
    state = checkpoints.load(path)
    for part in checkpoints.PARTS:
        checkpoints.save(path, {name: value for name, value in state.items() if name != part})
        with pytest.raises(ValueError, match=f"damaged.*It lacks '{part}'"):
            quick(conjugate, AutoDelta(conjugate), num_steps=2, checkpoint=path)
    checkpoints.save(path, {**state, "optimizer": {0: {}}, "progress": [1, 0, 0]})
    with pytest.raises(ValueError, match="is damaged"):
        quick(conjugate, AutoDelta(conjugate), num_steps=2, checkpoint=path)


def as_file(folder):
    (folder / "file").write_text("")
    return folder / "file" / "run"


def as_pipe(folder):
    os.mkfifo(folder / "pipe")
    return folder / "pipe"


BAD_PATHS = {
    "parent is a file": as_file,
    "parent of the parent is one": lambda folder: as_file(folder) / "deeper" / "run",
    "name too long": lambda folder: folder / (300 * "x"),
    "folder": lambda folder: folder,
    "pipe": as_pipe,
    "link to itself": lambda folder: (folder / "link").symlink_to("link") or folder / "link",
    "no folder of files": lambda folder: "/proc/no/run",
    "number": lambda folder: 3,
    "empty": lambda folder: "",
    "truth": lambda folder: True,
    "zero byte": lambda folder: f"{folder}/a\0b",
}


@pytest.mark.parametrize("make", BAD_PATHS.values(), ids=BAD_PATHS)
def test_a_path_that_cant_be_written_is_told_before_the_first_step(tmp_path, make):
    def model():
        raise AssertionError

    with pytest.raises((OSError, ValueError), match="checkpoint should be"):
        quick(model, AutoNormal(model), checkpoint=make(tmp_path))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_rights_is_told_before_the_first_step(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(PermissionError, match="checkpoint should be"):
        quick(conjugate, AutoNormal(conjugate), checkpoint=tmp_path / "run")


def test_a_path_is_taken_as_a_shell_would(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    quick(conjugate, AutoNormal(conjugate), num_steps=2, checkpoint="~/of/mine/run")
    assert (tmp_path / "of" / "mine" / "run").is_file()
    monkeypatch.chdir(tmp_path)
    quick(conjugate, AutoNormal(conjugate), num_steps=2, checkpoint=249 * "x" + ".pt")
    assert (tmp_path / (249 * "x" + ".pt")).is_file()


def test_a_link_is_written_through(tmp_path):
    (tmp_path / "large").mkdir()
    link = tmp_path / "run"
    link.symlink_to(tmp_path / "large" / "run")  # where there is nothing yet
    for _ in range(2):
        quick(conjugate, AutoNormal(conjugate), num_steps=2, checkpoint=link)
        assert link.is_symlink()
        assert not (tmp_path / "large" / "run").is_symlink()


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o007])
def test_who_may_read_a_checkpoint_the_umask_says(tmp_path, umask):
    before = os.umask(umask)
    try:
        quick(conjugate, AutoNormal(conjugate), num_steps=2, checkpoint=tmp_path / "run")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "run").stat().st_mode) == 0o666 & ~umask


def test_a_disk_that_is_full_is_warned_of_once_and_costs_no_step(tmp_path, monkeypatch):
    path = tmp_path / "run"
    calls = []

    def full(*_):
        calls.append(path.exists() and path.read_bytes())
        if 1 < len(calls) < 6:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.warns(UserWarning, match="trains on") as caught:
        result = quick(conjugate, AutoNormal(conjugate), checkpoint=path, checkpoint_every=10)
    (warning,) = caught
    assert str(path) in str(warning.message)
    assert "No space left on device" in str(warning.message)
    assert warning.filename == __file__
    assert result.num_steps == 60
    assert len(calls) == 7  # once to see, and at each time
    assert [p.name for p in tmp_path.iterdir()] == ["run"]
    assert checkpoints.load(path)["progress"][0] == 60


SAVE = """
import os, signal, sys
from pathlib import Path
from pyro_iaf.training import checkpoints
path = checkpoints.prepare(sys.argv[1])
checkpoints.save(path, {"whole": 1})
os.fsync = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
checkpoints.save(path, {"whole": 2})
"""


def test_what_a_killed_write_left_is_cleared_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "run"
    killed = subprocess.run([sys.executable, "-c", SAVE, str(path)])
    assert killed.returncode == -signal.SIGKILL
    assert torch.load(path, weights_only=True)["whole"] == 1  # the old one, whole
    assert len(list(tmp_path.iterdir())) == 2
    others = [tmp_path / ".run.bak", tmp_path / ".checkpoint-mine-1", tmp_path / "run-12"]
    for other in others:
        other.write_text("")
    with monkeypatch.context() as patch:
        patch.setattr(os, "getpid", os.getppid)  # a process that runs
        others.append(checkpoints._write(path, b""))
        others.append(checkpoints._write(tmp_path / "another", b""))
    checkpoints.prepare(path)
    assert sorted(tmp_path.iterdir()) == sorted([path, *others])


def test_several_threads_write_one_path_whole(tmp_path):
    path = tmp_path / "run"

    def write(k):
        for _ in range(20):
            checkpoints.save(path, {"k": torch.full((1000,), k)})

    threads = [threading.Thread(target=write, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    archive = path.read_bytes()
    assert archive == checkpoints._sealed(archive[:-66] + b"\0\0")
    assert list(tmp_path.iterdir()) == [path]


# Interrupts


def rows_of(k):
    return torch.linspace(-1, 1, 8) + k / 100


def scaled(y):
    z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("data", 40, subsample_size=len(y)):
        pyro.sample("y", dist.Normal(z.sum(-1), 1.0), obs=y)


class StopError(Exception):
    pass


def interrupted(place, stop, path, kind=AutoIAF, **settings):
    """A run that an error of the user's code ends, in a step or before it; or one to the end."""
    pyro.clear_param_store()
    calls = {"model": 0, "data": 0}
    error = KeyboardInterrupt if place != "error in the data" else StopError

    def model(y):
        scaled(y)
        calls["model"] += 1
        if place == "model" and calls["model"] == stop:
            raise error

    class Data:
        persistent_workers = True  # so that nobody looks at all of them beside the steps

        def __iter__(self):
            for batch in DataLoader(torch.linspace(-1, 1, 40), batch_size=7, shuffle=True):
                calls["data"] += 1
                if "data" in place and calls["data"] == stop:
                    raise error
                yield batch

    def weight(step):
        if place == "annealing" and step == stop:
            raise error
        return 1.0

    settings = {"num_steps": 60, "checkpoint": path, "checkpoint_every": 1000, **settings}
    settings |= {"annealing": weight} if place == "annealing" else {}
    settings |= {"data": Data()} if "data" in place else {"args": (rows_of(0),)}
    guide = kind(model)
    try:
        result = quick(model, guide, early_stop=False, **settings)
    except error as caught:
        result = caught.result
    return result, copy.deepcopy(guide.state_dict())


@pytest.mark.parametrize("mode", [False, "graph"])
@pytest.mark.parametrize("place", ["model", "data", "error in the data", "annealing"])
def test_an_interrupt_anywhere_costs_no_step_that_was_taken(tmp_path, place, mode):
    settings = {"compile": mode, "kind": AutoNormal if mode else AutoIAF}
    whole = interrupted(place, None, None, **settings)
    stop = 75 if place == "model" else 55  # which runs before the first step too
    part, state = interrupted(place, stop, tmp_path / "run", **settings)
    if place == "model" and mode:  # which doesn't run any more by then
        assert part.num_steps == 60
        return
    assert 0 < part.num_steps < 60
    assert part.stopped == "something else ended it"
    assert torch.equal(part.losses, whole[0].losses[: part.num_steps])
    saved = checkpoints.load(tmp_path / "run")
    assert saved["progress"][0] == part.num_steps
    assert_close(saved["guide"], state, atol=0, rtol=0)  # and the guide has what the file has
    result, state = interrupted(place, None, tmp_path / "run", **settings)
    assert result.resumed_at == part.num_steps
    assert torch.equal(result.losses, whole[0].losses)
    assert_close(state, whole[1], atol=0, rtol=0)


def test_an_interrupt_before_the_first_step_leaves_no_file(tmp_path):
    part, _ = interrupted("model", 1, tmp_path / "run")
    assert part.num_steps == len(part.losses) == 0
    assert list(tmp_path.iterdir()) == []


def test_a_run_of_other_kinds_of_batches_can_be_interrupted(tmp_path, monkeypatch):
    """Two kinds of minibatches, of which one is compiled late, and one is left over at times."""
    monkeypatch.setattr(Inductor, "is_available", lambda *_: False)
    monkeypatch.setattr(Backend, "fewest_steps", 60)
    settings = {"num_steps": 200, "compile": "auto", "kind": AutoNormal}
    whole = interrupted("data", None, None, **settings)
    assert whole[0].backend == "graph"
    for stop in (2, 50, 121, 151):  # with fewer steps left, in the end, than repay it
        path = tmp_path / str(stop)
        part, _ = interrupted("data", stop, path, **settings)
        assert part.num_steps == stop - 1
        result, state = interrupted("data", None, path, **settings)
        assert torch.equal(result.losses, whole[0].losses)
        assert_close(state, whole[1], atol=0, rtol=0)


SIGNALLED = textwrap.dedent(
    """
    import sys, time
    import pyro, pyro.distributions as dist, torch
    from pyro.infer.autoguide import AutoNormal
    from pyro_iaf import fit

    path, mode = sys.argv[1:]
    y = torch.linspace(-1, 1, 10)
    steps = []

    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 10):
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    def weight(step):
        steps.append(step)
        if __name__ == "__main__" and step > 60:  # not in a test
            if step == 61:
                print("ready", flush=True)
            time.sleep(0.01)
        return 1.0

    try:
        result = fit(model, AutoNormal(model), num_steps=400, seed=1, progress=False,
                     early_stop=False, compile=mode == "graph" and "graph", annealing=weight,
                     checkpoint=path, checkpoint_every=100_000)
    except KeyboardInterrupt as error:
        assert error.result.num_steps == len(error.result.losses) > 0
        sys.exit(7)
    """
)


@pytest.mark.parametrize("mode", ["eager", "graph"])
@pytest.mark.parametrize(("number", "code"), [("SIGINT", 7), ("SIGTERM", -signal.SIGTERM)])
def test_ctrl_c_and_sigterm_leave_a_checkpoint(tmp_path, monkeypatch, number, code, mode):
    torch.set_default_dtype(torch.float32)
    command = [sys.executable, "-c", SIGNALLED, str(tmp_path / "killed"), mode]
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"ready\n"
    process.send_signal(getattr(signal, number))
    process.stdout.close()
    assert process.wait() == code
    found = {}
    for name in ("whole", "killed"):
        pyro.clear_param_store()
        monkeypatch.setattr(sys, "argv", ["", str(tmp_path / name), mode])
        names = {"__name__": "test"}
        exec(SIGNALLED, names)
        found[name] = names["result"]
    assert 0 < found["killed"].resumed_at < 400
    assert torch.equal(found["killed"].losses, found["whole"].losses)


def test_signals_do_after_a_run_what_they_did_before():
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    seen = []

    def model():
        seen.append(signal.getsignal(signal.SIGTERM))
        conjugate()

    quick(model, AutoNormal(model), num_steps=2)
    assert {number: signal.getsignal(number) for number in before} == before
    assert len(set(seen)) == 2  # another one within
    own = signal.signal(signal.SIGTERM, lambda *_: None)
    try:  # who sees to it himself goes on to
        seen.clear()
        mine = signal.getsignal(signal.SIGTERM)
        quick(model, AutoNormal(model), num_steps=2)
        assert set(seen) == {mine}
    finally:
        signal.signal(signal.SIGTERM, own)


def test_a_run_in_a_thread_leaves_signals_alone():
    found = []

    def run():
        found.append(quick(conjugate, AutoNormal(conjugate), num_steps=5).num_steps)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found == [5]


def test_a_signal_within_a_save_waits_for_its_end(tmp_path, monkeypatch):
    replace = os.replace

    def interrupt(*args):
        signal.raise_signal(signal.SIGINT)
        replace(*args)

    monkeypatch.setattr(os, "replace", interrupt)
    settings = {"checkpoint": tmp_path / "run", "checkpoint_every": 10, "num_steps": 30}
    with pytest.raises(KeyboardInterrupt):
        quick(conjugate, AutoNormal(conjugate), **settings)
    assert checkpoints.load(tmp_path / "run")["progress"][0] == 10
    settings["checkpoint_every"] = 100
    (tmp_path / "run").unlink()
    with pytest.raises(KeyboardInterrupt) as caught:  # after the last step, too
        quick(conjugate, AutoNormal(conjugate), **settings)
    assert caught.value.result.num_steps == 30
    assert checkpoints.load(tmp_path / "run")["progress"][0] == 30


def test_a_signal_within_the_optimizers_step_waits_for_its_end(tmp_path, monkeypatch):
    step = Adam.step
    calls = []

    def interrupt(*args, **kwargs):
        calls.append(1)
        if len(calls) == 10:
            signal.raise_signal(signal.SIGINT)
        return step(*args, **kwargs)

    settings = {"checkpoint": tmp_path / "run", "num_steps": 30, "compile": False}
    with monkeypatch.context() as patch:
        patch.setattr(Adam, "step", interrupt)
        with pytest.raises(KeyboardInterrupt):
            quick(conjugate, AutoNormal(conjugate), **settings)
    assert checkpoints.load(tmp_path / "run")["progress"][0] == 10
    pyro.clear_param_store()
    result = quick(conjugate, AutoNormal(conjugate), **settings)
    pyro.clear_param_store()
    whole = quick(conjugate, AutoNormal(conjugate), num_steps=30, compile=False)
    assert torch.equal(result.losses, whole.losses)


def test_a_step_that_broke_half_way_is_not_saved(tmp_path, monkeypatch):
    step = Adam.step
    calls = []

    def fail(*args, **kwargs):
        calls.append(1)
        step(*args, **kwargs)
        if len(calls) == 25:
            raise MemoryError

    settings = {"checkpoint": tmp_path / "run", "checkpoint_every": 10, "compile": False}
    with monkeypatch.context() as patch:
        patch.setattr(Adam, "step", fail)
        with pytest.raises(MemoryError) as caught:
            quick(conjugate, AutoNormal(conjugate), **settings)
    assert caught.value.result.num_steps == 24
    assert checkpoints.load(tmp_path / "run")["progress"][0] == 20


def test_what_is_not_finite_does_not_replace_a_checkpoint(tmp_path):
    calls = []

    def model():
        calls.append(1)
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.factor("f", z if len(calls) < 150 else z * torch.nan)

    settings = {"num_particles": 1, "num_steps": 400, "compile": False}
    path = tmp_path / "run"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # Pyro's, of what is not a number
        with pytest.raises(FloatingPointError) as caught:
            quick(model, AutoNormal(model), checkpoint=path, checkpoint_every=100, **settings)
    assert checkpoints.load(path)["progress"][0] == 100
    assert caught.value.result.skipped


# Bars


class Stream:
    """A stderr that breaks after so many writes."""

    def __init__(self, error, after):
        self.error, self.left = error, after

    def write(self, text):
        self.left -= 1
        if self.left < 0:
            raise self.error

    def flush(self):
        self.write("")


ERRORS = {
    "pipe": BrokenPipeError(errno.EPIPE, "Broken pipe"),
    "disk": OSError(errno.ENOSPC, "No space left on device"),
    "closed": ValueError("I/O operation on closed file."),
    "letters": UnicodeEncodeError("ascii", "x", 0, 1, "ordinal not in range(128)"),
    "anything": RuntimeError("whatever"),
}


@pytest.mark.parametrize("after", [0, 1, 5])
@pytest.mark.parametrize("error", ERRORS.values(), ids=ERRORS)
def test_a_bar_that_cant_be_written_is_dropped_without_a_word(monkeypatch, error, after):
    monkeypatch.setattr(sys, "stderr", Stream(error, after))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = quick(conjugate, AutoNormal(conjugate), progress=True)
    assert result.num_steps == 60
    assert sys.stderr.left == -1  # it is left alone from then on


def test_a_bar_without_a_stream_is_none(monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)  # as where it was closed before the start
    assert quick(conjugate, AutoNormal(conjugate), progress=True).num_steps == 60


def test_a_bar_doesnt_swallow_ctrl_c(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Stream(KeyboardInterrupt(), 3))
    with pytest.raises(KeyboardInterrupt):
        quick(conjugate, AutoNormal(conjugate), progress=True, num_steps=1000)
    monkeypatch.undo()
    settings = {"progress": True, "num_steps": 5}
    other = threading.Thread(
        target=quick, args=(conjugate, AutoNormal(conjugate)), kwargs=settings, daemon=True
    )
    other.start()
    other.join(60)
    assert not other.is_alive()  # all bars share a lock, which it might wait for
