"""What the documentation shows, runs; what it claims, is what was measured."""

import doctest
import importlib
import inspect
import json
import math
import pathlib
import pkgutil
import re
import statistics

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.distributions import AffineTransform

import pyro_iaf

ROOT = pathlib.Path(__file__).parent.parent
MODULES = ["pyro_iaf", *(m.name for m in pkgutil.walk_packages(pyro_iaf.__path__, "pyro_iaf."))]
PUBLIC = sorted(set(pyro_iaf.__all__))


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name):
    torch.set_default_dtype(torch.float32)  # as the reader has it
    module = importlib.import_module(name)
    names = {name: getattr(pyro_iaf, name) for name in PUBLIC}
    names |= {"torch": torch, "pyro": pyro, "dist": dist, "AffineTransform": AffineTransform}
    flags = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
    failed, _ = doctest.testmod(module, extraglobs=names, optionflags=flags)
    assert failed == 0


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_is_documented(name):
    thing = getattr(pyro_iaf, name)
    doc = inspect.getdoc(thing)
    assert "Example:" in doc
    for parameter in inspect.signature(thing).parameters:
        assert f"{parameter}: " in doc, parameter


def blocks(language):
    text = (ROOT / "README.md").read_text()
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def test_the_readme_runs():
    torch.set_default_dtype(torch.float32)
    scope = {}
    for block in blocks("python"):
        # A fifth of the steps; what is asserted after them has twice the room it needs.
        short = re.sub(r"(num_steps=|in range\()(\d+)", lambda m: f"{m[1]}{int(m[2]) // 5}", block)
        exec(compile(short, "README.md", "exec"), scope)


def test_the_readme_opens_with_two_commands():
    first, second = (line.split("#")[0].strip() for line in blocks("sh")[0].splitlines()[:2])
    assert (first, second) == ("make demo", "make test")
    assert second in (ROOT / ".ci" / "run").read_text()


def test_every_promise_names_a_test_that_shows_it():
    text = (ROOT / "docs" / "faults.md").read_text().partition("## What is promised")[2]
    rows = [line for line in text.splitlines() if line.startswith("| ")][1:]
    code = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    there = set(re.findall(r"def (test_\w+)", code))
    assert len(rows) > 15
    for row in rows:
        shown_by = re.findall(r"`(test_\w+)`", row)
        assert shown_by, row
        assert set(shown_by) <= there, row


def test_the_version_is_the_same_wherever_it_stands():
    version = pyro_iaf.__version__
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"\n## {version}, " in (ROOT / "CHANGELOG.md").read_text()


def test_make_help_knows_every_target():
    text = (ROOT / "Makefile").read_text()
    targets = re.search(r"\.PHONY: (.*)", text).group(1).split()
    assert re.findall(r"^(\w+):.*## ", text, re.MULTILINE) == targets


def table(header):
    """The cells of the README's table under this header row."""
    lines = (ROOT / "README.md").read_text().splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(header))
    cells = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        cells.append([cell.strip() for cell in line.strip("|").split("|")])
    return cells


def saved(name):
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())


def results(name):
    return saved(name)["rows"]


def test_the_feature_table_is_what_was_measured():
    measured = [
        [row["feature"].capitalize(), row["Pyro"].split(":")[0], row["pyro_iaf"]]
        for row in results("features")
    ]
    assert table("| What a flow does |") == measured


def test_the_table_of_peers_is_what_was_tried():
    rows = results("peers")
    peers = list(rows[0])[1:]
    shown = table("| What it gives | " + " | ".join(peers) + " |")
    assert shown == [
        [row["feature"][0].upper() + row["feature"][1:], *(row[peer] for peer in peers)]
        for row in rows
    ]
    text = " ".join((ROOT / "README.md").read_text().split())
    for version in saved("peers")["about"]["versions"].items():
        assert " ".join(version) in text


def test_the_cost_table_is_what_was_measured():
    measured = {(row["task"], row["batch"], row["D"]): row for row in results("flows")}
    shown = table("| Operation |")
    assert len(shown) == len({task for task, *_ in measured})
    for task, _, *times in shown:
        for cell, (batch, D) in zip(times, [(16, 10), (128, 128)], strict=True):
            row = measured[task, batch, D]
            assert cell == f"{row['ours_us'] / 1000:.2f} / {row['pyro_us'] / 1000:.2f} ms"


def test_the_cost_of_the_diagonal_normal_is_what_was_measured():
    ratios = [row["ratio"] for row in results("distributions")]
    claim = f"takes between {min(ratios):.2f} and {max(ratios):.2f} times as long"
    assert claim in (ROOT / "README.md").read_text()


def test_the_step_table_is_what_was_measured():
    measured = {(row["D"], row["widths"]): row for row in results("guide_steps")}
    shown = table("| D | AutoIAF |")
    assert [int(D) for D, *_ in shown] == [10, 50, 200, 1000]
    for D, *cells in shown:
        default, equal = measured[int(D), "default"], measured[int(D), "D"]
        times = [default["ours_ms"], default["pyro_ms"], equal["pyro_ms"]]
        assert cells == [f"{time:.2f} ms" for time in times]


def test_the_table_of_compiled_steps_is_what_was_measured():
    rows = {(r["model"], r["particles"], r["contender"]): r for r in results("svi_step")}
    contenders = ["fit, eager", "fit, graph", "fit, compiled", "Pyro", "NumPyro"]
    shown = table("| Model | Particles | " + " | ".join(contenders))
    assert {(m, int(k)) for m, k, *_ in shown} == {(m, k) for m, k, _ in rows}
    for model, particles, *cells in shown:
        own = [rows[model, int(particles), who]["microseconds"] for who in contenders]
        assert cells == [f"{time:.0f}" for time in own]
    compiled = [r for r in rows.values() if r["contender"] == "fit, compiled"]
    first = [r["first steps, s"] for r in compiled][1:]
    cached = [r["cached, s"] for r in compiled]
    text = (ROOT / "README.md").read_text()
    assert f"takes {min(first):.0f} to {max(first):.0f} seconds the first time" in text
    assert f"{min(cached):.0f} to {max(cached):.0f} once it is on disk" in text


def test_the_poisson_table_is_what_was_measured():
    measured = {
        (f"{row['weights_sd']}, {row['lr']}", row["guide"]): row for row in results("guide_poisson")
    }
    guides = ["AutoIAF", "AutoNormal", "AutoMultivariateNormal", "AutoIAFNormal"]
    shown = table("| Weights, rate | " + " | ".join(guides))
    assert {first for first, *_ in shown} == {first for first, _ in measured}
    for first, *cells in shown:
        for cell, guide in zip(cells, guides, strict=True):
            row = measured[first, guide]
            if row["seeds_with_nan"]:
                assert cell == f"NaN in {row['seeds_with_nan']} of 8"
            else:
                assert float(cell) == pytest.approx(row["median_loss"], rel=0.2 * ("e" in cell))


def test_the_funnel_table_is_what_was_measured():
    guides = ["AutoIAF", "AutoIAFNormal, two flows", "AutoIAFNormal", "AutoNormal"]
    shown = table("| Rate | " + " | ".join(guides))
    measured = {(row["lr"], row["end_lr"], row["guide"]): row for row in results("guide_funnel")}
    assert len(shown) * len(guides) == len(measured)
    for rate, *cells in shown:
        start, _, end = rate.partition(" to ")
        for cell, guide in zip(cells, guides, strict=True):
            row = measured[float(start), float(end or start), guide]
            spread = f"{row['smallest_sd']:.2f} to {row['largest_sd']:.2f}"
            assert cell == f"{row['median_sd']:.2f} ({spread})"


LIBRARIES = ["pyro_iaf, gentle", "pyro_iaf, hard", "Pyro", "Zuko", "nflows"]


def inverse_ms(D, task, library):
    (found,) = (
        row["ms"]
        for row in results("inverse")
        if (row["D"], row["batch"], row["task"], row["library"]) == (D, 128, task, library)
    )
    return found


def test_the_inverse_table_is_what_was_measured():
    shown = table("| D | one pass | " + " | ".join(LIBRARIES))
    assert [int(D) for D, *_ in shown] == [8, 32, 128, 512, 1024]
    for D, one_pass, *cells in shown:
        assert one_pass == f"{inverse_ms(int(D), 'forward', LIBRARIES[0]):.2f}"
        assert cells == [f"{inverse_ms(int(D), 'inverse', name):.2f}" for name in LIBRARIES]


def test_the_price_of_an_inverse_with_gradient_is_what_was_measured():
    times = [inverse_ms(128, "inverse and gradient", name) for name in LIBRARIES]
    (memory,) = (row for row in results("inverse_memory") if row["D"] == 128)
    megabytes = [memory[name] for name in LIBRARIES if name != "pyro_iaf, hard"]
    claim = (
        "{:.1f} ms (hard {:.1f}) beside {:.0f}, {:.0f} and {:.0f} ms, and {:.1f} MB of memory "
        "beyond that of a forward pass beside {:.0f}, {:.0f} and {:.0f} MB"
    ).format(*times, *megabytes)
    assert claim in " ".join((ROOT / "README.md").read_text().split())
    sweeps = {(r["D"], r["flow"]): r["sweeps_float64"] for r in results("inverse_exactness")}
    claim = "in {} and {} at D = 32, {} and {} at D = 1024, in float64".format(
        *(sweeps[D, kind] for D in (32, 1024) for kind in ("gentle", "hard"))
    )
    assert claim in " ".join((ROOT / "README.md").read_text().split())


def test_the_seconds_to_a_verdict_are_those_measured():
    file = json.loads((ROOT / "benchmarks" / "results" / "certified.json").read_text())
    found, latents = file["about"]["summary"], len({row["posterior"] for row in file["rows"]})
    assert (latents, found["good though wrong"]) == (20, 0)
    told = " ".join((ROOT / "README.md").read_text().split())
    seconds = math.ceil(10 * found["median seconds"]) / 10
    assert f"half took at most {seconds} s from the model" in told
    assert f"a small operation of PyTorch takes {found['median operation']:.1f} µs" in told
    assert f"Of {found['fits']} fits none was called good" in told


GUIDES = ["AutoIAF", "AutoIAFNormal", "AutoMultivariateNormal", "AutoNormal"]


def test_the_table_of_posteriors_is_what_was_measured():
    shown = table("| Posterior | " + " | ".join(GUIDES))
    measured = results("posteriors")
    assert [name for name, *_ in shown] == list(dict.fromkeys(r["posterior"] for r in measured))
    for name, *cells in shown:
        for guide, cell in zip(GUIDES, cells, strict=True):
            rows = [r for r in measured if (r["posterior"], r["guide"]) == (name, guide)]
            assert cell == posterior_cell(rows)


def test_the_table_of_gradients_is_what_was_measured():
    measured = results("gradients_posteriors")
    ways = list(dict.fromkeys(row["gradient"] for row in measured))
    shown = table("| Posterior | " + " | ".join(way.capitalize() for way in ways))
    assert [name for name, *_ in shown] == list(dict.fromkeys(r["posterior"] for r in measured))
    for name, *cells in shown:
        for way, cell in zip(ways, cells, strict=True):
            rows = [r for r in measured if (r["posterior"], r["gradient"]) == (name, way)]
            assert len({row["seed"] for row in rows}) == len(rows) == 3
            keys = ("elbo", "mean_error", "khat")
            elbo, error, khat = (statistics.median(r[key] for r in rows) for key in keys)
            assert cell == f"{elbo:.2f}, {error:.3f}, {khat:.2f}"


def test_the_claims_on_gradients_are_what_was_measured():
    text = " ".join((ROOT / "README.md").read_text().split())
    ratios = [row["ratio"] for row in results("gradients_steps")]
    assert f"takes {min(ratios):.2f} to {max(ratios):.2f} times the ordinary one's time" in text
    assert max(ratios) < 1.6
    measured = results("gradients_hierarchical")
    for model in ("radon", "eight schools"):
        means = [
            statistics.mean(
                row["elbo"] for row in measured if (row["model"], row["gradient"]) == (model, way)
            )
            for way in ("ordinary", "ordinary, twice the steps", "through the draws")
        ]
        assert "{:.2f}, {:.2f} and {:.2f}".format(*means) in text


def posterior_cell(rows):
    """The worst of the seeds: error of a mean, spreads, k-hat; ELBO; seconds."""
    if any(row["failed"] for row in rows):
        return "failed"

    def worst(choose, key, digits):
        values = [row[key] for row in rows]
        return "-" if None in values else f"{choose(values):{digits}}"

    error, low, high = (
        worst(max, "mean_error", ".2g"),
        worst(min, "smallest_spread", ".2f"),
        worst(max, "largest_spread", ".2f"),
    )
    khat, elbo = worst(max, "khat", ".2f"), worst(min, "elbo", ".1f")
    return f"{error}, {low} to {high}, {khat}; {elbo}; {worst(max, 'seconds', '.0f')} s"


def test_the_table_of_the_vae_is_what_was_measured():
    images = {
        "vae": "digits",
        "vae_mnist": "MNIST, 10,000 images",
        "vae_mnist_full": "MNIST, all images",
    }
    for name, title in images.items():
        measured = {row["posterior"]: row for row in results(name)}
        shown = [cells for cells in table("| Images | Posterior") if cells[0] == title]
        assert len(shown) == len(measured)
        for _, posterior, elbo, likelihood, gain in shown:
            row = measured[posterior]
            assert [elbo, likelihood] == [f"{row['ELBO']:.2f}", f"{row['log p(x)']:.2f}"]
            if posterior != "diagonal":
                assert gain == f"{row['gain']:.2f} ± {row['se of the gain']:.2f}"


def test_the_tables_of_the_dmm_are_what_was_measured():
    shown = table("| Flows | Bound | Weighted")
    assert len(shown) == 3
    for (_, bound, weighted, gain), row in zip(shown, results("dmm"), strict=True):
        assert [bound, weighted] == [f"{row['-ELBO']:.2f}", f"{row['weighted']:.2f}"]
        if row["flows"]:
            assert gain == f"{row['gain']:.2f} ± {row['se of the gain']:.2f}"
    shown = table("| Latents | Flows | Time steps")
    for cells, row in zip(shown, results("dmm_steps"), strict=True):
        counts = [row[key] for key in ("latents", "flows", "time steps", "calls", "calls, Pyro")]
        assert cells[:5] == list(map(str, counts))
        times = [f"{row['ms']:.0f} ms", f"{row['ms, Pyro']:.0f} ms", f"{row['times as fast']:.1f}"]
        assert cells[5:] == times


def test_the_table_of_processes_is_what_was_measured():
    keys = ("rows a step", "one process", "two processes")
    for cells, row in zip(table("| Rows a step |"), results("distributed"), strict=True):
        assert cells == [*(f"{row[key]:,}" for key in keys), f"{row['times as fast']:.2f}"]


def test_the_claim_on_many_rows_is_what_was_measured():
    times = [row["milliseconds"] for row in results("hierarchical") if row["way"] == "fit"]
    assert max(times) < 1.2 * min(times)
    claim = f"{sorted(times)[1]:.0f} ms with a thousand rows as with a million"
    assert claim in " ".join((ROOT / "README.md").read_text().split())
