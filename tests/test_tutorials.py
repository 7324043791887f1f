"""Tutorials run, read the data they are given, and say what is wrong with others."""

import gzip
import json
import math
import os
import pathlib
import runpy
import sys

import pytest
import torch
from matplotlib import pyplot
from pyro import poutine
from torch.testing import assert_close

# What libraries that draw pictures say of each other is not the tutorials' doing.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

FOLDER = pathlib.Path(__file__).parent.parent / "tutorials"
TUTORIALS = sorted(path.stem for path in FOLDER.glob("*.py"))
# Half a minute each, so CI has them come to their known answers.
IN_EARNEST = {"02_autoiaf", "03_quantiles_and_arviz", "05_many_data_sets"}


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Runs a tutorial in this process: importing PyTorch anew would take longer than most."""

    def run(name, *settings):
        path = FOLDER / f"{name}.py"
        monkeypatch.setattr(sys, "argv", [str(path), *settings, "--output", str(tmp_path)])
        torch.set_default_dtype(torch.float32)  # as the reader has it
        return runpy.run_path(str(path), run_name="__main__")

    yield run
    pyplot.close("all")


@pytest.mark.parametrize("name", TUTORIALS)
def test_tutorials_run(name, run, tmp_path):
    if name == "distributed_lightning":
        pytest.importorskip("pytorch_lightning", reason="it takes pip install '.[lightning]'")
    run(name, *([] if name in IN_EARNEST and os.environ.get("CI") else ["--smoke"]))
    pictures = list(tmp_path.glob(f"{name}*.png"))
    assert pictures
    assert all(picture.stat().st_size > 5000 for picture in pictures)


def idx(*shape, content=None):
    """A file as MNIST's, of bytes."""
    head = bytes([0, 0, 8, len(shape)]) + b"".join(n.to_bytes(4, "big") for n in shape)
    return head + (bytes(math.prod(shape)) if content is None else content)


def test_the_vae_reads_mnist_packed_or_not(run, tmp_path, capsys):
    pixels = bytes(range(0, 256, 4)) * 120
    (tmp_path / "train-images-idx3-ubyte").write_bytes(idx(120, 8, 8, content=pixels))
    packed = gzip.compress(idx(30, 8, 8, content=pixels[: 30 * 64]))
    (tmp_path / "t10k-images-idx3-ubyte.gz").write_bytes(packed)
    run("vae_iaf", "--smoke", "--mnist", str(tmp_path))
    assert "The pictures are in" in capsys.readouterr().out


def test_the_vae_says_what_is_wrong_with_its_files(run, tmp_path):
    def read():
        run("vae_iaf", "--smoke", "--mnist", str(tmp_path))

    with pytest.raises(FileNotFoundError, match="no train-images-idx3-ubyte"):
        read()
    plain, packed = (tmp_path / f"train-images-idx3-ubyte{end}" for end in ("", ".gz"))
    broken = [b"<html>not found</html>", idx(120, 8, 8)[:-1], b"", idx(120), idx(120, 8, 7)]
    for data in [*broken, idx(0, 8, 8)]:
        plain.write_bytes(data)
        with pytest.raises(ValueError, match="is damaged"):
            read()
    plain.unlink()
    for data in (b"<html>not found</html>", gzip.compress(idx(120, 8, 8))[:-9]):
        packed.write_bytes(data)
        with pytest.raises(ValueError, match="is damaged"):
            read()


CHORALES = {"train": 6 * [[[60, 64], [], [59]], [[60]]], "test": 2 * [[[48], [60, 67]], [[72]]]}


@pytest.fixture
def run_dmm(run, tmp_path):
    """Runs the tutorial on chorales of this text."""

    def run_dmm(text):
        chorales = tmp_path / "chorales.json"
        chorales.write_text(text)
        run("dmm_iaf", "--smoke", "--data", str(chorales))

    return run_dmm


def test_the_dmm_reads_chorales_from_a_file(run_dmm, capsys):
    run_dmm(json.dumps(CHORALES))
    assert "2 chords, 2 calls of the flow's network" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"train": [[[60]]', "is damaged or something else"),
        (json.dumps({"train": [[[60]]]}), "is damaged or something else"),
        (json.dumps({"train": [[[60]], 5], "test": [[[60]]]}), "is damaged or something else"),
        (json.dumps({"train": [[[60]], []], "test": [[[60]]]}), "should have a chord"),
        (json.dumps({"train": [[60, 64]], "test": [[[60]]]}), "a chord a list of pitches"),
        (json.dumps({"train": [[[60, 20]]], "test": [[[60]]]}), "from 21 to 108"),
    ],
)
def test_the_dmm_says_what_is_wrong_with_its_file(run_dmm, text, message):
    with pytest.raises(ValueError, match=message):
        run_dmm(text)


@pytest.fixture
def dmm(tmp_path, monkeypatch):
    """What the tutorial defines before it trains."""
    (tmp_path / "chorales.json").write_text(json.dumps(CHORALES))
    path = FOLDER / "dmm_iaf.py"
    arguments = [str(path), "--smoke", "--data", str(tmp_path / "chorales.json")]
    monkeypatch.setattr(sys, "argv", arguments)
    space = {"__name__": "dmm_iaf"}
    exec(path.read_text().split("guides = {")[0], space)
    return space


def test_ragged_chorales_want_their_lengths(dmm):
    rolls, lengths = dmm["train"]
    model = dmm["Dmm"](1).model
    short = (rolls[:, :-1], lengths)
    for wrong in ((rolls, None), (rolls, lengths[:-1]), ([*rolls], lengths), short):
        with pytest.raises(ValueError, match="with lengths of shape"):
            model(*wrong)


def test_padding_changes_nothing(dmm, monkeypatch):
    monkeypatch.setattr(torch, "randn", torch.zeros)
    own = dmm["Dmm"](1)
    rolls, lengths = (part[1:2] for part in dmm["train"])  # one chord of three
    assert lengths.item() < rolls.shape[1]
    longer = torch.cat([rolls, torch.ones_like(rolls)], 1)
    found = []
    for padded in (rolls[:, :1], rolls, longer):
        z = torch.full((1, padded.shape[1], 5), 0.3)
        model = poutine.condition(own.model, {"z": z})
        found.append(poutine.trace(model).get_trace(padded, lengths).log_prob_sum())
        latent = poutine.trace(own.guide).get_trace(padded, lengths).nodes["z"]
        found.append(latent["fn"].log_density.squeeze())
    assert_close(torch.stack(found[::2]), found[0].expand(3))
    assert_close(torch.stack(found[1::2]), found[1].expand(3))
