"""CUDA graphs on a CPU: a capture computes nothing, a replay runs its kernels on the same tensors.

What makes a graph fail is kept. A replay runs no Python but the recorded operators. What they
make lies in memory that all graphs share, so each replay spoils what the others left there. And
nothing that a capture writes into tensors from outside is there after it.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten
from transformers.generation.continuous_batching import initialization, model_runner


def _tensors(*values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_flatten(values)[0] if isinstance(leaf, Tensor)]


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


@dataclass
class FakeGraph:
    """One recording."""

    pool: "FakeGraphs"
    operators: list[Callable[[], None]] = field(default_factory=list)
    made: list[Tensor] = field(default_factory=list)

    def replay(self) -> None:
        """Run the operators again, on the tensors they were recorded with."""
        self.pool.replays += 1
        self.pool.spoil()
        for operator in self.operators:
            operator()


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Runs operators and keeps them."""

    def __init__(self, graph: FakeGraph) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._graph = graph
        self._inside: set[int] = set()
        self.before: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        inputs = _tensors(args, kwargs)
        if func._schema.is_mutable:
            for tensor in inputs:
                if _address(tensor) not in {*self._inside, *self.before}:
                    whole = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
                    self.before[_address(tensor)] = whole, whole.clone()
        result = func(*args, **kwargs)
        outputs = _tensors(result)
        known = {_address(tensor) for tensor in inputs}
        fresh = [(i, t) for i, t in enumerate(outputs) if _address(t) not in known]
        self._graph.made += [tensor for _, tensor in fresh]
        self._inside |= {_address(tensor) for _, tensor in fresh}

        def again() -> None:
            values = _tensors(func(*args, **kwargs))
            for i, tensor in fresh:
                tensor.copy_(values[i])

        self._graph.operators.append(again)
        return result


@dataclass
class FakeGraphs:
    """What stands in for CUDA.

    Attributes:
        captures: Graphs made.
        replays: Replays of any of them.
        fault: Raised by a capture that gets so far as its end.
    """

    captures: list[FakeGraph] = field(default_factory=list)
    replays: int = 0
    fault: Exception | None = None

    def make(self) -> FakeGraph:
        """As ``torch.cuda.CUDAGraph()``."""
        return FakeGraph(self)

    def spoil(self) -> None:
        """Overwrite what every graph has made."""
        for graph in self.captures:
            for tensor in graph.made:
                if tensor.is_floating_point():
                    tensor.fill_(torch.nan)

    @contextmanager
    def capture(self, graph: FakeGraph, *, stream: Any, pool: Any) -> Iterator[None]:
        """As ``torch.cuda.graph()``."""
        assert (stream, pool) == (None, "pool")
        recorder = _Recorder(graph)
        with recorder:
            yield
        for whole, before in recorder.before.values():
            whole.copy_(before)
        if self.fault is not None:
            raise self.fault
        self.captures.append(graph)
        self.spoil()


def install(monkeypatch: pytest.MonkeyPatch) -> FakeGraphs:
    """Let transformers find graphs on this machine."""
    fake = FakeGraphs()
    monkeypatch.setattr(initialization, "get_accelerator_graph_name", lambda: "FakeGraph")
    for name, value in {
        "get_memory_pools": lambda: ("memory", "pool"),
        "memory_pool_context": lambda _: nullcontext(),
        "create_accelerator_graph": fake.make,
        "accelerator_graph_capture_context": fake.capture,
    }.items():
        monkeypatch.setattr(model_runner, name, value)
    return fake
