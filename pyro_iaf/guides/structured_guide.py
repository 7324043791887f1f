"""What a guide over one vector does with the structure of its model."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from pyro import poutine
from torch import Tensor

from .._validation import warn
from ..models.arguments import Args, Kwargs, Program
from ..models.log_joint import LogJoint
from ..models.matching import FixedLatents
from ..models.rows import Part, all_rows, chosen_rows, some_rows
from .base import FlowGuide
from .structure import Structure, find_structure, has_all_edges
from .structured_transform import StructuredTransform, structured_start

__all__ = ["StructuredGuide"]

# At so many draws of a start the structure that it has is looked at again, and so often in all.
NUM_DRAWS, NUM_LOOKS = 4, 3

# Among fewer latents flows over all of them do as well, so that nobody needs to know.
FEWEST_TOLD = 40

# With more rows the start is found from about so many random ones.
MOST_ROWS = 2**18


class StructuredGuide(FlowGuide):
    """A guide that finds structure, and starts its transform by it.

    A subclass sets ``_looks_for_structure``, and has its first transform as ``_transform``.
    """

    _looks_for_structure: bool
    _unconstrained_shapes: dict[str, Any]

    # Parts of the data, if the guide is set up by a minibatch: the start is found from them.
    parts_of_data: Sequence[Part] = ()

    @property
    def _may_have_structure(self) -> bool:
        """Whether it is wanted; flows that depend on a context are over all latents."""
        return self._looks_for_structure and self._encoder is None

    @property
    def structure(self) -> Structure | None:
        """The globals and the sparse graph of the other latents; None if the flow is over all.

        Its ``str`` is in words; it is known after the setup.
        """
        transform = self._modules.get("transform")
        return transform.structure if isinstance(transform, StructuredTransform) else None

    @property
    def frame_of_climbs(self) -> Any:
        """The transform in whose noise climbs are short, where the guide has structure."""
        several = self._modules.get("mixture") is not None
        return None if self.structure is None or several else self._modules["transform"]

    def _joint_of_start(self, model: Program, args: Args, kwargs: Kwargs) -> LogJoint:
        """The log joint density to start at, of all rows or many random ones."""
        values = {name: site["value"] for name, site in self._latent_sites().items()}
        run = poutine.trace(FixedLatents(values, {})(model))
        trace = run.get_trace(*args, **kwargs)  # with data and subsamples
        rows = {} if self.parts_of_data else all_rows(model, trace, args, kwargs)
        if not rows:
            joint = self.log_joint(model, trace, args, kwargs)
            return joint.on_parts(self.parts_of_data) if self.parts_of_data else joint
        rows = some_rows(rows, MOST_ROWS)
        with chosen_rows(rows):
            trace = run.get_trace(*args, **kwargs)
        return self.log_joint(model, trace, args, kwargs).on_parts([Part(1.0, rows)])

    def _structured_near(self, joint: LogJoint, loc: Tensor) -> StructuredTransform | None:
        """A transform with the structure of the model, if it has one; it starts near a point."""
        found, start = None, None
        with suppress(Exception):  # a model may raise anything, also where it is differentiated
            if self._modules.get("transform") is not None:
                structure = self.structure
                return None if structure is None else structured_start(joint, structure, loc, self)
            if self._may_have_structure:
                found, start = self._found_near(joint, loc)
        if found is not None and start is None and len(loc) >= FEWEST_TOLD:
            warn(
                f"AutoIAF found structure ({found}), but no start that has it: where it looked, "
                "the others had no mode given the globals, or touched each other elsewhere. Its "
                "flows are over all latents. Give structure=False to choose that without this "
                "warning."
            )
        return start

    def _found_near(
        self, joint: LogJoint, loc: Tensor
    ) -> tuple[Structure | None, StructuredTransform | None]:
        """The structure, and a start that has it also where it draws."""
        shapes, draws = [*self._unconstrained_shapes.values()], list[Tensor]()
        for _ in range(NUM_LOOKS):
            found = find_structure(joint, loc, shapes, draws)
            start = None if found is None else structured_start(joint, found, loc, self)
            if found is None or start is None:
                return found, None
            further = start.posterior().sample((NUM_DRAWS,))
            if has_all_edges(joint, found, further):
                return found, start
            draws.extend(further)
        return found, None

    def __repr__(self) -> str:
        found = self.structure
        return super().__repr__() if found is None else f"{super().__repr__()}\n  {found}"
