import copy
import pickle

import pyro
import pytest
import torch
from example_models import MODELS, make
from pyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO
from pyro.optim import Adam

from pyro_iaf import AutoIAF


@pytest.mark.parametrize("name", ["vectors", "nested plates", "simplexes"])
def test_mean_field_and_plain_losses_agree(name):
    guide, model, arguments = make(name, hidden_dims=[16], start="init")
    kwargs = {"num_particles": 4000, "vectorize_particles": True}
    with torch.no_grad():
        plain = Trace_ELBO(**kwargs).loss(model, guide, *arguments)
        mean_field = TraceMeanField_ELBO(**kwargs).loss(model, guide, *arguments)
    assert abs(plain - mean_field) < 0.2  # 5 se; the constraints' densities come to several nats


def test_a_prior_may_learn_beside_it():
    guide, model, _ = make("learnable prior")
    # Small steps: a support that learns may leave a draw outside.
    svi = SVI(model, guide, Adam({"lr": 1e-6}), Trace_ELBO())
    before = pyro.param("prior_loc").item()
    for _ in range(5):
        svi.step()
    assert pyro.param("prior_loc").item() != before
    copy.deepcopy(guide)
    pickle.dumps(guide)
    svi.step()


@pytest.mark.parametrize("before", [True, False])
def test_it_moves_between_devices(before):
    guide = AutoIAF(MODELS["supports"][0]())
    if before:
        guide.to("meta")
        guide.setup()
    else:
        guide.setup()
        guide.to("meta")
    draws = guide.sample_posterior(3)
    assert {value.device.type for value in draws.values()} == {"meta"}
    assert draws["bounds"].shape == (3, 3)
