"""What someone does first with the installed wheel; `make wheel` runs it away from the checkout."""

import pathlib
import sys
from importlib.resources import files

import pyro
import pyro.distributions as dist
import torch

import pyro_iaf
from pyro_iaf import AutoIAF, diagnose, fit

place = pathlib.Path(pyro_iaf.__file__)
assert pathlib.Path(sys.prefix) in place.parents, f"{place} is not in {sys.prefix}"
assert (files("pyro_iaf.solvers") / "cpp" / "operations.cpp").is_file()
assert (files("pyro_iaf") / "py.typed").is_file()


def model():
    w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    pyro.sample("y", dist.Normal(w.sum(-1), 0.1), obs=torch.tensor(1.0))


guide = AutoIAF(model)
print(fit(model, guide, num_steps=300, seed=0, progress=False))
verdict = diagnose(model, guide)
print(f"pyro_iaf {pyro_iaf.__version__} of {place.parent} works.\n{verdict}")
assert verdict.khat < 0.7
