"""The base of our ELBOs: Pyro's, of models whose discrete latents are summed out."""

from __future__ import annotations

import math
from typing import Any

from pyro.infer import ELBO, Trace_ELBO, TraceEnum_ELBO, config_enumerate

from ..models.arguments import Args, Kwargs, Program
from ..models.discrete import is_discrete
from ..models.enumeration import summed_out
from ..models.matching import Mismatch
from ..models.traces import samples

__all__ = ["MarginalELBO", "program_for"]


def program_for(elbo: ELBO, model: Program, guide: Any) -> Program:
    """The model to give to a loss, so that discrete latents are summed out by us or by the loss."""
    if isinstance(elbo, TraceEnum_ELBO) and getattr(guide, "discrete", None):
        return config_enumerate(model)  # type: ignore[no-any-return]
    return summed_out(model, guide)


class MarginalELBO(Trace_ELBO):
    """``Trace_ELBO`` of a model without the discrete latents that a guide of ours leaves out."""

    def _get_traces(self, model: Program, guide: Program, args: Args, kwargs: Kwargs) -> Any:
        program = summed_out(model, guide)
        is_unknown = self.vectorize_particles and self.max_plate_nesting == math.inf
        if is_unknown and program is not model:  # the plates of hidden sites count too
            self._guess_max_plate_nesting(model, guide, args, kwargs)
        for model_trace, guide_trace in super()._get_traces(program, guide, args, kwargs):
            for name, site in samples(model_trace).items():
                if name not in guide_trace and is_discrete(site):
                    raise Mismatch(
                        f"Discrete latents are summed out for guides of ours, as AutoIAF(model); "
                        f"site '{name}' would be drawn from its prior beside this one. Give "
                        "TraceEnum_ELBO a marked model, or sum it out in the model."
                    )
            yield model_trace, guide_trace
