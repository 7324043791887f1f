"""What people expect of objects here: to read well, to move, to compile, to leave others alone."""

import collections
import copy
import pickle
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from pyro.nn import AutoRegressiveNN
from pyro.optim import Adam
from torch._dynamo.testing import CompileCounterWithBackend
from torch.testing import assert_close

from pyro_iaf import (
    AutoHierarchicalIAF,
    AutoIAF,
    DiagonalNormal,
    Gated,
    InverseAutoregressiveFlow,
    InverseAutoregressiveFlowStack,
    MaskedAutoregressiveNetwork,
    TraceSTL_ELBO,
    conditional_inverse_autoregressive_flow,
    fit,
    inverse_autoregressive_flow,
)
from pyro_iaf.compiler.lowering import has_compiler


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
            lambda: inverse_autoregressive_flow(3, [8], num_flows=2, univariate="gated"),
            "InverseAutoregressiveFlowStack(input_dim=3, num_flows=2, hidden_dims=[8], "
            "univariate=Gated(bias=2.0); 208 parameters)",
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


def test_guides_say_what_a_reader_would_ask_next():
    def subsampled(y):
        with pyro.plate("rows", 100, subsample_size=10):
            pyro.sample("e", dist.Normal(torch.zeros(2), 1.0).to_event(1))

    def encode(y):
        return y[:, None].expand(10, 4)

    guide = AutoHierarchicalIAF(subsampled, encoder=encode)
    guide.setup(torch.zeros(10))
    first, site = repr(guide).splitlines()
    assert "num_flows=2, hidden_dims=[64, 64], encoder=encode;" in first
    assert site == "  e: (100, 2) in plate 'rows'"

    def many():
        for k in range(40):
            pyro.sample(f"z{k}", dist.Normal(0.0, 1.0))

    guide = AutoIAF(many)
    guide.setup()
    *lines, structure = repr(guide).splitlines()
    assert len(lines) == 12
    assert lines[-1] == "  and 30 sites more"
    assert structure == "  0 globals; 40 latents independent of each other, drawn in 1 round"
    conditional = conditional_inverse_autoregressive_flow(3, 2)
    assert repr(conditional.condition(torch.ones(2))).startswith("InverseAutoregressiveFlow(")
    assert "tensor" not in repr(fit(many, guide, num_steps=3, progress=False))


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


HAND_MADE = {
    "one flow": lambda: inverse_autoregressive_flow(3, [8]),
    "stack": lambda: inverse_autoregressive_flow(3, [8], num_flows=2),
    "gated": lambda: inverse_autoregressive_flow(3, [8], univariate="gated"),
    "inverse": lambda: inverse_autoregressive_flow(3, [8]).inv,
    "conditional": lambda: conditional_inverse_autoregressive_flow(3, 2, [8]),
    "conditional stack": lambda: conditional_inverse_autoregressive_flow(3, 2, [8], num_flows=2),
}


def loss_and_gradients(flow):
    base = DiagonalNormal(torch.zeros(3), torch.ones(3))

    def simple():
        pyro.sample("w", dist.Normal(torch.ones(3), 1.0).to_event(1))

    def guide():
        pyro.module("flow", flow)
        is_conditional = hasattr(flow, "condition")
        transform = flow.condition(torch.ones(2)) if is_conditional else flow
        pyro.sample("w", dist.TransformedDistribution(base, [transform]))

    flow.zero_grad()
    pyro.set_rng_seed(0)
    loss = Trace_ELBO().loss_and_grads(simple, guide)
    return [torch.tensor(loss), *(p.grad.clone() for p in flow.parameters())]


# torch.compile asks each tensor for its gradient, and is warned for it.
compiling = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")


@compiling
@pytest.mark.parametrize("make", HAND_MADE.values(), ids=HAND_MADE)
def test_a_flow_in_a_guide_by_hand_can_be_compiled(make):
    torch._dynamo.reset()  # tests before this one may have used up its compilations of a function
    flow = make()
    expected = loss_and_gradients(flow)
    frames = CompileCounterWithBackend("aot_eager")
    flow.compile(backend=frames)
    assert_close(loss_and_gradients(flow), expected)
    assert frames.frame_count > 0


@compiling
@pytest.mark.skipif(not has_compiler(torch.device("cpu")), reason="there is no C++ compiler")
def test_a_flow_can_be_compiled_by_inductor():
    flow = HAND_MADE["stack"]()
    expected = loss_and_gradients(flow)
    flow.compile()
    assert_close(loss_and_gradients(flow), expected)


def test_a_network_may_have_been_compiled_before():
    torch.manual_seed(1)
    network = MaskedAutoregressiveNetwork(3, [8])
    plain = InverseAutoregressiveFlow(network)
    compiled = InverseAutoregressiveFlow(torch.compile(network, backend="aot_eager"))
    assert_close(loss_and_gradients(compiled), loss_and_gradients(plain))
    y = torch.randn(5, 3)
    assert_close(compiled.inv(y), plain.inv(y))


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
        with pyro.plate("rows", 3):
            with poutine.mask(mask=mask):
                w = pyro.sample("w", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(w, 1.0), obs=torch.zeros(3))

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        svi = SVI(masked, kind(masked, hidden_dims=[8]), Adam({"lr": 0.01}), TraceSTL_ELBO())
        for _ in range(4):
            svi.step()
        fit(masked, kind(masked, name="fitted"), num_steps=4, progress=False)
    counts = collections.Counter(str(w.message) for w in caught)
    assert counts
    assert max(counts.values()) <= 2  # once for each guide


def test_an_inverse_is_warned_of_once_for_each_flow():
    steep = inverse_autoregressive_flow(30)
    with torch.no_grad():
        for p in steep.parameters():
            p.mul_(100.0)
    y = 10 * torch.randn(5, 30)
    with pytest.warns(RuntimeWarning, match="ill-conditioned"):
        steep.inv(y)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(4):
            steep.inv(y)


def test_resampling_is_warned_of_in_the_same_words_at_the_users_line():
    def ridge():
        w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(w.sum(-1), 0.01), obs=torch.tensor(1.0))

    guide = AutoIAF(ridge, start="init")
    fit(ridge, guide, num_steps=3, progress=False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            guide.sample_posterior(500, resample=True)
    assert len(caught) == 3
    assert len({str(w.message) for w in caught}) == 1  # Python shows such ones once
    assert {w.filename for w in caught} == {__file__}


def delta(fn, state=pyro.sample):
    def model():
        z = state("z", fn())
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(w + z.sum(), 1.0), obs=torch.tensor(1.0))

    return model


POINTS = {
    "delta": lambda: dist.Delta(torch.tensor(1.0)),
    "of vectors": lambda: dist.Delta(torch.ones(3), event_dim=1),
    "to_event": lambda: dist.Delta(torch.ones(3)).to_event(1),
    "with a density": lambda: dist.Delta(torch.tensor(1.0), log_density=-2.0).mask(True),
}


@pytest.mark.parametrize("fn", POINTS.values(), ids=POINTS)
@pytest.mark.parametrize("kind", GUIDES)
def test_a_latent_whose_value_is_known_is_refused_by_name(kind, fn):
    guide = kind(delta(fn))
    for start in (guide.setup, guide):
        with pytest.raises(ValueError, match=r"site 'z' is a Delta.*known.*deterministic\('z'"):
            start()
    stated = delta(lambda: fn()(), pyro.deterministic)
    guide = kind(stated, hidden_dims=[8])
    assert fit(stated, guide, num_steps=3, progress=False).losses.isfinite().all()
    assert guide.sample_posterior(2).keys() == {"w"}


@pytest.mark.filterwarnings("ignore:fit runs its particles")  # as no density is finite
def test_fit_says_so_of_other_guides():
    guided = delta(POINTS["delta"])
    with pytest.raises(FloatingPointError, match=r"'z' \(its log density is -inf, as a Delta's"):
        fit(guided, AutoNormal(guided), num_steps=20, progress=False)


@pytest.mark.parametrize("kind", GUIDES)
def test_a_guide_names_its_map(kind):
    for bad in ("no", 1, None, True, Gated):
        with pytest.raises(ValueError, match='univariate should be "affine", "gated" or a'):
            kind(model, univariate=bad)
