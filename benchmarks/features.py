"""Features of Pyro's AffineAutoregressive and of our flows, each tried on both.

Each row of the README's table is the result of a function here.
"""

import copy
import pickle
import warnings

import pyro.distributions as dist
import torch
from pyro.distributions import transforms

from benchmarks.common import save
from pyro_iaf import conditional_inverse_autoregressive_flow, inverse_autoregressive_flow

D = 4


class Ours:
    flow = staticmethod(inverse_autoregressive_flow)
    conditional = staticmethod(conditional_inverse_autoregressive_flow)


class Pyros:
    flow = staticmethod(transforms.affine_autoregressive)
    conditional = staticmethod(transforms.conditional_affine_autoregressive)


def roughened(flow):
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return flow


def network(flow):
    return flow.network if hasattr(flow, "network") else flow.arn


def count(flow):
    calls = []
    network(flow).register_forward_hook(lambda *_: calls.append(1))
    return calls


def sums_the_log_determinant_over_the_vector(kind):
    flow, x = roughened(kind.flow(D, [8])), torch.randn(5, D)
    return flow.log_abs_det_jacobian(x, flow(x)).shape == (5,)


def scores_its_last_draw_without_a_network_pass(kind):
    flow = roughened(kind.flow(D, [8]))
    y, calls = flow(torch.randn(5, D)), count(flow)
    flow.log_abs_det_jacobian(flow.inv(y), y)
    return not calls


def scores_every_draw_alive_without_a_network_pass(kind):
    flow = roughened(kind.flow(D, [8]))
    draws, calls = [flow(torch.randn(5, D)) for _ in range(10)], count(flow)
    for y in draws:
        flow.log_abs_det_jacobian(flow.inv(y), y)
    return not calls


def forgets_a_draw_when_its_parameters_change(kind):
    flow = roughened(kind.flow(D, [8]))
    y = flow(torch.randn(5, D))
    y.sum().backward()
    torch.optim.SGD(flow.parameters(), 0.1).step()
    return torch.allclose(flow(flow.inv(y).clone()), y, atol=1e-6)


def has_gradients_for_a_draw_made_without(kind):
    flow = roughened(kind.flow(D, [8]))
    with torch.no_grad():
        y = flow(torch.randn(5, D))
    again = y.clone()
    one = flow.log_abs_det_jacobian(flow.inv(y), y).sum()
    other = flow.log_abs_det_jacobian(flow.inv(again), again).sum()
    ends = [
        torch.autograd.grad(s, list(flow.parameters()), allow_unused=True) for s in (one, other)
    ]
    zeros = [[torch.zeros(()) if g is None else g for g in end] for end in ends]
    return all(
        a.shape == b.shape and torch.allclose(a, b, atol=1e-6) for a, b in zip(*zeros, strict=True)
    )


def has_the_true_gradient_everywhere(kind):
    flow = roughened(kind.flow(D, [8])).double()
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.mul_(8)
    x = torch.randn(5, D, dtype=torch.float64, requires_grad=True)
    return torch.autograd.gradcheck(lambda x: flow(x.clone()), x, raise_exception=False)


def reaches_scales_of_a_thousand_in_one_layer(kind):
    flow = kind.flow(D, [8])
    net = network(flow)
    bias = net.matrices(net.weights[0])[-1] if kind is Ours else net.layers[-1].bias
    with torch.no_grad():
        bias[-D:] = 100.0
    x = torch.randn(5, D)
    return bool((flow.log_abs_det_jacobian(x, flow(x)) / D > 6.9).all())


def has_hidden_layers_narrower_than_the_vector(kind):
    return kind.flow(D, [2])(torch.zeros(D)).shape == (D,)


def acts_on_one_coordinate_without_a_warning(kind):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return kind.flow(1, [8])(torch.zeros(1)).shape == (1,)


def starts_near_the_identity(kind):
    x = torch.randn(1000, D)
    return bool(((kind.flow(D)(x) - x).abs() <= 1e-2 * (1 + x.abs())).all())


def takes_batch_shape_from_its_context(kind):
    flow = kind.conditional(D, 2, [8]).condition(torch.randn(5, 2))
    base = dist.Normal(torch.zeros(D), torch.ones(D))
    return dist.TransformedDistribution(base, [flow]).rsample().shape == (5, D)


def inverts_in_float64(kind):
    flow = roughened(kind.flow(D, [8])).double()
    y = flow(torch.randn(5, D, dtype=torch.float64))
    again = flow(flow.inv(y.clone()).clone())
    return again.dtype == y.dtype and torch.allclose(again, y, rtol=1e-10, atol=1e-10)


def inverts_in_fewer_passes_than_coordinates(kind):
    flow = roughened(kind.flow(40, [80]))
    y, calls = flow(torch.randn(5, 40)).detach().clone(), count(flow)
    with torch.no_grad():
        x = flow.inv(y)
    return len(calls) < 40 and torch.allclose(flow(x.clone()), y, atol=1e-4)


def differentiates_an_inverse_without_a_graph_for_each_coordinate(kind):
    flow, kept = kind.flow(40, [80]), []

    def note(tensor):
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        flow(torch.randn(5, 40))
        forward = sum(kept)
        flow.inv(torch.randn(5, 40))
    return sum(kept) < 5 * forward


def can_be_copied_right_after_a_draw(kind):
    flow = roughened(kind.flow(D, [8]))
    y = flow(x := torch.randn(5, D))
    twins = [copy.deepcopy(flow), pickle.loads(pickle.dumps(flow))]
    return all(torch.allclose(twin(x.clone()), y) for twin in twins)


def has_an_inverse_that_is_a_module(kind):
    return isinstance(kind.flow(D, [8]).inv, torch.nn.Module)


def runs_forward_under_vmap(kind):
    flow, x = roughened(kind.flow(D, [8])), torch.randn(5, D)
    return torch.allclose(torch.func.vmap(flow)(x), flow(x.clone()), atol=1e-6)


def scores_a_foreign_value_in_one_compiled_graph(kind):
    flow, y = roughened(kind.flow(D, [8])), torch.randn(5, D)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def score(y):
        x = flow.inv(y)
        return flow.log_abs_det_jacobian(x, y)

    return torch.allclose(score(y), flow.log_abs_det_jacobian(flow.inv(y.clone()), y), atol=1e-6)


FEATURES = [
    sums_the_log_determinant_over_the_vector,
    scores_its_last_draw_without_a_network_pass,
    scores_every_draw_alive_without_a_network_pass,
    forgets_a_draw_when_its_parameters_change,
    has_gradients_for_a_draw_made_without,
    has_the_true_gradient_everywhere,
    reaches_scales_of_a_thousand_in_one_layer,
    starts_near_the_identity,
    has_hidden_layers_narrower_than_the_vector,
    acts_on_one_coordinate_without_a_warning,
    takes_batch_shape_from_its_context,
    inverts_in_float64,
    inverts_in_fewer_passes_than_coordinates,
    differentiates_an_inverse_without_a_graph_for_each_coordinate,
    can_be_copied_right_after_a_draw,
    has_an_inverse_that_is_a_module,
    runs_forward_under_vmap,
    scores_a_foreign_value_in_one_compiled_graph,
]


def attempt(feature, kind):
    torch.manual_seed(0)
    try:
        return "yes" if feature(kind) else "no"
    except Exception as error:
        return f"no: {type(error).__name__}"


def main():
    rows = [
        {
            "feature": feature.__name__.replace("_", " "),
            "Pyro": attempt(feature, Pyros),
            "pyro_iaf": attempt(feature, Ours),
        }
        for feature in FEATURES
    ]
    save("features", "AffineAutoregressive beside InverseAutoregressiveFlow", rows)


if __name__ == "__main__":
    main()
