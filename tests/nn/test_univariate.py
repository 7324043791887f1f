"""What every univariate map owes, and what it gets for it: one table, and every test for each."""

import copy
import json
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from bijections import coordinate_by_coordinate, rough
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide.initialization import init_to_value
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing import assert_close
from univariate_maps import MAPS, TOYS, Bent, Softened

from pyro_iaf import (
    Affine,
    AutoHierarchicalIAF,
    AutoIAF,
    ConditionalInverseAutoregressiveFlow,
    DiagonalNormal,
    Gated,
    InverseAutoregressiveFlow,
    MaskedAutoregressiveNetwork,
    TraceSTL_ELBO,
    UnivariateMap,
    conditional_inverse_autoregressive_flow,
    diagnose,
    fit,
    inverse_autoregressive_flow,
    invert,
    solve_transposed,
)
from pyro_iaf.solvers import path_score
from pyro_iaf.solvers.path_score import draw_with_score


@pytest.fixture(params=MAPS)
def univariate(request):
    return MAPS[request.param]


# The map itself


def arguments(univariate, shape=(50,)):
    x, *params = torch.randn(1 + univariate.num_params, *shape).unbind()
    return 2 * x, *params


def test_forward_and_inverse_agree(univariate):
    x, *params = arguments(univariate)
    y, log_slope = univariate.forward(x, *params)
    again, log_slope_again = univariate.inverse(y, *params)
    assert_close(again, x, rtol=1e-11, atol=1e-11)
    assert_close(log_slope_again, log_slope, rtol=1e-10, atol=1e-10)


def test_the_log_slope_is_autograds(univariate):
    x, *params = arguments(univariate)
    slope = torch.func.grad(lambda x: univariate.forward(x, *params)[0].sum())(x)
    assert (slope > 0).all()
    assert_close(univariate.forward(x, *params)[1], slope.log())


def test_the_derivatives_are_autograds(univariate):
    given = arguments(univariate)
    found = univariate.derivatives(*given)
    every = tuple(range(len(given)))
    for k, (by_x, by_params) in enumerate((found[:2], found[2:])):
        exact = torch.func.grad(lambda *a, k=k: univariate.forward(*a)[k].sum(), argnums=every)
        for ours, theirs in zip((by_x, *by_params), exact(*given), strict=True):
            assert ours is None or not ours.requires_grad
            assert_close(torch.zeros_like(theirs) if ours is None else ours, theirs)


def test_parameters_broadcast_with_the_noise(univariate):
    x, *_ = arguments(univariate, (6, 4))
    _, *params = arguments(univariate, (4,))
    wide = [param.expand(6, 4) for param in params]
    y, log_slope = univariate.forward(x, *params)
    assert_close(univariate.inverse(y, *params)[0], x)
    assert_close((y, log_slope.expand_as(y)), univariate.forward(x, *wide))
    for narrow, exact in zip(
        univariate.derivatives(x, *params)[1], univariate.derivatives(x, *wide)[1], strict=True
    ):
        assert_close(narrow.expand_as(x), exact)


def test_a_fresh_map_takes_zero_to_zero(univariate):
    y, _ = univariate.forward(*torch.zeros(1 + univariate.num_params))
    assert y == 0


def test_a_map_is_a_value(univariate):
    for twin in (copy.deepcopy(univariate), pickle.loads(pickle.dumps(univariate))):
        assert twin == univariate
        assert hash(twin) == hash(univariate)
        assert repr(twin) == repr(univariate)
    assert [other for other in MAPS.values() if other == univariate] == [univariate]
    assert univariate != repr(univariate)


def test_a_map_says_what_it_is():
    assert [repr(kind) for kind in MAPS.values()] == [
        "Affine()",
        "Gated(bias=2.0)",
        "Gated(bias=-1.0)",
        "Bent()",
        "Softened(offset=0.5)",
        "Shift()",
    ]
    assert Gated(1.0) != Gated(2.0)
    assert Softened(1.0) != Softened(2.0)
    with pytest.raises(AttributeError):
        Gated().bias = 3.0


class Silent(UnivariateMap):
    """A map that doesn't say how many parameters it has."""


def test_a_map_says_how_many_parameters_it_has():
    with pytest.raises(ValueError, match=r"Silent\.num_params should be an int of at least 1"):
        inverse_autoregressive_flow(3, univariate=Silent())


def test_a_network_that_is_not_for_the_map_is_refused():
    network = MaskedAutoregressiveNetwork(3, [8])
    waiting = MaskedAutoregressiveNetwork(3, [8], context_dim=2)
    words = r"univariate=Bent\(\) expects a network with num_params=4; got one with num_params=2"
    with pytest.raises(ValueError, match=words):
        InverseAutoregressiveFlow(network, univariate=Bent())
    with pytest.raises(ValueError, match=words):
        ConditionalInverseAutoregressiveFlow(waiting, univariate=Bent())
    lone = lambda x: 3 * (x,)  # noqa: E731
    lone.order = torch.arange(3)
    with pytest.raises(ValueError, match=r"return 4 tensors like x, the parameters of Bent\(\); "):
        InverseAutoregressiveFlow(lone, univariate=Bent())(torch.zeros(3))


# Flows of it


class Called(torch.nn.Module):
    """A network that can only be called."""

    def __init__(self, own):
        super().__init__()
        self.own, self.order = own, own.order

    def forward(self, x):
        return self.own(x)


FLOWS = {
    "flow": lambda **kind: inverse_autoregressive_flow(5, [12, 9], order=[3, 0, 4, 1, 2], **kind),
    "stack": lambda **kind: inverse_autoregressive_flow(4, [12], num_flows=3, **kind),
    "conditioned": lambda **kind: conditional_inverse_autoregressive_flow(
        4, 2, [12], num_flows=2, **kind
    ).condition(torch.randn(6, 2, requires_grad=True)),
    "a network that can only be called": lambda univariate: InverseAutoregressiveFlow(
        Called(MaskedAutoregressiveNetwork(4, [12], num_params=univariate.num_params)),
        univariate=univariate,
    ),
}


@pytest.fixture(params=FLOWS)
def flow(request, univariate):
    return rough(FLOWS[request.param](univariate=univariate), 0.15)


def parts_of(flow):
    return getattr(flow, "parts", [flow])


def noise(flow):
    return torch.randn(6, parts_of(flow)[0].input_dim)


def leaves(flow):
    contexts = {part.context for part in parts_of(flow)} - {None}
    return [*flow.parameters(), *contexts]


@pytest.mark.parametrize("method", ["auto", "incremental", "fixed_point"])
def test_a_flow_inverts_exactly(flow, method):
    x = noise(flow)
    with torch.no_grad():
        y = flow(x).clone()
        found = invert(flow, y, method)
        assert_close(found, x, rtol=1e-10, atol=1e-10)
        assert_close(flow(found.clone()), y, rtol=1e-10, atol=1e-10)


def test_big_batches_and_many_coordinates_are_inverted_as_well(univariate):
    for D, batch in ((4, 300), (130, 5)):  # one by one; in blocks
        flow = rough(inverse_autoregressive_flow(D, [40], univariate=univariate), 0.1)
        x = torch.randn(batch, D)
        with torch.no_grad():
            assert_close(flow.inv(flow(x).clone()), x, rtol=1e-9, atol=1e-9)


def test_the_log_determinant_is_autograds(flow):
    x = noise(flow)
    y = flow(x)
    log_det = flow.log_abs_det_jacobian(x, y)
    for k in range(len(x)):  # each row has a context of its own
        jacobian = torch.autograd.functional.jacobian(lambda row, k=k: flow(row)[k], x)[:, k]
        assert_close(log_det[k], torch.linalg.slogdet(jacobian)[1])
    assert_close(log_det, flow.log_abs_det_jacobian(x, y.clone()))


def test_implicit_gradients_are_those_of_an_unrolled_solve(flow):
    y = flow(noise(flow)).detach().clone().requires_grad_()
    weights = torch.linspace(1, 2, y.numel()).reshape(y.shape)

    def weighted(x):
        log_det = -sum(part.log_abs_det_jacobian(*ends) for part, ends in walk(x))
        return (weights * x.sin()).sum() + (weights[:, 0] * log_det).sum()

    def walk(x):
        for part in parts_of(flow):
            after = part(x.clone())
            yield part, (x, after)
            x = after

    inputs = [y, *leaves(flow)]
    options = {"allow_unused": True, "materialize_grads": True}
    found = torch.autograd.grad(weighted(flow.inv(y)), inputs, **options)
    exact = torch.autograd.grad(weighted(coordinate_by_coordinate(flow, y)), inputs, **options)
    assert_close(found, exact, rtol=1e-7, atol=1e-9)


def test_the_log_determinant_of_an_inverse_has_its_gradient(flow):
    y = flow(noise(flow)).detach().clone().requires_grad_()
    by_inverse = flow.inv.log_abs_det_jacobian(y, flow.inv(y))
    x = coordinate_by_coordinate(flow, y)
    exact = -flow.log_abs_det_jacobian(x, flow(x))
    exact = exact + 0 * y.sum()  # a shift changes no volume, so there is no graph
    inputs = [y, *leaves(flow)]
    options = {"allow_unused": True, "materialize_grads": True}
    assert_close(
        torch.autograd.grad(by_inverse.sum(), inputs, **options),
        torch.autograd.grad(exact.sum(), inputs, **options),
        rtol=1e-7,
        atol=1e-9,
    )


@pytest.mark.parametrize("by_kernel", [False, True])
def test_path_scores_are_autograds(flow, by_kernel, monkeypatch):
    monkeypatch.setattr(path_score, "goes_by_kernel", lambda *_: by_kernel)
    x = noise(flow)
    drawn = draw_with_score(parts_of(flow), x)
    y = drawn.value.detach().requires_grad_()
    base = DiagonalNormal(torch.zeros(x.shape[-1]), torch.ones(()))
    log_q = dist.TransformedDistribution(base, [flow]).log_prob(y)
    assert_close(drawn.log_prob, log_q)
    assert_close(drawn.score, torch.autograd.grad(log_q.sum(), y)[0], rtol=1e-8, atol=1e-9)
    v = torch.randn_like(x)
    assert_close(drawn.solve_transposed(v), solve_transposed(flow, x, v))


def test_the_transposed_jacobian_is_solved_with(flow):
    x, v = noise(flow), noise(flow)
    u = solve_transposed(flow, x, v)
    y = flow(x.requires_grad_())
    assert_close(torch.autograd.grad(y, x, u)[0], v)


def score(flow, x):
    y = flow(x)
    return y, flow.log_abs_det_jacobian(x, y)


def test_traced_and_eager_runs_agree(flow):
    x = noise(flow)
    assert_close(make_fx(lambda x: score(flow, x))(x)(2 * x), score(flow, 2 * x))
    assert_close(torch.func.vmap(flow.inv)(x[None]), flow.inv(x)[None])


def test_a_flow_compiles_without_a_break(univariate):
    torch._dynamo.reset()  # it gives up on functions that it has met too often
    flow = rough(FLOWS["conditioned"](univariate=univariate), 0.15)
    compiled = torch.compile(lambda x: score(flow, x), fullgraph=True, backend="eager")
    x = noise(flow)
    assert_close(compiled(x), score(flow, x))


@pytest.mark.parametrize("name", TOYS)
def test_an_exchanged_map_is_seen(name):
    # Whatever its parameters, a network may have as many as another map wants.
    flow = rough(inverse_autoregressive_flow(4, [8], univariate=TOYS[name]))
    x = torch.randn(3, 4)
    y, log_det = flow(x), flow.log_abs_det_jacobian(x, flow(x))

    class Doubled(type(flow.univariate)):
        def forward(self, x, *params):
            y, log_slope = super().forward(x, *params)
            return 2 * y, log_slope + torch.tensor(2.0).log()

        def inverse(self, y, *params):
            x, log_slope = super().inverse(y / 2, *params)
            return x, log_slope + torch.tensor(2.0).log()

    other = Doubled.__new__(Doubled)
    vars(other).update(vars(flow.univariate))
    flow.univariate = other
    assert_close(flow(x), 2 * y)
    assert_close(flow.log_abs_det_jacobian(x, y), log_det + 4 * torch.tensor(2.0).log())
    assert_close(flow.inv(2 * y), x)


def test_an_attribute_that_changed_is_seen():
    flow = rough(inverse_autoregressive_flow(4, [8], univariate=Softened(0.5)))
    x = torch.randn(3, 4)
    y = flow(x)
    flow.univariate.offset = 1.5
    assert not torch.allclose(flow.inv(y), x)
    assert_close(flow(flow.inv(y)), y)


# Losses and guides


def test_a_landing_gradient_is_that_through_the_draws(univariate):
    flow = rough(inverse_autoregressive_flow(3, [8], num_flows=2, univariate=univariate), 0.1)
    target = dist.MultivariateNormal(torch.ones(3), 0.5 * torch.eye(3) + 0.5)

    def posterior(flow):
        return dist.TransformedDistribution(DiagonalNormal(torch.zeros(3), torch.ones(3)), [flow])

    def guide():
        pyro.module("flow", flow)
        pyro.sample("z", posterior(flow))

    def model():
        pyro.sample("z", target)

    pyro.set_rng_seed(1)
    TraceSTL_ELBO(num_particles=3).loss_and_grads(model, guide)
    found = [parameter.grad.clone() for parameter in flow.parameters()]
    still = copy.deepcopy(flow).requires_grad_(False)
    pyro.set_rng_seed(1)
    loss = 0
    for _ in range(3):
        z = posterior(flow).rsample()
        loss = loss + (posterior(still).log_prob(z + 0) - target.log_prob(z)) / 3
    exact = torch.autograd.grad(loss, list(flow.parameters()))
    assert_close(found, list(exact), rtol=1e-7, atol=1e-9)


def gaussian():
    """Two means of one datum: correlated, with evidence N(1.5 | 0, 2.25)."""
    z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    pyro.sample("y", dist.Normal(z.sum(-1), 0.5), obs=torch.tensor(1.5))


def test_a_guide_of_it_fits(univariate):
    guide = AutoIAF(gaussian, univariate=univariate, hidden_dims=[8])
    fit(gaussian, guide, num_steps=300, compile="graph", progress=False)
    evidence = dist.Normal(0.0, 2.25**0.5).log_prob(torch.tensor(1.5))
    found = diagnose(gaussian, guide, num_samples=1000)
    assert found.elbo > evidence - 0.05
    SVI(gaussian, guide, pyro.optim.Adam({"lr": 1e-3}), Trace_ELBO()).step()


def test_a_fresh_guide_sits_where_it_is_told(univariate):
    start = init_to_value(values={"z": torch.tensor([0.5, -1.0])})
    guide = AutoIAF(gaussian, univariate=univariate, init_loc_fn=start, init_scale=0.1)
    draws = guide.sample_posterior(2000)["z"]
    assert ((draws.mean(0) - torch.tensor([0.5, -1.0])).abs() < 0.02).all()
    assert ((draws.std(0) - 0.1).abs() < 0.03).all()  # a bent map is less steep away from zero


def test_a_guide_for_plates_takes_it(univariate):
    def rows():
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", 7, subsample_size=3):
            pyro.sample("effect", dist.Normal(mean, 1.0))

    guide = AutoHierarchicalIAF(rows, univariate=univariate, hidden_dims=[8])
    fit(rows, guide, num_steps=5, progress=False)
    assert guide.sample_posterior(4)["effect"].shape == (4, 7)
    fresh = AutoHierarchicalIAF(rows, univariate=univariate, name="fresh")
    fresh.load_state_dict(guide.state_dict(), strict=True)


def test_a_state_goes_into_a_guide_of_its_map_alone(univariate):
    guide = AutoIAF(gaussian, univariate=univariate, hidden_dims=[8])
    guide.setup()
    state = guide.state_dict()
    fresh = AutoIAF(gaussian, univariate=univariate, name="fresh")
    fresh.load_state_dict(state, strict=True)
    assert fresh.univariate == univariate
    is_toy = univariate in TOYS.values()
    words = f"a guide with univariate={univariate!r}; this one has univariate="
    for other in (kind for kind in MAPS.values() if kind != univariate):
        set_up = AutoIAF(gaussian, univariate=other, hidden_dims=[8], name="set up")
        set_up.setup()
        for refusing in (set_up, AutoIAF(gaussian, univariate=other, name="new"))[: 1 + is_toy]:
            with pytest.raises(RuntimeError) as error:
                refusing.load_state_dict(state)
            assert words + repr(other) in str(error.value)
    if not is_toy:  # what is ours is built from its name
        default = AutoIAF(gaussian, name="default")
        default.load_state_dict(state, strict=True)
        assert default.univariate == univariate


def test_a_state_names_its_map_in_words():
    state = AutoIAF(gaussian, univariate=Gated(1.0)).get_extra_state()
    assert json.loads(bytes(state.tolist()))["univariate"] == "Gated(bias=1.0)"
    assert repr(AutoIAF(gaussian, univariate=Bent())).startswith("AutoIAF(num_flows=2, univariate=")
    assert "univariate" not in repr(AutoIAF(gaussian, univariate=Affine()))
