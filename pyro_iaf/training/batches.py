"""The arguments of each step: always the same, minibatches, or simulated data."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from numbers import Number
from typing import Any

import numpy as np
import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.utils.data import DataLoader

from ..models.arguments import (
    Args,
    Batch,
    Kwargs,
    Program,
    batch_of,
    flatten_tensors,
    signature_error,
)
from ..models.traces import quietly

__all__ = ["Batches", "odd_data", "simulated"]

# In place of a minibatch at the end of the data.
END = object()


class Batches:
    """An endless sequence of arguments for a model, which a checkpoint can resume.

    Args:
        model: A model.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        data: Minibatches instead of ``args``, iterated over again and again.
        simulate: Names of the sites to simulate, by keyword argument.
    """

    def __init__(
        self,
        model: Program,
        args: Args,
        kwargs: Kwargs,
        data: Iterable[Any] | None,
        simulate: Sequence[str] | Mapping[str, str] | None,
    ) -> None:
        if isinstance(data, Tensor | np.ndarray):
            what = "a tensor" if isinstance(data, Tensor) else "an array"
            raise ValueError(
                f"data should be an iterable of minibatches; each row of {what} would be one. Give "
                "args=(tensor,) for all of it at every step, or a DataLoader."
            )
        if isinstance(data, Mapping):
            raise ValueError(
                "data should be an iterable of minibatches; each key of a dict would be one. Give "
                "kwargs={...} for all of it at every step, or data=[{...}, {...}]."
            )
        if data is not None and args:
            raise ValueError("Give args or data, not both: data holds the model's arguments.")
        if data is not None and (isinstance(data, str | bytes) or not isinstance(data, Iterable)):
            raise ValueError(
                f"data should be an iterable of minibatches; got {data!r}. A data set becomes one "
                "by DataLoader(data, batch_size=...)."
            )
        if isinstance(simulate, str):
            simulate = [simulate]
        names = {} if simulate is None else simulate
        if not isinstance(names, Mapping | Sequence):
            raise ValueError(
                f"simulate should be names of sites, or a dict from arguments to sites; got "
                f"{simulate!r}."
            )
        self.simulate = dict(names) if isinstance(names, Mapping) else {n: n for n in names}
        self.model, self.args, self.kwargs, self.data = model, args, kwargs, data
        self._iterator: Iterator[Any] = iter(())
        self._before: list[Tensor] = []  # the generators' states at the start of this epoch
        self._taken = 0  # minibatches of this epoch

    @property
    def change(self) -> bool:
        """Whether arguments change from step to step."""
        return self.data is not None or bool(self.simulate)

    def next(self) -> Batch:
        """The arguments of the next step."""
        args, kwargs = self.args, self.kwargs
        if self.data is not None:
            args, kwargs = self._from_data(self.data)
        if self.simulate:
            kwargs = {**kwargs, **simulated(self.model, args, kwargs, self.simulate)}
        return args, kwargs

    def check(self, args: Args, kwargs: Kwargs) -> None:
        """Checks the first batch.

        Raises:
            TypeError: If the model doesn't take these arguments.
            ValueError: If tensors among them allow no gradient.
        """
        if why := signature_error(self.model, args, kwargs):
            raise TypeError(
                f"{why} Each minibatch of data should be a tuple of its arguments, a dict of them, "
                "or the one argument; simulate= adds the arguments that it names."
            )
        if any(tensor.is_inference() for tensor in flatten_tensors(args, kwargs)[0]):
            raise ValueError(
                "fit needs gradients, but the model's arguments contain tensors that were made "
                "within torch.inference_mode(), which allow none. Make them outside, or give "
                "copies by tensor.clone()."
            )

    def without_simulated(self, args: Args, kwargs: Kwargs) -> Batch:
        """A batch without its simulated arguments."""
        return args, {name: value for name, value in kwargs.items() if name not in self.simulate}

    def _from_data(self, data: Iterable[Any]) -> Batch:
        item = next(self._iterator, END)
        if item is END:
            self._before = self.generators()
            self._iterator, self._taken = iter(data), 0
            item = next(self._iterator, END)
        if item is END:
            raise ValueError(
                "data has no more minibatches, and can't be iterated over again. Give a list, "
                "a DataLoader, or an iterator with at least num_steps minibatches."
            )
        if item is None or isinstance(item, str | bytes):
            raise ValueError(
                "data should give minibatches, each a tuple of the model's arguments, a dict of "
                f"them, or the one argument; got {item!r}."
            )
        self._taken += 1
        return batch_of(item, self.kwargs)

    @property
    def can_repeat(self) -> bool:
        """Whether all minibatches can be had beside those of the steps."""
        data = self.data
        is_alone = getattr(data, "persistent_workers", False)  # which serve one iterator at a time
        if data is None or self.simulate or is_alone or isinstance(data, Iterator):
            return False
        return isinstance(data, DataLoader) or iter(data) is not iter(data)

    def epoch(self, anew: bool = False) -> Iterator[Batch]:
        """All minibatches once, without a change of any generator.

        Args:
            anew: Whether in another order than that of the next epoch, if that is random.
        """
        assert self.data is not None
        ours = self.generators()
        for generator in self._generators() if anew else ():
            generator.manual_seed(1 + generator.initial_seed())
        theirs, iterator = self.generators(), None
        self.set_generators(ours)
        while True:
            ours = self.generators()
            self.set_generators(theirs)
            try:
                iterator = iter(self.data) if iterator is None else iterator
                item = next(iterator, END)
            finally:
                theirs = self.generators()
                self.set_generators(ours)
            if item is END:
                return
            yield batch_of(item, self.kwargs)

    def _generators(self) -> list[torch.Generator]:
        things = [self.data, *(getattr(self.data, a, None) for a in ("sampler", "batch_sampler"))]
        things.append(getattr(things[-1], "sampler", None))
        own = {id(g): g for t in things if (g := getattr(t, "generator", None)) is not None}
        return [torch.default_generator, *own.values()]

    def generators(self) -> list[Tensor]:
        """The states of PyTorch's generator and of those of ``data`` and its samplers."""
        return [generator.get_state() for generator in self._generators()]

    def set_generators(self, states: Sequence[Tensor]) -> None:
        """Sets the generators to these states."""
        for generator, state in zip(self._generators(), states, strict=False):
            generator.set_state(state)

    def state(self) -> dict[str, Any]:
        """The position in ``data``, for :meth:`restore`."""
        return {"before": self._before, "taken": self._taken}

    def restore(self, state: dict[str, Any]) -> None:
        """Goes to a position in ``data``; changes the state of PyTorch's generator."""
        if self.data is None or not state["before"]:
            return
        again = iter(self.data)
        done = self._taken if again is self._iterator else 0
        self.set_generators(state["before"])
        self._iterator = again if again is self._iterator else iter(self.data)
        self._before, self._taken = state["before"], state["taken"]
        for _ in range(self._taken - done):
            if next(self._iterator, None) is None:
                raise ValueError(
                    f"The checkpoint was written after {self._taken} minibatches of data, but data "
                    "now has fewer. Give the same data, or another path to begin anew."
                )


class _OddData(Messenger):
    """Finds observed values that are neither tensors nor numbers, or complex."""

    found = ""

    def _pyro_sample(self, msg: Any) -> None:
        value = msg["value"]
        if not msg["is_observed"] or self.found:
            return
        if not isinstance(value, Tensor | Number):
            self.found = (
                f"The data of site '{msg['name']}' should be a tensor or a number; got a "
                f"{type(value).__name__}, {value!r:.80}. torch.as_tensor(...) makes tensors "
                "of arrays and lists of numbers; encode words as numbers."
            )
        elif torch.as_tensor(value).is_complex() and not _has_real_density(msg["fn"], value):
            self.found = (
                f"The data of site '{msg['name']}' should be real; got complex numbers. "
                "torch.view_as_real(...) makes two real numbers of each."
            )


def _has_real_density(fn: Any, value: Any) -> bool:
    """Whether a distribution takes complex values, as that of ``pyro.deterministic`` does."""
    with suppress(Exception):
        return not fn.log_prob(value).is_complex()
    return False


@torch.no_grad()
def odd_data(model: Program, args: Args, kwargs: Kwargs) -> str:
    """A message about the first invalid data of a model, or ""; keeps the generators' states."""
    odd = _OddData()
    with torch.random.fork_rng([]), poutine.block(), odd, suppress(Exception), quietly():
        model(*args, **kwargs)
    return odd.found


@torch.no_grad()
def simulated(
    model: Program, args: Args, kwargs: Kwargs, simulate: Mapping[str, str]
) -> dict[str, Any]:
    """One draw of sites from the model's prior, by keyword argument."""
    with poutine.block():
        trace = poutine.trace(model).get_trace(*args, **kwargs)
    for keyword, name in simulate.items():
        site = trace.nodes.get(name, {"type": "missing"})
        if site["type"] != "sample" or site["is_observed"]:
            what = "is observed" if site["type"] == "sample" else "is no sample site of the model"
            raise ValueError(
                f"simulate should draw {keyword!r} from site '{name}', but that {what}. "
                f"The model should sample it when run without data: leave {keyword!r} out of the "
                "arguments, and give it the default None in the model."
            )
    return {keyword: trace.nodes[name]["value"] for keyword, name in simulate.items()}
