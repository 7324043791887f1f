"""Fits that add components where a search finds modes, in stages."""

import gc
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.testing import assert_close

from pyro_iaf import AutoHierarchicalIAF, AutoIAF, diagnose, fit
from pyro_iaf.guides import mixture
from pyro_iaf.models.weighted import WeightedParticles
from pyro_iaf.training import checkpoints, schedule
from pyro_iaf.training.averages import Averages
from pyro_iaf.training.certificate import Certificate
from pyro_iaf.training.run import Run
from pyro_iaf.training.schedule import Rounds

PEAKS = torch.tensor([[-3.0, 0.0], [3.0, 1.0], [0.0, -4.0]])


def modes(weights=(0.3, 0.7), scale=0.5):
    """A normalised mixture of normals."""
    log_weights = torch.tensor(weights).log()
    scales = torch.tensor(scale).expand(len(weights)).unsqueeze(-1)

    def model():
        prior = dist.Normal(torch.zeros(2), 5.0).to_event(1)
        x = pyro.sample("x", prior)
        parts = dist.Normal(PEAKS[: len(weights)], scales).to_event(1).log_prob(x.unsqueeze(-2))
        pyro.factor("target", (log_weights + parts).logsumexp(-1) - prior.log_prob(x))

    return model


two_modes = modes()


def one_mode():
    pyro.sample("x", dist.Normal(torch.tensor([1.0, 2.0]), 0.5).to_event(1))


def meeting():
    """Two modes that one component can cover, but not soon."""
    x = pyro.sample("x", dist.Normal(0.0, 3.0))
    parts = dist.Normal(torch.tensor([-2.0, 1.0]), torch.tensor([0.5, 1.0])).log_prob(
        x.unsqueeze(-1)
    )
    pyro.factor("target", parts.logsumexp(-1) - math.log(2) - dist.Normal(0.0, 3.0).log_prob(x))


def quick(model, guide, **settings):
    return fit(model, guide, **{"progress": False, "seed": 0, **settings})


def shares_of(guide, num=3):
    draws = guide.sample_posterior(4000)["x"].to(PEAKS)
    nearest = torch.cdist(draws, PEAKS[:num]).argmin(-1)
    return nearest.bincount(minlength=num) / len(draws)


# Components are added


@pytest.mark.parametrize("weights", [(0.3, 0.7), (0.2, 0.5, 0.3)], ids=["two", "three"])
def test_each_mode_gets_a_component_with_its_weight(weights):
    guide = AutoIAF(modes(weights))
    result = quick(modes(weights), guide)
    assert result.diagnosis.verdict == "good"
    assert_close(
        guide.component_weights.sort().values,
        torch.tensor(weights).sort().values,
        atol=0.02,
        rtol=0,
    )
    assert_close(shares_of(guide, len(weights)), torch.tensor(weights), atol=0.04, rtol=0)
    assert abs(result.diagnosis.iw_elbo) < 0.02
    assert result.num_steps == len(result.losses) == 200
    assert result.settled[0] == -result.diagnosis.elbo


def test_one_mode_gets_no_other():
    guide = AutoIAF(one_mode)
    result = quick(one_mode, guide)
    assert result.num_steps == 100
    assert guide.component_weights.tolist() == [1.0]


def test_peaks_that_one_component_shares_get_components(monkeypatch):
    monkeypatch.setattr(schedule, "LAST_END", 100)
    guide = AutoIAF(meeting)
    result = quick(meeting, guide)
    assert result.num_steps == 200
    assert_close(
        guide.component_weights, torch.full((2,), 0.5), atol=0.1, rtol=0, check_dtype=False
    )
    assert result.diagnosis.gap < 0.02
    assert abs(result.diagnosis.iw_elbo) < 0.02


def test_a_search_comes_before_long_training():
    guide = AutoIAF(modes((0.45, 0.55), scale=(0.5, 1.2)))
    result = quick(modes((0.45, 0.55), scale=(0.5, 1.2)), guide)
    assert len(guide.component_weights) == 2
    assert result.num_steps <= 400


@pytest.mark.parametrize("settings", [{"num_steps": 150}, {"loss": pyro.infer.Trace_ELBO(16)}])
def test_other_fits_keep_the_number(monkeypatch, settings):
    monkeypatch.setattr(schedule, "LAST_END", 100)
    guide = AutoIAF(two_modes)
    quick(two_modes, guide, **settings)
    assert guide.component_weights.tolist() == [1.0]


def test_a_fixed_number_is_kept_and_the_verdict_says_what_is_missing():
    guide = AutoIAF(two_modes, num_components=1)
    result = quick(two_modes, guide)
    assert guide.component_weights.tolist() == [1.0]
    assert result.diagnosis.verdict == "modes missing"


def test_there_are_no_more_than_the_bound(monkeypatch):
    monkeypatch.setattr(mixture, "MOST_COMPONENTS", 2)
    weights = (0.4, 0.3, 0.3)
    guide = AutoIAF(modes(weights))
    result = quick(modes(weights), guide)
    assert len(guide.component_weights) == 2
    assert result.diagnosis.verdict == "modes missing"
    assert 0.2 < result.diagnosis.share_missed < 0.5


def test_another_fit_trains_all_together():
    guide = AutoIAF(two_modes)
    quick(two_modes, guide)
    before = {name: param.clone() for name, param in guide.named_parameters()}
    again = quick(two_modes, guide)
    assert again.diagnosis.gap < 0.01
    assert not again.diagnosis.modes
    assert again.num_steps == 100
    changed = {n.split(".parts")[0] for n, p in guide.named_parameters() if not p.equal(before[n])}
    assert changed == {"transform", "mixture.others.0", "mixture.logits"}
    assert_close(guide.component_weights.sort().values, torch.tensor([0.3, 0.7]), atol=0.02, rtol=0)


def test_two_fits_by_one_seed_are_the_same():
    guides = [AutoIAF(two_modes, name=name) for name in "ab"]
    for guide in guides:
        quick(two_modes, guide)
    first, second = (guide.state_dict() for guide in guides)
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def test_all_compiled_is_the_same_as_uncompiled():
    results = []
    for engine in (False, "graph"):
        torch.manual_seed(0)
        guide = AutoIAF(two_modes, num_components=2, hidden_dims=8)
        result = quick(two_modes, guide, num_steps=30, compile=engine)
        assert result.backend == ("graph" if engine else "eager")
        results.append(result.losses)
    assert_close(*results, rtol=1e-4, atol=1e-4)


def test_a_loss_of_ones_own_is_not_cut_short_by_a_search():
    guide = AutoIAF(two_modes)
    guide.setup()
    particles = WeightedParticles(two_modes, guide, (), {})
    for has_own_loss in (False, True):
        rest = Averages({}), Rounds(1e-3, None), has_own_loss
        found = Certificate(particles, lambda: None, 16, *rest)
        assert found._finds_more(200) != has_own_loss


# Interrupted


class StopHereError(Exception):
    pass


def stopping_at(monkeypatch, step, number):
    """Ends a fit after this step of the stage of this number."""
    real = Run._take_step

    def take(self, args, kwargs):
        real(self, args, kwargs)
        if (self.stage.number, self.step) == (number, step):
            raise StopHereError

    monkeypatch.setattr(Run, "_take_step", take)
    return lambda: monkeypatch.setattr(Run, "_take_step", real)


@pytest.mark.parametrize(("number", "step"), [(0, 60), (1, 1), (1, 99)])
def test_an_interrupted_fit_resumes_with_the_same_numbers(monkeypatch, tmp_path, number, step):
    model = modes((0.2, 0.5, 0.3))

    def fitted(path):
        pyro.clear_param_store()
        guide = AutoIAF(model)
        result = quick(model, guide, checkpoint=path, compile=False, checkpoint_every=7)
        return result, {name: value.clone() for name, value in guide.state_dict().items()}

    expected, state = fitted(tmp_path / "whole.pt")
    undo = stopping_at(monkeypatch, step, number)
    with pytest.raises(StopHereError) as caught:
        fitted(tmp_path / "run.pt")
    undo()
    assert caught.value.result.num_steps == 100 * number + step
    del caught
    gc.collect()
    result, found = fitted(tmp_path / "run.pt")
    assert result.resumed_at == 100 * number + step
    assert torch.equal(result.losses, expected.losses)
    assert str(result.diagnosis) == str(expected.diagnosis)
    assert all(torch.equal(value, found[name]) for name, value in state.items())


def test_a_fit_that_was_over_gives_its_result_again(tmp_path):
    path = tmp_path / "run.pt"
    first = quick(two_modes, AutoIAF(two_modes), checkpoint=path)
    again = quick(two_modes, AutoIAF(two_modes), checkpoint=path)
    assert again.num_steps == first.num_steps == again.resumed_at
    assert str(again.diagnosis) == str(first.diagnosis)


def test_a_checkpoint_of_components_is_refused_by_another_guide(tmp_path):
    path = tmp_path / "run.pt"
    quick(two_modes, AutoIAF(two_modes), checkpoint=path)
    assert checkpoints.load(path)["stage"]["number"] == 1
    with pytest.raises(ValueError, match="another guide or model"):
        quick(two_modes, AutoIAF(two_modes, hidden_dims=8, num_components=1), checkpoint=path)


def test_a_refused_checkpoint_leaves_the_guide_as_it_was(tmp_path):
    path = tmp_path / "run.pt"
    quick(two_modes, AutoIAF(two_modes, name="a"), checkpoint=path)
    other = modes((0.4, 0.6))
    guide = AutoIAF(other, num_components="auto", name="a")
    guide.setup()
    before = {name: value.clone() for name, value in guide.state_dict().items()}
    with pytest.raises(ValueError, match=r"another guide or model|a run on other data"):
        quick(other, guide, checkpoint=path, lr=5e-3)
    assert len(guide.component_weights) == 1
    assert all(torch.equal(value, before[n]) for n, value in guide.state_dict().items())


def test_a_guide_that_had_grown_goes_back_to_the_checkpoint(monkeypatch, tmp_path):
    path, guide = tmp_path / "run.pt", AutoIAF(two_modes)
    real = AutoIAF.fit_weights

    def interrupt(self, joint):
        real(self, joint)
        if len(self.component_weights) > 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(AutoIAF, "fit_weights", interrupt)
    with pytest.raises(KeyboardInterrupt) as caught:
        quick(two_modes, guide, checkpoint=path)
    assert caught.value.result.num_steps == 100
    assert len(guide.component_weights) == 2
    monkeypatch.setattr(AutoIAF, "fit_weights", real)
    result = quick(two_modes, guide, checkpoint=path)
    assert (result.num_steps, result.resumed_at) == (200, 100)
    assert len(guide.component_weights) == 2


def test_a_guide_in_double_precision_grows_in_it():
    guide = AutoIAF(two_modes).double()
    quick(two_modes, guide)
    assert len(guide.component_weights) == 2
    assert {param.dtype for param in guide.parameters()} == {torch.float64}


# Guides without components


def test_a_hierarchical_guide_keeps_one_and_says_that_it_was_searched():
    def model():
        sign = pyro.sample("sign", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", 4):
            x = pyro.sample("x", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(sign * x, 0.2), obs=torch.tensor([1.0, 1.2, 0.9, 1.1]))

    guide = AutoHierarchicalIAF(model)
    quick(model, guide, num_steps=100)
    assert not hasattr(guide, "component_weights")
    found = diagnose(model, guide)
    assert found.verdict == "modes missing"
    assert "of all 5 latents" in found.searched
