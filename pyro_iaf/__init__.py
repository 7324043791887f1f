r"""Inverse autoregressive flows for Pyro.

.. math::
    y = \mu(x) + \sigma(x) \odot x, \qquad x \sim N(0, I)

A flow carries noise ``x`` to latent ``y`` in one network pass. The log density of a value that it
drew costs no further pass.
"""

from ._registration import register
from .diagnostics.arviz import to_arviz
from .diagnostics.diagnose import Diagnosis, diagnose
from .diagnostics.modes import Mode
from .diagnostics.plots import plot_loss, plot_pairs
from .diagnostics.refine import Refined, refine
from .distributions import DiagonalNormal
from .elbo.anchor import Anchor
from .elbo.compiled import CompiledTrace_ELBO
from .elbo.stl import TraceSTL_ELBO
from .flows.autoregressive import (
    InverseAutoregressiveFlow,
    InverseAutoregressiveFlowStack,
    inverse_autoregressive_flow,
)
from .flows.conditional import (
    ConditionalInverseAutoregressiveFlow,
    ConditionalInverseAutoregressiveFlowStack,
    conditional_inverse_autoregressive_flow,
)
from .flows.inverse import invert, solve_transposed
from .guides.auto_iaf import AutoIAF
from .guides.hierarchical import AutoHierarchicalIAF
from .nn.made import MaskedAutoregressiveNetwork
from .nn.univariate import Affine, Gated, UnivariateMap
from .training.fit import FitResult, fit

__version__ = "0.1.0"

__all__ = [
    "Affine",
    "Anchor",
    "AutoHierarchicalIAF",
    "AutoIAF",
    "CompiledTrace_ELBO",
    "ConditionalInverseAutoregressiveFlow",
    "ConditionalInverseAutoregressiveFlowStack",
    "Diagnosis",
    "DiagonalNormal",
    "FitResult",
    "Gated",
    "InverseAutoregressiveFlow",
    "InverseAutoregressiveFlowStack",
    "MaskedAutoregressiveNetwork",
    "Mode",
    "Refined",
    "TraceSTL_ELBO",
    "UnivariateMap",
    "conditional_inverse_autoregressive_flow",
    "diagnose",
    "fit",
    "inverse_autoregressive_flow",
    "invert",
    "plot_loss",
    "plot_pairs",
    "refine",
    "register",
    "solve_transposed",
    "to_arviz",
]

register()
