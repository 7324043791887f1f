r"""Inverse autoregressive flows for Pyro.

.. math::
    y = \mu(x) + \sigma(x) \odot x, \qquad x \sim N(0, I)

Noise ``x`` to latent ``y`` in one network pass; the density of what was drawn comes for free.
"""

from .conditional import (
    ConditionalInverseAutoregressiveFlow,
    ConditionalInverseAutoregressiveFlowStack,
    conditional_inverse_autoregressive_flow,
)
from .diagnostics import Diagnosis, diagnose, to_arviz
from .distributions import DiagonalNormal
from .elbo import CompiledTrace_ELBO
from .fitting import FitResult, fit
from .guides import AutoIAF
from .hierarchical import AutoHierarchicalIAF
from .inversion import invert, solve_transposed
from .networks import MaskedAutoregressiveNetwork
from .plots import plot_loss, plot_pairs
from .registration import register
from .sticking import TraceSTL_ELBO
from .transforms import (
    InverseAutoregressiveFlow,
    InverseAutoregressiveFlowStack,
    inverse_autoregressive_flow,
)

__version__ = "0.1.0"

__all__ = [
    "AutoHierarchicalIAF",
    "AutoIAF",
    "CompiledTrace_ELBO",
    "ConditionalInverseAutoregressiveFlow",
    "ConditionalInverseAutoregressiveFlowStack",
    "Diagnosis",
    "DiagonalNormal",
    "FitResult",
    "InverseAutoregressiveFlow",
    "InverseAutoregressiveFlowStack",
    "MaskedAutoregressiveNetwork",
    "TraceSTL_ELBO",
    "conditional_inverse_autoregressive_flow",
    "diagnose",
    "fit",
    "inverse_autoregressive_flow",
    "invert",
    "plot_loss",
    "plot_pairs",
    "register",
    "solve_transposed",
    "to_arviz",
]

register()
