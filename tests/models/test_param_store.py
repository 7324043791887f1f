import copy
import gc
import pickle

import pyro
import pytest
import torch
from example_models import reload_store, same, seeded, train, two_sites, values
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoGuideList, init_to_feasible
from pyro.optim import Adam
from torch.testing import assert_close

from pyro_iaf import AutoHierarchicalIAF, AutoIAF
from pyro_iaf.models.param_store import parameters_of


def own(guide):
    return parameters_of(guide.transform, f"{guide._pyro_name}.transform")


def trained_past_a_save(path):
    """A guide that went on training after its store was saved, and its values when it was."""
    guide = AutoIAF(two_sites)
    train(guide)
    saved = values(guide)
    pyro.get_param_store().save(path)
    train(guide)
    return guide, saved


def test_the_store_saves_and_restores(tmp_path):
    guide, saved = trained_past_a_save(tmp_path / "store")
    assert not same(values(guide), saved)

    reload_store(tmp_path / "store")
    parameters = list(guide.parameters())
    guide()
    assert same(values(guide), saved)
    assert all(a is b for a, b in zip(parameters, guide.parameters(), strict=True))

    reload_store(tmp_path / "store")
    fresh = AutoIAF(two_sites)
    fresh.sample_posterior(5)  # before any call
    assert same(values(fresh), saved)
    assert_close(seeded(fresh.sample_posterior, 5), seeded(guide.sample_posterior, 5))
    svi = SVI(two_sites, fresh, Adam({"lr": 0.05}), Trace_ELBO())
    svi.step()
    store = pyro.get_param_store()
    assert all(store[n] is p for n, p in own(fresh).items())
    assert not same(values(fresh), saved)


def test_a_cleared_store_takes_nothing_from_the_guide():
    guide = AutoIAF(two_sites)
    train(guide)
    before = values(guide)
    pyro.clear_param_store()
    guide()
    assert same(values(guide), before)
    assert len(pyro.get_param_store()) == 4  # two flows, loc and scale, and their frame


def test_a_store_of_another_make_is_refused(tmp_path):
    train(AutoIAF(two_sites, hidden_dims=[8]))
    pyro.get_param_store().save(tmp_path / "store")
    reload_store(tmp_path / "store")
    with pytest.raises(ValueError, match=r"another make: AutoIAF.transform.*shape.*name=\.\.\."):
        AutoIAF(two_sites, hidden_dims=[9])()
    with pytest.raises(ValueError, match="missing"):
        AutoIAF(two_sites, hidden_dims=[8], num_flows=1)()
    AutoIAF(two_sites, hidden_dims=[9], name="another")()


def test_two_guides_of_one_name_keep_their_parameters():
    first, second = AutoIAF(two_sites), AutoIAF(two_sites)
    train(first)
    before = values(first)
    with pytest.warns(UserWarning, match=r"'AutoIAF' is alive.*name=\.\.\.") as warned:
        train(second)
    assert len(warned) == 1
    assert same(values(first), before)
    trained = values(second)
    with pytest.warns(UserWarning, match="is alive"):
        train(first)
    assert same(values(second), trained)
    assert not same(values(first), before)


def test_a_guide_that_is_gone_leaves_nothing_behind(recwarn):
    first = AutoIAF(two_sites)
    train(first)
    old = first.transform.parts[-1].loc.clone()
    del first
    gc.collect()
    second = AutoIAF(two_sites, init_loc_fn=init_to_feasible)
    second()
    assert not recwarn.list
    assert not torch.equal(second.transform.parts[-1].loc, old)
    assert (second.transform.parts[-1].loc == 0).all()


def test_a_guide_that_waits_for_the_collector_is_gone(recwarn):
    gc.disable()
    try:
        first = AutoIAF(two_sites)
        train(first)
        first.__dict__["itself"] = first  # as the tracebacks of caught errors do
        del first
        train(AutoIAF(two_sites))
    finally:
        gc.enable()
    assert not recwarn.list


def test_names_keep_guides_apart(recwarn):
    first, second = AutoIAF(two_sites, name="first"), AutoIAF(two_sites, name="second")
    train(first)
    train(second)
    assert not recwarn.list
    assert {name.split(".")[0] for name in pyro.get_param_store()} == {"first", "second"}


def test_a_loaded_state_wins_over_the_store(tmp_path):
    guide = AutoIAF(two_sites)
    train(guide)
    state = values(guide)
    train(guide)
    pyro.get_param_store().save(tmp_path / "store")
    reload_store(tmp_path / "store")
    fresh = AutoIAF(two_sites)
    fresh.load_state_dict(state)
    assert same(values(fresh), state)
    fresh.median()
    fresh()
    assert same(values(fresh), state)
    store = pyro.get_param_store()
    assert all(store[n] is p for n, p in own(fresh).items())


def test_local_parameters_stay_with_the_guide():
    with pyro.settings.context(module_local_params=True):
        guide, other = AutoIAF(two_sites), AutoIAF(two_sites)
        train(guide)
        before = values(guide)
        train(other)
        assert same(values(guide), before)
        assert not len(pyro.get_param_store())
        twin = copy.deepcopy(guide)
        train(twin)
        assert same(values(guide), before)
        assert same(values(pickle.loads(pickle.dumps(guide))), before)


def test_frozen_parameters_stay():
    guide = AutoIAF(two_sites)
    guide.setup()
    frozen = guide.transform.parts[-1].coefficients.requires_grad_(False)
    before = frozen.clone()
    train(guide)
    assert torch.equal(frozen, before)


def test_frozen_parameters_are_restored_too(tmp_path):
    guide, saved = trained_past_a_save(tmp_path / "store")
    for freeze in (guide.transform.parts[0], guide):
        freeze.requires_grad_(False)
        reload_store(tmp_path / "store")
        guide()
        assert same(values(guide), saved)
        assert all(value.requires_grad for value in pyro.get_param_store()._params.values())


@pytest.mark.parametrize("kind", [AutoIAF, AutoHierarchicalIAF])
def test_every_entry_takes_a_hook(kind):
    guide = kind(two_sites)
    guide()
    norms = {name: [] for name in pyro.get_param_store()}
    for name, value in pyro.get_param_store().named_parameters():
        value.register_hook(lambda slope, name=name: norms[name].append(slope.norm()))
    train(guide)
    seen = {name for name, found in norms.items() if found}
    assert {name for name in norms if name not in seen} == {n for n in norms if "frame" in n}
    assert all(parameter.grad is not None for parameter in guide.parameters())


def test_a_guide_may_join_a_list_later():
    guide = AutoIAF(two_sites)
    train(guide)
    before = values(guide)
    both = AutoGuideList(two_sites)
    both.append(guide)
    both()
    assert same(values(guide), before)
    train(both)
    other = AutoGuideList(two_sites)
    other.append(AutoIAF(two_sites))
    with pytest.warns(UserWarning, match="is alive"):
        train(other)
    with pytest.warns(UserWarning, match="is alive"):
        train(AutoIAF(two_sites))
