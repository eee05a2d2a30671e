"""CUDA graphs of a computation on tensors, one for each shape of its inputs. One graph launch replaces thousands.

    graphs = Graphs(session)          session(*inputs): a context manager that yields a function without arguments
    outputs = graphs(*inputs)         that function's outputs for these inputs

A graph repeats its captured launches with the same memory and the same scalars. So it is captured on buffers, and
every call copies its inputs into them. Everything that changes between calls must be an input, such as the ES step as
int64 [1]. Work that a session does before it yields is not part of the graph and must not depend on values.

A shape is computed without a graph the first time and captured the second time, because many shapes come only once.
"""

from collections import OrderedDict
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch

from esengine.base.errors import RenderError
from esengine.base.memory import out_of_memory
from esengine.models.loading import first_line

LIMIT = 16
"""Maximum number of shapes to keep, with their outputs and buffers. A step has two or three for each text length."""

TEXT_MULTIPLE = 8
"""Text is padded to a multiple of this many tokens, so that there are fewer shapes. The mask excludes the padding."""

Compute = Callable[[], Any]
Session = Callable[..., AbstractContextManager[Compute]]


@dataclass(frozen=True)
class Recorded:
    """A captured computation: `replay` runs it on `buffers` and writes the results into `outputs`."""

    buffers: tuple[torch.Tensor, ...]
    outputs: Any
    replay: Callable[[], None]
    pool: Any


class Graphs:
    """The graphs of one computation. They share one memory pool and must not run at the same time.

    All are captured on one stream, because the allocator reuses a freed block of a pool only on the block's stream.

    Args:
        session: Called with the inputs of a call, or with buffers of their shapes.
        limit: Maximum number of shapes to keep. The least recently used one is dropped first.
    """

    def __init__(self, session: Session, *, limit: int = LIMIT):
        if limit < 1:
            raise ValueError(f"limit: expected at least 1, got {limit}")
        self.session, self.limit = session, limit
        self._shapes: OrderedDict[tuple, Recorded | None] = OrderedDict()  # None: seen once
        self._stream: Any = None

    @property
    def captured(self) -> int:
        """Number of captured graphs."""
        return sum(recorded is not None for recorded in self._shapes.values())

    @torch.no_grad()
    def __call__(self, *inputs: torch.Tensor) -> Any:
        """The outputs for `inputs`. The next call overwrites them: use them on this stream, or copy them.

        Raises:
            RenderError: The computation cannot be captured.
            torch.OutOfMemoryError: It does not fit into memory.
        """
        key = tuple((tensor.shape, tensor.dtype, tensor.device) for tensor in inputs)
        if key not in self._shapes:
            self._make_room()
            self._shapes[key] = None
            with self.session(*inputs) as compute:
                return compute()
        self._shapes.move_to_end(key)
        if self._shapes[key] is None:
            self._shapes[key] = self._capture(inputs)
        recorded = self._shapes[key]
        for buffer, tensor in zip(recorded.buffers, inputs, strict=True):
            buffer.copy_(tensor, non_blocking=True)
        recorded.replay()
        return recorded.outputs

    def _make_room(self) -> None:
        while len(self._shapes) >= self.limit:
            self._shapes.popitem(last=False)

    @torch.inference_mode(False)
    @torch.no_grad()
    def _capture(self, inputs: tuple[torch.Tensor, ...]) -> Recorded:
        # the pool of an existing graph: a pool without a graph cannot be used again
        pool = next((recorded.pool for recorded in self._shapes.values() if recorded is not None), None)
        buffers = tuple(torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in inputs)
        for buffer, tensor in zip(buffers, inputs, strict=True):
            buffer.copy_(tensor)
        try:
            with self.session(*buffers) as compute:
                if self._stream is None:
                    self._stream = side_stream(buffers[0].device)
                outputs, replay, pool = record(compute, pool, self._stream)
        except RuntimeError as error:
            if out_of_memory(error):
                raise
            raise RenderError(
                f"no CUDA graph could be captured ({first_line(error)}): render without, graphs never, decode eager"
            ) from error
        return Recorded(buffers, outputs, replay, pool)


class Addresses:
    """The memory addresses of a module's tensors. Graphs captured from the module are valid while `unchanged` is true.

    The tree of modules is walked once, and its dicts of tensors and submodules are stored. `unchanged` reads these
    dicts. So it notices tensors that were moved, cast or replaced, and submodules that were replaced.
    """

    def __init__(self, module: torch.nn.Module):
        modules = list(module.modules())
        self._children = [each._modules for each in modules if each._modules]
        self._tensors = [kind for each in modules for kind in (each._parameters, each._buffers)]
        self._first = self._read()

    def unchanged(self) -> bool:
        """Whether all tensors have the same addresses and dtypes, and all submodules are the same, as at the start."""
        return self._read() == self._first

    def _read(self) -> tuple[list, list]:
        tensors = [(t.data_ptr(), t.dtype) for kind in self._tensors for t in kind.values() if t is not None]
        return [child for each in self._children for child in each.values()], tensors


def supported(device: torch.device) -> bool:
    """Whether a device has CUDA graphs and streams."""
    return device.type == "cuda"


def side_stream(device: torch.device) -> torch.cuda.Stream:
    """A new stream. Keep and reuse it: memory allocated on it is reused by no other stream."""
    return torch.cuda.Stream(device)


def record(compute: Compute, pool: Any, stream: torch.cuda.Stream) -> tuple[Any, Callable[[], None], Any]:
    """Capture `compute` as a graph, after one run that compiles its kernels.

    Args:
        compute: A function without arguments. It must not wait for the device.
        pool: The pool of a graph to share memory with, or None.
        stream: The stream to run and capture on. It must not be the current stream, which waits for the run.

    Returns:
        The outputs of `compute`, which a replay overwrites; the replay function; the graph's pool.
    """
    with torch.cuda.device(stream.device):
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            compute()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            outputs = compute()
    return outputs, graph.replay, graph.pool()
