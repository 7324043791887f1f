r"""A guide for hierarchical models: one flow for what all data share, and one for each plate.

.. math::
    q(z, w_1, \dots, w_N) = q(z) \prod_i q(w_i \mid z, c_i)

How its latents are drawn is told in ``grouped.py``; here, how it is made and read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pyro
import torch
from pyro import poutine
from torch import Tensor
from torch.distributions import biject_to

from .._validation import check_levels, check_size
from ..models.traces import split_sizes, taking_turns
from ..nn.univariate import UnivariateMap
from .base import quantiles_of
from .hierarchical import GroupedGuide
from .plates import checked_rows

__all__ = ["AutoHierarchicalIAF"]

# Medians and quantiles are read off so many draws, or fewer if these would hold more numbers. At
# once are made as many draws as fill layers of so many units.
NUM_DRAWS, MOST_NUMBERS = 4001, 10_000_000
UNITS_AT_ONCE = 2**24


class AutoHierarchicalIAF(GroupedGuide):
    r"""A guide for models with local latents, by flows: for large data, and for new data.

    The global latents come from one inverse autoregressive flow, those of each plate's rows from a
    conditional one that all rows share. It listens to the globals, to the latents of the plates
    around, and to a context of the row: what an ``encoder`` makes of the data, or a row of a
    learned table, of ``context_dim`` numbers. Plates may be subsampled, nested, and several. Rows
    of plates that stand side by side, as persons and questions do, are independent given the
    globals: there :class:`~pyro_iaf.AutoIAF` is the better guide, as long as it is not too large.

    A step costs as much as the minibatch it draws, whatever the data's size; in plates that
    ``create_plates`` or an ``AutoGuideList`` makes, Pyro puts all rows in random order first. A
    table of N rows holds ``N * context_dim`` numbers: :func:`~pyro_iaf.fit` updates the rows that a
    step has drawn and leaves the others; unlike other parameters, they are not averaged at its end.
    Under ``pyro.infer.SVI``, any optimiser but ``SparseAdam`` fills a gradient for all N rows at
    each step, which is slow from some 100,000 rows on; give ``embedding_grad="sparse"`` and
    ``pyro.optim.SparseAdam`` there.

    A guide starts around what ``init_loc_fn`` says, as :class:`~pyro_iaf.AutoIAF` does with
    ``start="init"``.

    Args:
        model: A Pyro model.
        encoder: What makes contexts of the model's arguments: a module or a function that takes
            them and returns a tensor of shape ``plate_shape + (context_dim,)``, a row for each row
            of the plate. It runs inside the plate, so that ``pyro.subsample(data, event_dim=...)``
            is the minibatch there; what it returns for all rows is cut to the subsample. For a
            model with several plates, a dictionary from the names of plates to encoders; of nested
            ones ``"outer/inner"``. Plates without an encoder have a table.
        context_dim: Size of a row of the tables, by default 8; with an encoder, what it returns.
        num_flows: How many flows for each group of latents.
        hidden_dims: Widths of each network's hidden layers; by default two layers of
            ``max(64, D)`` for the D numbers of a row.
        univariate: How a flow maps each coordinate: ``"affine"``, ``"gated"`` or a
            :class:`~pyro_iaf.UnivariateMap`.
        init_loc_fn: As for :class:`~pyro_iaf.AutoIAF`.
        init_scale: Standard deviation of a fresh guide in unconstrained space.
        scale: As for :class:`~pyro_iaf.AutoIAF`, for each group.
        embedding_grad: ``"dense"``, or ``"sparse"`` for ``pyro.optim.SparseAdam``: the gradients
            of tables have the rows drawn alone, and those of the guide's other parameters the
            form that this optimiser wants. :func:`~pyro_iaf.fit` needs neither.
        create_plates: A function of the model's arguments that returns plates for the guide to
            use, as when indices of a minibatch are an argument.
        name: What the guide's parameters are called in the store, by default
            ``"AutoHierarchicalIAF"``.

    Raises:
        ValueError: If an argument is out of range; at the first call, if plates and encoders don't
            go together, a latent is discrete or a Delta, or a context has another shape than its
            plate.
        NotImplementedError: At the first call, if a plate is sequential, or the support of a
            latent changes from row to row of its plate.
        RuntimeError: At the first call, if the model has no latents.

    References:
        Kingma et al. (2016), https://arxiv.org/abs/1606.04934;
        Agrawal and Domke (2021), https://arxiv.org/abs/2111.03144

    Example:
        >>> data = torch.randn(1000)
        >>> def model():
        ...     mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("rows", 1000, subsample_size=10) as rows:
        ...         effect = pyro.sample("effect", dist.Normal(mean, 1.0))
        ...         pyro.sample("y", dist.Normal(effect, 1.0), obs=data[rows])
        >>> guide = AutoHierarchicalIAF(model)
        >>> result = fit(model, guide, num_steps=20, progress=False)
        >>> guide.sample_posterior(100)["effect"].shape
        torch.Size([100, 1000])
        >>> rows = {"rows": torch.tensor([3, 4])}
        >>> guide.sample_posterior(100, rows=rows)["effect"].shape
        torch.Size([100, 2])
    """

    def __init__(
        self,
        model: Callable[..., Any],
        *,
        encoder: Callable[..., Tensor] | Mapping[str, Callable[..., Tensor]] | None = None,
        context_dim: int | None = None,
        num_flows: int = 2,
        hidden_dims: int | Sequence[int] | None = None,
        univariate: str | UnivariateMap = "affine",
        init_loc_fn: Callable[..., Any] | None = None,
        init_scale: float | None = None,
        scale: str = "auto",
        embedding_grad: str = "dense",
        create_plates: Callable[..., Any] | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(
            model,
            encoder=encoder,
            context_dim=context_dim,
            num_flows=num_flows,
            hidden_dims=hidden_dims,
            univariate=univariate,
            init_loc_fn=init_loc_fn,
            init_scale=init_scale,
            scale=scale,
            embedding_grad=embedding_grad,
            create_plates=create_plates,
            name=name,
        )

    @torch.no_grad()
    def sample_posterior(
        self,
        num_samples: int,
        *args: Any,
        rows: Mapping[str, Sequence[int] | Tensor] | None = None,
        resample: bool = False,
        **kwargs: Any,
    ) -> dict[str, Tensor]:
        """Draws from the guide, all at once, in the units of the model.

        Args:
            num_samples: How many draws.
            args: What the model takes; needed only if the guide was never called or set up, if it
                has an encoder, and to resample. An encoder may see data that it was not trained on.
            rows: For plates by name which rows to draw, by default all.
            resample: As for :class:`~pyro_iaf.AutoIAF`; for models that don't subsample.
            kwargs: As ``args``.

        Returns:
            For each site a tensor of shape ``(num_samples,) + shape`` of its value in the model,
            with all rows of its plates or those chosen.

        Raises:
            ValueError: If there is no such plate, or no such row, or a model that subsamples is to
                be resampled.

        Warns:
            UserWarning: If the weights say that resampling can't repair the guide.
        """
        check_size("num_samples", num_samples)
        if resample:
            self._setup_on_demand(*args, **kwargs)
            if rows is not None or not all(map(self._is_whole, self._prototype_frames)):
                raise ValueError(
                    "Draws are resampled by the weight of all that they hold, so all rows have to "
                    "be there: leave out rows, and give a model that does not subsample."
                )
            return self._resampled(num_samples, args, kwargs)
        drawn = self._draws(num_samples, args, kwargs, rows)
        return {name: value for name, (value, _) in drawn.items()}

    @torch.no_grad()
    def median(
        self,
        *args: Any,
        rows: Mapping[str, Sequence[int] | Tensor] | None = None,
        **kwargs: Any,
    ) -> dict[str, Tensor]:
        """The median of each latent: coordinate by coordinate in unconstrained space.

        Read off 4001 draws, the same at every call, or fewer where these would be more than ten
        million numbers; ``rows`` spares what is not wanted.

        Args:
            args: As for :meth:`sample_posterior`.
            rows: Likewise.
            kwargs: Likewise.
        """
        found = {}
        for name, (_, draws) in self._settled_draws(args, kwargs, rows).items():
            constrain = biject_to(self._latent_sites()[name]["fn"].support)
            found[name] = constrain(quantiles_of(draws, draws.new_tensor([0.5]))[0])
        return found

    @torch.no_grad()
    def quantiles(
        self,
        quantiles: Sequence[float] | Tensor | float,
        *args: Any,
        rows: Mapping[str, Sequence[int] | Tensor] | None = None,
        **kwargs: Any,
    ) -> dict[str, Tensor]:
        """Quantiles of each number of each site, in the units of the model.

        Read off the draws that :meth:`median` takes.

        Args:
            quantiles: Levels between 0 and 1.
            args: As for :meth:`sample_posterior`.
            rows: Likewise.
            kwargs: Likewise.

        Returns:
            For each site a tensor of shape ``(len(quantiles),) + shape``, increasing where the
            levels are.
        """
        levels = check_levels(quantiles)
        draws = self._settled_draws(args, kwargs, rows)
        return {name: quantiles_of(value, levels) for name, (value, _) in draws.items()}

    def _settled_draws(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], rows: Any
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """Draws that are the same at every call."""
        self._setup_on_demand(*args, **kwargs)
        device = self._modules["transforms"][0].parts[-1].frame.device  # type: ignore[index]
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(0)
            one = self._draws(1, args, kwargs, rows)
            numbers = sum(value.numel() for value, _ in one.values())
            num_draws = max(101, min(NUM_DRAWS, MOST_NUMBERS // numbers))
            return self._draws(num_draws, args, kwargs, rows)

    def _draws(
        self,
        num_draws: int,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        rows: Mapping[str, Sequence[int] | Tensor] | None,
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """Sites and their unconstrained values, with the draws in front."""
        self._setup_on_demand(*args, **kwargs)
        self._adopt_parameters()
        contexts = self._contexts_ahead(args, kwargs, of_all=True)
        sizes, frames = self._sizes_of_plates(contexts), self._prototype_frames
        chosen = checked_rows(rows or {}, sizes)
        plates = {
            name: pyro.plate(name, size, subsample=chosen.get(name), dim=frames[name].dim)
            for name, size in sizes.items()
        }
        batch_shapes = [site["fn"].batch_shape for site in self._latent_sites().values()]
        nesting = max([*map(len, batch_shapes), *(-frame.dim for frame in frames.values())])
        at_once = max(1, UNITS_AT_ONCE // self._num_units(plates))
        parts: dict[str, list[tuple[Tensor, Tensor]]] = {}
        for size in split_sizes(num_draws, at_once):
            draws = pyro.plate("num_particles_vectorized", size, dim=-nesting - 1)
            with taking_turns, poutine.block(), draws:
                drawn = self._draw(plates, contexts, args, kwargs)
            for name, pair in drawn.items():
                parts.setdefault(name, []).append(self._draws_in_front(name, size, *pair))
        return {
            name: (torch.cat([a for a, _ in pairs]), torch.cat([b for _, b in pairs]))
            for name, pairs in parts.items()
        }

    def _num_units(self, plates: Mapping[str, pyro.plate]) -> int:
        """How many numbers the widest layers hold while all rows are drawn once."""
        most = 1
        transforms: Any = self._modules["transforms"]
        for group, transform in zip(self.groups, transforms, strict=True):
            network = transform.parts[0].network
            num_rows = math.prod(plates[name].subsample_size for name in group.plates)
            most = max(most, num_rows * (max(network.hidden_dims) + network.context_dim))
        return most

    def _draws_in_front(
        self, name: str, num_draws: int, value: Tensor, unconstrained: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Without the plates that a site is in none of, which stand after the draws."""
        fn = self._latent_sites()[name]["fn"]
        num_batch = len(fn.batch_shape)
        own = value.shape[value.dim() - num_batch - fn.event_dim :]
        inner = unconstrained.shape[value.dim() - fn.event_dim :]
        return (
            value.reshape(num_draws, *own),
            unconstrained.reshape(num_draws, *own[:num_batch], *inner),
        )
