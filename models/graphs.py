"""CUDA graphs of a computation on tensors, one for each shape of its inputs: a thousand launches become one.

    graphs = Graphs(session)          session(*inputs): a context manager that gives a function without arguments
    outputs = graphs(*inputs)         that function's outputs for these inputs

A graph repeats the launches it has seen, with the memory and the scalars they had. So it is captured on buffers into
which every call copies its inputs, and whatever changes from call to call has to be an input: the ES step too, as
int64 [1]. What a session does before it gives the function is not part of the graph and must not depend on values.

A shape is computed as it is the first time it is seen, and captured the second time, because many come once.
"""

from collections import OrderedDict
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch

from esengine.base.errors import RenderError
from esengine.models.loading import first_line

LIMIT = 16
"""Shapes that are kept, each with its outputs and buffers: a step has two or three, at each length of text."""

TEXT_MULTIPLE = 8
"""Tokens that text is padded to a multiple of, since each length is a shape. The mask keeps the result as it is."""

Compute = Callable[[], Any]
Session = Callable[..., AbstractContextManager[Compute]]


@dataclass(frozen=True)
class Recorded:
    """A captured computation: `replay` runs it on `buffers` and leaves its results in `outputs`."""

    buffers: tuple[torch.Tensor, ...]
    outputs: Any
    replay: Callable[[], None]
    pool: Any


class Graphs:
    """One computation, replayed. The graphs share one memory pool and must not run at the same time.

    All are captured on one stream, since the allocator gives a freed block of a pool to the stream it was of alone.

    Args:
        session: Called with the inputs of a call, or with buffers of their shapes.
        limit: Shapes to keep; the one that was not used for longest goes first.
    """

    def __init__(self, session: Session, *, limit: int = LIMIT):
        if limit < 1:
            raise ValueError(f"limit: expected at least 1, got {limit}")
        self.session, self.limit = session, limit
        self._shapes: OrderedDict[tuple, Recorded | None] = OrderedDict()  # None: seen once
        self._stream: Any = None

    @property
    def captured(self) -> int:
        """How many graphs there are."""
        return sum(recorded is not None for recorded in self._shapes.values())

    @torch.no_grad()
    def __call__(self, *inputs: torch.Tensor) -> Any:
        """The outputs for `inputs`. They are overwritten by the next call: use them on this stream, or copy them.

        Raises:
            RenderError: The computation cannot be captured.
            torch.OutOfMemoryError: There is no room for it.
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
        # a handle of a live graph: a pool that nobody uses any more cannot be taken up again
        pool = next((recorded.pool for recorded in self._shapes.values() if recorded is not None), None)
        buffers = tuple(torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in inputs)
        for buffer, tensor in zip(buffers, inputs, strict=True):
            buffer.copy_(tensor)
        try:
            with self.session(*buffers) as compute:
                if self._stream is None:
                    self._stream = side_stream(buffers[0].device)
                outputs, replay, pool = record(compute, pool, self._stream)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise RenderError(
                f"no CUDA graph could be captured ({first_line(error)}): render without, graphs never, decode eager"
            ) from error
        return Recorded(buffers, outputs, replay, pool)


class Places:
    """Where a module's tensors lie: as long as it holds, what was captured of the module is right.

    The tree of modules is walked once. A look later goes through the dicts found then, in which tensors that are moved,
    cast or exchanged show, and modules that are exchanged.
    """

    def __init__(self, module: torch.nn.Module):
        modules = list(module.modules())
        self._children = [each._modules for each in modules if each._modules]
        self._tensors = [kind for each in modules for kind in (each._parameters, each._buffers)]
        self._seen = self._look()

    def hold(self) -> bool:
        """Whether all is where it was when this was made, of the dtype that it had."""
        return self._look() == self._seen

    def _look(self) -> tuple[list, list]:
        tensors = [(t.data_ptr(), t.dtype) for kind in self._tensors for t in kind.values() if t is not None]
        return [child for each in self._children for child in each.values()], tensors


def supported(device: torch.device) -> bool:
    """Whether there are graphs, and streams, on a device."""
    return device.type == "cuda"


def side_stream(device: torch.device) -> torch.cuda.Stream:
    """A stream to keep: memory that was used on it serves no other, so each new one would take its own."""
    return torch.cuda.Stream(device)


def record(compute: Compute, pool: Any, stream: torch.cuda.Stream) -> tuple[Any, Callable[[], None], Any]:
    """Captures `compute`, after one run that compiles what it launches.

    Args:
        compute: Without arguments; it must not wait for the device.
        pool: Of a graph to share memory with, or None.
        stream: To run and capture it on, other than the current one, which waits for the run.

    Returns:
        What `compute` gave, which a replay overwrites; the replay; the graph's pool.
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
