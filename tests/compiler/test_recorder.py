import copy
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoNormal

from pyro_iaf import CompiledTrace_ELBO
from pyro_iaf.compiler.capture import Refused
from pyro_iaf.compiler.recorder import MAX_BUILDS, MAX_GRAPHS, Recorder, disagreement
from pyro_iaf.elbo.objectives import TraceLoss
from pyro_iaf.elbo.trace import Call
from pyro_iaf.training.compiled_step import CompiledSteps, StepCall
from pyro_iaf.training.optimizers import Adam


class Toy(Recorder):
    """Records products: the other factor becomes a constant."""

    def __init__(self):
        super().__init__()
        self.factor = 2.0

    def kind(self, call):
        if isinstance(call, str):
            raise Refused("Words have no kind.")
        return len(call)

    def make(self, call):
        return [self.factor]

    def is_current(self, recording):
        return True

    def check(self, recording, call):
        if [self.factor * x for x in call] != [recording[0] * x for x in call]:
            raise disagreement("the factor is another")

    def leave_to_code(self, why):
        pass


class OfToy:
    """A recorder, calls of many kinds for it, and a change that it can't see."""

    def __init__(self):
        self.recorder = Toy()

    def call(self, size):
        return size * [1.0]

    def call_of_no_kind(self):
        return "words"

    def change(self):
        self.recorder.factor = 3.0


class OfElbo:
    def __init__(self):
        self.loc = 0.0
        self.guide = AutoNormal(self.model)
        self.guide(torch.zeros(1))
        self.loss = CompiledTrace_ELBO(backend="graph")  # whose recorder it is
        self.recorder = self.loss.recorder

    def model(self, x):
        z = pyro.sample("z", dist.Normal(self.loc, 1.0))
        with pyro.plate("rows", len(x)):
            pyro.sample("x", dist.Normal(z, 1.0), obs=torch.as_tensor(x))

    def call(self, size):
        return Call(self.model, self.guide, (torch.zeros(size),), {})

    def call_of_no_kind(self):
        return Call(self.model, self.guide, (torch.zeros(1).numpy(),), {})

    def change(self):
        self.loc = 5.0


class OfFit(OfElbo):
    def __init__(self):
        super().__init__()
        params = dict(self.guide.named_parameters())
        optimizer = Adam(1)
        optimizer.groups[0].extend(params.values())
        self.recorder = CompiledSteps(
            TraceLoss(self.model, self.guide, Trace_ELBO()),
            params,
            optimizer,
            [1.0],
            False,
            (),
            compile="graph",
            num_left=lambda step: 10_000,
            change=True,
            before=None,
        )

    def call(self, size):
        return StepCall(0, (torch.zeros(size),), {})

    def call_of_no_kind(self):
        return StepCall(0, (torch.zeros(1).numpy(),), {})


USERS = {"toy": OfToy, "CompiledTrace_ELBO": OfElbo, "fit": OfFit}


@pytest.fixture(params=USERS.values(), ids=USERS)
def user(request, monkeypatch):
    """One of them, with lists of the calls that it recorded and checked, and of what it gave up."""
    user = request.param()
    recorder = user.recorder
    user.made, user.checked, user.left = [], [], []
    make, check = recorder.make, recorder.check

    def noting_make(call):
        user.made.append(call)
        return make(call)

    def noting_check(recording, call):
        user.checked.append(call)
        check(recording, call)

    monkeypatch.setattr(recorder, "make", noting_make)
    monkeypatch.setattr(recorder, "check", noting_check)
    monkeypatch.setattr(recorder, "leave_to_code", user.left.append)
    return user


def run(user, size):
    """Runs a call as often as it takes to have it recorded, and not for ever."""
    recorder, call = user.recorder, user.call(size)
    for _ in range(25):
        recording, is_due = recorder.find(call)
        if is_due:
            recording = recorder.record(call)
        if recording is not None:
            break
    user.checked.clear()
    return recording


def test_calls_of_one_kind_share_a_recording(user):
    first = run(user, 1)
    assert run(user, 2) is not first
    assert run(user, 1) is first
    assert len(user.made) == len(user.recorder.recordings) == 2


def test_recordings_are_checked_ever_more_rarely(user):
    recording = run(user, 1)
    checks = []
    for k in range(1, 20):
        assert user.recorder.find(user.call(1)) == (recording, False)
        if len(user.checked) > len(checks):
            checks.append(k)
    growth = user.recorder.check_growth
    assert checks == [growth**k for k in range(5) if growth**k < 20]


def test_a_change_that_cant_be_seen_is_found_at_a_check(user):
    run(user, 1)
    user.recorder.find(user.call(1))
    user.change()
    for _ in range(user.recorder.check_growth - 2):
        user.recorder.find(user.call(1))
    with pytest.raises(Refused, match="don't agree"):
        user.recorder.find(user.call(1))


def test_a_recording_from_elsewhere_that_is_wrong_is_made_anew_once():
    toy = Toy()
    toy.made_before = lambda kind: [5.0]
    assert toy.find([1.0]) == (None, True)
    assert toy.record([1.0]) == [2.0]
    assert toy.find([1.0]) == ([2.0], False)
    toy.factor = 3.0
    with pytest.raises(Refused, match="don't agree"):
        toy.find([1.0])


def test_a_place_that_became_free_hides_no_recording():
    toy = Toy()
    toy.fits = lambda recording, call: recording == call
    toy.make = list
    toy.check = lambda recording, call: None
    for k in range(3):
        toy.record([float(k)])
    del toy.recordings[1, 1]
    assert toy.find([2.0]) == ([2.0], False)


def test_what_goes_stale_is_recorded_anew_a_few_times(user, monkeypatch):
    monkeypatch.setattr(user.recorder, "is_current", lambda recording: False)
    most = user.recorder.most_builds
    for _ in range(most + 3):
        run(user, 1)
    assert len(user.made) == most
    assert "keeps changing" in user.left[-1]


def test_so_many_are_kept_and_no_more(user):
    for size in [*range(1, MAX_GRAPHS + 4), *range(1, MAX_GRAPHS + 4)]:
        run(user, size)
    assert len(user.recorder.recordings) == MAX_GRAPHS
    assert len(user.made) <= 2 * (MAX_GRAPHS + 3)


def test_calls_that_cant_be_told_apart_are_left_to_the_code(user):
    assert user.recorder.find(user.call_of_no_kind()) == (None, False)
    assert len(user.left) == 1
    assert not user.made


def test_a_kind_that_its_user_gives_up_stays_with_the_code(user, monkeypatch):
    monkeypatch.setattr(user.recorder, "make", user.made.append)
    for _ in range(5):
        assert run(user, 1) is None
    assert len(user.made) == 1


def test_copies_have_no_recordings():
    toy = Toy()
    toy.record([1.0])
    for twin in (copy.deepcopy(toy), pickle.loads(pickle.dumps(toy))):
        assert not twin.recordings
        assert twin.factor == toy.factor
        assert twin.find([1.0]) == (None, True)


def test_recordings_of_kinds_in_rotation_are_not_made_for_ever():
    toy, made = Toy(), []
    toy.make = lambda call: made.append(call) or [toy.factor]
    for k in range(500):
        call = (1 + k % (MAX_GRAPHS + 1)) * [1.0]
        if toy.find(call)[1]:
            toy.record(call)
    assert len(made) <= MAX_BUILDS * (MAX_GRAPHS + 1)
