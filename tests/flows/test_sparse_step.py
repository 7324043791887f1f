"""The flows of a guide with structure: a line for each kind, and the same promises of all."""

import copy
import gc
import io
import pickle
import weakref

import pyro.distributions as dist
import pytest
import torch
from bijections import rough, standard_normal
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing import assert_close

from pyro_iaf import InverseAutoregressiveFlowStack, inverse_autoregressive_flow
from pyro_iaf.flows.posterior import Posterior
from pyro_iaf.flows.sinh_arcsinh import LocScale
from pyro_iaf.flows.sparse_step import Coordinates, Leading, SparseStep, feature_degrees, features
from pyro_iaf.solvers.path_score import Within, draw_scored, draw_with_score
from pyro_iaf.solvers.sparse import eliminated

CHAIN = [(i, i + 1) for i in range(5)]
PLATE = [(0, 1), (2, 3), (4, 5)]
GRID = [(0, 1), (1, 2), (3, 4), (4, 5), (0, 3), (1, 4), (2, 5)]
DENSE = [(i, j) for i in range(6) for j in range(i)]


def step(num_globals, edges, num_others=6, by=0.3):
    """A step with coefficients that move with the globals."""
    elimination = eliminated(num_others, edges)
    G, size = num_globals, 2 * num_others + elimination.num_coefficients
    # The higher a feature's degree, the smaller its coefficients, as far noise has large cubes.
    typical = features(3 * torch.ones(G)).unsqueeze(-1)
    start = by * torch.randn(len(feature_degrees(G)), size) / typical
    tril = (0.3 * torch.randn(G, G)).tril(-1) + torch.diag(0.5 + torch.rand(G))
    found = rough(SparseStep(elimination, torch.randn(G), tril, start), 0.2)
    with torch.no_grad():
        found.by_parents *= 3
    return found


def in_runs(place, *runs):
    """Coordinates in which the latents of each run are differences."""
    before = torch.full((len(place),), len(place))
    for run in map(torch.tensor, runs):
        before[run[1:]] = run[:-1]
    return Coordinates(torch.tensor(place), before)


def leading(**settings):
    return rough(Leading(inverse_autoregressive_flow(3, [8], **settings), 8))


def bent_leading():
    return rough(Leading(LocScale(torch.randn(3), torch.eye(3), -0.3, True), 8), 0.2)


def whole(num_globals=2, edges=CHAIN, place=(3, 0, 7, 5, 1, 6, 2, 4)):
    """What a guide makes of them: all the flows, one after the other."""
    G, D = num_globals, num_globals + 6
    over = [inverse_autoregressive_flow(G, [8]) for _ in range(2)] if G else []
    over += [LocScale(torch.zeros(G), torch.ones(G), -0.1, True)] if G else []
    coordinates = in_runs([k for k in place if k < D], [G + 1, G + 2, G + 3], [0, G + 4])
    flows = [rough(Leading(flow, D), 0.05) for flow in over]
    return InverseAutoregressiveFlowStack([*flows, step(G, edges, by=0.1), coordinates])


FLOWS = {
    "leading": leading,
    "leading, gated": lambda: leading(univariate="gated"),
    "leading, loc and scale": bent_leading,
    "leading, all": lambda: rough(Leading(inverse_autoregressive_flow(4, [8]), 4)),
    "chain": lambda: step(2, CHAIN),
    "one global": lambda: step(1, CHAIN),
    "no globals": lambda: step(0, CHAIN),
    "many globals": lambda: step(7, PLATE),
    "plate": lambda: step(2, PLATE),
    "grid": lambda: step(2, GRID),
    "dense": lambda: step(1, DENSE),
    "no edges": lambda: step(2, []),
    "no edges, no globals": lambda: step(0, []),
    "one other": lambda: step(2, [], num_others=1),
    "coordinates": lambda: in_runs([3, 0, 1, 2, 4]),
    "sums": lambda: in_runs([3, 0, 1, 2, 4], [0, 1, 2]),
    "sums of several runs": lambda: in_runs([4, 6, 5, 3, 0, 1, 2], [1, 4, 0], [5, 2]),
    "whole": whole,
    "whole, without globals": lambda: whole(0),
    "whole, one global": lambda: whole(1, GRID),
}
PARTS = [name for name in FLOWS if not name.startswith("whole")]
LEARNED = [name for name in FLOWS if "coordinates" not in name and "sums" not in name]


@pytest.fixture(params=FLOWS)
def flow(request):
    return FLOWS[request.param]()


def parts(flow):
    return list(getattr(flow, "parts", [flow]))


def dim(flow):
    return parts(flow)[-1].input_dim


@pytest.fixture
def x(flow):
    return torch.randn(5, dim(flow))


def jacobians(flow, x):
    return torch.stack([torch.autograd.functional.jacobian(flow._call, row) for row in x])


def log_density(flow, y):
    """The density of the value of standard normal noise, by the inverse."""
    x = flow.inv(y)
    return standard_normal(dim(flow)).log_prob(x) - flow.log_abs_det_jacobian(x, y)


# The map


def test_a_step_is_what_its_formula_says():
    flow = step(2, GRID)
    elimination, n = flow.elimination, flow.num_others
    with torch.no_grad():
        flow.changes.zero_()
        x = torch.randn(8)
        y = flow._call(x)
        v, noise = x.split([2, n])
        mean, log_scale, coefficients = (features(v) @ flow.start_frame).split(
            [n, n, elimination.num_coefficients]
        )
        A = torch.zeros(n, n)
        A[elimination.children, elimination.parents] = coefficients
        skew, log_tail = flow.bend
        bent = (log_tail.exp() * noise.asinh() + skew).sinh()
        away = y[2:] - mean
        C, D = torch.zeros(2, n, n)
        units = flow.unit_frame[elimination.children], flow.unit_frame[n]
        C[elimination.children, elimination.parents] = flow.by_parents[0] * units[0]
        D[elimination.children, elimination.parents] = flow.by_parents[1] * units[1]
        ratio = 10 * (away / flow.spread_frame / 10).tanh()
        scale = (log_scale + D @ ratio).exp()
        assert C.abs().max() > 0.1
        assert D.abs().max() > 0.1
        assert_close(away, A @ away + C @ ratio.square() + scale * bent)
        assert_close(y[:2], flow.loc + flow.scale_tril @ v)


@pytest.mark.parametrize("num_globals", [0, 1, 3, 12, 13, 20])
def test_features_are_bounded_and_as_many_as_are_said(num_globals):
    for size in (1.0, 1e6):
        found = features(size * torch.randn(5, num_globals))
        assert found.shape == (5, len(feature_degrees(num_globals)))
        assert (found[:, 0] == 1).all()
        assert found.abs().max() <= 1000


def test_near_zero_features_are_powers():
    v = 1e-2 * torch.randn(2)
    a, b = v.tolist()
    expected = torch.tensor([1.0, a, b, a * a, a * b, b * b, a**3, b**3])
    assert_close(features(v), expected, rtol=1e-4, atol=0)


def test_a_fresh_step_has_no_bend_and_no_changes():
    elimination = eliminated(6, CHAIN)
    start = 0.2 * torch.randn(len(feature_degrees(2)), 12 + elimination.num_coefficients)
    flow = SparseStep(elimination, torch.zeros(2), torch.eye(2), start)
    at_zero = flow._call(torch.zeros(8))
    assert_close(at_zero, torch.cat([torch.zeros(2), start[0, :6]]))


def test_leading_leaves_the_rest_as_it_is():
    flow, x = leading(), torch.randn(5, 8)
    y = flow(x)
    assert torch.equal(y[:, 3:], x[:, 3:])
    assert_close(y[:, :3], flow.flow(x[:, :3]))
    assert_close(
        flow.log_abs_det_jacobian(x, y), flow.flow.log_abs_det_jacobian(x[:, :3], y[:, :3])
    )


def test_latents_of_a_run_are_differences_of_its_sums():
    flow = in_runs([3, 0, 1, 2, 4], [0, 1, 2])
    x = torch.randn(5)
    in_order = x[torch.tensor([3, 0, 1, 2, 4])]
    y = flow._call(x)
    assert_close(y[:3].cumsum(0), in_order[:3])
    assert_close(y[3:], in_order[3:])


def test_runs_of_several_sites_and_lengths_are_told_apart():
    flow = in_runs([4, 6, 5, 3, 0, 1, 2], [1, 4, 0], [5, 2])
    x = torch.randn(7)
    in_order, y = x[torch.tensor([4, 6, 5, 3, 0, 1, 2])], flow._call(x)
    for run in ([1, 4, 0], [5, 2], [3], [6]):
        assert_close(y[run].cumsum(0), in_order[run])


# The log-determinant, there and back


def test_log_det_agrees_with_autograd(flow, x):
    log_det = flow.log_abs_det_jacobian(x, flow(x))
    assert log_det.shape == (5,)
    assert_close(log_det, jacobians(flow, x).det().abs().log())


def test_the_log_det_of_new_tensors_agrees(flow, x):
    y = flow._call(x)
    expected = flow.log_abs_det_jacobian(x, flow(x))
    assert_close(flow.log_abs_det_jacobian(x.clone(), y.clone()), expected)
    assert_close(flow.inv.log_abs_det_jacobian(y.clone(), x.clone()), -expected)


def test_there_and_back(flow, x):
    for scale in (1.0, 2.0):
        back = flow.inv(flow(scale * x).detach().clone())
        assert_close(back, scale * x, atol=1e-8, rtol=1e-8)


def test_back_and_there(flow, x):
    assert_close(flow(flow.inv(x).detach().clone()), x)


@pytest.mark.parametrize("shape", [(), (0,), (1,), (3,), (2, 3), (2, 0, 3)])
def test_any_batch_shape_flows(flow, shape):
    x = torch.randn(*shape, dim(flow))
    y = flow(x)
    assert y.shape == x.shape == flow.inv(y.detach().clone()).shape
    assert flow.log_abs_det_jacobian(x, y).shape == shape
    if len(x.reshape(-1, dim(flow))):
        assert_close(y.reshape(-1, dim(flow))[0], flow._call(x.reshape(-1, dim(flow))[0]))


def test_expanded_noise_flows(flow, x):
    y = flow(x[:1].expand(5, -1))
    assert_close(y, flow(x[:1].repeat(5, 1)))


def test_far_noise_stays_finite(flow):
    x = torch.stack([torch.full((dim(flow),), c) for c in (-30.0, 30.0)])
    y = flow(x)
    assert y.isfinite().all()
    assert flow.log_abs_det_jacobian(x, y).isfinite().all()


def test_a_wrong_size_is_named(flow):
    for run in (flow, flow.inv):
        with pytest.raises(ValueError, match=rf"vectors of {dim(flow)} coordinates"):
            run(torch.randn(2, dim(flow) + 1))


def test_the_density_adds_up_to_one():
    flow = step(1, [], num_others=1)
    ends = torch.linspace(-30.0, 30.0, 801)
    with torch.no_grad():
        mass = log_density(flow, torch.cartesian_prod(ends, ends)).exp().sum()
    assert_close(mass * (ends[1] - ends[0]) ** 2, torch.tensor(1.0), atol=2e-3, rtol=0)


# Gradients


@pytest.mark.parametrize("flow", LEARNED, indirect=True)
def test_gradients_reach_every_parameter(flow, x):
    y = flow(x)
    (y.square().sum() + flow.log_abs_det_jacobian(x, y).sum()).backward()
    for name, parameter in flow.named_parameters():
        if not parameter.numel():
            continue
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


def test_gradients_are_true_there_and_back(flow, x):
    y = flow._call(x[:2]).detach().requires_grad_()
    x = x[:2].clone().requires_grad_()

    def there(x):
        y = flow(x.clone())
        return y, flow.log_abs_det_jacobian(x.clone(), y)

    def back(y):
        y = y.clone()
        x = flow.inv(y)
        return x, flow.log_abs_det_jacobian(x, y)

    assert torch.autograd.gradcheck(there, (x,))
    assert torch.autograd.gradcheck(back, (y,))


@pytest.mark.parametrize("flow", ["chain", "no globals", "grid", "sums"], indirect=True)
def test_second_derivatives_are_true(flow, x):
    x = (x[:1]).clone().requires_grad_()
    y = flow._call(x).detach().requires_grad_()
    assert torch.autograd.gradgradcheck(lambda x: flow._compute(x), (x,))
    assert torch.autograd.gradgradcheck(lambda y: flow._undo(y), (y,))


@pytest.mark.parametrize("flow", LEARNED, indirect=True)
def test_the_inverse_has_the_gradients_of_the_parameters(flow, x):
    """Through the fixed point: d inv / d theta = - J^{-1} dy / d theta."""
    params = [p for p in flow.parameters() if p.numel()]
    y = flow._call(x).detach()
    noise = flow.inv(y.clone())
    weights = torch.randn_like(noise)
    found = torch.autograd.grad((weights * noise).sum(), params, allow_unused=True)
    solved = torch.linalg.solve(jacobians(flow, x).mT, weights.unsqueeze(-1)).squeeze(-1)
    there = (-solved * flow._call(x)).sum()
    expected = torch.autograd.grad(there, params, allow_unused=True)
    for a, b in zip(found, expected, strict=True):
        a, b = (torch.zeros(()) if g is None else g for g in (a, b))
        assert_close(a + 0 * b, b + 0 * a, atol=1e-7, rtol=1e-7)


def test_transposed_systems_are_solved(flow, x):
    if hasattr(flow, "parts"):
        return  # see Drawn below
    v = torch.randn_like(x)
    with torch.no_grad():
        u = flow.solve_transposed(x, v)
    assert_close((jacobians(flow, x).mT @ u.unsqueeze(-1)).squeeze(-1), v)


# Scores


def test_a_draw_with_its_score_is_autograds(flow, x):
    drawn = draw_with_score(parts(flow), x)
    y = drawn.value.detach().clone().requires_grad_()
    log_q = log_density(flow, y)
    (score,) = torch.autograd.grad(log_q.sum(), y)
    assert_close(drawn.value, flow._call(x))
    assert_close(drawn.log_prob.detach(), log_q.detach())
    assert_close(drawn.score, score, atol=1e-8, rtol=1e-8)
    assert not drawn.score.requires_grad


def test_a_scored_draw_is_the_same_in_fewer_operations(flow, x):
    drawn, scored = draw_with_score(parts(flow), x), draw_scored(parts(flow), x)
    assert_close(scored.value, drawn.value)
    assert_close(scored.log_prob.detach(), drawn.log_prob.detach())
    assert_close(scored.score, drawn.score)


@pytest.mark.parametrize("flow", LEARNED, indirect=True)
def test_the_value_and_its_density_have_the_gradients_of_a_pass(flow, x):
    params = [p for p in flow.parameters() if p.numel()]
    weights = torch.randn_like(x)
    drawn, scored = draw_with_score(parts(flow), x), draw_scored(parts(flow), x)
    y = flow._call(x)
    log_det = flow.log_abs_det_jacobian(x, flow(x))

    def slopes(of):
        found = torch.autograd.grad(of.sum(), params, retain_graph=True, allow_unused=True)
        return [torch.zeros_like(p) if s is None else s for p, s in zip(params, found, strict=True)]

    expected = slopes(weights * y)
    assert_close(slopes(weights * drawn.value), expected)
    assert_close(slopes(weights * scored.value), expected)
    assert_close(slopes(-drawn.log_prob), slopes(log_det))


def test_a_draw_solves_transposed_systems(flow, x):
    drawn = draw_with_score(parts(flow), x)
    v = torch.randn_like(x)
    expected = torch.linalg.solve(jacobians(flow, x).mT, v.unsqueeze(-1)).squeeze(-1)
    assert_close(drawn.solve_transposed(v), expected)


def test_the_step_of_a_leading_flow_is_within():
    drawn = draw_with_score(whole().parts, torch.randn(3, 8))
    assert [isinstance(step, Within) for step in drawn.steps] == 3 * [True] + 2 * [False]


def test_other_base_densities_have_their_score():
    flow, x = whole(), torch.randn(4, 8)
    base = dist.StudentT(5.0, torch.zeros(8), 1.0).to_event(1)
    leaf = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(base.log_prob(leaf).sum(), leaf)
    drawn = draw_with_score(flow.parts, x, base.log_prob(x), slope)
    y = drawn.value.detach().clone().requires_grad_()
    back = flow.inv(y)
    log_q = base.log_prob(back) - flow.log_abs_det_jacobian(back, y)
    (score,) = torch.autograd.grad(log_q.sum(), y)
    assert_close(drawn.log_prob.detach(), log_q.detach())
    assert_close(drawn.score, score)


# What is remembered


@pytest.fixture
def count(monkeypatch):
    """Counts computations of steps and coordinates, there and back."""
    calls = []
    for kind in (Leading, SparseStep, Coordinates):
        for name in ("_compute", "_undo", "_undo_known"):
            own = getattr(kind, name)

            def counted(self, *args, own=own, name=name):
                calls.append(name)
                return own(self, *args)

            monkeypatch.setattr(kind, name, counted)
    return calls


def test_scoring_a_draw_costs_no_pass(flow, count):
    posterior = Posterior(standard_normal(dim(flow)), [stacked(flow)]).expand((3,))
    y = posterior.rsample()
    passes = len(count)
    log_prob = posterior.log_prob(y)
    assert len(count) == passes == len(parts(flow))
    assert_close(log_prob, posterior.log_prob(y.clone()))
    assert len(count) > passes


def stacked(flow):
    return flow if hasattr(flow, "parts") else InverseAutoregressiveFlowStack([flow])


def test_the_noise_of_a_value_is_known(flow, x, count):
    y = flow(x)
    before = len(count)
    assert flow.inv(y) is x
    flow.log_abs_det_jacobian(x, y)
    assert len(count) == before


@pytest.mark.parametrize("flow", LEARNED, indirect=True)
def test_nothing_is_stale_after_an_optimiser_step(flow, x):
    optimizer = torch.optim.Adam(flow.parameters(), 0.05)
    y = flow(x)
    old = flow.log_abs_det_jacobian(x, y)
    (y.square().sum() + old.sum()).backward()
    optimizer.step()
    assert flow.inv(y) is not x
    assert_close(flow(flow.inv(y).detach().clone()), y)
    assert not torch.equal(flow(x), y)
    found = flow.log_abs_det_jacobian(x, flow(x))
    assert_close(found, jacobians(flow, x).det().abs().log())


@pytest.mark.parametrize("name", ["chain", "sums", "leading"])
def test_nothing_is_stale_after_a_buffer_has_changed(name):
    flow = FLOWS[name]()
    x = torch.randn(4, dim(flow))
    y = flow(x)
    for value in flow.state_dict(keep_vars=True).values():
        if value.is_floating_point():
            value.data.mul_(1.1) if value.requires_grad else value.mul_(1.1)
    if name == "sums":
        flow.place_frame.copy_(flow.place_frame.roll(1))
    if name != "leading":  # a change through .data has no version
        assert flow.inv(y) is not x
    assert_close(flow(flow.inv(y.clone()).detach().clone()), y)


@pytest.mark.parametrize("name", FLOWS)
def test_a_value_frees_its_pass(name):
    flow = FLOWS[name]()
    x = torch.randn(4, dim(flow))
    noise = weakref.ref(x)
    y = flow(x)
    flow.log_abs_det_jacobian(x, y)
    del x, y
    gc.collect()
    assert noise() is None


# Precision, state, copies, tracing


def test_single_precision_agrees_with_double(flow, x):
    single = copy.deepcopy(flow).float()
    y = single(x.float())
    assert y.dtype == torch.float32
    assert_close(y.double(), flow(x), atol=1e-3, rtol=1e-3)
    log_det = single.log_abs_det_jacobian(x.float(), y)
    assert log_det.dtype == torch.float32
    assert_close(log_det.double(), flow.log_abs_det_jacobian(x, flow(x)), atol=1e-3, rtol=1e-3)
    assert_close(single.inv(y.detach().clone()).double(), x, atol=1e-2, rtol=1e-2)
    drawn, expected = (draw_with_score(parts(f), n) for f, n in ((single, x.float()), (flow, x)))
    assert drawn.score.dtype == torch.float32
    assert_close(drawn.score.double(), expected.score, atol=1e-2, rtol=1e-2)


def test_there_and_back_between_precisions(flow, x):
    expected = flow(x)
    twin = copy.deepcopy(flow).to(torch.float32).double()
    assert twin(x).dtype == torch.float64
    assert_close(twin(x), expected, atol=1e-3, rtol=1e-3)
    for name, value in twin.state_dict().items():
        assert value.dtype == flow.state_dict()[name].dtype


def test_copies_do_the_same_and_are_apart(flow, x):
    expected = flow(x)
    for twin in (copy.deepcopy(flow), pickle.loads(pickle.dumps(flow))):
        assert torch.equal(twin(x), expected)
        assert_close(twin.inv(expected.detach().clone()), x, atol=1e-8, rtol=1e-8)
        assert not set(map(id, flow.parameters())) & set(map(id, twin.parameters()))


def test_a_state_of_tensors_has_all_that_is_learned(flow, x):
    file = io.BytesIO()
    torch.save(flow.state_dict(), file)
    file.seek(0)
    other = copy.deepcopy(flow)
    rough(other, 0.5)
    other.load_state_dict(torch.load(file, weights_only=True), strict=True)
    assert torch.equal(other(x), flow(x))


def loaded_or_refused(flow, other, x):
    """``other`` with the state of ``flow`` does what that does, or the state is refused."""
    try:
        other.load_state_dict(flow.state_dict(), strict=True)
    except RuntimeError:
        return
    assert_close(other(x), flow(x))
    assert_close(other.inv(flow(x).detach().clone()), x)


def test_a_state_of_other_edges_is_not_mixed_with_ones_own():
    shuffled = [(0, 3), (3, 1), (1, 5), (5, 2), (2, 4)]
    flow, other = step(2, CHAIN), step(2, shuffled)
    assert flow.start_frame.shape == other.start_frame.shape
    loaded_or_refused(flow, other, torch.randn(4, 8))


def test_a_state_of_other_runs_is_not_mixed_with_ones_own():
    flow, other = in_runs([3, 0, 1, 2, 4], [0, 1, 2]), in_runs([0, 1, 2, 3, 4], [4, 3, 2, 1])
    loaded_or_refused(flow, other, torch.randn(4, 5))


def test_traced_and_eager_runs_agree(flow, x):
    def run(x):
        y = flow(x)
        return y, flow.log_abs_det_jacobian(x, y), flow.inv(y)

    traced = make_fx(run)(x)
    assert_close(traced(2 * x), run(2 * x))


def test_works_under_torch_func(flow, x):
    y = flow(x)
    assert_close(torch.func.vmap(flow)(x), y)
    assert_close(torch.func.vmap(flow.inv)(y.detach().clone()), x, atol=1e-8, rtol=1e-8)
    assert_close(torch.func.jacrev(flow)(x[0]), jacobians(flow, x[:1])[0])
    assert_close(torch.func.jacfwd(flow._call)(x[0]), jacobians(flow, x[:1])[0])


@pytest.mark.parametrize("name", ["chain", "sums"])
def test_compiles_without_a_break(name):
    flow = FLOWS[name]()
    x = torch.randn(4, dim(flow))

    def run(x):
        y = flow(x)
        return y, flow.log_abs_det_jacobian(x, y), flow.inv(y)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    assert_close(compiled(x), run(x))


def test_tails_are_widened():
    flow = step(2, CHAIN)
    far = torch.full((8,), 5.0)
    far[:2] = 0.0
    before = flow._undo(flow._call(far))[1]
    flow.widen_tails(0.2)
    assert (flow._compute(far)[1][2:] > before[2:]).all()
    assert torch.equal(flow._compute(far)[1][:2], before[:2])


def test_words_say_what_it_is():
    words = repr(step(2, CHAIN))
    for part in ("2 globals", "6 others", "coefficients"):
        assert part in words


def assert_learned(flow, target):
    """That minimising the divergence to a normalised target brings it down to the noise."""
    noise = standard_normal(flow.input_dim)

    def divergence(x):
        y = flow(x)
        log_q = noise.log_prob(x) - flow.log_abs_det_jacobian(x, y)
        return (log_q - target(y)).mean()

    def loss():
        optimizer.zero_grad()
        found = divergence(x)
        found.backward()
        return found

    x = torch.randn(1000, flow.input_dim)
    optimizer = torch.optim.LBFGS(flow.parameters(), max_iter=150, line_search_fn="strong_wolfe")
    before = loss().item()
    optimizer.step(loss)
    assert divergence(torch.randn(1000, flow.input_dim)) < 0.02 * before


def test_it_learns_a_target_with_its_structure():
    """A random walk with a scale that is a global: it is in the family, and so is found."""
    n = 6
    elimination = eliminated(n, CHAIN)
    start = torch.zeros(len(feature_degrees(1)), 2 * n + elimination.num_coefficients)
    flow = SparseStep(elimination, torch.zeros(1), torch.eye(1), start)

    def target(z):
        g, u = z.split([1, n], -1)
        u = u[..., elimination.order.argsort()]
        steps = torch.cat([u[..., :1], u.diff(dim=-1)], -1)
        walk = dist.Normal(0.0, (0.5 * g).exp()).log_prob(steps).sum(-1)
        return standard_normal(1).log_prob(g) + walk

    assert_learned(flow, target)


def test_a_latent_may_be_the_scale_of_another():
    """A funnel, without a global: it is in the family, and so is found."""
    elimination = eliminated(4, [(0, 1), (2, 3)])
    start = torch.zeros(1, 2 * 4 + elimination.num_coefficients)
    flow = SparseStep(elimination, torch.zeros(0), torch.zeros(0, 0), start)

    def target(z):
        u = z[..., elimination.order.argsort()].unflatten(-1, (2, 2))
        a, b = u.unbind(-1)
        # whichever of the two is drawn first
        log_scale, value = (a, b) if elimination.order[0] % 2 == 0 else (b, a)
        of_value = dist.Normal(0.3 * log_scale**2, log_scale.exp()).log_prob(value)
        return (dist.Normal(0.0, 0.7).log_prob(log_scale) + of_value).sum(-1)

    assert_learned(flow, target)
