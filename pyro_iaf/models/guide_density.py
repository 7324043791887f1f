r"""The log density of a guide at latents that it did not draw itself.

.. math::
    \log q(z) = \log q(T(z)) + \log |\det \partial T / \partial z|

for latents :math:`z` in unconstrained space, in nats.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from pyro import poutine
from pyro.infer.autoguide.guides import AutoContinuous
from torch import Tensor

from .log_joint import LogJoint
from .matching import FixedValues
from .traces import compute_log_prob, is_point, log_prob_of_particles, quietly, samples
from .weighted import WeightedParticles

__all__ = ["Unscorable", "guide_log_prob"]


class Unscorable(Exception):  # noqa: N818
    """Densities at given latents can't be had, for the reason in the message."""


@torch.no_grad()
def guide_log_prob(particles: WeightedParticles, joint: LogJoint, z: Tensor) -> Tensor:
    """Log densities of shape ``(K,)`` at latents of shape ``(K, D)``, as ``joint`` orders them.

    An ``AutoContinuous`` guide has the density of one vector of all latents. Another guide runs
    with its sites fixed: the latents themselves, or where they are points the auxiliary sites that
    they come from. Those are ``{name}_unconstrained``, as in ``AutoNormal``, or what the guide's
    method ``auxiliary_values(unconstrained, nesting)`` returns by name.

    Raises:
        Unscorable: If a site of the guide can't be fixed by the latents.
    """
    if isinstance(particles.guide, AutoContinuous):
        with quietly(), poutine.block():
            posterior: Any = particles.guide.get_posterior(*particles.args, **particles.kwargs)
            found: Tensor = posterior.log_prob(z)  # far out an inverse may be inexact
        return found
    parts = z.split(particles.sizes(len(z)))
    return torch.cat([_of_fixed_sites(particles, joint, part) for part in parts])


def _of_fixed_sites(particles: WeightedParticles, joint: LogJoint, z: Tensor) -> Tensor:
    """The sum over the sites of a run of the guide in which they have these values."""
    sites, log_det = joint.constrained(z)
    free = joint.split(z)
    fixed = {**sites, **{f"{name}_unconstrained": value for name, value in free.items()}}
    to_auxiliary: Callable[..., Any] | None = getattr(particles.guide, "auxiliary_values", None)
    if to_auxiliary is not None:
        fixed |= to_auxiliary(free, particles.nesting)
    if not particles.at_once:
        first = samples(particles.first_guide)
        fixed = {n: v.reshape(first[n]["value"].shape) for n, v in fixed.items() if n in first}
    points = {n for n, s in samples(particles.first_guide).items() if is_point(s["fn"])}
    given = FixedValues({name: value for name, value in fixed.items() if name not in points})
    with quietly(), poutine.block(), given:
        trace = particles.run_guide(len(z))
    for name in getattr(particles.guide, "corrections", ()):
        if name in trace.nodes:
            trace.remove_node(name)
    for name in samples(trace):
        if name not in given.values and name not in points:
            raise Unscorable(f"the guide's site '{name}' is no function of the latents")
    for name in points & sites.keys():
        if not torch.allclose(samples(trace)[name]["value"], sites[name], rtol=1e-3, atol=1e-5):
            raise Unscorable(f"the guide's site '{name}' depends on more than the latents")
    compute_log_prob(trace)
    nesting = particles.nesting if particles.at_once else None
    return log_prob_of_particles(trace, len(z), nesting) + log_det
