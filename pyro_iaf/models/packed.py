"""Log densities at all values of discrete latents, packed as Pyro's contractions take them."""

from __future__ import annotations

from typing import Any, NamedTuple

__all__ = ["Table"]


class Table(NamedTuple):
    """The log density of a site at all values of discrete latents.

    Attributes:
        name: The site's name.
        log_prob: A packed tensor of Pyro's.
        plates: The site's plates and the particles, by symbols.
        latents: The names of the discrete latents of its other dimensions, by symbols.
        scale: The site's scale.
    """

    name: str
    log_prob: Any
    plates: dict[str, Any]
    latents: dict[str, str]
    scale: Any

    @property
    def dims(self) -> set[str]:
        """The symbols of its dimensions that are no plates."""
        return set(self.log_prob._pyro_dims) - self.plates.keys()

    def check_plates(self, owner: Table) -> None:
        """Raises a ValueError unless the site is in the plates of a latent that it depends on."""
        lacking = owner.plates.keys() - self.plates.keys()
        if missing := [owner.plates[s].name for s in lacking if owner.plates[s].size > 1]:
            raise ValueError(
                f"What depends on a discrete latent should be in its plates, since it is summed "
                f"out row by row; site '{self.name}' depends on '{owner.name}' and is not in plate "
                f"{', '.join(map(repr, missing))}. Use one pyro.plate object or name for both, or "
                "sum the latent out by hand."
            )
