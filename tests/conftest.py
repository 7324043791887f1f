import pyro
import pytest
import torch
from bijections import flows_in


@pytest.fixture(autouse=True)
def clean_slate():
    """Every test is seeded, in float64, on an empty parameter store, with validation on."""
    pyro.set_rng_seed(0)
    pyro.clear_param_store()
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    with pyro.validation_enabled(True):
        yield
    torch.set_default_dtype(dtype)
    pyro.clear_param_store()


@pytest.fixture
def count_passes():
    """Counts network calls: ``count_passes(*transforms)`` gives a function that tells."""
    handles = []

    def start(*transforms):
        calls = []
        for flow in flows_in(*transforms):
            hook = lambda *_: calls.append(1)  # noqa: E731
            handles.append(flow.network.register_forward_hook(hook))
        return lambda: len(calls)

    yield start
    for handle in handles:
        handle.remove()
