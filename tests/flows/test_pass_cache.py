"""Nothing is computed twice, nothing stale is returned, nothing outlives its use."""

import functools
import gc
import weakref

import pyro
import pyro.distributions as dist
import pytest
import torch
from bijections import flows_in, rough, standard_normal
from pyro.nn import AutoRegressiveNN, PyroModule, PyroParam, PyroSample
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.testing import assert_close

from pyro_iaf import (
    DiagonalNormal,
    Gated,
    InverseAutoregressiveFlow,
    conditional_inverse_autoregressive_flow,
    inverse_autoregressive_flow,
)
from pyro_iaf.flows import pass_cache

D = 4


def two_flows():
    return [rough(inverse_autoregressive_flow(D, [8])) for _ in range(2)]


AFFINE = functools.partial(dist.transforms.AffineTransform, torch.ones(D), 2.0, event_dim=1)
CHAINS = {
    "one": lambda: [two_flows()[0]],
    "list": two_flows,
    "stack": lambda: [rough(inverse_autoregressive_flow(D, [8], num_flows=3))],
    "compose": lambda: [dist.transforms.ComposeTransform(two_flows())],
    "iterated": lambda: [dist.transforms.iterated(3, inverse_autoregressive_flow, D, [8])],
    "nested": lambda: [
        dist.transforms.ComposeTransform([*CHAINS["compose"](), *CHAINS["stack"]()])
    ],
    "before a cached affine": lambda: [*two_flows(), AFFINE(cache_size=1)],
    "compose with an affine": lambda: [
        dist.transforms.ComposeTransform([*two_flows(), AFFINE()], cache_size=1)
    ],
    "conditioned": lambda: [
        rough(conditional_inverse_autoregressive_flow(D, 2, [8], num_flows=2)).condition(
            torch.randn(5, 2)
        )
    ],
}


@pytest.mark.parametrize("kind", CHAINS)
def test_scoring_a_draw_costs_no_pass(kind, count_passes):
    transforms = CHAINS[kind]()
    passes, num_flows = count_passes(*transforms), len(flows_in(*transforms))
    posterior = dist.TransformedDistribution(standard_normal(D), transforms).expand((5,))
    # A foreign transform knows its last value only.
    draws = [posterior.rsample() for _ in range(1 if "affine" in kind else 3)]
    assert passes() == len(draws) * num_flows > 0
    scores = [posterior.log_prob(y) for y in draws]
    scores += [posterior.expand((2, 5)).log_prob(y) for y in draws]
    assert passes() == len(draws) * num_flows
    assert_close(scores[0], posterior.log_prob(draws[0].clone()))


@pytest.mark.parametrize("kind", ["one", "list", "stack", "conditioned"])
def test_scoring_a_draw_without_gradients_costs_no_pass(kind, count_passes):
    transforms = CHAINS[kind]()
    passes, num_flows = count_passes(*transforms), len(flows_in(*transforms))
    posterior = dist.TransformedDistribution(standard_normal(D), transforms).expand((5,))
    y = posterior.rsample()
    with torch.no_grad():
        score = posterior.log_prob(y)
    assert passes() == num_flows
    assert not score.requires_grad
    assert_close(score, posterior.log_prob(y))


def test_every_value_alive_is_known(count_passes):
    flow = rough(inverse_autoregressive_flow(D, [8], num_flows=2))
    passes = count_passes(flow)
    noise = [torch.randn(3, D) for _ in range(10)]
    values = [flow(x) for x in noise]
    for x, y in zip(noise, values, strict=True):
        assert flow.inv(y) is x
        flow.log_abs_det_jacobian(x, y)
    assert passes() == 20


def test_a_context_seen_again_is_known_again(count_passes):
    flow = rough(conditional_inverse_autoregressive_flow(D, 2, [8]))
    passes = count_passes(flow)
    context, x = torch.randn(5, 2), torch.randn(5, D)
    y = flow.condition(context)(x)
    assert flow.condition(context).inv(y) is x
    assert passes() == 1
    other = flow.condition(context + 1)
    assert other.inv(y) is not x
    assert_close(other(other.inv(y).clone()), y)


# Nothing stale


OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, 0.01),
    "Adam": lambda p: torch.optim.Adam(p, 0.1),
    "fused Adam": lambda p: torch.optim.Adam(p, 0.1, fused=True),
    "foreach AdamW": lambda p: torch.optim.AdamW(p, 0.1, foreach=True),
    "RMSprop": lambda p: torch.optim.RMSprop(p, 0.02),
    "ClippedAdam": lambda p: pyro.optim.clipped_adam.ClippedAdam(p, 0.1),
    "AdagradRMSProp": lambda p: pyro.optim.adagrad_rmsprop.AdagradRMSProp(p, 0.1),
}


def is_known(flow, x, y):
    return flow.inv(y) is x


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("num_flows", [1, 2])
def test_no_stale_value_after_a_step_of_any_optimiser(make, num_flows):
    flow = rough(inverse_autoregressive_flow(D, [8], num_flows=num_flows))
    optimizer = make(flow.parameters())
    x = torch.randn(3, D)
    y = flow(x)
    old = flow.log_abs_det_jacobian(x, y)
    (y.sum() + old.sum()).backward()
    optimizer.step()
    assert not is_known(flow, x, y)
    assert_close(flow(flow.inv(y)), y)
    fresh = flow(x)
    assert not torch.equal(fresh, y)
    expected = torch.func.vmap(torch.func.jacrev(flow))(x).logdet()
    assert_close(flow.log_abs_det_jacobian(x, y), expected)
    assert not torch.allclose(old, expected)


def recycle(flow):
    """Back and forth between vectors of parameters; an allocator likes to use an address again."""
    vector = parameters_to_vector(flow.parameters()).detach().clone()
    for _ in range(20):
        vector_to_parameters(vector + torch.randn(()), flow.parameters())


CHANGES = {
    "in place": lambda f: rough(f),
    "loaded state": lambda f: f.load_state_dict(inverse_autoregressive_flow(D, [8]).state_dict()),
    "assigned state": lambda f: f.load_state_dict(
        inverse_autoregressive_flow(D, [8]).state_dict(), assign=True
    ),
    "new parameter": lambda f: f.network.weights.__setitem__(
        0, torch.nn.Parameter(torch.randn_like(f.network.mask))
    ),
    "new data": lambda f: setattr(f.network.weights[0], "data", torch.randn_like(f.network.mask)),
    "another network": lambda f: setattr(
        f, "network", rough(inverse_autoregressive_flow(D, 8)).network
    ),
    "gate": lambda f: setattr(f, "univariate", Gated()),
    "recycled storage": recycle,
    "activation": lambda f: setattr(f.network, "activation", torch.nn.Tanh()),
    "training mode": lambda f: f.eval(),
    "order": lambda f: f.load_state_dict(
        inverse_autoregressive_flow(D, [8], order=[3, 2, 1, 0]).state_dict()
    ),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_no_stale_value_after_a_change_of_parameters(change):
    flow = rough(inverse_autoregressive_flow(D, [8]))
    vector = parameters_to_vector(flow.parameters()).detach().clone()
    vector_to_parameters(vector, flow.parameters())
    del vector
    x = torch.randn(3, D)
    y = flow(x)
    assert is_known(flow, x, y)
    change(flow)
    assert not is_known(flow, x, y)
    assert_close(flow(flow.inv(y)), y)


def test_no_stale_value_after_a_change_of_an_integer():
    flow = rough(inverse_autoregressive_flow(D, [8], univariate="gated"))
    flow.univariate = Gated(1.0)
    y = flow(x := torch.randn(3, D))
    flow.univariate = Gated(3.0)
    assert_close(flow(flow.inv(y)), y)
    assert_close(flow.log_abs_det_jacobian(x, y), flow.log_abs_det_jacobian(x.clone(), y.clone()))


def test_no_stale_value_after_a_change_of_value_or_noise():
    flow = rough(inverse_autoregressive_flow(D, [8]))
    for changed in ("value", "noise"):
        x = torch.randn(3, D)
        y = flow(x)
        with torch.no_grad():
            (y if changed == "value" else x).add_(1)
        assert flow.inv(y) is not x
        assert_close(flow(flow.inv(y)), y)


def test_no_stale_value_after_a_change_of_context():
    conditional = rough(conditional_inverse_autoregressive_flow(D, 2, [8]))
    context, x = torch.randn(2), torch.randn(3, D)
    flow = conditional.condition(context)
    y = flow(x)
    context.add_(1)
    assert flow.inv(y) is not x
    assert_close(flow(flow.inv(y)), y)


def test_swapped_parameters_are_other_parameters():
    flow = rough(inverse_autoregressive_flow(D, [8]))
    x = torch.randn(3, D)
    other = {name: p.detach() + 1 for name, p in flow.named_parameters()}
    y = torch.func.functional_call(flow, other, (x,))
    assert flow.inv(y) is not x
    assert_close(flow(flow.inv(y)), y)


def test_weights_with_a_prior_are_not_remembered():
    flow = inverse_autoregressive_flow(D, [8])
    pyro.nn.module.to_pyro_module_(flow)
    prior = dist.Normal(torch.zeros_like(flow.network.mask), 1.0).to_event(1)
    setattr(flow.network.weights, "0", PyroSample(prior))
    assert isinstance(flow, PyroModule)
    x = torch.randn(3, D)
    with pytest.warns(RuntimeWarning, match="comes back only"):  # the weights differ by then
        assert flow.inv(flow(x)) is not x


def test_parameters_of_pyro_are_not_remembered():
    flow = rough(inverse_autoregressive_flow(D, [8]))
    pyro.nn.module.to_pyro_module_(flow)
    value = torch.ones_like(flow.network.mask)
    setattr(flow.network.weights, "0", PyroParam(lambda: value))
    x = torch.randn(3, D)
    flow(x)
    y = flow(x)
    assert flow.inv(y) is not x
    assert_close(flow(flow.inv(y)), y)


def test_a_callable_that_can_not_be_watched_is_not_remembered():
    network = AutoRegressiveNN(D, [8])

    class Wrapped:
        permutation = network.permutation

        def __call__(self, x):
            return network(x)

    flow = InverseAutoregressiveFlow(Wrapped())
    x = torch.randn(3, D)
    assert flow.inv(flow(x)) is not x
    assert_close(flow.inv(flow(x)), x)
    partial = functools.partial(network)
    partial.permutation = network.permutation
    flow = InverseAutoregressiveFlow(partial)
    y = flow(x)
    assert flow.inv(y) is x
    with torch.no_grad():
        rough(network)
    assert flow.inv(y) is not x


# Grad modes


def test_a_switch_to_gradients_brings_them(count_passes):
    flow = rough(inverse_autoregressive_flow(D, [8], num_flows=2))
    posterior = dist.TransformedDistribution(standard_normal(D), [flow])
    with torch.no_grad():
        y = posterior.rsample((5,))
    passes = count_passes(flow)
    score = posterior.log_prob(y)
    assert passes() == 2
    assert score.requires_grad
    known = torch.autograd.grad(score.sum(), list(flow.parameters()))
    found = torch.autograd.grad(posterior.log_prob(y.clone()).sum(), list(flow.parameters()))
    assert_close(known, found)


@pytest.mark.parametrize(("kind", "price"), [("list", 1), ("stack", 1), ("compose", 2)])
def test_a_switch_to_gradients_costs_a_pass_or_two(kind, price, count_passes):
    transforms = CHAINS[kind]()
    passes, num_flows = count_passes(*transforms), len(flows_in(*transforms))
    posterior = dist.TransformedDistribution(standard_normal(D), transforms)
    with torch.no_grad():
        y = posterior.rsample((5,))
    before = passes()
    score = posterior.log_prob(y)
    # ComposeTransform asks for the values in between once more, and these have to be made anew.
    assert passes() - before == price * num_flows
    parameters = [p for flow in flows_in(*transforms) for p in flow.parameters()]
    known = torch.autograd.grad(score.sum(), parameters)
    found = torch.autograd.grad(posterior.log_prob(y.clone()).sum(), parameters)
    assert_close(known, found)


def test_a_value_that_was_cut_from_its_graph_gets_its_gradient():
    flow = rough(inverse_autoregressive_flow(D, [8], num_flows=2))
    posterior = dist.TransformedDistribution(standard_normal(D), [flow])
    y = posterior.rsample((4,))
    y.detach_().requires_grad_()
    leaves = [y, *flow.parameters()]
    known = torch.autograd.grad(posterior.log_prob(y).sum(), leaves)
    found = torch.autograd.grad(posterior.log_prob(y.clone()).sum(), leaves)
    assert_close(known, found)


def test_there_and_back_has_its_gradient():
    flow = rough(inverse_autoregressive_flow(D, [8]))
    with torch.no_grad():
        y = flow(torch.randn(D))
    for value in (y, y.clone()):
        x = flow.inv(value)
        slope = torch.func.jacrev(flow)(x.detach()).sum(0)
        assert_close(torch.autograd.grad(flow(x).sum(), x)[0], slope)


def test_the_noise_of_a_changed_inverse_is_its_own():
    first, second = two_flows()
    with torch.no_grad():
        y = second(first(torch.randn(3, D)))
    z = second.inv(y)
    with torch.no_grad():
        z += 1
    assert_close(first(first.inv(z)), z)


def test_an_inverse_can_be_inverted_without_gradients(count_passes):
    first, second = two_flows()
    with torch.no_grad():
        y = second(first(x := torch.randn(3, D)))
    z = second.inv(y)
    passes = count_passes(first)
    with torch.no_grad():
        assert_close(first.inv(z), x)
    assert passes() == 0


def under_func_grad(posterior, draw):
    return torch.func.grad(lambda s: (s * posterior.log_prob(draw())).sum())(torch.tensor(2.0))


def under_vmap(posterior, draw):
    run = torch.func.vmap(lambda s: s * posterior.log_prob(draw()).sum(), randomness="same")
    return run(torch.ones(2))[0]


def under_make_fx(posterior, draw):
    return make_fx(lambda s: (s * posterior.log_prob(draw())).sum())(torch.ones(()))(torch.ones(()))


def under_forward_mode(posterior, draw):
    with torch.autograd.forward_ad.dual_level():
        score = posterior.log_prob(draw()).sum()
        return torch.autograd.forward_ad.unpack_dual(score).primal


@pytest.mark.parametrize("run", [under_func_grad, under_vmap, under_make_fx, under_forward_mode])
def test_a_value_drawn_without_gradients_works_everywhere(run):
    flow = rough(inverse_autoregressive_flow(D, [8], num_flows=2))
    # torch checks values by branching on them, which a tracer can't follow.
    base = DiagonalNormal(torch.zeros(D), torch.ones(D), validate_args=False)
    posterior = dist.TransformedDistribution(base, [flow], validate_args=False)
    with torch.no_grad():
        y = posterior.rsample((4,))
    value = run(posterior, lambda: y)
    assert_close(value, posterior.log_prob(y.clone()).sum())
    if value.requires_grad:
        parameters = list(flow.parameters())
        known = torch.autograd.grad(value, parameters)
        assert_close(known, torch.autograd.grad(posterior.log_prob(y.clone()).sum(), parameters))


def test_each_score_is_the_callers_own():
    flow = rough(inverse_autoregressive_flow(D, [8]))
    y = flow(x := torch.randn(3, D))
    once = flow.log_abs_det_jacobian(x, y)
    expected = once.clone()
    once += 1
    assert_close(flow.log_abs_det_jacobian(x, y), expected)


def test_noise_that_a_context_widens_is_known(count_passes):
    for num_flows in (1, 2):
        flow = rough(conditional_inverse_autoregressive_flow(D, 2, [8], num_flows=num_flows))
        flow = flow.condition(torch.randn(5, 2))
        passes = count_passes(flow)
        y = flow(x := torch.randn(D))
        assert flow.log_abs_det_jacobian(x, y).shape == (5,)
        assert flow.inv(y).shape == (5, D)
        assert passes() == num_flows


def test_a_switch_from_gradients_leaves_them():
    flow = rough(inverse_autoregressive_flow(D, [8], num_flows=2))
    x = torch.randn(3, D)
    y = flow(x)
    with torch.no_grad():
        assert flow.inv(y) is x
        assert not flow.log_abs_det_jacobian(x, y).requires_grad
        assert not flow(x).requires_grad


def test_thawed_parameters_get_gradients():
    flow = rough(inverse_autoregressive_flow(D, [8])).requires_grad_(False)
    y = flow(torch.randn(3, D))
    x = flow.inv(y)
    assert not x.requires_grad
    flow.requires_grad_(True)
    score = flow.log_abs_det_jacobian(flow.inv(y), y).sum()
    known = torch.autograd.grad(score, flow.network.weights[0])
    again = y.clone()
    found = torch.autograd.grad(
        flow.log_abs_det_jacobian(flow.inv(again), again).sum(), flow.network.weights[0]
    )
    assert_close(known, found)


def test_a_value_that_comes_to_want_gradients_gets_them():
    flow = rough(inverse_autoregressive_flow(D, [8])).requires_grad_(False)
    y = flow(torch.randn(3, D)).requires_grad_()
    (slope,) = torch.autograd.grad(flow.inv(y).sum(), y)
    again = y.detach().clone().requires_grad_()
    assert_close(slope, torch.autograd.grad(flow.inv(again).sum(), again)[0])


@pytest.mark.usefixtures("no_gc")
def test_inference_mode_works_and_keeps_nothing():
    flow = rough(inverse_autoregressive_flow(D, [8], num_flows=2))
    posterior = dist.TransformedDistribution(standard_normal(D), [flow])
    before = sizes()
    with torch.inference_mode():
        y = posterior.sample((3,))
        noise = torch.randn(3, D)
        score = posterior.log_prob(y)
        assert sizes() == before
    assert_close(score, posterior.log_prob(y.clone()))
    with torch.no_grad():
        flow(noise)  # a tensor without a version
    assert sizes() == before


def sizes():
    names = ("_forward", "_backward", "_aliases", "_values")
    return [len(getattr(pass_cache, name)) for name in names]


def test_gradcheck_is_not_fooled_by_what_is_remembered():
    flow = rough(inverse_autoregressive_flow(D, [8], num_flows=2))
    x = torch.randn(2, D, requires_grad=True)
    posterior = dist.TransformedDistribution(standard_normal(D), [flow])
    assert torch.autograd.gradcheck(flow, (x,))
    assert torch.autograd.gradcheck(lambda x: flow.log_abs_det_jacobian(x, flow(x)), (x,))
    assert torch.autograd.gradcheck(lambda x: (y := flow(x), posterior.log_prob(y))[1], (x,))
    assert torch.autograd.gradcheck(flow.inv, (x,))
    assert torch.autograd.gradcheck(posterior.log_prob, (x,))
    assert torch.autograd.gradgradcheck(flow, (x,))
    weights = tuple(flow.parameters())
    fixed = torch.randn(2, D)
    assert torch.autograd.gradcheck(lambda *_: flow(fixed), weights)
    assert torch.autograd.gradcheck(lambda *_: posterior.log_prob(fixed), weights)
    assert torch.autograd.gradcheck(lambda *_: posterior.log_prob(flow(fixed)), weights)


# Nothing outlives its use


@pytest.fixture
def no_gc():
    gc.collect()
    gc.disable()
    yield
    gc.enable()


LIVES = {
    "stack": lambda: inverse_autoregressive_flow(D, [8], num_flows=2),
    "gated": lambda: inverse_autoregressive_flow(D, [8], univariate="gated"),
    "conditioned": lambda: conditional_inverse_autoregressive_flow(D, 2, [8], num_flows=2),
}


@pytest.mark.usefixtures("no_gc")
@pytest.mark.parametrize("leaf", [False, True])
@pytest.mark.parametrize("make", LIVES.values(), ids=LIVES)
def test_nothing_outlives_its_use(make, leaf):
    flow = rough(make())
    encoder = torch.nn.Linear(2, 2)
    watched = []

    def use():
        bijection = flow
        if hasattr(flow, "condition"):
            context = encoder(torch.randn(5, 2))
            bijection = flow.condition(context)
            watched.append(weakref.ref(context))
            watched.append(weakref.ref(bijection))
        x = torch.randn(5, D, requires_grad=leaf)
        y = bijection(x)
        score = bijection.log_abs_det_jacobian(bijection.inv(y), y)
        watched.extend(map(weakref.ref, (x, y, score)))
        with torch.no_grad():
            drawn = bijection(torch.randn(5, D))
        known = bijection.inv(drawn)
        again = bijection.log_abs_det_jacobian(known, drawn)
        watched.extend(map(weakref.ref, (drawn, known, again)))
        (y.sum() + score.sum() + again.sum() + known.sum()).backward()

    before = sizes()
    use()
    assert [ref() for ref in watched] == [None] * len(watched)
    assert sizes() == before


@pytest.mark.usefixtures("no_gc")
@pytest.mark.parametrize("how", ["hook", "attribute", "in-place score"])
def test_nothing_is_kept_alive_by_what_the_memory_holds(how):
    class Guide(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.flow = inverse_autoregressive_flow(D, [8])
            self.flow.network.register_forward_hook(lambda *_: self.seen())

        def seen(self):
            pass

        def forward(self):
            y = self.flow(x := torch.randn(3, D))
            score = self.flow.log_abs_det_jacobian(x, y)
            if how == "in-place score":
                score += y.square().sum(-1)
            else:
                (self.flow.network if how == "attribute" else self).last = y
            return weakref.ref(y)

    guide = Guide()
    last = guide()
    before = sizes()
    del guide
    gc.collect()  # a guide and its hook are a cycle of their own
    assert last() is None
    assert sum(sizes()) <= sum(before)


@pytest.mark.usefixtures("no_gc")
def test_memory_does_not_grow_over_training():
    flow = inverse_autoregressive_flow(D, [8], num_flows=2)
    posterior = dist.TransformedDistribution(standard_normal(D), [flow])
    optimizer = torch.optim.Adam(flow.parameters(), 0.01)
    after = []
    for _ in range(5):
        y = posterior.rsample((3,))
        optimizer.zero_grad()
        posterior.log_prob(y).sum().backward()
        optimizer.step()
        after.append(sizes())
    assert after == after[:1] * 5


def test_steps_are_counted_once_each():
    parameter = torch.nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([parameter], 0.1)
    before = pass_cache._optimizer_steps
    for _ in range(3):
        optimizer.step()
    assert pass_cache._optimizer_steps == before + 3
