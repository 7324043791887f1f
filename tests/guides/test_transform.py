"""Transforms of guides: a line for each kind, and the same promises of all."""

import copy
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn
from torch.testing import assert_close

from pyro_iaf import AutoIAF, DiagonalNormal, Gated, fit, inverse_autoregressive_flow
from pyro_iaf.flows.base import SinglePass
from pyro_iaf.flows.sparse_step import feature_degrees
from pyro_iaf.guides.nested_laplace import NestedStart
from pyro_iaf.guides.pathfinder import Start
from pyro_iaf.guides.structure import Structure
from pyro_iaf.guides.structured_transform import structured_transform, transform_from_state
from pyro_iaf.guides.transform import GuideTransform, fresh_transform
from pyro_iaf.nn.univariate import univariate_map

LOC = torch.tensor([1.0, -2.0, 30.0], dtype=torch.float64)
CORRELATED = torch.tensor([[1.0, 0.0, 0.0], [0.5, 2.0, 0.0], [-1.0, 0.2, 0.1]]).double()


class Scaled(SinglePass):
    """A scale for each coordinate about a loc, written here alone."""

    def __init__(self, loc):
        super().__init__()
        self.input_dim = len(loc)
        self.loc, self.log_scale = nn.Parameter(loc.clone()), nn.Parameter(torch.zeros_like(loc))

    @property
    def _sources(self):
        return self.loc, self.log_scale

    def _compute(self, x):
        return self.loc + self.log_scale.exp() * x, self.log_scale.expand(x.shape)

    def _undo(self, y, method="auto"):
        return (y - self.loc) / self.log_scale.exp(), self.log_scale.expand(y.shape)

    def _undo_known(self, x, y):
        return self._undo(y)

    def solve_transposed(self, x, v):
        return v / self.log_scale.exp()


class Toy(GuideTransform):
    """One with another last step, so with an origin and with tails of its own."""

    def __init__(self, loc):
        flow = inverse_autoregressive_flow(len(loc), [8]).to(loc)
        super().__init__([flow], Scaled(loc))

    @property
    def is_dense(self):
        return False

    @property
    def origin(self):
        return self.parts[-1].loc.detach()

    def widen_tails(self, by):
        before = self.parts[-1].log_scale.detach().clone()
        self.parts[-1].log_scale.data.add_(by)
        return lambda: self.parts[-1].log_scale.data.copy_(before)


def made(scale=None, context_dim=0, univariate="affine", dense=False, num_flows=2):
    return fresh_transform(
        Start(LOC, torch.ones_like(LOC) if scale is None else scale),
        log_scale=-1.0,
        context_dim=context_dim,
        num_flows=num_flows,
        hidden_dims=[8],
        univariate=univariate_map(univariate),
        dense=dense,
    )


def structured(num_globals):
    """The first are globals, and the last depends on the one before it."""
    G, n = num_globals, 3 - num_globals
    is_global, before = torch.arange(3) < G, torch.full((3,), 3)
    structure = Structure.of(is_global, before, torch.tensor([[1, 2]]))
    start = torch.zeros(len(feature_degrees(G)), 2 * n + structure.elimination.num_coefficients)
    start[0, :n], start[0, n : 2 * n], start[0, 2 * n :] = LOC[structure.others], -1.0, 0.5
    nested = NestedStart(LOC[:G], 0.5 * torch.eye(G).double(), start.double())
    settings = {"num_flows": 2, "hidden_dims": [8], "univariate": univariate_map("affine")}
    return structured_transform(nested, structure, **settings)


TRANSFORMS = {
    "diagonal": made,
    "one flow": lambda: made(num_flows=1),
    "dense": lambda: made(dense=True),
    "in a frame": lambda: made(CORRELATED, dense=True),
    "gated": lambda: made(univariate="gated"),
    "gated otherwise": lambda: made(univariate=Gated(bias=0.5)),
    "conditional": lambda: made(context_dim=2),
    "structured": lambda: structured(1),
    "structured, no globals": lambda: structured(0),
    "toy": lambda: Toy(LOC),
}


@pytest.fixture(params=TRANSFORMS.values(), ids=TRANSFORMS)
def transform(request):
    return request.param()


def at_a_context(transform):
    context = torch.tensor([0.3, -0.7], dtype=torch.float64)
    return transform.condition(context) if transform.context_dim else transform


def test_it_says_what_it_is(transform):
    assert transform.latent_dim == 3
    assert transform.context_dim == (2 if hasattr(transform, "condition") else 0)
    assert_close(transform.origin, LOC)
    assert not transform.origin.requires_grad
    assert transform.num_units >= max((max(n.hidden_dims) for n in transform.networks), default=1)
    assert isinstance(transform.is_dense, bool)
    params = {id(p) for p in transform.parameters()}
    assert all(id(p) in params for net in transform.networks for p in net.parameters())


def test_its_noise_is_what_it_takes(transform):
    noise = transform.noise()
    assert isinstance(noise, DiagonalNormal)
    x = noise.sample((5,))
    assert x.dtype == torch.float64
    assert at_a_context(transform)(x).shape == (5, 3)


def test_a_fresh_one_carries_noise_to_its_start(transform):
    """Its mean is the origin, to a tenth of a scale: what fresh networks do is small."""
    x = transform.noise().sample((4000,))
    y = at_a_context(transform)(x).detach()
    assert ((y.mean(0) - LOC) / y.std(0)).abs().max() < 0.1  # 0.02 is one standard error


def test_the_posterior_has_its_density(transform):
    flow = at_a_context(transform)
    posterior = flow.posterior()
    y = posterior.sample((4,))
    x = flow.inv(y)
    slopes = torch.stack([torch.func.jacrev(flow._call)(row) for row in x.detach()])
    normal = dist.Normal(torch.zeros(3).double(), 1.0).to_event(1)
    assert_close(posterior.log_prob(y), normal.log_prob(x) - slopes.det().abs().log())


def test_tails_are_widened_and_that_can_be_undone(transform):
    flow = at_a_context(transform)
    far = torch.full((3,), 5.0, dtype=torch.float64)
    before = copy.deepcopy(transform.state_dict())
    here, there = flow(-far).detach(), flow(far).detach()
    undo = transform.widen_tails(0.1)
    wider = at_a_context(transform)
    assert (wider(far) - wider(-far)).abs().detach().gt((there - here).abs()).all()
    undo()
    assert all(torch.equal(value, before[name]) for name, value in transform.state_dict().items())


def test_copies_do_the_same(transform):
    x = transform.noise().sample((3,))
    expected = at_a_context(transform)(x)
    for twin in (copy.deepcopy(transform), pickle.loads(pickle.dumps(transform))):
        assert_close(at_a_context(twin)(x), expected)


def test_a_state_says_of_which_make_it_is(transform):
    maps = getattr(transform.parts[0], "univariate", univariate_map("affine"))
    twin = transform_from_state(transform.state_dict(), maps)
    if isinstance(transform, Toy):
        assert twin is None  # its last step is not ours
        return
    assert twin.num_flows == transform.num_flows == len(transform.networks)
    twin.load_state_dict(transform.state_dict(), strict=True)
    x = transform.noise().sample((3,))
    assert_close(at_a_context(twin)(x), at_a_context(transform)(x))


class ToyGuide(AutoIAF):
    """A guide over that transform, which says nothing else."""

    def _fresh_transform(self, start, log_scale, context_dim=0):
        return Toy(start.loc)


def test_a_guide_over_another_transform_finds_the_posterior():
    y = torch.tensor([0.5, -1.0, 2.0])

    def model():
        z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(z, 0.5).to_event(1), obs=y)

    guide = ToyGuide(model, start="init")
    fit(model, guide, num_steps=1500, compile=False, seed=0, progress=False)
    assert isinstance(guide.transform, Toy)
    draws = guide.sample_posterior(10_000)["z"]
    assert_close(draws.mean(0), 0.8 * y, atol=0.05, rtol=0)  # a tenth of a standard deviation
    assert_close(draws.std(0), torch.full((3,), 0.2**0.5), atol=0, rtol=0.1)
