import sys

import pytest
import torch

from pyro_iaf import FitResult, Mode, plot_loss, plot_pairs


@pytest.fixture(autouse=True)
def no_window():
    plt = pytest.importorskip("matplotlib.pyplot")
    plt.switch_backend("Agg")
    yield
    plt.close("all")


def test_the_loss_is_drawn_with_its_level():
    losses = torch.cat([torch.linspace(1000.0, 4.0, 200), 4 + 0.1 * torch.randn(800)])
    ax = plot_loss(FitResult(losses, 1000, False, 0, 1.0))
    labels = [text.get_text() for text in ax.get_legend().get_texts()]
    assert "settled at 4.0" in labels[-1].replace("3.99", "4.0")
    assert ax.get_ylim()[1] < 1000  # the first steps don't decide what is seen
    assert ax.lines[0].get_ydata().shape == (1000,)


def test_pairs_stand_beside_the_reference():
    draws = {"a": torch.randn(500), "b": torch.randn(500, 2, 2)}
    figure = plot_pairs(draws, {"b": draws["b"].numpy(), "a": draws["a"].numpy()}, max_numbers=4)
    assert len(figure.axes) == 16
    names = [ax.get_xlabel() for ax in figure.axes[-4:]]
    assert names == ["a", "b[0, 0]", "b[0, 1]", "b[1, 0]"]
    below, above = figure.axes[4].collections, figure.axes[1].collections
    assert len(below) == len(above) == 1
    assert len(plot_pairs(draws, sites=["b"]).axes[1].collections) == 0  # no reference, no cloud


def test_modes_are_crosses_with_their_share():
    modes = [Mode(0.26, 0.01, {"z": torch.tensor([-9.0, 5.0])}, "a draw of the prior")]
    draws = {"z": torch.randn(100, 2)}
    figure = plot_pairs(draws, modes=modes)
    (below,) = (ax for ax in figure.axes if ax.texts)
    assert below.texts[0].get_text() == "26%"
    assert below.texts[0].xy == (-9.0, 5.0)
    (low, _), (_, high) = below.get_xlim(), below.get_ylim()
    assert low < -9.0
    assert high > 5.0
    assert not any(ax.texts for ax in plot_pairs(draws).axes)


def test_sites_that_are_not_there_are_told():
    with pytest.raises(ValueError, match=r"reference should have all sites.*'b'"):
        plot_pairs({"a": torch.randn(9), "b": torch.randn(9)}, {"a": torch.randn(9)})


@pytest.mark.parametrize(
    "plot",
    [
        lambda: plot_loss(FitResult(torch.ones(3), 3, False, 0, 1.0)),
        lambda: plot_pairs({"a": torch.randn(9)}),
    ],
)
def test_without_matplotlib_the_way_to_get_it_is_told(plot, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(ImportError, match=r"pip install 'pyro_iaf\[plot\]'"):
        plot()


def test_a_site_that_modes_lack_is_named():
    mode = Mode(0.3, 0.01, {"z": torch.zeros(2)}, "a draw of the prior")
    draws = {"z": torch.randn(50, 2), "twice": torch.randn(50, 2)}
    with pytest.raises(ValueError, match="modes should have all sites to plot; site 'twice'"):
        plot_pairs(draws, modes=[mode])
