"""The draft worker of production, made up. vLLM comes first: its kernels cannot be registered once numba is imported."""

from __future__ import annotations

import gc
from dataclasses import replace
from typing import TYPE_CHECKING

from vllm_double.draft.engine.base import Batch, DraftEngine, Row
from vllm_double.draft.engine.ranks import Follower, Meeting
from vllm_double.draft.forward_budget import measured_nodes

if TYPE_CHECKING:
    from vllm_double.draft.worker import DraftWorker
    from vllm_double.hosting.settings import DraftSettings

__all__ = ["build"]


def build(settings: DraftSettings, address: str, rank: int, rendezvous: str) -> DraftWorker | Follower:
    """The production worker: vLLM's draft engine on one end of the shared memory; of several ranks the first one's.

    address: of the target's channel. rendezvous: path in the runtime folder, new for each start.
    """
    from vllm_double.draft.engine.vllm_engine import VllmDraftEngine

    assert settings.engine is not None, "a draft worker needs a draft model"
    meeting = Meeting(rendezvous, rank, settings.num_ranks)
    engine: DraftEngine = VllmDraftEngine(
        replace(settings.engine, tensor_parallel_size=settings.num_ranks, rank=rank, rendezvous=meeting.file)
    )
    if meeting.rank > 0:
        return meeting.follow(engine)
    if meeting.num_ranks > 1:
        engine = meeting.lead(engine)
    # The first forwards import, compile and allocate for seconds; page 0 belongs to nobody.
    engine.forward(Batch.of([Row([0], 0, [0], 1, 0.0), Row([1], 0, [0], 1, 1.0, noise_scale=1.0, top_p=0.9)]), 1)

    double = settings.double
    num_nodes = double.nodes_per_iteration
    if num_nodes is None:
        num_nodes = measured_nodes(engine, min(double.children_per_node, engine.vocab_size))

    from vllm_double.draft.frontier import FrontierLimits
    from vllm_double.draft.worker import DraftWorker
    from vllm_double.retrieval import known_noise
    from vllm_double.retrieval.sources import Sources
    from vllm_double.transport.shared import SharedDraftChannel

    sources = Sources.of(double, settings.datastores) if double.draft_retrieval else Sources(context=False)
    retrievers = sources.open_again()
    known_noise.warm_up()
    channel = SharedDraftChannel.attach(address)
    gc.collect()
    gc.freeze()  # a collection need not look through all that was imported and loaded
    limits = FrontierLimits(
        settings.num_speculative_tokens,
        nodes_per_iteration=num_nodes,
        children_per_node=double.children_per_node,
        prefill_tokens=double.prefill_tokens,
        min_path_prob=double.min_path_prob,
    )
    return DraftWorker(engine, channel, limits, retrievers=retrievers, prefix_caching=settings.prefix_caching)
