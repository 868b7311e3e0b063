"""One rank of a draft worker's engine, for test_draft_ranks: reads what to do as JSON, prints what the first rank found.

python draft_rank.py '{"model": ..., "rank": 0, "num_ranks": 2, "meeting": ...}'
"""

import json
import sys
from typing import Any

import numpy as np

from vllm_double.draft.engine.base import Batch, DraftEngine, Row
from vllm_double.draft.engine.ranks import Meeting
from vllm_double.draft.engine.vllm_engine import EngineConfig, VllmDraftEngine
from vllm_double.draft.frontier import FrontierLimits
from vllm_double.draft.worker import DraftWorker
from vllm_double.prefix_hash import mix, seed
from vllm_double.transport.inprocess import in_process_pair
from vllm_double.transport.messages import Admit, Nodes


def script(engine: DraftEngine) -> list[Any]:
    """Forwards of prompts in chunks, a fork of a tail page, and paths behind both."""
    text = [(7 * place) % 250 + 1 for place in range(70)]
    found = []

    def forward(*rows: Row) -> None:
        tokens, probs = engine.forward(Batch.of(rows), 5)
        found.append([tokens.tolist(), probs.tolist()])

    forward(Row([1, 2, 3], 0, text[:40], 1, 0.0), Row([4], 0, text[30:50], 0, 1.0))
    forward(Row([1, 2, 3], 40, text[40:], 3, 0.7))
    engine.copy_slots([(3, 5, 6)])
    forward(Row([1, 2, 3], 70, [9], 1, 0.0), Row([1, 2, 5], 70, [11, 12], 2, 0.0), Row([4], 20, [3], 1, 0.0))
    return found


def drafted(engine: DraftEngine) -> list[int]:
    """The most probable path that the drafting loop tells its target."""
    target, end = in_process_pair(capacity=1 << 20)
    worker = DraftWorker(engine, end, FrontierLimits(8, children_per_node=1, min_path_prob=1e-30))
    text = np.array([(7 * place) % 250 + 1 for place in range(40)], np.int32)
    target.send(Admit(1, base=40, tokens=text, temperature=0.0, max_length=90, stop_token_ids=(), tenant=""))
    for _ in range(30):
        worker.turn()
    reports = target.drain(1 << 20)
    records = [record for report in reports if isinstance(report, Nodes) for record in report.records]
    best = {int(record["prefix_hash"]): int(record["tokens"][0]) for record in records}
    path, prefix = [], seed(1)
    while prefix in best:
        path.append(best[prefix])
        prefix = mix(prefix, path[-1])
    return path


def main() -> None:
    settings = json.loads(sys.argv[1])
    meeting = Meeting(settings["meeting"], settings["rank"], settings["num_ranks"])
    config = EngineConfig(
        settings["model"], dtype="float32", page_size=32, num_pages=16, max_model_len=96,
        tensor_parallel_size=meeting.num_ranks, rank=meeting.rank, rendezvous=meeting.file,
    )  # fmt: skip
    engine: DraftEngine = VllmDraftEngine(config)
    if meeting.rank > 0:
        meeting.follow(engine).run(lambda: False)
        return
    if meeting.num_ranks > 1:
        engine = meeting.lead(engine)
    print("found " + json.dumps([script(engine), drafted(engine)]), flush=True)


if __name__ == "__main__":
    main()
