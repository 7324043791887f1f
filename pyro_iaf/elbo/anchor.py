r"""A point at which all rows are known, which takes the noise of minibatches away.

.. math::
    \log p(y, z) = \mathbb{E}_b \bigl[ \log p_b(z) - \log p_b(a) + \log p(y, a)
    + (\nabla \log p(y, a) - \nabla \log p_b(a))^{\mathsf T} (z - a) \bigr]

for a fair minibatch :math:`b` and any anchor :math:`a`, and so for the gradients in :math:`z`. What
is left of the noise is of second order in the distance of :math:`z` from :math:`a`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from ..models.arguments import Program, batch_of, check_call
from ..models.epoch import epoch_of
from ..models.log_joint import LogJoint
from ..models.rows import Part, all_rows
from ..models.traces import is_latent, quietly

__all__ = ["Anchor"]

# At so many points a model is tried to find out whether it can run at all of them at once.
NUM_CHECKED = 7

CANNOT_ANCHOR = (
    "An anchor needs a model that sees some of its rows at a time and can be run on all: by "
    "plate(..., subsample_size=n), from which it takes the rows of its data, or on minibatches, "
    "the same in each epoch, given as data=. Its latents may not belong to these rows."
)


class Anchor:
    r"""A point where a model is known on all of its rows, to train on minibatches without noise.

    At each step the model also runs at the anchor, on the same rows. What these say there, less
    what all rows say, is taken off the log joint density and its gradient. That is unbiased
    whatever the anchor; near the posterior next to nothing of the noise is left. It costs as much
    as one more particle, and once a run on all rows. :func:`~pyro_iaf.fit` does it by itself; for a
    loop of your own give it to :class:`~pyro_iaf.TraceSTL_ELBO`.

    The model's latents may not belong to its rows, and it may have no parameters.

    Args:
        model: A model that sees some of its rows at a time, by ``subsample_size`` of a plate or in
            minibatches.
        at: The values of its latents by name, as ``guide.median()``.
        args: The model's positional arguments, if it subsamples by itself.
        kwargs: Its keyword arguments likewise.
        data: Minibatches, as for :func:`~pyro_iaf.fit`.

    Raises:
        ValueError: If the model can't be run on all rows or has parameters, or a latent is not in
            ``at``.

    References:
        Johnson and Zhang (2013), Accelerating stochastic gradient descent using predictive variance
        reduction; Baker et al. (2019), https://arxiv.org/abs/1706.05439

    Example:
        >>> y = 3 + torch.randn(1000)
        >>> def model():
        ...     mean = pyro.sample("mean", dist.Normal(0.0, 10.0))
        ...     with pyro.plate("rows", 1000, subsample_size=10) as rows:
        ...         pyro.sample("y", dist.Normal(mean, 1.0), obs=y[rows])
        >>> guide = AutoIAF(model)
        >>> guide.setup()
        >>> anchor = Anchor(model, guide.median())
        >>> losses = [TraceSTL_ELBO(anchor=anchor).loss_and_grads(model, guide) for _ in range(9)]
        >>> max(losses) - min(losses) < 1e-3  # of 10 rows each
        True
    """

    def __init__(
        self,
        model: Callable[..., Any],
        at: Mapping[str, Tensor],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
        *,
        data: Iterable[Any] | None = None,
    ) -> None:
        usual, named = check_call(args, kwargs, None if data is not None else model)
        epoch = None
        if data is not None:
            if isinstance(data, Iterator):
                raise ValueError(
                    "data should be minibatches that can be had again; got an iterator."
                )
            epoch = epoch_of(model, data, lambda anew=False: (batch_of(i, named) for i in data))
            if epoch is None:
                raise ValueError(CANNOT_ANCHOR)
            usual, named = epoch[0].batch
        with torch.no_grad(), quietly(), poutine.block():
            trace = poutine.trace(model).get_trace(*usual, **named)
        if any(site["type"] == "param" for site in trace.nodes.values()):
            raise ValueError(
                "An anchor knows a model as it is, and parameters of the model change. Give "
                "latents in their place, or leave the anchor out."
            )
        joint = LogJoint(model, trace, usual, named)
        parts = epoch or [Part(1.0, all_rows(model, trace, usual, named))]
        if epoch is None and not parts[0].rows:
            raise ValueError(CANNOT_ANCHOR)
        if missing := sorted(joint.latents.keys() - at.keys()):
            raise ValueError(
                f"at should hold a value of each latent, as guide.median() does; site "
                f"'{missing[0]}' is not among {sorted(at)}."
            )
        with torch.random.fork_rng():
            sites = {name: torch.as_tensor(at[name]).detach() for name in joint.latents}
            point = joint.unconstrained({n: value.unsqueeze(0) for n, value in sites.items()})[0]
            if why := joint.check(point + torch.randn(NUM_CHECKED, len(point)).to(point)):
                raise ValueError(f"An anchor needs a density that can be computed again: {why}.")
        self._begin(joint, point)
        self.place(self.point, joint.on_parts(parts))

    @classmethod
    def near(cls, joint: LogJoint, point: Tensor) -> Anchor:
        """An anchor for a log density of minibatches, to be placed."""
        anchor = cls.__new__(cls)
        anchor._begin(joint, point)
        return anchor

    def _begin(self, joint: LogJoint, point: Tensor) -> None:
        self.joint, self.point = joint, point.detach().clone()
        self.value, self.slope = point.new_zeros(()), torch.zeros_like(point)

    def place(self, point: Tensor, whole: LogJoint) -> None:
        """Moves it, in unconstrained space; ``whole`` is the log density of all rows."""
        value, slope = whole.gradient(point.detach().unsqueeze(0))
        for ours, new in zip(self.tensors, (point, value[0], slope[0]), strict=True):
            ours.copy_(new.detach())

    @property
    def is_finite(self) -> bool:
        """Whether density and gradient are."""
        return bool(self.value.isfinite() and self.slope.isfinite().all())

    @property
    def tensors(self) -> list[Tensor]:
        """The point, the density of all rows there, and its gradient."""
        return [self.point, self.value, self.slope]

    def correct(
        self, log_p: Tensor, z: Tensor, value: Tensor, slope: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Log densities at points without the noise of their minibatch, and what to add to slopes.

        Args:
            log_p: The log densities of the minibatch, of shape ``(K,)``.
            z: The points, of shape ``(K, D)``.
            value: The minibatch's log density at the anchor.
            slope: Its gradient there.
        """
        error = self.slope - slope
        return log_p - value + self.value + (z - self.point) @ error, error

    def __call__(self, model: Program) -> Program:
        """The model with a factor that takes the noise of its minibatch away."""

        def anchored(*args: Any, **kwargs: Any) -> Any:
            with _Sites() as seen:
                returned = model(*args, **kwargs)
            joint = self.joint.with_data(args, kwargs)
            joint.subsamples = seen.rows
            value, slope = joint.gradient(self.point.unsqueeze(0))
            z, lead = joint.vectors(seen.values)
            zero = z.new_zeros(len(z))
            correction, _ = self.correct(zero, z, value[0], slope[0])
            pyro.factor("_anchor", correction.reshape(lead))
            return returned

        return anchored


class _Sites(Messenger):
    """Notes the latents of a run, and the rows of its plates."""

    def __enter__(self) -> _Sites:
        self.values: dict[str, Tensor] = {}
        self.rows: dict[str, Tensor] = {}
        super().__enter__()
        return self

    def _pyro_post_sample(self, msg: Any) -> None:
        if site_is_subsample(msg):
            self.rows[msg["name"]] = msg["value"]
        elif is_latent(msg):
            self.values[msg["name"]] = msg["value"]
