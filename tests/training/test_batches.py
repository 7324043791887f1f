from itertools import chain

import pyro
import pyro.distributions as dist
import pytest
import torch
from example_models import data
from pyro import poutine
from torch.utils.data import DataLoader, TensorDataset

from pyro_iaf.training.batches import Batches


def model(x, y=None, *, noise=1.0):
    weight = pyro.sample("weight", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(0.0, 1.0))
        return pyro.sample("y", dist.Normal(weight * x, noise), obs=y)


def batches_of(data=None, *, args=(), kwargs=None, simulate=None):
    return Batches(model, args, kwargs or {}, data, simulate)


def loader(generator=None):
    dataset = TensorDataset(torch.arange(10.0), torch.arange(10.0) ** 2)
    return DataLoader(dataset, batch_size=3, shuffle=True, generator=generator)


DATA = {
    "list": lambda: [(torch.full((2,), float(i)), torch.ones(2)) for i in range(4)],
    "loader": loader,
    "loader with a generator": lambda: loader(torch.Generator().manual_seed(3)),
    "list of dicts": lambda: [{"x": torch.full((2,), float(i))} for i in range(3)],
}


@pytest.fixture(params=DATA.values(), ids=DATA)
def make_data(request):
    return request.param


def numbers(batch):
    """The first argument of a batch, which tells it from the others."""
    args, kwargs = batch
    return (args[0] if args else kwargs["x"]).tolist()


def walked(batches, num_steps):
    return [numbers(batches.next()) for _ in range(num_steps)]


# Arguments


def test_without_data_the_arguments_stay():
    args, kwargs = data(), {"noise": 0.5}
    batches = batches_of(args=args, kwargs=kwargs)
    assert not batches.change
    for _ in range(3):
        assert batches.next() == (args, kwargs)


a, b = torch.zeros(2), torch.ones(2)

ITEMS = {
    "tuple": ((a, b), (a, b), {}),
    "list": ([a, b], (a, b), {}),
    "single tensor": (a, (a,), {}),
    "dict": ({"x": a, "y": b}, (), {"x": a, "y": b}),
}


@pytest.mark.parametrize(("item", "args", "kwargs"), ITEMS.values(), ids=ITEMS)
def test_an_item_becomes_the_models_arguments(item, args, kwargs):
    batches = batches_of([item], kwargs={"noise": 0.5})
    assert batches.change
    found, keywords = batches.next()
    assert isinstance(found, tuple)
    assert [id(value) for value in found] == [id(value) for value in args]
    assert keywords == {"noise": 0.5, **kwargs}


def test_a_dict_wins_over_the_arguments_that_stay():
    batches = batches_of([{"noise": 2.0}, {}], kwargs={"noise": 0.5})
    assert [batches.next()[1]["noise"] for _ in range(3)] == [2.0, 0.5, 2.0]


def test_a_loader_gives_every_row_once_a_walk():
    batches = batches_of(loader())
    first, second = walked(batches, 4), walked(batches, 4)
    for walk in (first, second):
        assert sorted(chain.from_iterable(walk)) == list(range(10))
    assert first != second
    args, _ = batches.next()
    assert torch.equal(args[0] ** 2, args[1])


def test_a_list_is_walked_again_and_again():
    assert walked(batches_of([torch.tensor([i]) for i in range(3)]), 7) == [
        [i % 3] for i in range(7)
    ]


def test_an_iterator_lasts_as_long_as_it_lasts():
    batches = batches_of(torch.tensor([i]) for i in range(3))
    assert walked(batches, 3) == [[0], [1], [2]]
    for _ in range(2):
        with pytest.raises(ValueError, match="no more minibatches, and can't be iterated"):
            batches.next()
    with pytest.raises(ValueError, match="no more minibatches"):
        batches_of([]).next()


def test_data_and_arguments_together_are_refused():
    with pytest.raises(ValueError, match="args or data, not both"):
        batches_of([a], args=(a,))
    with pytest.raises(ValueError, match=r"iterable of minibatches; got 3\."):
        batches_of(3)


# Taking up again


@pytest.mark.parametrize("steps", [1, 3, 4, 5, 9])
def test_a_restored_walk_goes_on_where_it_was(make_data, steps):
    batches = batches_of(make_data())
    walked(batches, steps)
    state, rng = batches.state(), torch.get_rng_state()
    expected = walked(batches, 6)

    pyro.set_rng_seed(7)  # another process
    other = batches_of(make_data())
    other.restore(state)
    torch.set_rng_state(rng)  # as one who restores a run does
    assert walked(other, 6) == expected
    batches.restore(state)
    torch.set_rng_state(rng)
    assert walked(batches, 6) == expected


def test_a_walk_that_never_began_begins_after_it_is_restored(make_data):
    batches = batches_of(make_data())
    state, rng = batches.state(), torch.get_rng_state()
    expected = walked(batches, 6)
    other = batches_of(make_data())
    other.restore(state)
    torch.set_rng_state(rng)
    assert walked(other, 6) == expected


def test_an_iterator_of_another_process_is_walked_on():
    def rows():
        return (torch.tensor([i]) for i in range(6))

    batches = batches_of(rows())
    walked(batches, 2)
    state = batches.state()
    other = batches_of(rows())
    other.restore(state)
    assert walked(other, 4) == walked(batches, 4) == [[2], [3], [4], [5]]
    same = batches_of(rows())
    walked(same, 1)
    same.restore(state)  # one item was taken of two
    assert walked(same, 4) == [[2], [3], [4], [5]]


# Simulation


def test_simulated_data_come_from_the_prior():
    x = torch.tensor([1.0, 2.0])
    batches = batches_of(args=(x,), kwargs={"noise": 0.5}, simulate="y")
    assert batches.change
    draws = []
    for _ in range(4000):
        args, kwargs = batches.next()
        assert args == (x,)
        assert set(kwargs) == {"noise", "y"}
        draws.append(kwargs["y"])
    found = torch.stack(draws).T.cov()
    expected = x.outer(x) + 0.25 * torch.eye(2)
    assert torch.allclose(found, expected, atol=0.4, rtol=0)  # 4 se of a variance of 4.25


@pytest.mark.parametrize("simulate", ["z", ["z"], ("z",), {"z": "z"}])
def test_sites_are_named_alone_in_a_row_or_by_keyword(simulate):
    _, kwargs = batches_of(args=(a,), simulate=simulate).next()
    assert list(kwargs) == ["z"]
    assert kwargs["z"].shape == (2,)


def test_several_sites_come_from_one_run_by_their_keywords():
    sites = {"latent": "weight", "y": "y"}
    _, kwargs = batches_of(args=(a + 1e6,), simulate=sites).next()
    assert set(kwargs) == {"latent", "y"}
    assert kwargs["y"].mean() / 1e6 == pytest.approx(kwargs["latent"].item(), abs=1e-5)
    assert not kwargs["y"].requires_grad


def test_minibatches_are_completed_by_simulation():
    batches = batches_of([{"x": torch.ones(n)} for n in (2, 3)], simulate=["y"])
    assert [batches.next()[1]["y"].shape for _ in range(3)] == [(2,), (3,), (2,)]


def test_simulation_stays_out_of_its_callers_sight():
    batches = batches_of(args=(a,), simulate="y")
    with poutine.trace() as caller:
        batches.next()
    assert not caller.trace.nodes


def test_sites_that_cannot_be_simulated_are_named():
    with pytest.raises(ValueError, match=r"draw 'y' from site 'y', but that is observed"):
        batches_of(args=(a, b), simulate="y").next()
    with pytest.raises(ValueError, match=r"draw 'k' from site 'nowhere', but that is no sample"):
        batches_of(args=(a,), simulate={"k": "nowhere"}).next()
    with pytest.raises(ValueError, match="leave 'y' out of the arguments"):
        batches_of([(a, b)], simulate=["y"]).next()
