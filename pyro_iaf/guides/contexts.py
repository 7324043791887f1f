"""What the rows of plates listen to: encoded data, or a table of their own."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

__all__ = ["TABLE_WIDTH", "Contexts", "Encoders", "make_gradients_sparse"]

# Contexts by the plates of a group: those that are there before the plates are.
Contexts = Mapping[tuple[str, ...], Tensor]
TABLE_WIDTH = 8
_made_sparse: Any = WeakIdKeyDictionary()  # parameters, and whose they are


class Encoders(nn.Module):
    """Encoders by the names of their plates, modules and functions."""

    def __init__(self, encoders: Mapping[str, Any]) -> None:
        super().__init__()
        modules = {k: e for k, e in encoders.items() if isinstance(e, nn.Module)}
        self.functions = {k: e for k, e in encoders.items() if k not in modules}
        # By number, since names of plates may be no names of modules.
        self.places = {name: k for k, name in enumerate(modules)}
        self.parts = nn.ModuleList(modules.values())

    def of_plates(self, name: str) -> Any:
        """The encoder for a group of plates, if there is one."""
        place = self.places.get(name)
        return self.functions.get(name) if place is None else self.parts[place]


def make_gradients_sparse(param: Tensor, guide: Any) -> None:
    """Gives a parameter's gradients the form that ``SparseAdam`` wants, while its guide does."""
    if param not in _made_sparse:
        param.register_post_accumulate_grad_hook(_make_sparse)
    _made_sparse[param] = weakref.ref(guide)


def _make_sparse(param: Tensor) -> None:
    guide = _made_sparse[param]() if param in _made_sparse else None
    is_wanted = guide is not None and guide.embedding_grad == "sparse" and not guide.rows_alone
    if is_wanted and param.grad is not None and not param.grad.is_sparse:
        param.grad = param.grad.to_sparse()
