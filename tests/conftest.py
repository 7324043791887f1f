import getpass
import os
import signal
import tempfile

import pyro
import pytest
import torch
from bijections import flows_in

from pyro_iaf.compiler.lowering import has_compiler
from pyro_iaf.solvers.kernels import has_kernels

# PyTorch's compiler keeps what it has made, and gives it out again under another
# ATEN_CPU_CAPABILITY, where it doesn't compile. So each has a place of its own.
CAPABILITY = torch.backends.cpu.get_cpu_capability().lower()
KEPT = os.path.join(tempfile.gettempdir(), f"torchinductor_{getpass.getuser()}_{CAPABILITY}")
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", KEPT)

# A shell has its background jobs ignore Ctrl-C, and what they start too; tests send it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items):
    """What no test is to blame for is ignored; under ``-W error`` too, unlike in pyproject.toml."""
    for item in items:
        # PyTorch's own modules, imported late, and Pyro's JitTrace_ELBO use what PyTorch retires.
        item.add_marker(pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"))


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
def kernels():
    """The operations in C++ are there."""
    if not has_compiler(torch.device("cpu")):
        pytest.skip("there is no C++ compiler")
    assert has_kernels()


@pytest.fixture
def count_passes():
    """Counts network calls: ``count_passes(*transforms)`` gives a function that tells."""
    handles = []

    def start(*transforms):
        networks = [flow.network for flow in flows_in(*transforms)]
        calls = []

        def hook(module, *_):
            calls.extend(1 for network in networks if module is network)

        # For all modules: a hook on the network itself could change what it returns, so flows
        # would not rely on its weights any more.
        handles.append(torch.nn.modules.module.register_module_forward_hook(hook))
        return lambda: len(calls)

    yield start
    for handle in handles:
        handle.remove()
