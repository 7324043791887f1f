"""What people expect of objects here: to read well, to move, to compile, to leave others alone."""

import collections
import copy
import pickle
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.nn import AutoRegressiveNN
from pyro.optim import Adam
from torch.testing import assert_close

from pyro_iaf import (
    AutoHierarchicalIAF,
    AutoIAF,
    DiagonalNormal,
    InverseAutoregressiveFlow,
    InverseAutoregressiveFlowStack,
    TraceSTL_ELBO,
    conditional_inverse_autoregressive_flow,
    fit,
    inverse_autoregressive_flow,
)


def model(y=None):
    w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    with pyro.plate("rows", 5):
        e = pyro.sample("e", dist.LogNormal(0.0, 1.0))
        pyro.sample("y", dist.Normal(w.sum(-1, keepdim=True) + e, 0.3), obs=torch.zeros(5))


GUIDES = [AutoIAF, AutoHierarchicalIAF]


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (
            lambda: inverse_autoregressive_flow(3, [8]),
            "InverseAutoregressiveFlow(input_dim=3, hidden_dims=[8]; 104 parameters)",
        ),
        (
            lambda: inverse_autoregressive_flow(3, [8]).inv,
            "InverseAutoregressiveFlow(input_dim=3, hidden_dims=[8]; 104 parameters).inv",
        ),
        (
            lambda: InverseAutoregressiveFlow(AutoRegressiveNN(3, [8])),
            "InverseAutoregressiveFlow(input_dim=3, network=AutoRegressiveNN; 86 parameters)",
        ),
        (
            lambda: inverse_autoregressive_flow(3, [8], num_flows=2, gated=True),
            "InverseAutoregressiveFlowStack(input_dim=3, num_flows=2, hidden_dims=[8], gated=True, "
            "gate_bias=2.0; 208 parameters)",
        ),
        (
            lambda: conditional_inverse_autoregressive_flow(3, 2, [8], num_flows=2),
            "ConditionalInverseAutoregressiveFlowStack(input_dim=3, num_flows=2, hidden_dims=[8], "
            "context_dim=2; 264 parameters)",
        ),
    ],
)
def test_flows_say_in_one_line_what_they_are(make, text):
    flow = make()
    assert repr(flow) == text
    assert f"{sum(p.numel() for p in flow.parameters())} parameters" in text


def test_a_stack_of_unlike_flows_shows_each():
    flows = [inverse_autoregressive_flow(3, [width]) for width in (4, 5)]
    text = repr(InverseAutoregressiveFlowStack(flows))
    assert all(repr(flow) in text for flow in flows)


@pytest.mark.parametrize("kind", GUIDES)
def test_guides_say_what_they_are_before_and_after_their_first_call(kind):
    guide = kind(model, hidden_dims=[8])
    assert repr(guide) == f"{kind.__name__}(num_flows=2, hidden_dims=[8]; built at its first call)"
    guide.setup()
    first, *sites = repr(guide).splitlines()
    assert f"{sum(p.numel() for p in guide.parameters()):,} parameters" in first
    assert sites == ["  w: (3,)", "  e: (5,) in plate 'rows'"]
    assert repr(pickle.loads(pickle.dumps(guide))) == repr(copy.deepcopy(guide)) == repr(guide)


@pytest.mark.parametrize("kind", GUIDES)
@pytest.mark.parametrize("when", ["before", "after"])
def test_guides_move_by_to(kind, when):
    guide = kind(model, hidden_dims=[8])
    if when == "after":
        guide.setup()
    assert guide.to(torch.float32) is guide
    guide.setup()
    assert {p.dtype for p in guide.parameters()} == {torch.float32}
    assert guide.sample_posterior(4)["e"].dtype == torch.float32


def test_a_flow_in_a_guide_by_hand_can_be_compiled():
    flow = inverse_autoregressive_flow(3, [8], num_flows=2)
    compiled = torch.compile(flow, backend="aot_eager")
    base = DiagonalNormal(torch.zeros(3), torch.ones(3))

    def simple():
        pyro.sample("w", dist.Normal(torch.ones(3), 1.0).to_event(1))

    def guide_of(transform):
        def guide():
            pyro.module("flow", flow)
            x = base.rsample()
            y = transform(x)
            log_density = base.log_prob(x) - flow.log_abs_det_jacobian(x, y)
            pyro.sample("w", dist.Delta(y, log_density=log_density, event_dim=1))

        return guide

    found = []
    for transform in (flow, compiled):
        flow.zero_grad()
        pyro.set_rng_seed(0)
        loss = Trace_ELBO().loss_and_grads(simple, guide_of(transform))
        found.append([torch.tensor(loss), *(p.grad.clone() for p in flow.parameters())])
    assert_close(found[0], found[1])


def test_zuko_flows_work_beside_ours():
    zuko = pytest.importorskip("zuko", reason="zuko is in the benchmarks extra")
    before = torch.distributions.Distribution._validate_args
    theirs = zuko.flows.MAF(3, transforms=2, hidden_features=[8])
    ours = inverse_autoregressive_flow(3, [8])
    base = DiagonalNormal(torch.zeros(3), torch.ones(3))
    transform = theirs.transform()
    q = dist.TransformedDistribution(base, [ours, *transform.inv.transforms])
    y = q.sample((5,))
    x = transform(y)
    expected = base.log_prob(ours.inv(x)) + transform.log_abs_det_jacobian(y, x)
    expected = expected - ours.log_abs_det_jacobian(ours.inv(x), x)
    assert_close(q.log_prob(y), expected)
    assert torch.distributions.Distribution._validate_args == before


@pytest.mark.parametrize("kind", GUIDES)
def test_nothing_is_warned_of_at_every_step(kind):
    def masked():
        mask = torch.tensor([True, False, True])
        with pyro.plate("rows", 3), pyro.poutine.mask(mask=mask):
            w = pyro.sample("w", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(w, 1.0), obs=torch.zeros(3))

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        svi = SVI(masked, kind(masked, hidden_dims=[8]), Adam({"lr": 0.01}), TraceSTL_ELBO())
        for _ in range(4):
            svi.step()
        fit(masked, kind(masked, name="fitted"), num_steps=4, progress=False)
    counts = collections.Counter(str(w.message) for w in caught if "pyro_iaf" in w.filename)
    assert counts
    assert max(counts.values()) <= 2  # once for each guide
