"""CUDA graphs of whole steps, so that a step costs the host one launch."""

import torch

from common.runtime import console
from sample.step import Step

SEEN = 256  # the reach of the blocks is rounded up to a multiple of this


class Graphs:
    """A graph for each shape of a step: rows in use, rounded up to a power of two, and how far their blocks reach.

    A step reads and writes only memory that stays where it is (weights, slots, cache), so that a graph stays valid
    until that memory is given back.
    """

    def __init__(self) -> None:
        self.usable = True  # until a step cannot be recorded
        self.forget()

    def forget(self) -> None:
        """Drop all graphs: the memory they speak of goes away."""
        self.met: set[tuple] = set()  # shapes that have been run once
        self.graphs: dict[tuple, torch.cuda.CUDAGraph] = {}
        self.steps: dict[tuple, Step] = {}  # kept because graphs read their tensors
        self.pool: tuple[int, int] | None = None

    def run(self, step: Step, rows: int, seen: int) -> None:
        """The step, by its graph; the first one of a shape is run plainly, and the second recorded."""
        limit = step.cache.width if step.cache is not None else step.slots.tokens.shape[1]
        rows = min(1 << (rows - 1).bit_length(), len(step.slots.finished))
        seen = min(-(-seen // SEEN) * SEEN, limit)
        shape = (rows, seen, limit, *step.variant)
        if shape in self.met and shape not in self.graphs and self.usable:
            self.record(shape, step, rows, seen)
        if shape in self.graphs and self.usable:
            self.graphs[shape].replay()
            return
        step(rows, seen)
        if not (step.network.full_attention and step.settings.use_cache):  # a prefix cache sorts its rows on the host
            self.met.add(shape)

    def record(self, shape: tuple, step: Step, rows: int, seen: int) -> None:
        """Keep the graph of a step, which is not carried out. Where it cannot be recorded, nothing is any more."""
        self.pool = self.pool or torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=self.pool):
                step(rows, seen)
        except RuntimeError as error:
            self.usable = False
            console.print(f"steps are launched one kernel at a time: no CUDA graph ({str(error).splitlines()[0]})")
            return
        self.graphs[shape], self.steps[shape] = graph, step
