import subprocess
import sys

import pyro.distributions as dist
import pyro.infer.autoguide
import pytest

import pyro_iaf

SNAPSHOT = """
import copy, sys, warnings
import torch, pyro, pyro.infer
import pyro.distributions as dist, pyro.infer.autoguide as autoguide, pyro.poutine as poutine
from torch.distributions.kl import _KL_REGISTRY

hosts = [dist, dist.transforms, autoguide, pyro, pyro.infer]
hosts += [torch.distributions, torch.nn, torch.optim]

def state():
    attributes = [dict(vars(host)) for host in hosts]
    lists = [list(getattr(host, "__all__", [])) for host in hosts]
    classes = {c: dict(vars(c)) for c in vars(torch.distributions).values() if isinstance(c, type)}
    flags = (
        torch.distributions.Distribution._validate_args,
        dist.is_validation_enabled(),
        pyro.infer.util.is_validation_enabled(),
        poutine.util.is_validation_enabled(),
        torch.get_default_dtype(),
        torch.is_grad_enabled(),
        torch.get_rng_state().tolist(),
        warnings.filters[:],
        pyro.settings.get(),
    )
    return attributes, lists, classes, flags, dict(_KL_REGISTRY)

before = state()
import pyro_iaf
after = state()
for host, old, new in zip(hosts, before[0], after[0]):
    for name, value in old.items():
        if name != "__builtins__":
            assert new[name] is value, (host, name)
    added = sorted(set(new) - set(old))
    print(host.__name__, added)
assert before[1] == after[1]
assert before[2] == after[2]
assert before[3] == after[3]
assert all(after[4][key] is value for key, value in before[4].items())
"""


def run(code):
    return subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", code],
        capture_output=True,
        text=True,
        check=False,
    )


def test_importing_adds_and_never_changes():
    result = run(SNAPSHOT)
    assert result.returncode == 0, result.stderr
    added = dict(line.split(" ", 1) for line in result.stdout.splitlines())
    assert added["pyro.distributions"] == "['DiagonalNormal']"
    assert added["torch.distributions"] == added["pyro.infer"] == "[]"
    assert added["pyro.infer.autoguide"] == "['AutoHierarchicalIAF', 'AutoIAF']"
    assert "conditional_inverse_autoregressive_flow" in added["pyro.distributions.transforms"]


def test_names_are_there():
    assert dist.DiagonalNormal is pyro_iaf.DiagonalNormal
    for name in (
        "InverseAutoregressiveFlow",
        "InverseAutoregressiveFlowStack",
        "ConditionalInverseAutoregressiveFlow",
        "ConditionalInverseAutoregressiveFlowStack",
        "inverse_autoregressive_flow",
        "conditional_inverse_autoregressive_flow",
    ):
        assert getattr(dist.transforms, name) is getattr(pyro_iaf, name)
    assert pyro.infer.autoguide.AutoIAF is pyro_iaf.AutoIAF


def test_registering_again_does_nothing(recwarn):
    from torch.optim.optimizer import _global_optimizer_post_hooks as hooks

    before = dict(hooks), dict(vars(dist)), dict(vars(dist.transforms))
    pyro_iaf.register()
    assert (dict(hooks), dict(vars(dist)), dict(vars(dist.transforms))) == before
    assert not recwarn.list


def test_a_name_that_is_taken_is_left_alone_with_one_warning(monkeypatch):
    class Theirs:
        pass

    monkeypatch.setattr(dist, "DiagonalNormal", Theirs)
    monkeypatch.setattr(dist.transforms, "inverse_autoregressive_flow", None)
    with pytest.warns(UserWarning, match="DiagonalNormal.*inverse_autoregressive_flow") as warned:
        pyro_iaf.register()
    assert len(warned) == 1
    assert dist.DiagonalNormal is Theirs
    assert dist.transforms.inverse_autoregressive_flow is None


def test_import_survives_a_taken_name():
    result = run(
        "import warnings, pyro.distributions as d\n"
        "d.DiagonalNormal = 'theirs'\n"
        "with warnings.catch_warnings(record=True) as w:\n"
        "    warnings.simplefilter('always')\n"
        "    import pyro_iaf\n"
        "assert d.DiagonalNormal == 'theirs'\n"
        "print(len([x for x in w if 'pyro_iaf' in str(x.message)]))"
    )
    assert result.stdout.strip() == "1", result.stderr


def test_all_public_names_are_importable():
    for name in pyro_iaf.__all__:
        assert hasattr(pyro_iaf, name)
    assert isinstance(pyro_iaf.__version__, str)
