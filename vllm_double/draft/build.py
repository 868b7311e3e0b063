"""The draft worker of production, made up. vLLM comes first: its kernels cannot be registered once numba is imported."""

from __future__ import annotations

import gc
import logging
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from vllm_double.draft.engine.base import Batch, DraftEngine, Row
from vllm_double.draft.engine.ranks import Follower, Meeting
from vllm_double.draft.forward_budget import measured_nodes

if TYPE_CHECKING:
    from vllm_double.draft.worker import DraftWorker

__all__ = ["build"]

logger = logging.getLogger(__name__)


def build(settings: dict[str, Any]) -> DraftWorker | Follower:
    """The production worker: vLLM's draft engine at one end of the shared logs; of several ranks the first one's.

    settings: ``engine`` (fields of EngineConfig), ``limits`` (fields of FrontierLimits; ``nodes_per_iteration`` None: as
    measured), ``retrieval`` (fields of Sources), ``prefix_caching``, ``address`` of the logs; ``rank``, and ``meeting``: path
    in the runtime folder, new for each start.
    """
    from vllm_double.draft.engine.vllm_engine import EngineConfig, VllmDraftEngine

    meeting = Meeting(settings["meeting"], settings["rank"], settings["engine"].get("tensor_parallel_size", 1))
    engine: DraftEngine = VllmDraftEngine(EngineConfig(**settings["engine"], rank=meeting.rank, rendezvous=meeting.file))
    if meeting.rank > 0:
        return meeting.follow(engine)
    if meeting.num_ranks > 1:
        engine = meeting.lead(engine)
    # The first forwards import, compile and allocate for seconds; page 0 belongs to nobody.
    engine.forward(Batch.of([Row([0], 0, [0], 1, 0.0), Row([1], 0, [0], 1, 1.0, noise_scale=1.0, top_p=0.9)]), 1)

    limits = dict(settings["limits"])
    if limits["nodes_per_iteration"] is None:
        limits["nodes_per_iteration"] = measured_nodes(engine, min(limits["children_per_node"], engine.vocab_size))

    from vllm_double.draft.frontier import FrontierLimits
    from vllm_double.draft.worker import DraftWorker
    from vllm_double.retrieval.datastore import DatastoreError
    from vllm_double.retrieval.sources import Sources
    from vllm_double.transport.shared import SharedWorkerEnd

    sources = Sources(**settings["retrieval"])
    try:
        retrievers = sources.open()
    except DatastoreError as error:  # it was there when the target started
        logger.warning("%s The draft goes on without it.", error)
        retrievers = replace(sources, datastores=()).open()
    end = SharedWorkerEnd.attach(settings["address"])
    gc.collect()
    gc.freeze()  # a collection need not look through all that was imported and loaded
    return DraftWorker(engine, end, FrontierLimits(**limits), retrievers=retrievers, prefix_caching=settings["prefix_caching"])
