"""Orders of elimination, sparse factors and colours, against dense linear algebra."""

import itertools
import math

import pytest
import torch
from torch.testing import assert_close

from pyro_iaf.solvers.sparse import coloured, eliminated


def chain(n):
    return n, [(i, i + 1) for i in range(n - 1)]


def shuffled(n, edges):
    to = torch.randperm(n).tolist()
    return n, [(to[i], to[j]) for i, j in edges]


def band(n, width):
    return n, [(i, j) for i in range(n) for j in range(i + 1, min(n, i + width + 1))]


def rows(num, size):
    """Rows of a plate, in each of which all variables touch."""
    pairs = list(itertools.combinations(range(size), 2))
    return num * size, [(r * size + i, r * size + j) for r in range(num) for i, j in pairs]


def grid(height, width):
    across = [(r * width + c, r * width + c + 1) for r in range(height) for c in range(width - 1)]
    down = [(r * width + c, (r + 1) * width + c) for r in range(height - 1) for c in range(width)]
    return height * width, across + down


def star(n):
    return n, [(0, i) for i in range(1, n)]


GRAPHS = {
    "one": lambda: (1, []),
    "no edges": lambda: (7, []),
    "chain": lambda: chain(33),
    "shuffled chain": lambda: shuffled(*chain(20)),
    "ring": lambda: (12, [*chain(12)[1], (11, 0)]),
    "band": lambda: band(25, 3),
    "plate": lambda: rows(6, 3),
    "grid": lambda: grid(5, 6),
    "star": lambda: star(9),
    "dense": lambda: band(8, 8),
    "pairs and single ones": lambda: (9, [(0, 8), (3, 2)]),
    "edges twice, reversed, and loops": lambda: (4, [(0, 1), (1, 0), (2, 2), (1, 0), (3, 1)]),
}


@pytest.fixture(params=GRAPHS.values(), ids=GRAPHS)
def graph(request):
    return request.param()


def precisions(n, edges, num=3):
    """Definite matrices with non-zeros there, in the order of the variables."""
    Q = torch.zeros(num, n, n)
    for i, j in edges:
        if i != j:
            Q[:, i, j] = Q[:, j, i] = torch.randn(num)
    return Q + torch.diag_embed(Q.abs().sum(-1) + 0.1 + torch.rand(num, n))


def factored(n, edges, num=3):
    """An elimination, matrices in its order of drawing, and their factors."""
    elimination = eliminated(n, edges)
    order = elimination.order
    Q = precisions(n, edges, num)[:, order][:, :, order]
    entries = Q[:, elimination.children, elimination.parents]
    return elimination, Q, elimination.factor(Q.diagonal(dim1=1, dim2=2), entries)


def matrix(factor):
    """``A`` of each factor, written out."""
    elimination, coefficients, precisions = factor
    K, n = precisions.shape
    A = torch.zeros(K, n, n)
    A[:, elimination.children, elimination.parents] = coefficients[:, :-1]
    return A


# The order


def test_every_variable_is_drawn_once_after_its_parents(graph):
    n, edges = graph
    elimination = eliminated(n, edges)
    assert sorted(elimination.order.tolist()) == list(range(n))
    assert (elimination.parents < elimination.children).all()
    places = 0
    for each in elimination.rounds:
        assert each.first == places
        places = each.last
        within = (elimination.children >= each.first) & (elimination.children < each.last)
        assert (elimination.parents[within] < each.first).all()
    assert places == n
    pairs = list(zip(elimination.children.tolist(), elimination.parents.tolist(), strict=True))
    assert len(set(pairs)) == len(pairs) == elimination.num_coefficients


def test_each_edge_has_a_coefficient(graph):
    n, edges = graph
    elimination = eliminated(n, edges)
    variables = elimination.order[torch.stack([elimination.children, elimination.parents])]
    found = {frozenset(pair) for pair in variables.T.tolist()}
    assert {frozenset(pair) for pair in edges if pair[0] != pair[1]} <= found


@pytest.mark.parametrize("n", [2, 10, 100, 1000])
@pytest.mark.parametrize(
    "make", [chain, lambda n: shuffled(*chain(n))], ids=["in order", "shuffled"]
)
def test_a_chain_takes_about_log2_rounds(n, make):
    elimination = eliminated(*make(n))
    assert len(elimination.rounds) <= 2 * math.log2(n) + 1
    assert elimination.num_coefficients <= 2 * n


@pytest.mark.parametrize("num", [2, 50])
def test_rows_of_a_plate_take_as_many_rounds_as_one_row(num):
    elimination = eliminated(*rows(num, 3))
    assert len(elimination.rounds) == 3
    assert elimination.num_coefficients == 3 * num


def test_without_edges_all_are_drawn_at_once():
    elimination = eliminated(7, [])
    assert len(elimination.rounds) == 1
    assert elimination.num_coefficients == 0
    assert elimination.edges.shape == (0, 2)


def test_a_star_has_no_further_coefficients():
    assert eliminated(*star(30)).num_coefficients == 29


def test_a_grid_stays_sparse():
    elimination = eliminated(*grid(20, 20))
    assert elimination.num_coefficients < 0.1 * 400 * 399 / 2
    assert len(elimination.rounds) < 80


def test_the_same_edges_give_the_same_order():
    n, edges = grid(5, 6)
    again = [(j, i) for i, j in reversed(edges)]
    assert torch.equal(eliminated(n, edges).order, eliminated(n, again).order)


# Factors


def test_the_last_coefficient_is_zero_also_where_there_is_no_other(graph):
    elimination, _, factor = factored(*graph)
    assert factor.coefficients.shape == (3, elimination.num_coefficients + 1)
    assert (factor.coefficients[:, -1] == 0).all()


def test_the_factor_is_that_of_the_matrix(graph):
    _, Q, factor = factored(*graph)
    eye = torch.eye(Q.shape[-1])
    left = eye - matrix(factor)
    # x - A x = noise of these precisions
    assert_close(left.mT @ torch.diag_embed(factor.precisions) @ left, Q)


def test_the_log_determinant_is_the_dense_one(graph):
    _, Q, factor = factored(*graph)
    assert_close(factor.log_det(), Q.logdet())


def test_systems_are_solved(graph):
    _, Q, factor = factored(*graph)
    v = torch.randn(3, Q.shape[-1])
    before = v.clone()
    assert_close(factor.solve(v), torch.linalg.solve(Q, v))
    assert torch.equal(v, before)


def test_draws_have_the_covariance(graph):
    elimination, Q, factor = factored(*graph)
    n = Q.shape[-1]
    # The draw of each unit vector of noise is a column of a root of the covariance.
    units = torch.eye(n).unsqueeze(1) * factor.precisions.rsqrt()
    root = elimination.draw(factor.coefficients, units)
    assert_close(torch.einsum("ski,skj->kij", root, root), Q.inverse())


def test_draws_solve_the_triangular_system(graph):
    elimination, _, factor = factored(*graph)
    scaled = torch.randn(5, 3, len(elimination.order))
    x = elimination.draw(factor.coefficients, scaled)
    assert_close(x - (matrix(factor) @ x.unsqueeze(-1)).squeeze(-1), scaled)


def test_one_row_of_coefficients_serves_all_draws(graph):
    elimination, _, factor = factored(*graph, num=1)
    scaled = torch.randn(4, len(elimination.order))
    x = elimination.draw(factor.coefficients[0], scaled)
    assert_close(x, elimination.draw(factor.coefficients.expand(4, -1), scaled))


def test_what_it_is_given_stays_as_it_was(graph):
    n, edges = graph
    elimination = eliminated(n, edges)
    diagonal, entries = 5 * torch.ones(2, n), torch.ones(2, elimination.num_coefficients)
    before = diagonal.clone(), entries.clone()
    elimination.factor(diagonal, entries)
    assert torch.equal(diagonal, before[0])
    assert torch.equal(entries, before[1])


def test_matrices_that_are_not_definite_have_finite_factors():
    n, edges = chain(10)
    elimination = eliminated(n, edges)
    diagonal = torch.tensor([[1.0], [-1.0]]).expand(2, n)
    factor = elimination.factor(diagonal, torch.ones(2, elimination.num_coefficients))
    assert factor.log_det().isfinite().all()
    assert (factor.precisions > 0).all()


def test_single_precision_stays_single():
    n, edges = grid(3, 4)
    elimination = eliminated(n, edges)
    factor = elimination.factor(
        10 * torch.ones(1, n).float(), torch.ones(1, elimination.num_coefficients).float()
    )
    assert factor.solve(torch.ones(1, n).float()).dtype == torch.float32


def test_mapped_has_all_tensors_mapped():
    n, edges = grid(3, 4)
    elimination = eliminated(n, edges)
    found = []
    again = elimination.mapped(lambda t: found.append(t) or t.clone())
    assert len(found) == 4 + 3 * len(elimination.rounds)
    assert torch.equal(again.order, elimination.order)
    assert again.order is not elimination.order
    noise = torch.randn(n)
    coefficients = torch.randn(elimination.num_coefficients + 1)
    assert_close(again.draw(coefficients, noise), elimination.draw(coefficients, noise))


# Colours


def test_columns_of_a_colour_have_no_row_in_common(graph):
    n, edges = graph
    colours = coloured(n, edges)
    pattern = (precisions(n, edges, 1)[0] != 0).double()
    common = pattern.T @ pattern
    same = colours.unsqueeze(0) == colours.unsqueeze(1)
    assert colours.shape == (n,)
    assert (colours >= 0).all()
    assert (common[same & ~torch.eye(n, dtype=torch.bool)] == 0).all()


def test_products_with_colours_have_all_entries(graph):
    n, edges = graph
    colours = coloured(n, edges)
    Q = precisions(n, edges, 1)[0]
    products = Q @ torch.nn.functional.one_hot(colours).to(Q)
    i, j = Q.nonzero().T
    assert_close(products[i, colours[j]], Q[i, j])


def test_chains_and_bands_need_few_colours():
    assert coloured(*chain(100)).max() + 1 == 3
    assert coloured(*band(100, 3)).max() + 1 == 7
    assert coloured(50, []).max() + 1 == 1
    assert coloured(*rows(20, 3)).max() + 1 == 3
