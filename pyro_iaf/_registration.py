"""Everything that importing pyro_iaf adds to Pyro and PyTorch, in one list.

Names are added where they are free, and nothing that exists is changed. The hook counts optimiser
steps, so that no flow returns a value cached before the last step.
"""

from __future__ import annotations

import warnings

import pyro.distributions
import pyro.distributions.transforms
import pyro.infer.autoguide
from torch.distributions.kl import register_kl
from torch.optim.optimizer import register_optimizer_step_post_hook

from . import distributions
from .flows import autoregressive, conditional, pass_cache
from .guides import auto_iaf, hierarchical, site_delta
from .models import bijections

__all__ = ["register"]

NAMES = [
    (pyro.distributions, distributions.DiagonalNormal),
    *(
        (pyro.distributions.transforms, getattr(module, name))
        for module in (autoregressive, conditional)
        for name in module.__all__
    ),
    (pyro.infer.autoguide, auto_iaf.AutoIAF),
    (pyro.infer.autoguide, hierarchical.AutoHierarchicalIAF),
]

_counts_steps = False


def register() -> None:
    """Adds our names to Pyro, and our KL divergences, bijections and hook to PyTorch.

    Called once by ``import pyro_iaf``; calling it again does nothing.

    Warns:
        UserWarning: If Pyro already has some of the names. Those are left as they are.

    Example:
        >>> register()
        >>> pyro.distributions.transforms.inverse_autoregressive_flow is inverse_autoregressive_flow
        True
    """
    global _counts_steps
    taken = []
    for host, member in NAMES:
        if getattr(host, member.__name__, member) is not member:
            taken.append(f"{host.__name__}.{member.__name__}")
        else:
            setattr(host, member.__name__, member)
    if taken:
        warnings.warn(
            f"Pyro already has these names, and pyro_iaf leaves them as they are: "
            f"{', '.join(taken)}. Import its own from pyro_iaf.",
            UserWarning,
            stacklevel=2,
        )
    divergences = distributions.KL_DIVERGENCES | site_delta.KL_DIVERGENCES
    for (p, q), divergence in divergences.items():
        register_kl(p, q)(divergence)
    bijections.register_bijections()
    if not _counts_steps:
        register_optimizer_step_post_hook(pass_cache.count_optimizer_step)
        _counts_steps = True
