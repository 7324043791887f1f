"""What code computes from its data is constant, and what depends on more is refused."""

import warnings
from collections import Counter

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from torch import nn
from torch.testing import assert_close

from pyro_iaf import CompiledTrace_ELBO, fit
from pyro_iaf.compiler.recorder import MAX_BUILDS
from pyro_iaf.training import compiled_step
from pyro_iaf.training import run as running


def latent():
    return pyro.sample("z", dist.Normal(0.0, 1.0))


def observe(loc, y, name="y"):
    loc, y = torch.broadcast_tensors(torch.as_tensor(loc), y)
    pyro.sample(name, dist.Normal(loc, 1.0).to_event(1), obs=y)


def plate_of_groups(group, y):
    z = latent()
    with pyro.plate("groups", int(group.max()) + 1):
        a = pyro.sample("a", dist.Normal(z, 1.0))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(a[group], 1.0), obs=y)


def branch(group, y):
    z = latent()
    observe(z if y.sum() > 3 else 2 * z, y)


def unique(group, y):
    _, place, counts = torch.unique(group, return_inverse=True, return_counts=True)
    counts += 1
    observe(latent() * counts[place], y)


def mask_of_latents(group, y):
    z = pyro.sample("z", dist.Normal(torch.zeros(6), 1.0).to_event(1))
    observe(z[group > 0], y[group > 0])


def selected_latents(group, y):
    z = pyro.sample("z", dist.Normal(torch.zeros(6), 1.0).to_event(1))
    observe(z.masked_select(group > 0), y[group > 0])


def rows(group, y):
    z, start = latent(), 0
    for k, n in enumerate(torch.bincount(group)):
        observe(z, y[start : start + n], f"y{k}")
        start += n


def pieces(group, y):
    z = latent()
    for k, piece in enumerate(torch.tensor_split(y, torch.bincount(group).cumsum(0)[:-1])):
        observe(z, piece, f"y{k}")


def written_in_place(group, y):
    x = y.clone()
    x[0] = 5.0
    x[group > 1] = 0.0
    x -= x.mean()
    x[1:].mul_(group[1:])
    observe(latent() * x.max().item(), y)


def missing(group, y):
    y = torch.where(y < 0, torch.nan, y).reshape(3, 2)
    loc = latent().unsqueeze(-1) * torch.ones(2)
    with pyro.plate("rows", 3):
        pyro.sample("y", dist.NanMaskedMultivariateNormal(loc, torch.eye(2) + 0.5), obs=y)


net = nn.RNN(1, 2, dtype=torch.float64).requires_grad_(False)


def packed(group, y):
    sizes = torch.bincount(group).sort(descending=True).values
    x = nn.utils.rnn.pad_sequence(y.split(sizes.tolist()))
    x = nn.utils.rnn.pack_padded_sequence(x.unsqueeze(-1), sizes)
    found, _ = nn.utils.rnn.pad_packed_sequence(net(x)[0])
    observe(latent() * found.sum(), y)


READS = {
    "int": plate_of_groups,
    "item": lambda group, y: observe(latent() + y.mean().item(), y),
    "float": lambda group, y: observe(latent() * float(y.std()), y),
    "format": lambda group, y: observe(latent() * float(f"{y.std():.3f}"), y),
    "branch": branch,
    "tolist": lambda group, y: observe(latent() * max(group.tolist()), y),
    "numpy": lambda group, y: observe(latent() * torch.as_tensor(y.numpy()), y),
    "tensor of tensors": lambda group, y: observe(
        latent() + torch.tensor([y.mean(), 1.0]).sum(), y
    ),
    "full": lambda group, y: observe(latent() * torch.full((6,), y.mean()), y),
    "index": lambda group, y: observe(latent() * y[group.argmax()], y),
    "equal": lambda group, y: observe(latent() * (1 + torch.equal(group, y.long())), y),
    "contains": lambda group, y: observe(latent() * (1 + (2 in group)), y),
    "mask": lambda group, y: observe(latent(), y[group > 0]),
    "mask of latents": mask_of_latents,
    "masked_select": lambda group, y: observe(latent(), y.masked_select(group > 0)),
    "masked_select of latents": selected_latents,
    "nonzero": lambda group, y: observe(latent(), y[torch.nonzero(group).squeeze(-1)]),
    "where": lambda group, y: observe(latent(), y[torch.where(group > 0)]),
    "unique": unique,
    "bincount": lambda group, y: observe(latent() * torch.bincount(group)[group], y),
    "one_hot": lambda group, y: observe(latent() * nn.functional.one_hot(group)[:, 0], y),
    "repeat_interleave": lambda group, y: observe(
        latent() * torch.arange(3).repeat_interleave(torch.bincount(group, minlength=3)), y
    ),
    "split": lambda group, y: observe(latent(), y.split(torch.bincount(group).tolist())[0]),
    "lengths": rows,
    "tensor_split": pieces,
    "written in place": written_in_place,
    "missing data": missing,
    "packed sequences": packed,
}


def data():
    return torch.tensor([0, 0, 1, 1, 2, 2]), torch.tensor([1.0, 2.0, 0.5, -1.0, 0.25, 3.0])


def change(group, y):
    """Other numbers of most kinds: fewer groups, another mean, and other counts."""
    group.copy_(torch.tensor([0, 1, 1, 1, 1, 1]))
    y.mul_(-1).add_(0.125)


def graph(**settings):
    return CompiledTrace_ELBO(backend="graph", **settings)


def guide_for(model, args):
    guide = AutoNormal(model)
    guide(*args)
    return guide


def steps(loss, model, guide, args, num_steps=3):
    """The losses and gradients of some steps under one seed."""
    pyro.set_rng_seed(1)
    found = []
    for _ in range(num_steps):
        guide.zero_grad()
        value = loss.loss_and_grads(model, guide, *args)
        grads = [p.grad.reshape(-1) for p in guide.parameters() if p.grad is not None]
        found.append(torch.cat([torch.tensor([value]), *grads]))
    return torch.stack(found)


def agree(loss, model, guide, args, num_steps=3):
    expected = steps(Trace_ELBO(), model, guide, args, num_steps)
    assert_close(steps(loss, model, guide, args, num_steps), expected)


@pytest.fixture(params=READS.values(), ids=READS)
def model(request):
    return request.param


def test_numbers_and_shapes_of_arguments_are_constants(model):
    args = data()
    guide, loss = guide_for(model, args), graph()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        agree(loss, model, guide, args)
    (recording,) = loss.recorder.recordings.values()
    assert recording.graph.constants.values


def test_so_are_those_of_tensors_from_elsewhere_until_they_change(model):
    held = data()

    def closed():
        model(*held)

    guide, loss = guide_for(closed, ()), graph()
    agree(loss, closed, guide, ())
    if model is not plate_of_groups:  # whose latents change
        change(*held)
        agree(loss, closed, guide, ())


def test_other_data_are_recorded_beside_them(model):
    args = data()
    guide, loss = guide_for(model, args), graph()
    agree(loss, model, guide, args, num_steps=1)
    if model is not plate_of_groups:  # whose latents change
        change(*args)
    agree(loss, model, guide, data())  # in other tensors
    assert len(loss.recorder.recordings) == 1
    if model is not plate_of_groups:
        for these in (args, data(), args):
            agree(loss, model, guide, these, num_steps=1)
        assert len(loss.recorder.recordings) <= 2


@pytest.mark.parametrize(
    "name", ["int", "branch", "mask of latents", "unique", "missing data", "packed sequences"]
)
def test_a_fit_replays_them_too(name):
    model, found = READS[name], []
    for how in (False, "graph"):
        pyro.clear_param_store()
        guide = AutoNormal(model)
        result = fit(
            model, guide, data(), num_steps=6, num_particles=1, compile=how, seed=0, progress=False
        )
        assert result.backend == (how or "eager")
        found.append([result.losses, *(p.detach() for p in guide.parameters())])
    assert_close(found[0], found[1])


def test_only_the_sources_of_constants_are_watched():
    group, y = data()

    def model(group, y):
        observe(latent(), y[group > 0])

    guide, loss = guide_for(model, (group, y)), graph()
    for _ in range(3):
        agree(loss, model, guide, (group, y))
        y.add_(1.0)
        group.mul_(2)  # the mask is the same
    assert loss.recorder._builds.total() == 1


def test_least_squares_of_latents_have_one_shape():
    def model(group, y):
        x = torch.stack([torch.ones(6), group + latent()], -1)
        observe(x @ torch.linalg.lstsq(x, y.unsqueeze(-1)).solution.squeeze(-1), y)

    args = data()
    agree(graph(), model, guide_for(model, args), args)


def test_a_mask_of_one_number_chooses_between_values():
    def model(group, y):
        z = latent()
        scale = 1 + z**2
        scale[z > 0] = 2.0
        shift = z.clone()
        shift.data[z.data > 1] = y.mean()
        observe(z * scale + shift, y)

    args = data()
    agree(graph(), model, guide_for(model, args), args, num_steps=6)


# What depends on more than data


def of_params(get):
    def model(group, y):
        w = pyro.param("w", torch.tensor(1.0))
        observe(latent() * w * get(w), y)

    return model


def of_latents(get):
    def model(group, y):
        z = latent()
        observe(z * get(z, y), y)

    return model


def through_a_view(z, y):
    x = y.clone()
    x[:1].fill_(0.0).add_(z.detach())
    return x.max().item()


REFUSED = {
    "a latent": of_latents(lambda z, y: z.item()),
    "a detached latent": of_latents(lambda z, y: z.detach().item()),
    "a latent's data": of_latents(lambda z, y: z.data.item()),
    "a branch on a latent": of_latents(lambda z, y: 1 if z > 0 else 2),
    "a latent with data": of_latents(lambda z, y: (y + z).mean().item()),
    "a latent in a list": of_latents(lambda z, y: torch.tensor([z.detach(), 1.0]).sum()),
    "a latent as a list": of_latents(lambda z, y: z.detach().tolist()),
    "a latent in data": of_latents(through_a_view),
    "indices of a latent": of_latents(
        lambda z, y: torch.tensor_split(y, (z > 0).long().expand(1) + 1)[0].sum()
    ),
    "a parameter": of_params(lambda w: w.item()),
    "a parameter's data": of_params(lambda w: w.data.exp().item()),
    "a detached parameter": of_params(lambda w: float(w.detach() + 1)),
    "a random number": of_latents(lambda z, y: torch.rand(()).item()),
    "a random order": of_latents(lambda z, y: y[torch.randperm(6)[0]]),
    "a mask by a latent": of_latents(lambda z, y: y[y > z].sum()),
    "a mask by a random number": of_latents(lambda z, y: y[torch.rand(6) > 0.5].sum()),
}


@pytest.mark.parametrize("model", REFUSED.values(), ids=REFUSED)
def test_what_depends_on_more_is_refused_by_its_line(model):
    args = data()
    guide = guide_for(model, args)
    with pytest.raises(
        ValueError, match=r"test_constants.py, line \d+, in .*(takes a number|selects by numbers)"
    ):
        steps(graph(), model, guide, args)


def test_what_a_distribution_reads_is_refused_by_its_site():
    def model():
        pyro.sample("w", dist.NanMaskedNormal(latent(), 1.0))  # which asks whether w is NaN

    with pytest.raises(ValueError, match=r"log_prob at site 'w': The model or the guide takes a n"):
        graph().loss_and_grads(model, guide_for(model, ()))


def test_a_generator_of_the_model_is_refused():
    def model():
        y = torch.randn(3, generator=torch.Generator().manual_seed(0))
        pyro.sample("y", dist.Normal(latent(), 1.0).expand([3]).to_event(1), obs=y)

    guide = guide_for(model, ())
    with pytest.raises(ValueError, match=r"a torch.Generator of its own"):
        graph().loss_and_grads(model, guide)


def test_numbers_of_arguments_with_gradients_are_refused():
    model = READS["item"]
    group, y = data()
    guide = guide_for(model, (group, y))
    with pytest.raises(ValueError, match="takes a number out"):
        graph().loss_and_grads(model, guide, group, y.requires_grad_())


def test_numbers_of_frozen_parameters_are_constants():
    net = nn.Linear(1, 1).requires_grad_(False)

    def model(group, y):
        observe(latent() * net(torch.ones(1)).item(), y)

    args = data()
    guide, loss = guide_for(model, args), graph()
    agree(loss, model, guide, args)
    net.weight.fill_(3.0)
    agree(loss, model, guide, args)
    assert loss.recorder._builds.total() == 2


def test_draws_depend_on_what_was_written_through_views_before():
    def guide():
        a = pyro.param("a", torch.full((2,), 2.0))
        a = a.clone()
        a[0] = a[1] + 3.0
        a[:1].mul_(2.0)
        pyro.sample("z", dist.Gamma(a, 1.0).to_event(1))

    def model():
        z = pyro.sample("z", dist.Gamma(torch.ones(2), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(z.sum(-1), 1.0), obs=torch.tensor(1.0))

    guide()
    losses = []
    for loss in (Trace_ELBO(), graph()):
        pyro.set_rng_seed(0)
        losses.append([loss.loss_and_grads(model, guide) for _ in range(4)])
    assert losses[0] == pytest.approx(losses[1])


# Data that change from step to step


def scaled(y):
    observe(latent() * y.std().item(), y)


def cut(y):
    observe(latent(), y[y > 0])


def batches_of(*numbers):
    return [torch.tensor([1.0, 2.0, 3.0]) * number for number in numbers]


def test_ever_new_numbers_are_left_to_the_code():
    guide, loss = guide_for(scaled, batches_of(1)), graph()
    for k in range(MAX_BUILDS):
        agree(loss, scaled, guide, batches_of(1 + k), num_steps=1)
    with pytest.warns(UserWarning, match=r"keeps changing.* computes from its data in Python"):
        agree(loss, scaled, guide, batches_of(50), num_steps=1)
    assert loss.recorder._builds.total() == MAX_BUILDS
    agree(loss, scaled, guide, batches_of(1), num_steps=2)  # which has its recording


@pytest.fixture
def lowered(monkeypatch):
    """Counts how many steps of a fit were lowered."""
    calls = Counter()
    lower = compiled_step.lowering.lower

    def counting(*args):
        calls["lowered"] += 1
        return lower(*args)

    monkeypatch.setattr(compiled_step.lowering, "lower", counting)
    return calls


def run(model, data, **settings):
    pyro.clear_param_store()
    guide = AutoNormal(model)
    settings = {"num_particles": 1, "seed": 0, "progress": False, "early_stop": False} | settings
    result = fit(model, guide, data=data, **{"num_steps": 24, "compile": "graph"} | settings)
    return result, torch.stack([p.detach() for p in guide.parameters()])


def test_minibatches_with_the_same_numbers_share_a_step(lowered):
    data = batches_of(1.0, 2.0, 0.5)
    found = run(cut, data)
    assert found[0].backend == "graph"
    assert lowered["lowered"] == 1
    assert_close(found[1], run(cut, data, compile=False)[1])


@pytest.mark.parametrize("num_batches", [2, 4, 7])
def test_minibatches_that_take_turns_have_a_step_each(lowered, num_batches):
    data = [torch.arange(1.0, 9.0) - 1.5 - k for k in range(num_batches)]  # of 7, 6, ... rows
    found = run(cut, data)
    assert found[0].backend == "graph"
    assert lowered["lowered"] == num_batches
    assert_close(found[1], run(cut, data, compile=False)[1])


def test_more_of_them_than_graphs_are_kept_are_not_compiled():
    data = [torch.arange(1.0, 12.0) - 1.5 - k for k in range(10)]
    with pytest.raises(ValueError, match="more than 8 kinds of arguments take turns"):
        run(cut, data)


def test_minibatches_with_ever_new_numbers_are_not_compiled(lowered, monkeypatch):
    data = batches_of(*range(1, 25))
    with pytest.raises(ValueError, match="keeps changing"):
        run(scaled, data)
    monkeypatch.setattr(compiled_step.lowering.Backend, "fewest_steps", 1)
    with pytest.warns(UserWarning, match="uncompiled: .*keeps changing"):
        found = run(scaled, data, compile="auto")
    assert found[0].backend == "eager"
    assert not lowered
    assert_close(found[1], run(scaled, data, compile=False)[1])


def test_a_second_fit_takes_other_numbers():
    guide = AutoNormal(scaled)
    guide(*batches_of(1.0))
    settings = {"num_steps": 6, "num_particles": 1, "progress": False, "seed": 0}
    for number in (1.0, 5.0):
        found = []
        for how in ("graph", False):
            for p in guide.parameters():
                p.data.fill_(0.5)
            fit(scaled, guide, batches_of(number), compile=how, **settings)
            found.append([p.detach().clone() for p in guide.parameters()])
        assert_close(found[0], found[1])


def test_a_second_fit_sees_a_tensor_that_was_bound_anew():
    y = torch.tensor([1.0, 2.0])

    def model():
        observe(latent(), y)

    guide = AutoNormal(model)
    guide()
    settings = {"num_steps": 6, "num_particles": 1, "progress": False, "seed": 0}
    for y in (y, y + 5.0):  # noqa: B007, B020
        found = []
        for how in ("graph", False):
            for p in guide.parameters():
                p.data.fill_(0.5)
            result = fit(model, guide, compile=how, **settings)
            found.append([p.detach().clone() for p in guide.parameters()])
            assert result.backend == ("eager" if how is False else how)
        assert_close(found[0], found[1])


@pytest.mark.parametrize("at", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("ever_new", [False, True], ids=["two", "ever new"])
def test_a_resumed_run_gives_the_same_numbers(at, ever_new, tmp_path, monkeypatch):
    def model(y):
        observe(latent() * (1 + (y > 0).sum().item()), y)

    monkeypatch.setattr(compiled_step.lowering.Backend, "fewest_steps", 1)
    data = 2 * batches_of(1.0, -1.0)
    if ever_new:  # compiled steps end at the third number of positive ones
        monkeypatch.setattr(compiled_step, "MAX_GRAPHS", 2)
        data += [torch.tensor([1.0, -1.0, k - 2.0]) for k in range(5)]

    def compiled(**more):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "fit takes its steps uncompiled")
            return run(model, data, compile="auto", num_steps=10, **more)

    whole = compiled()
    settings = {"checkpoint": tmp_path / "run.pt", "checkpoint_every": 1}

    def stop(bar, step, *_):
        if step >= at:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(running, "show", stop)
        with pytest.raises(KeyboardInterrupt):
            compiled(**settings)
    resumed = compiled(**settings)
    assert torch.equal(resumed[1], whole[1])
    assert torch.equal(resumed[0].losses, whole[0].losses)
    assert whole[0].backend == ("eager" if ever_new else "graph")
