"""Plots of a fit: its losses, and its draws beside those of a reference."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .modes import Mode

__all__ = ["plot_loss", "plot_pairs"]

BLUE, GREY, RED = "#1f5c99", "#9aa5b1", "#c44536"


def plot_loss(result: Any, ax: Any = None) -> Any:
    """The loss of each step, its running mean, and the level at which it settled.

    Args:
        result: What :func:`~pyro_iaf.fit` returned.
        ax: Matplotlib axes to draw on; new ones by default.

    Returns:
        The axes.

    Raises:
        ImportError: If Matplotlib is not installed.

    Example:
        >>> result = FitResult(torch.linspace(3.0, 1.0, 200), 200, "all steps were taken", 0, 1.0)
        >>> plot_loss(result).get_xlabel()
        'step'
    """
    plt = _pyplot()
    if ax is None:
        _, ax = plt.subplots(figsize=(6, 3.5), layout="constrained")
    losses = result.losses.double()
    steps = torch.arange(1, len(losses) + 1)
    level, error = result.settled
    ax.plot(steps, losses, color=GREY, lw=0.5, label="each step")
    size = max(1, len(losses) // 50)
    means = losses.unfold(0, size, 1).mean(-1)
    ax.plot(steps[size - 1 :], means, color=BLUE, lw=1.5, label=f"mean of {size} steps")
    ax.axhline(level, color=RED, lw=1, ls="--", label=f"settled at {level:.2f} ± {error:.1g}")
    # The losses of the first steps may be larger by orders of magnitude, so they set no limit.
    late = losses[len(losses) // 10 :]
    low, high = late.quantile(0.001).item(), late.quantile(0.999).item()
    margin = 0.1 * (high - low) or 1.0
    ax.set(xlabel="step", ylabel="loss, nats", ylim=(min(low, level) - margin, high + margin))
    ax.legend(frameon=False)
    return ax


def plot_pairs(
    draws: Mapping[str, Tensor],
    reference: Mapping[str, Any] | None = None,
    sites: Sequence[str] | None = None,
    max_numbers: int = 6,
    modes: Sequence[Mode] = (),
) -> Any:
    """Scatter plots of each pair of latent numbers, and histograms of each, with a reference.

    Draws of the guide are blue and below the diagonal, draws of the reference red and above it.
    Modes that the guide misses are crosses with their share of the posterior's mass.

    Args:
        draws: Draws by site, with the draws along the first axis, as
            ``guide.sample_posterior(1000)`` returns them.
        reference: The same as tensors or arrays from another method, such as a long run of NUTS.
        sites: The sites to plot, in this order; all by default.
        max_numbers: Plots the first ``max_numbers`` numbers at most.
        modes: Modes that the guide misses, as ``Diagnosis.modes``.

    Returns:
        The Matplotlib figure.

    Raises:
        ImportError: If Matplotlib is not installed.
        ValueError: If ``draws``, ``reference`` or ``modes`` lack a site.

    Example:
        >>> figure = plot_pairs({"z": torch.randn(100, 2)}, {"z": torch.randn(50, 2)})
        >>> len(figure.axes)
        4
    """
    plt = _pyplot()
    names = list(draws) if sites is None else list(sites)
    of_modes = modes[0].sites if modes else None
    for given, what in ((draws, "draws"), (reference, "reference"), (of_modes, "modes")):
        missing = [] if given is None else [name for name in names if name not in given]
        if missing:
            raise ValueError(
                f"{what} should have all sites to plot; site '{missing[0]}' is missing, and "
                f"{sorted(given or ())} are there. Choose the sites with sites=[...]."
            )
    columns = _columns(draws, names, max_numbers)
    others = {} if reference is None else _columns(reference, names, max_numbers)
    places: dict[str, Any] = {}
    if modes:
        peaks = {name: torch.stack([mode.sites[name] for mode in modes]) for name in names}
        places = _columns(peaks, names, max_numbers)
    n = len(columns)
    figure, axes = plt.subplots(
        n, n, figsize=(1.9 * n + 0.6, 1.9 * n), squeeze=False, layout="constrained"
    )
    for i, row in enumerate(columns):
        for j, column in enumerate(columns):
            ax = axes[i, j]
            across, up = (_range(columns[k], others.get(k), places.get(k)) for k in (column, row))
            if i == j:
                for values, color, label in ((others, RED, "reference"), (columns, BLUE, "guide")):
                    if values:
                        style = {"histtype": "step", "density": True, "bins": 40, "color": color}
                        ax.hist(values[row], range=across, label=label, **style)
                ax.set_yticks([])
                for x in places[row] if places else ():
                    ax.axvline(x, color="black", lw=0.8, ls=":")
            elif i > j or others:
                # Equally many draws of both, so that neither looks denser than the other.
                size = min(len(v[row]) for v in (columns, others) if v)
                values, color = (columns, BLUE) if i > j else (others, RED)
                ax.scatter(values[column][:size], values[row][:size], s=2, color=color, lw=0)
                for k, mode in enumerate(modes):
                    at = places[column][k], places[row][k]
                    ax.plot(*at, "x", color="black", ms=5)
                    ax.annotate(f"{mode.share:.0%}", at, (4, 4), textcoords="offset points")
                ax.set_ylim(up)
            else:
                ax.axis("off")
            ax.set_xlim(across)
            ax.set(xlabel=column if i == n - 1 else "", ylabel=row if j == 0 and i else "")
            ax.tick_params(labelbottom=i == n - 1, labelleft=j == 0 and i > 0)
    if others:
        figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper right", ncols=2)
    return figure


def _columns(draws: Mapping[str, Any], names: Sequence[str], max_numbers: int) -> dict[str, Any]:
    """The draws of the first numbers of the sites, as arrays by label."""
    columns = {}
    for name in names:
        values: Any = torch.as_tensor(draws[name]).detach().cpu().numpy()
        for index in itertools.product(*map(range, values.shape[1:])):
            columns[f"{name}{list(index) if index else ''}"] = values[(..., *index)]
    return dict(itertools.islice(columns.items(), max_numbers))


def _range(*columns: Any) -> tuple[float, float]:
    """The interval of nearly all draws, with a margin."""
    given = [torch.as_tensor(column).double() for column in columns if column is not None]
    low = min(values.quantile(0.002).item() for values in given)
    high = max(values.quantile(0.998).item() for values in given)
    margin = 0.05 * (high - low) or 1.0
    return low - margin, high + margin


def _pyplot() -> Any:
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ImportError(
            "Plots need Matplotlib: pip install 'pyro_iaf[plot]', or pip install matplotlib."
        ) from error
    return plt
