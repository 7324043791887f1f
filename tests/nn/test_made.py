import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from pyro_iaf import MaskedAutoregressiveNetwork


def slopes(network, x, context=None):
    """The Jacobian of each output vector, rows and columns in the network's order."""
    jacobians = torch.func.jacrev(lambda x: network(x, context))(x)
    return [J[network.order][:, network.order] for J in jacobians]


@given(
    D=st.integers(1, 7),
    hidden_dims=st.one_of(st.integers(1, 12), st.lists(st.integers(1, 12), min_size=1, max_size=3)),
    context_dim=st.integers(0, 2),
    num_params=st.integers(1, 3),
    activation=st.sampled_from(["elu", "tanh", "gelu", "silu", "softplus"]),
    data=st.data(),
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_outputs_listen_to_all_that_comes_before_and_nothing_else(
    D, hidden_dims, context_dim, num_params, activation, data
):
    order = data.draw(st.permutations(range(D)))
    network = MaskedAutoregressiveNetwork(
        D,
        hidden_dims,
        context_dim=context_dim,
        num_params=num_params,
        order=order,
        activation=activation,
    )
    assert network.order.tolist() == list(order)
    context = torch.randn(context_dim) if context_dim else None
    out = network(torch.randn(3, D), context)
    assert len(out) == num_params
    assert all(p.shape == (3, D) for p in out)
    for slope in slopes(network, torch.randn(D), context):
        assert ((slope != 0) == torch.ones(D, D).tril(-1).bool()).all()


def test_forbidden_weights_do_not_matter_whatever_they_hold():
    network = MaskedAutoregressiveNetwork(4, [8], order=[3, 1, 0, 2])
    x = torch.randn(4)
    before = network(x)
    with torch.no_grad():
        network.weights[0][network.mask == 0] = 1e6
    assert_close(network(x), before, rtol=0, atol=0)


@pytest.mark.parametrize("context_dim", [0, 3])
@pytest.mark.parametrize(("D", "H"), [(2, 5), (5, 4), (5, 8), (8, 3), (1, 4), (6, 64)])
def test_hidden_units_are_sorted_by_degree_and_spread_evenly(D, H, context_dim):
    network = MaskedAutoregressiveNetwork(D, [H, H], context_dim=context_dim)
    lowest = 0 if context_dim or D == 1 else 1
    for degrees in network.hidden_degrees():
        assert (degrees.diff() >= 0).all()
        assert lowest <= degrees.min()
        assert degrees.max() <= D - 1
        counts = degrees.bincount(minlength=D)[lowest:]
        assert counts.max() - counts.min() <= 1


def test_context_feeds_every_layer():
    network = MaskedAutoregressiveNetwork(4, [8, 6], context_dim=2)
    loc, log_scale = network(torch.randn(4), torch.randn(2))
    (loc.sum() + log_scale.sum()).backward()
    rows = network.matrices(network.weights[0].grad)[-1][:, 1:].abs().sum(-1)
    for layer in rows.split([8, 6, 8]):
        assert (layer > 0).any()


@pytest.mark.parametrize(
    ("x_shape", "context_shape", "shape"),
    [
        ((4,), (5, 2), (5,)),
        ((5, 4), (2,), (5,)),
        ((3, 1, 4), (5, 2), (3, 5)),
        ((5, 4), (5, 2), (5,)),
    ],
)
def test_batch_shapes_broadcast(x_shape, context_shape, shape):
    network = MaskedAutoregressiveNetwork(4, [8], context_dim=2)
    x, context = torch.randn(x_shape), torch.randn(context_shape)
    loc, _ = network(x, context)
    assert loc.shape == (*shape, 4)
    expanded = network(x.expand(*shape, 4), context.expand(*shape, 2))
    assert_close(loc, expanded[0])


@pytest.mark.parametrize("name", ["elu", "relu", "tanh", "sigmoid", "selu", "leaky_relu"])
def test_activations_go_by_name_or_as_modules(name):
    network = MaskedAutoregressiveNetwork(3, [8], activation=name)
    other = MaskedAutoregressiveNetwork(3, [8], activation=copy.deepcopy(network.activation))
    other.load_state_dict(network.state_dict())
    x = torch.randn(5, 3)
    assert_close(other(x), network(x))


def test_an_activation_with_parameters_is_trained():
    network = MaskedAutoregressiveNetwork(3, [8], activation=torch.nn.PReLU())
    network(torch.randn(5, 3))[0].sum().backward()
    assert network.activation.weight.grad.any()


def test_one_coordinate_comes_without_a_warning(recwarn):
    MaskedAutoregressiveNetwork(1, [4])(torch.randn(5, 1))
    assert not recwarn.list


def test_outputs_start_near_zero_whatever_the_size():
    for D, hidden_dims in [(1, [4]), (50, None), (5, [512, 512])]:
        for p in MaskedAutoregressiveNetwork(D, hidden_dims)(torch.randn(500, D)):
            assert p.abs().max() < 1e-3
    conditional = MaskedAutoregressiveNetwork(5, context_dim=8)
    for p in conditional(torch.randn(500, 5), torch.randn(500, 8)):
        assert p.abs().max() < 1e-3


def test_units_count_their_inputs():
    # An Adam step moves every weight by lr. What that does to a unit must not grow with the width.
    for H in (16, 64, 256, 1024):
        network = MaskedAutoregressiveNetwork(8, [H, H])
        *_, hidden, output, _ = network.matrices(network.mask)
        weights = output.square().sum(-1)
        assert weights.max() <= 2
        assert hidden.square().sum(-1).max() <= 2
        exponent = output[output > 0].log2()
        assert_close(exponent, exponent.round(), rtol=0, atol=0)


def test_seeds_decide_the_weights():
    torch.manual_seed(3)
    first = MaskedAutoregressiveNetwork(4).state_dict()
    torch.manual_seed(3)
    second = MaskedAutoregressiveNetwork(4).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_state_holds_weights_and_the_order_only():
    names = set(MaskedAutoregressiveNetwork(4, [8, 8], context_dim=2).state_dict())
    assert names == {
        "_extra_state",
        "order",
        "weights.0",
    }


def test_precision_does_not_change_the_network():
    network = MaskedAutoregressiveNetwork(5, [7, 9])
    single = copy.deepcopy(network).float()
    fresh = MaskedAutoregressiveNetwork(5, [7, 9])
    fresh.load_state_dict(single.state_dict())
    x = torch.randn(3, 5)
    assert_close(single.double()(x), fresh(x), rtol=0, atol=0)


def test_it_moves_and_converts_like_any_module():
    network = MaskedAutoregressiveNetwork(3, [8], context_dim=2)
    on_meta = copy.deepcopy(network).to("meta")
    out = on_meta(torch.empty(5, 3, device="meta"), torch.empty(2, device="meta"))
    assert out[0].shape == (5, 3)
    half = copy.deepcopy(network).to(torch.bfloat16)
    assert half(torch.zeros(3).bfloat16(), torch.zeros(2).bfloat16())[0].dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        copy.deepcopy(network).float()(torch.zeros(3).float(), torch.zeros(2).float())


# Bad input


@pytest.mark.parametrize("bad", [0, -3, [0], [8, 0], [], 2.5, [True], "8"])
def test_widths_have_to_be_positive(bad):
    with pytest.raises(ValueError, match="hidden_dims"):
        MaskedAutoregressiveNetwork(4, bad)


@pytest.mark.parametrize("bad", [0, -1, 1.5, True, None])
def test_input_dim_has_to_be_positive(bad):
    with pytest.raises(ValueError, match="input_dim should be an int of at least 1"):
        MaskedAutoregressiveNetwork(bad)


NO_ORDERS = [
    [0, 1],
    [0, 1, 1],
    [1, 2, 3],
    [0, 1, 2, 3],
    torch.zeros(3).long(),
    5,
    ["a", 1, 2],
    [[0], 1, 2],
]


@pytest.mark.parametrize("bad", NO_ORDERS)
def test_an_order_has_to_be_a_permutation(bad):
    with pytest.raises(ValueError, match=r"order should be a permutation of 0, \.\.\., 2"):
        MaskedAutoregressiveNetwork(3, order=bad)


def test_an_unknown_activation_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"elu, gelu.*got 'elo'"):
        MaskedAutoregressiveNetwork(3, activation="elo")
    with pytest.raises(ValueError, match=r"nn.Tanh\(\)"):
        MaskedAutoregressiveNetwork(3, activation=math.tanh)


def test_inputs_have_to_fit():
    network = MaskedAutoregressiveNetwork(3, [8])
    with pytest.raises(ValueError, match=r"input_dim=3 coordinates; got .* \(5, 2\)"):
        network(torch.zeros(5, 2))
    with pytest.raises(ValueError, match="built without a context"):
        network(torch.zeros(3), torch.zeros(2))
    with pytest.raises(ValueError, match=r"torch.float64; got torch.float32.*\.double\(\)"):
        network(torch.zeros(3, dtype=torch.float32))
    conditional = MaskedAutoregressiveNetwork(3, [8], context_dim=2)
    with pytest.raises(ValueError, match="got none"):
        conditional(torch.zeros(3))
    with pytest.raises(ValueError, match="context_dim=2 features"):
        conditional(torch.zeros(3), torch.zeros(5))


def test_a_state_of_other_widths_is_refused_though_the_numbers_agree():
    wide, deep = MaskedAutoregressiveNetwork(2, [5, 9]), MaskedAutoregressiveNetwork(2, [7, 7])
    assert wide.mask.shape == deep.mask.shape
    with pytest.raises(RuntimeError, match=r"hidden_dims=\[5, 9\].*this has.*hidden_dims=\[7, 7\]"):
        deep.load_state_dict(wide.state_dict())


def test_a_state_without_an_order_is_refused():
    network = MaskedAutoregressiveNetwork(3)
    state = network.state_dict() | {"order": torch.tensor([0, 0, 0])}
    with pytest.raises(ValueError, match="a permutation"):
        network.load_state_dict(state)


def test_a_state_may_be_loaded_in_inference_mode():
    network = MaskedAutoregressiveNetwork(3)
    state = network.state_dict()
    with torch.inference_mode():
        network.load_state_dict(state)
    network(torch.randn(3))[0].sum().backward()
