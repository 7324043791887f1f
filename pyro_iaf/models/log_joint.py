r"""The log joint density of a model, as a function of its latents in unconstrained space.

.. math::
    \ell(z) = \log p(x, T(z)) + \log |\det \partial T / \partial z|

for many :math:`z` at once, as a particle plate outside the model's own plates has it; or one after
the other, where the model doesn't take such a plate.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from threading import Lock, RLock
from types import TracebackType
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.distributions import MaskedDistribution
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.autograd import grad
from torch.distributions import Distribution, Independent, biject_to
from torch.distributions.transforms import identity_transform

__all__ = [
    "Given",
    "LogJoint",
    "Matching",
    "Mismatch",
    "Told",
    "Unchecked",
    "compute_log_prob",
    "is_latent",
    "is_subsampled",
    "join",
    "log_prob_of_each",
    "log_prob_of_particles",
    "log_probs_of_particles",
    "plate_nesting",
    "quietly",
    "same",
    "samples",
    "split_sizes",
    "subsamples",
    "taking_turns",
]

# Numbers that a model's sites hold at most in one run, and the graph of a Hessian's rows.
MAX_NUMBERS = 2**24

# Held while models run, since Pyro has one stack of handlers for all threads.
taking_turns = RLock()


class LogJoint:
    r"""The log joint density of a model at latents of shape ``(K, D)``, of shape ``(K,)``, in nats.

    The model runs away from the caller's handlers, on the subsamples of ``trace``, and without
    checks of what its distributions are given: where it has no density, that is ``-inf``.

    Args:
        model: A Pyro model.
        trace: One run of it, which tells its sites, plates and subsamples.
        args: The model's arguments.
        kwargs: Likewise.
        latents: The sites that make up the vector, in its order; by default all latents there are.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        trace: poutine.Trace,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        latents: dict[str, Any] | None = None,
    ) -> None:
        self.model, self.args, self.kwargs = model, args, kwargs
        self.subsamples = {name: site["value"] for name, site in subsamples(trace).items()}
        self.subsampled = is_subsampled(trace)
        drawn = {name: s for name, s in samples(trace).items() if not s["is_observed"]}
        self.latents = drawn if latents is None else latents
        self.nesting = plate_nesting(trace)
        shapes = [torch.Size(site["fn"].shape()) for site in samples(trace).values()]
        self.num_numbers = sum(max(1, shape.numel()) for shape in shapes)
        self._shapes = {name: site["value"].shape for name, site in self.latents.items()}
        self._layout = []
        for name, site in self.latents.items():
            to_support = biject_to(site["fn"].support)
            shape = to_support.inverse_shape(site["value"].shape)
            missing = self.nesting - (len(shape) - to_support.domain.event_dim)
            self._layout.append((name, to_support, [1] * missing + list(shape), shape.numel()))
        self.at_once = True
        self.weight: float | Tensor = 1.0

    @property
    def num_at_once(self) -> int:
        """How many particles a call should have at most."""
        return max(1, MAX_NUMBERS // self.num_numbers)

    def on(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], weight: float | Tensor = 1.0
    ) -> LogJoint:
        """The same on other data, with fresh subsamples, the latents' densities weighted."""
        other = copy.copy(self)
        other.args, other.kwargs, other.subsamples, other.weight = args, kwargs, {}, weight
        return other

    def __call__(self, z: Tensor, together: int = 1) -> Tensor:
        """The log densities; ``-inf`` for particles at which the model raises an error.

        Args:
            z: Latents of shape ``(K, D)``.
            together: So many particles after one another share that fate.
        """
        if len(z) > max(self.num_at_once, together):
            size = together * max(1, self.num_at_once // together)
            return torch.cat([self(part, together) for part in z.split(size)])
        try:
            with quietly():
                return self.density(z)
        except Mismatch:
            raise
        except Exception:  # at some point a matrix has no Cholesky factor, or a check fails
            if len(z) <= together:
                return z.new_full((len(z),), -torch.inf)
            half = together * (len(z) // together // 2) or together
            return torch.cat([self(part, together) for part in (z[:half], z[half:])])

    def density(self, z: Tensor) -> Tensor:
        """The log densities, or the error that the model raises."""
        if self.at_once:
            return self._of_particles(z)
        return torch.cat([self._of_one(row) for row in z.unbind()])

    def check(self, z: Tensor) -> str | None:
        """What speaks against this density, if anything; finds out whether particles go at once.

        Args:
            z: Two points at least, not too near to each other.
        """
        alone, fine, failure = [], [], None
        with quietly():
            for row in z:
                try:
                    alone.append(self._sites(row.unsqueeze(0), None))
                    fine.append(row)
                except Mismatch:
                    raise
                except Exception as error:  # there, but perhaps not elsewhere
                    failure = error
            if not alone:
                return f"the model fails there, {type(failure).__name__}: {failure}"
            again = self._sites(fine[0].unsqueeze(0), None)
        if len(alone) == 1:
            alone, fine = 2 * alone, 2 * fine
        if not same(alone[0], again):
            return "its log density changes from one run to the next"
        try:
            with quietly():
                together = self._sites(torch.stack(fine), self.nesting)
            self.at_once = same(together, join(alone))
        except Exception:  # whatever a model that isn't made for it may raise
            self.at_once = False
        return None

    def _sites(self, z: Tensor, nesting: int | None) -> dict[str, Tensor]:
        values, _ = self._constrain(z)
        values = self._single(values) if nesting is None else values
        return log_probs_of_particles(self._trace(values), len(z), nesting)

    def _single(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """The values of one particle, as a run without particles has them."""
        return {name: v.reshape(self.latents[name]["value"].shape) for name, v in values.items()}

    def gradient(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Values and gradients, of shapes ``(K,)`` and ``(K, D)``."""
        if len(z) > self.num_at_once:
            parts = [self.gradient(part) for part in z.split(self.num_at_once)]
            values, slopes = zip(*parts, strict=True)
            return torch.cat(values), torch.cat(slopes)
        with torch.enable_grad():
            z = z.detach().requires_grad_()
            value = self(z)
            if not value.requires_grad:
                return value, torch.zeros_like(z)
            (slope,) = grad(value.sum(), z)
        return value.detach(), slope

    def hessian(self, z: Tensor) -> Tensor:
        """Second derivatives, of shape ``(K, D, D)``."""
        K, D = z.shape
        with torch.enable_grad():
            z = z.detach().requires_grad_()
            (slope,) = grad(self(z).sum(), z, create_graph=True)
            if not slope.requires_grad:
                return z.new_zeros(K, D, D)
            units = torch.eye(D, dtype=z.dtype, device=z.device).unsqueeze(1).expand(D, K, D)
            if K * D * self.num_numbers <= MAX_NUMBERS:
                try:
                    rows = grad(slope, z, units, retain_graph=True, is_grads_batched=True)[0]
                    return rows.transpose(0, 1)
                except RuntimeError:
                    pass  # an operation without a batching rule
            rows = torch.stack([grad(slope, z, unit, retain_graph=True)[0] for unit in units])
        return rows.transpose(0, 1)

    def diagonal(self, z: Tensor, num_probes: int = 16) -> Tensor:
        """Estimates of the second derivatives in each latent alone, at ``z`` of shape ``(D,)``.

        From products of the Hessian with random signs (Bekas et al. 2007). They err by what the
        other latents bring, and are no smaller than a tenth of what that may be.
        """
        z = z.expand(1 if not self.at_once else min(num_probes, self.num_at_once), -1)
        estimates = []
        for _ in range(-(-num_probes // len(z))):
            with torch.enable_grad():
                z = z.detach().clone().requires_grad_()
                (slope,) = grad(self(z).sum(), z, create_graph=True)
                signs = torch.empty_like(z).bernoulli_() * 2 - 1
                estimates.append(signs * grad((slope * signs).sum(), z)[0])
        found = torch.cat(estimates)
        mean, size = found.mean(0), found.square().mean(0).sqrt()
        return torch.where(mean.abs() > size / 10, mean, -size / 10)

    def _of_particles(self, z: Tensor) -> Tensor:
        # No plate is needed for them: densities broadcast over what the latents bring.
        values, log_det = self._constrain(z)
        log_prob = log_prob_of_particles(self._trace(values), len(z), self.nesting, self.weight)
        return log_prob + self.weight * log_det

    def _of_one(self, z: Tensor) -> Tensor:
        values, log_det = self._constrain(z.unsqueeze(0))
        trace = self._trace(self._single(values))
        log_prob = log_prob_of_particles(trace, 1, None, self.weight)
        return log_prob + self.weight * log_det

    def _trace(self, values: dict[str, Tensor]) -> poutine.Trace:
        with poutine.block(expose_types=["param"]), Given(values, self.subsamples, self._shapes):
            trace = poutine.trace(self.model).get_trace(*self.args, **self.kwargs)
            compute_log_prob(trace)
        return trace

    def _constrain(self, z: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Values of the sites, with the particles left of all plates; and the log-determinant."""
        values, log_det = {}, z.new_zeros(len(z))
        parts = z.split([size for *_, size in self._layout], -1)
        for part, (name, to_support, shape, _) in zip(parts, self._layout, strict=True):
            part = part.reshape(len(z), *shape)
            values[name] = value = to_support(part)
            if to_support is not identity_transform:
                own = to_support.log_abs_det_jacobian(part, value)
                log_det = log_det + own.reshape(len(z), -1).sum(-1)
        return values, log_det


class Unchecked(Messenger):
    """Takes the checks out of distributions that were made with them, before the run."""

    def _pyro_sample(self, msg: Any) -> None:
        msg["fn"] = _unchecked(msg["fn"])


def _unchecked(fn: Any) -> Any:
    parts = {name: part for name, part in vars(fn).items() if isinstance(part, Distribution)}
    bare = {name: _unchecked(part) for name, part in parts.items()}
    if not fn.__dict__.get("_validate_args") and all(bare[n] is parts[n] for n in parts):
        return fn
    twin = copy.copy(fn)
    vars(twin).update(bare, _validate_args=False)
    return twin


class Mismatch(ValueError):  # noqa: N818
    """The latents of a model are not those that its guide draws."""


class Matching(Messenger):
    """Sees to it that a model's run has just these latents, and takes values of their shapes.

    Args:
        names: Of the latents; asked for when the run begins.

    Raises:
        Mismatch: If the run has others, not all of them, or one of another shape.
    """

    def __init__(self, names: Callable[[], Iterable[str]]) -> None:
        super().__init__()
        self._names = names

    def __enter__(self) -> Matching:
        self._drawn = set(self._names())
        self._met: set[str] = set()
        self._rows: dict[str, int] = {}
        super().__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        super().__exit__(kind, error, traceback)
        if isinstance(error, Mismatch) and isinstance(error.__cause__, Mismatch):
            raise error.__cause__ from None  # as it was before Pyro wrote the run's shapes below it
        if error is None and (strange := self._drawn - self._met):
            raise Mismatch(
                f"A guide should draw latents of the model, and this one draws {_listed(strange)}; "
                f"the model's run has no such latent, but {_listed(self._met)}. Make a guide for "
                "this model and these arguments. A site that only helps to draw others takes "
                "infer={'is_auxiliary': True}."
            )

    def _pyro_sample(self, msg: Any) -> None:
        name = msg["name"]
        if site_is_subsample(msg):
            self._rows[name] = _num_rows(msg)
        if name in self._drawn and not msg["is_observed"]:
            self._met.add(name)
            return
        if not is_latent(msg):
            return
        if msg["infer"].get("enumerate"):
            raise Mismatch(
                f"Site '{name}' is to be enumerated, which neither fit's own loss nor importance "
                "weights do: give fit loss=TraceEnum_ELBO(...), or sum the site out of the model."
            )
        raise Mismatch(
            f"A guide should draw all latents of the model, or they would come from the prior; "
            f"site '{name}' is a latent in this run, and the guide draws {_listed(self._drawn)}. "
            "Make a guide for this model and these arguments, observe the site, or sum it out."
        )

    def _pyro_post_sample(self, msg: Any) -> None:
        if site_is_subsample(msg):
            _check_plate(msg, self._rows[msg["name"]])
        elif msg["name"] in self._met:
            _check_shape(msg, msg["value"].shape)


def _listed(names: Iterable[str]) -> str:
    return ", ".join(f"'{name}'" for name in sorted(names)) or "nothing"


class Told(Unchecked):
    """Gives sites values, as far as a run has such sites."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        super().__init__()
        self.values = values

    def _pyro_sample(self, msg: Any) -> None:
        super()._pyro_sample(msg)
        if msg["name"] in self.values and not msg["is_observed"]:
            msg["value"] = self.values[msg["name"]]
            msg["done"] = True


class Given(Matching):
    """Gives all latents of a model their values, and leaves all else of them alone.

    Distributions are not checked, as :class:`Unchecked` has it.

    Args:
        values: Of the latents, all of them and nothing else.
        kept: Of subsamples and of auxiliary sites, where the model has them.
        shapes: Of the latents, without the particles that stand before them.

    Raises:
        Mismatch: If the run has other latents, or one of another shape.
    """

    def __init__(
        self,
        values: Mapping[str, Any],
        kept: Mapping[str, Any],
        shapes: Mapping[str, torch.Size] | None = None,
    ) -> None:
        super().__init__(values.keys)
        self.values = {**kept, **values}
        self.shapes = {} if shapes is None else shapes

    def _pyro_sample(self, msg: Any) -> None:
        msg["fn"] = _unchecked(msg["fn"])
        super()._pyro_sample(msg)
        if msg["name"] in self.values and not msg["is_observed"]:
            msg["value"] = self.values[msg["name"]]
            msg["done"] = True
            # Before the model meets the value.
            if site_is_subsample(msg):
                _check_plate(msg, self._rows[msg["name"]])
            elif msg["name"] in self.shapes:
                _check_shape(msg, self.shapes[msg["name"]])

    def _pyro_post_sample(self, msg: Any) -> None:
        pass


def _check_shape(site: Any, shape: torch.Size) -> None:
    """Raises a Mismatch unless a value, a draw of this shape or several, is one of its site."""
    expected = torch.Size(site["fn"].shape())
    own = expected[-len(shape) :] if shape else torch.Size()
    found = torch.as_tensor(site["value"]).shape
    if _core(own) != _core(shape) or _core(torch.broadcast_shapes(expected, found)) != _core(found):
        raise Mismatch(
            f"A guide should draw values of the shapes that the model's sites have; at site "
            f"'{site['name']}' it draws shape {tuple(shape)}, and the model has {tuple(expected)}. "
            "Make a guide for this model and these arguments."
        )


def _num_rows(site: Any) -> int:
    """How many rows a plate takes of its own."""
    fn, own = site["fn"], site["value"]  # None unless the model tells the rows
    if own is not None:
        return len(own)
    return int(fn.size if fn.subsample_size is None else fn.subsample_size)


def _check_plate(site: Any, expected: int) -> None:
    """Raises a Mismatch unless a plate was given indices for as many rows as it takes."""
    found = len(site["value"])
    if found != expected:
        raise Mismatch(
            f"A plate should have as many rows in the guide as in the model; plate "
            f"'{site['name']}' has {found} in the guide and {expected} in the model. Make a guide "
            "for this model and these arguments."
        )


def _core(shape: torch.Size) -> tuple[int, ...]:
    """A shape without leading ones, which change no density."""
    sizes = list(shape)
    while sizes[:1] == [1]:
        del sizes[0]
    return tuple(sizes)


def is_latent(site: Any) -> bool:
    """Whether a sample site is drawn by a guide: no data, no subsample, nothing auxiliary."""
    hidden = ("is_auxiliary", "was_observed")
    is_free = site["type"] == "sample" and not site["is_observed"]
    return is_free and not site_is_subsample(site) and not any(map(site["infer"].get, hidden))


def samples(trace: poutine.Trace) -> dict[str, Any]:
    """The sample sites of a run, but for the subsamples of plates."""
    nodes: dict[str, Any] = dict(trace.nodes)
    return {
        n: site for n, site in nodes.items() if site["type"] == "sample" and not _is_index(site)
    }


def subsamples(trace: poutine.Trace) -> dict[str, Any]:
    """The sites where plates draw their subsamples."""
    nodes: dict[str, Any] = dict(trace.nodes)
    return {n: site for n, site in nodes.items() if _is_index(site)}


def is_subsampled(trace: poutine.Trace) -> bool:
    """Whether some plate takes fewer than all."""
    fns = [site["fn"] for site in subsamples(trace).values()]
    return any(fn.subsample_size not in (None, fn.size) for fn in fns)


def _is_index(site: Any) -> bool:
    """Whether a site is a plate's, which draws its subsample."""
    return site["type"] == "sample" and site_is_subsample(site)


def compute_log_prob(trace: poutine.Trace, *, in_double: bool = False) -> None:
    """Scores all sites of a run; a plate's subsample has no density.

    Args:
        trace: The run.
        in_double: Whether to sum the log densities of single observations in double precision, and
            to note the square of what their rounding comes to, as ``squared_rounding``.
    """
    if not in_double:
        trace.compute_log_prob(lambda _, site: not site_is_subsample(site))
        return
    for site in samples(trace).values():
        each, num_event = log_prob_of_each(site)
        each = each if each.is_floating_point() else each.double()
        eps, scale = torch.finfo(each.dtype).eps, site["scale"]
        if num_event:
            flat = each.flatten(-num_event)
            log_prob = flat.sum(-1, dtype=torch.float64)
            size = torch.linalg.vector_norm(flat, dim=-1, dtype=torch.float64)
        else:  # sums over a dimension of size 1 would be slow
            log_prob, size = each.double(), each.abs()
        site["log_prob"] = scale * log_prob
        site["squared_rounding"] = (scale * eps * size).square()


def log_prob_of_each(site: Any) -> tuple[Tensor, int]:
    """The log density of each observation, also where a site sums over many; 0 if masked out.

    And how many of the last dimensions are those of the event.
    """
    log_prob, num_event = _of_each(site["fn"], site["value"])
    return _masked(log_prob, site["mask"], num_event), num_event


def _of_each(fn: Any, value: Any) -> tuple[Tensor, int]:
    if isinstance(fn, MaskedDistribution) and fn._mask is not False:
        log_prob, num_event = _of_each(fn.base_dist, value)
        return _masked(log_prob, fn._mask, num_event), num_event
    if isinstance(fn, Independent):
        log_prob, num_event = _of_each(fn.base_dist, value)
        return log_prob, num_event + fn.reinterpreted_batch_ndims
    return fn.log_prob(value), 0


def _masked(log_prob: Tensor, mask: Any, num_event: int) -> Tensor:
    if mask is None:
        return log_prob
    mask = torch.as_tensor(mask, device=log_prob.device)
    return torch.where(mask.reshape(mask.shape + (1,) * num_event), log_prob, 0.0)


def plate_nesting(*traces: poutine.Trace) -> int:
    """How many dimensions the plates of these runs take, counted from the right."""
    depth = 0
    for trace in traces:
        for site in samples(trace).values():
            dims = [-frame.dim for frame in site["cond_indep_stack"] if frame.vectorized]
            depth = max(depth, len(site["fn"].batch_shape), *dims)
    return depth


def log_prob_of_particles(
    trace: poutine.Trace,
    num_particles: int,
    nesting: int | None,
    weight: float | Tensor = 1.0,
    what: str = "log_prob",
) -> Tensor:
    """The log densities of a run's particles, which lie left of ``nesting`` plates.

    Those of sites that are not observed are weighted. Without a nesting there is one particle.
    """
    sites = samples(trace)
    total: Any = 0.0
    for name, log_prob in log_probs_of_particles(trace, num_particles, nesting, what).items():
        total = total + (log_prob if sites[name]["is_observed"] else weight * log_prob)
    return torch.as_tensor(total).expand(num_particles)


def log_probs_of_particles(
    trace: poutine.Trace, num_particles: int, nesting: int | None, what: str = "log_prob"
) -> dict[str, Tensor]:
    """The same, site by site."""
    found = {}
    for name, site in samples(trace).items():
        log_prob = site[what]
        beyond = -1 if nesting is None else log_prob.dim() - nesting - 1
        if beyond < 0:  # the same for all
            found[name] = log_prob.sum().expand(num_particles)
        else:
            each = log_prob.movedim(beyond, 0)
            found[name] = each.reshape(len(each), -1).sum(-1).expand(num_particles)
    return found


def join(alone: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """What single runs found, as one run of several particles would."""
    return {name: torch.cat([run[name] for run in alone]) for name in alone[0]}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Whether two runs have the same densities, site by site, to rounding."""
    return a.keys() == b.keys() and all(
        torch.allclose(
            a[n],
            b[n],
            rtol=1e-8 if a[n].dtype == torch.float64 else 1e-3,
            atol=1e-5,
            equal_nan=True,
        )
        for n in a
    )


def split_sizes(total: int, size: int) -> list[int]:
    """How many go at a time."""
    return [min(size, total - start) for start in range(0, total, size)]


class _Quiet:
    """Turns a switch of the whole process once, for all threads that want it turned."""

    def __init__(self) -> None:
        self.lock, self.num_inside, self.restore = Lock(), 0, ExitStack()

    def enter(self) -> None:
        with self.lock:
            if self.num_inside == 0:
                self.restore.enter_context(pyro.validation_enabled(False))
                self.restore.enter_context(warnings.catch_warnings())
                warnings.simplefilter("ignore")
            self.num_inside += 1

    def leave(self) -> None:
        with self.lock:
            self.num_inside -= 1
            if self.num_inside == 0:
                self.restore.close()


_quiet = _Quiet()


@contextmanager
def quietly() -> Iterator[None]:
    """Without checks and warnings of Pyro and PyTorch about densities that are not finite."""
    _quiet.enter()
    try:
        yield
    finally:
        _quiet.leave()
