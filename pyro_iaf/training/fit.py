"""Training of a guide by one call, which can be interrupted and resumed."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import Any

import pyro
import torch
from pyro.poutine import runtime
from pyro.poutine.block_messenger import BlockMessenger
from pyro.poutine.seed_messenger import SeedMessenger

from .._validation import check_size
from ..elbo.compiled import CompiledTrace_ELBO
from ..elbo.objectives import RECORDABLE
from ..models.arguments import check_call, check_pair
from ..models.traces import handler_lock
from . import checkpoints
from .batches import Batches
from .result import FitResult
from .run import Run
from .schedule import Rounds, Schedule
from .stages import Stage, Stages

__all__ = ["FitResult", "fit"]

# The largest seed that NumPy takes, which pyro.set_rng_seed seeds too.
LARGEST_SEED = 2**32 - 1


def fit(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    num_steps: int | None = None,
    num_particles: int = 16,
    data: Iterable[Any] | None = None,
    simulate: Sequence[str] | Mapping[str, str] | None = None,
    lr: float = 5e-3,
    clip_norm: float = 10.0,
    loss: Any = None,
    annealing: int | Callable[[int], float] | None = None,
    early_stop: bool = True,
    compile: bool | str = "auto",  # noqa: A002
    anchor: bool = True,
    seed: int | None = None,
    progress: bool = True,
    checkpoint: str | Path | None = None,
    checkpoint_every: int = 200,
) -> FitResult:
    r"""Fits a guide to a model by maximising the ELBO.

    By Adam, until the guide is certified: steps come in rounds that end after 100, 200, 400, ...
    and at most 6,400 steps. At the end of each, new draws of the guide are weighted by the model.
    The run stops where the weights change no mean by 0.05 standard deviations and no standard
    deviation by 5 %, and :func:`~pyro_iaf.diagnose` calls the guide good. It also stops where the
    ELBO no longer rises from round to round, or rises so slowly that all rounds would not be
    enough. ``result.stopped`` says which, and ``result.diagnosis`` is the verdict of further draws.
    While ``annealing`` keeps the weight of the KL divergence below one, no round is the last.

    An :class:`~pyro_iaf.AutoIAF` with ``num_components="auto"`` is also searched for modes that it
    misses, at the second look and at the end. Where one holds more than 2 % of the mass, the guide
    gets a component there, up to eight, and the rounds begin again with all of them. So do they
    where the guide is not close and climbs from its own draws end at several peaks.

    Some weights do not tell how good a guide is: those of a point, where the ``loss`` sums latents
    out, or of minibatches that have latents of their own, or can be had once only. Such a run has
    one round, ends when the losses have settled, after 3,000 steps at most, and has no verdict.

    On minibatches, by ``data`` or by a plate that subsamples, the guide starts at all rows, and its
    weights are on all rows, which are gone through at each look. Plates go through their rows in
    turn. An :class:`~pyro_iaf.Anchor` takes nearly all noise of minibatches away, where the model
    has no parameters and the loss is fit's own; ``result.noise`` tells. A guide that is there at
    its first step is trained by small steps, and one that training makes worse goes back to where
    it was near, and on by smaller ones.

    In each round the learning rate rises, stays, falls after four tenths of the steps, and ends at
    a hundredth; the parameters of the last fifth of the steps are averaged. With ``num_steps``
    there is one such round, where the fall begins earlier if the ELBO has settled. Gradients are
    clipped. A step whose loss or gradient is not finite is skipped.

    For an :class:`~pyro_iaf.AutoIAF` or :class:`~pyro_iaf.AutoHierarchicalIAF` and without a
    ``loss``, gradients go through the draws alone ("sticking the landing"). They are unbiased, and
    have little noise near the posterior. For guides by hand ``loss=TraceSTL_ELBO(...)`` does the
    same. Particles are vectorised if the model gives the same log densities so, which is tried
    first; ``AutoIAF`` then maps the model over them by ``torch.vmap``; otherwise they run one after
    the other.

    Long runs are compiled: model, guide, gradient, clipping and Adam run once in Python and become
    one call, with the same results but for rounding. A step then costs what its arithmetic does,
    instead of milliseconds. Compiling takes seconds, and nothing for the same guide, model and
    shapes in the same process. For a loop of your own, :class:`pyro.infer.SVI` works with the guide
    as usual, and :class:`~pyro_iaf.CompiledTrace_ELBO` compiles its loss.

    Without a ``loss``, small steps take one thread, since others gain nothing there; your setting
    is restored.

    Threads wait for each other in calls of fit and :func:`~pyro_iaf.diagnose`, since Pyro has one
    stack of handlers for all threads. Processes run in parallel.

    Args:
        model: A Pyro model.
        guide: A guide, by hand or any of Pyro's or ours.
        args: The positional arguments of model and guide.
        kwargs: Their keyword arguments.
        num_steps: The largest number of steps. None means until the guide is certified, as above.
        num_particles: The number of draws in each step's gradient. A guide with components draws
            as often from each, and at least four times.
        data: An iterable or a ``DataLoader`` of minibatches, instead of ``args``: each a tuple of
            the model's arguments, a dict of keyword arguments, or the one argument. It is iterated
            over as often as needed. The model has to scale its likelihood, by a plate's ``size``
            and ``subsample_size`` or by ``poutine.scale``.
        simulate: Sites to draw from the model's prior at every step, and to pass to model and guide
            as keyword arguments: their names if the arguments have the same names, or a dict from
            arguments to sites. With an encoder, one fit then serves all data sets.
        lr: The largest learning rate. That of our networks' weights is four times as large.
        clip_norm: The largest norm of the gradient; ``math.inf`` turns clipping off.
        loss: One of Pyro's ELBOs, for instance ``TraceMeanField_ELBO()``, or ours, as
            :class:`~pyro_iaf.TraceSTL_ELBO`; it brings its own number of particles.
        annealing: The number of steps over which the weight of the KL divergence to the prior rises
            to one; or a function from steps to weights.
        early_stop: Whether the learning rate begins to fall as soon as the ELBO has settled.
        compile: ``True`` compiles the step, or replays it operation by operation if there is no C++
            compiler. ``"graph"`` always replays, which is slower than the code itself for an
            ``AutoIAF`` of more than 200 latents. ``"auto"`` replays or compiles if the steps still
            to come are faster so by the counts of steps, operations and numbers, never by a clock,
            so that a seed gives the same run; it warns if it can't. ``False`` runs model and guide
            at each step, as needed if they change from step to step, or branch on latents,
            parameters or random numbers, or on numbers that differ from one minibatch to the next.
            Numbers that they compute from the same data at each step, as ``int(group.max())``, are
            constants of the step.
        anchor: Whether to take the noise of minibatches away by an :class:`~pyro_iaf.Anchor`, where
            that is worthwhile.
        seed: The seed of the generators of PyTorch, NumPy and Python, which are left alone if None.
        progress: Whether to show a bar, with the ELBO, its trend and the steps per second.
        checkpoint: A file in which the state of the run is saved regularly. If it exists, the run
            resumes from it; settings, data, model and guide have to be the same. A resumed run
            gives the same numbers as one without interruption, unless ``data`` is shuffled by other
            generators than PyTorch's. The file is always complete, also after a crash.
        checkpoint_every: The number of steps between two checkpoints.

    Returns:
        The losses, how the run went, and the verdict if there is one. An error that ends the run
        has this result of the steps taken so far as ``error.result``. They are in the checkpoint
        too, unless their values are the error.

    Raises:
        ValueError: If an argument is out of range, model and guide are swapped or are none, the
            guide's sites are not the model's latents or have other shapes, also at a later step,
            data are outside the support of their site, a site has another shape than its plates,
            the checkpoint is damaged or of another run, the step can't be compiled with
            ``compile=True``, or the call is within ``torch.inference_mode()`` or a Pyro handler.
        TypeError: If the model doesn't take ``args``, ``kwargs`` or the first of ``data``.
        OSError: If the checkpoint can't be written; before the first step.
        FloatingPointError: If too many steps were not finite; names the sites at fault.
        KeyboardInterrupt: At Ctrl-C. Guide and checkpoint then have the parameters of the last
            step. ``SIGTERM`` leaves a checkpoint too, and then ends the process.

    Warns:
        UserWarning: If the posterior is improper, since nothing depends on a latent with a flat
            prior; if particles run one after the other; with ``compile="auto"`` if long runs can't
            be compiled; and once, if a later checkpoint can't be written, for example on a full
            disk: training goes on, and the last checkpoint stays.

    Example:
        >>> def model():
        ...     z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        ...     pyro.sample("y", dist.Normal(z.sum(-1), 0.5), obs=torch.tensor(1.0))
        >>> guide = AutoIAF(model)
        >>> result = fit(model, guide, seed=0, progress=False)
        >>> result.num_steps, result.stopped
        (100, 'more of them would change nothing')
        >>> result.diagnosis.verdict
        'good'
    """
    if num_steps is not None:
        num_steps = check_size("num_steps", num_steps)
    elif not early_stop:
        raise ValueError("early_stop=False takes all steps, so give their number as num_steps.")
    num_particles = check_size("num_particles", num_particles)
    checkpoint_every = check_size("checkpoint_every", checkpoint_every)
    lr = _check_positive("lr", lr, math.inf)
    clip_norm = _check_positive("clip_norm", clip_norm)
    if annealing is not None and not callable(annealing):
        annealing = check_size("annealing", annealing)
    switches = {"early_stop": early_stop, "progress": progress, "anchor": anchor}
    for name, switch in switches.items():
        if switch not in (True, False):
            raise ValueError(f"{name} should be True or False; got {switch!r}.")
    check_pair("fit", model, guide)
    if loss is not None and (isinstance(loss, type) or not hasattr(loss, "loss_and_grads")):
        raise ValueError(f"loss should be one of Pyro's ELBOs, as Trace_ELBO(); got {loss!r}.")
    if compile not in (True, False, "auto", "graph"):
        raise ValueError(f'compile should be True, False, "auto" or "graph"; got {compile!r}.')
    if not isinstance(compile, str):
        compile = bool(compile)  # noqa: A001
    args, kwargs = check_call(args, kwargs, None if simulate or data is not None else model)
    if simulate and not getattr(guide, "amortized", True):
        raise ValueError(
            "simulate= trains a guide for all data sets, so the guide should depend on the data: "
            f"give it an encoder, {type(guide).__name__}(model, encoder=...)."
        )
    batches = Batches(model, args, kwargs, data, simulate)
    path = None if checkpoint is None else checkpoints.prepare(checkpoint)
    if seed is not None:
        seed = check_size("seed", seed, smallest=0)
        if seed > LARGEST_SEED:
            raise ValueError(f"seed should be an int of at most {LARGEST_SEED}; got {seed}.")
    with handler_lock:
        _check_surroundings()
        if seed is not None:
            pyro.set_rng_seed(seed)
        make = functools.partial(
            Run,
            model=model,
            guide=guide,
            batches=batches,
            num_particles=num_particles,
            clip_norm=clip_norm,
            elbo=loss,
            compile=_compile_of(loss) if compile == "auto" else compile,
            anchor=bool(anchor),
            seed=seed,
            checkpoint=path,
            checkpoint_every=checkpoint_every,
        )

        def run_of(stage: Stage) -> Run:
            if num_steps is None:
                return make(schedule=Rounds(lr, annealing), stage=stage)
            schedule = Schedule(num_steps, lr, annealing, bool(early_stop))
            return make(schedule=schedule, stage=stage)

        return Stages(run_of, guide, path).to_the_end(bool(progress))


def _check_surroundings() -> None:
    """Refuses to run in inference mode, or within handlers that see the sites of each step."""
    if torch.is_inference_mode_enabled():
        raise ValueError(
            "fit needs gradients, which torch.inference_mode() turns off. Call it outside, and "
            "make guides outside too."
        )
    handlers: list[Any] = []
    for handler in runtime._PYRO_STACK:
        if isinstance(handler, BlockMessenger):  # hides sites from the handlers before it
            handlers.clear()
        elif not isinstance(handler, SeedMessenger):  # which sees no site
            handlers.append(handler)
    if handlers:
        names = ", ".join(type(handler).__name__ for handler in handlers)
        raise ValueError(
            "fit runs model and guide at each step, and no handler should be around it; got a call "
            f"within {names}. Handle the model, as in fit(poutine.condition(model, ...), guide), "
            "or hide the call by `with poutine.block():`."
        )


def _check_positive(name: str, number: object, below: float | None = None) -> float:
    """The number as a float; raises a ValueError that names the argument."""
    if isinstance(number, Real) and not isinstance(number, bool):
        value = float(number)
        if value > 0 and (below is None or value < below):
            return value
    finite = "" if below is None else "finite "
    raise ValueError(f"{name} should be a positive {finite}number; got {number!r}.")


def _compile_of(elbo: Any) -> bool | str:
    """The way to compile with this loss."""
    if isinstance(elbo, CompiledTrace_ELBO):
        return "graph" if elbo.backend == "graph" else True
    return "auto" if elbo is None or type(elbo) in RECORDABLE else False
