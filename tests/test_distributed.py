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


@pytest.fixture(scope="module")
def in_short(tmp_path_factory):
    """What two processes print in six steps, and a folder with what each of them wrote."""
    folder = tmp_path_factory.mktemp("in_short")
    tutorial = f"{threads.__file__} {TUTORIALS / 'distributed.py'} --smoke --output {folder}/$RANK"
    return run_ranks("--no-python", "bash", "-c", f"exec {sys.executable} {tutorial}"), folder


@pytest.fixture(scope="module")
def by_lightning(tmp_path_factory):
    """What two processes of Lightning print; the tutorial fails if it finds another posterior."""
    pytest.importorskip("pytorch_lightning", reason="it takes pip install '.[lightning]'")
    tutorial = [TUTORIALS / "distributed_lightning.py", *SIZE, "--processes", 2]
    folder = tmp_path_factory.mktemp("by_lightning")
    return run(sys.executable, threads.__file__, *tutorial, "--output", folder)


@pytest.mark.skipif(not threads.TASKS.exists(), reason="only Linux tells the names of threads")
@pytest.mark.parametrize("name", ["distributed", "distributed_lightning"])
def test_no_thread_of_gloo_outlives_a_tutorials_group(name, request):
    if name == "distributed":
        printed, _ = request.getfixturevalue("in_short")
    else:
        printed = request.getfixturevalue("by_lightning")
    assert printed.count("Threads of gloo: none\n") == 2, printed


def test_the_first_rank_alone_writes(in_short):
    _, folder = in_short
    assert (folder / "0" / "distributed.pt").exists()
    assert not list((folder / "1").iterdir())


def test_a_run_whose_rank_is_killed_ends_in_the_same_numbers(in_short, tmp_path):
    _, folder = in_short
    tutorial = [TUTORIALS / "distributed.py", "--smoke", "--output", tmp_path]
    printed = run_ranks(*tutorial, "--die-at", 2, restarts=1)  # in the second of three epochs
    assert "from epoch 0 on" in printed
    assert "from epoch 1 on" in printed
    states = [torch.load(f / "distributed.pt") for f in (folder / "0", tmp_path)]
    assert_close(*states, rtol=0, atol=0)
    assert {path.name for path in tmp_path.iterdir()} == {"distributed.pt", "distributed.png"}


def test_two_processes_find_the_posterior_of_one(tmp_path):
    # The tutorial compares what it found with the exact posterior, and fails if it is another.
    printed = run_ranks(TUTORIALS / "distributed.py", *SIZE, "--output", tmp_path)
    assert "2 processes from epoch 0 on" in printed
    assert printed.count("Largest error of a mean") == 2


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    torch.save({"run": [5, 1, 1, 0.05, 0]}, tmp_path / "distributed_run.pt")
    with pytest.raises(AssertionError, match="is of a run with other settings"):
        run(sys.executable, TUTORIALS / "distributed.py", "--smoke", "--output", tmp_path)


def test_lightning_finds_the_posterior_by_two_processes(by_lightning):
    assert "2 processes took 800 steps" in by_lightning
