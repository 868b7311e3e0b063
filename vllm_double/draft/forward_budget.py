"""How many nodes one draft forward takes: what the draft's own forwards cost says it.

A forward of more rows foresees more outcomes, one of fewer rows is back sooner with the next token of each. A forward is mostly
fixed cost up to some number of rows, which depends on model and device: so many it takes.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence

from vllm_double.draft.engine.base import Batch, DraftEngine, Row

__all__ = ["MAX_NODES", "SIZES", "measured_nodes", "nodes_for"]

logger = logging.getLogger("vllm.double")  # in a draft worker vLLM's handlers write what the server's log repeats

MAX_NODES = 32
"""Beyond, an iteration's bookkeeping takes longer than a quick forward."""

SIZES = tuple(1 << power for power in range(MAX_NODES.bit_length()))
"""Nodes whose forwards are compared."""

_DEAREST = 1.5  # forwards of one row that a forward of many may cost
_REPEATS = 9


def nodes_for(seconds: Sequence[float]) -> int:
    """The most nodes whose forward costs little more than that of one. ``seconds``: of the first of SIZES, at least one."""
    return max(size for size, cost in zip(SIZES, seconds, strict=False) if cost <= _DEAREST * seconds[0])


def measured_nodes(engine: DraftEngine, num_children: int, clock: Callable[[], float] = time.perf_counter) -> int:
    """Time the engine's forwards, and say how many nodes one takes. Writes to its pages, which hold nothing yet.

    The quickest of several forwards counts, because whatever else runs on these cores only adds.
    """
    sizes = [size for size in SIZES if size <= engine.num_pages]
    rows = [Row([page], 0, [0], 1, 0.0) for page in range(sizes[-1])]  # a page each: two rows write no common slot
    batches = [Batch.of(rows[:size]) for size in sizes]
    quickest = [float("inf")] * len(sizes)
    for _ in range(_REPEATS):
        for index, batch in enumerate(batches):
            started = clock()
            engine.forward(batch, num_children)
            quickest[index] = min(quickest[index], clock() - started)
    nodes = nodes_for(quickest)
    curve = ", ".join(f"{size}: {1000 * cost:.2f}" for size, cost in zip(sizes, quickest, strict=True))
    logger.info("A draft forward takes %d nodes; milliseconds by nodes: %s.", nodes, curve)
    return nodes
