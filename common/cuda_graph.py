"""What makes an update fast on CUDA: the whole of it as one graph, and work on a second stream."""

import weakref
from collections.abc import Callable

import torch
from torch.utils import _pytree as pytree


class SideStream:
    """`with side:` puts work on a second CUDA stream, beside what the current one does from here on; `join` waits for
    it. Small kernels leave most of a card idle, so two passes that do not need each other take little more than one.
    On another device the work is done in its place.
    """

    def __init__(self, device: torch.device):
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.context = None  # of the work that has not been joined

    def __enter__(self) -> None:
        if self.stream:
            self.stream.wait_stream(torch.cuda.current_stream())
            self.context = torch.cuda.stream(self.stream)
            self.context.__enter__()

    def __exit__(self, *error) -> None:
        if self.stream:
            self.context.__exit__(*error)

    def join(self) -> None:
        """What comes next on the current stream may read what the side wrote, and free what it read. Nothing to wait
        for is allowed: a stream that a capture has not forked must not be waited for in it."""
        if self.context:
            torch.cuda.current_stream().wait_stream(self.stream)
            self.context = None


class CaptureError(RuntimeError):
    """CUDA refused to capture an update; the process cannot go on on this device."""


class CudaGraph:
    """A CUDA graph of `fn(batch, variant) -> tensors` for each variant, replayed on new batches.

    The first calls run eagerly (they are real updates; libraries make their workspaces in them, and the compiler its
    code), the next one captures. All of them read the batch from the same place, in the same layout: code that was
    compiled for another would be compiled again, which a capture cannot bear. A batch that another graph wrote is read
    where it lies, any other is copied. What comes back is overwritten by the next replay.

    A capture that CUDA refuses leaves its stream and the generator broken, so there is no way back to eager updates in
    the same process: CaptureError says how to start without graphs.
    """

    WARMUP = 3

    def __init__(self, fn: Callable, generators: tuple[torch.Generator, ...] = ()):
        """generators: what fn draws from, beside the device's own."""
        self.fn, self.generators = fn, generators
        self.calls: dict = {}
        self.graphs: dict = {}
        self.inputs = None
        self.stream = self.pool = None  # one of each, whatever the number of graphs and of calls before them

    def __call__(self, batch, variant):
        self.calls[variant] = self.calls.get(variant, 0) + 1
        if self.inputs is None:
            self.inputs = pytree.tree_map(torch.empty_like, batch)
        if not self.graphs and is_drawn_by_a_graph(batch):
            self.inputs = batch
        if batch is not self.inputs and pytree.tree_leaves(batch):
            torch._foreach_copy_(pytree.tree_leaves(self.inputs), pytree.tree_leaves(batch))
        if self.calls[variant] <= self.WARMUP:
            return self.run_on_side_stream(self.inputs, variant)
        if variant not in self.graphs:
            self.capture(variant)
        graph, out = self.graphs[variant]
        graph.replay()
        return out

    def run_on_side_stream(self, batch, variant):
        """Run on a side stream, as capture wants of the calls before it."""
        if self.stream is None:
            self.stream = torch.cuda.Stream()
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            out = self.fn(batch, variant)
        torch.cuda.current_stream().wait_stream(self.stream)
        return out

    def capture(self, variant) -> None:
        graph = torch.cuda.CUDAGraph()
        for generator in self.generators:
            graph.register_generator_state(generator)
        self.pool = self.pool or torch.cuda.graph_pool_handle()
        try:
            with torch.cuda.graph(graph, pool=self.pool, stream=self.stream):
                out = self.fn(self.inputs, variant)
        except RuntimeError as error:  # what CUDA raises when something in the update cannot be captured
            cause = error
            while cause.__context__:  # the end of a capture that has failed raises an error of its own
                cause = cause.__context__
            raise CaptureError(
                f"CUDA cannot capture this update ({str(cause).splitlines()[0]}): start again with --no_cuda_graphs"
            ) from error
        self.graphs[variant] = graph, out


SAMPLERS: weakref.WeakSet = weakref.WeakSet()  # the graphs that draw batches


def is_drawn_by_a_graph(batch) -> bool:
    return any(batch is out for sampler in SAMPLERS for _, out in sampler.graphs.values())


def draw_by_graph(sampler) -> None:
    """From here on `sampler.sample(b)` is one launch on CUDA, and an update's graph reads the batch where it lies.

    A batch is overwritten by the next one. sampler: with a `generator`, the only one that `sample` draws from.
    """
    if sampler.generator.device.type != "cuda":
        return
    sample = sampler.sample
    # contiguous, as are the copies that a first update reads: one layout from the first update on
    graph = CudaGraph(lambda _, b: pytree.tree_map(torch.Tensor.contiguous, sample(b)), (sampler.generator,))
    SAMPLERS.add(graph)
    sampler.sample = lambda b: graph((), b)
