"""Several processes find what one does, also when one of them is killed on the way."""

import os
import pathlib
import subprocess
import sys

import pytest
import shards
import threads
import torch
from torch.testing import assert_close

TUTORIALS = pathlib.Path(__file__).parent.parent / "tutorials"
SIZE = ["--patients", "1000", "--batch", "500", "--epochs", "400"]


def run(*command):
    """What a command prints; an error with all that it printed if it fails."""
    settings = {"OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    done = subprocess.run(
        list(map(str, command)),
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **settings},
        timeout=1800,  # a hang has to end; a busy machine takes minutes
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def run_ranks(*command, restarts=0):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return run(*torchrun, "--nproc-per-node", 2, "--max-restarts", restarts, *command)


def test_gradients_of_the_ranks_average_to_that_of_all_data():
    size = ["--patients", "60", "--batch", "20"]
    printed = run_ranks(shards.__file__, *size)
    assert all(f"Rank {rank} of 2 agrees" in printed for rank in (0, 1))


@pytest.mark.skipif(not threads.TASKS.exists(), reason="only Linux tells the names of threads")
@pytest.mark.parametrize("name", ["distributed", "distributed_lightning"])
def test_no_thread_of_gloo_outlives_a_tutorials_group(name, tmp_path):
    command = [threads.__file__, TUTORIALS / f"{name}.py", "--smoke", "--output", tmp_path]
    if name == "distributed":
        printed = run_ranks(*command)
    else:
        pytest.importorskip("pytorch_lightning", reason="it takes pip install '.[lightning]'")
        printed = run(sys.executable, *command, "--processes", 2)
    assert printed.count("Threads of gloo: none\n") == 2, printed


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Where a fit by one process, and by two, left what they found; both agreed with the answer."""
    found = {name: tmp_path_factory.mktemp(name) for name in ("one", "two")}
    tutorial = [TUTORIALS / "distributed.py", *SIZE, "--output"]
    run(sys.executable, *tutorial, found["one"])
    run_ranks(*tutorial, found["two"])
    return found


@pytest.fixture
def posterior(monkeypatch):
    """What a saved guide says of patients it was not trained on: means and spreads by site."""
    torch.set_default_dtype(torch.float32)  # as the tutorial has it
    monkeypatch.setattr(sys, "argv", [str(shards.PATH), *SIZE])
    space = shards.defined()

    def of(folder):
        space["guide"].load_state_dict(torch.load(folder / "distributed.pt", weights_only=True))
        draws = space["guide"].sample_posterior(20_000, space["new"])
        return {name: (value.mean(0), value.std(0)) for name, value in draws.items()}

    yield of
    shards.end(space)


def test_two_processes_find_the_posterior_of_one(folders, posterior):
    one, two = (posterior(folders[name]) for name in ("one", "two"))
    for name in ("mean", "own"):
        (loc, scale), (other_loc, other_scale) = one[name], two[name]
        # The noise of the last minibatches moves the mean of 1000 patients by some 0.1 sd.
        assert ((other_loc - loc) / scale).abs().max() < 0.4
        assert (other_scale / scale).log().abs().max() < 0.3


def test_a_run_whose_rank_is_killed_ends_in_the_same_numbers(folders, tmp_path):
    tutorial = [TUTORIALS / "distributed.py", *SIZE, "--output", tmp_path]
    printed = run_ranks(*tutorial, "--die-at", 480, restarts=1)
    assert "from epoch 0 on" in printed
    assert "from epoch 240 on" in printed
    states = [torch.load(f / "distributed.pt") for f in (folders["two"], tmp_path)]
    assert_close(*states, rtol=0, atol=0)
    assert {path.name for path in tmp_path.iterdir()} == {"distributed.pt", "distributed.png"}


def test_the_first_rank_alone_writes(tmp_path):
    command = f"exec {sys.executable} {TUTORIALS / 'distributed.py'} --smoke --output {tmp_path}"
    run_ranks("--no-python", "bash", "-c", f"{command}/$RANK")
    assert (tmp_path / "0" / "distributed.pt").exists()
    assert not list((tmp_path / "1").iterdir())


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    torch.save({"run": [5, 1, 1, 0.05, 0]}, tmp_path / "distributed_run.pt")
    with pytest.raises(AssertionError, match="is of a run with other settings"):
        run(sys.executable, TUTORIALS / "distributed.py", "--smoke", "--output", tmp_path)


def test_lightning_finds_the_posterior_by_two_processes(tmp_path):
    pytest.importorskip("pytorch_lightning", reason="it takes pip install '.[lightning]'")
    tutorial = [
        TUTORIALS / "distributed_lightning.py",
        "--processes",
        2,
        *SIZE,
        "--output",
        tmp_path,
    ]
    assert "2 processes took 800 steps" in run(sys.executable, *tutorial)
