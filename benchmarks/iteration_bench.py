"""What one iteration of the drafting loop costs without its forward: commands, select, expand, publish, by real logs.

    python -m benchmarks.iteration_bench

Rows of results/iteration.csv, in microseconds, by the number of paths in the forward. The texts partly repeat, and the sources
are asked. `benchmarks.round_bench` does the same for the target's side.
"""

import argparse
import gc
import random
import time
from pathlib import Path

import numpy as np

from benchmarks import rows
from benchmarks.stats import quantile, quiet_median
from tests.fakes.engine import FakeEngine
from vllm_double.draft.frontier import FrontierLimits
from vllm_double.draft.worker import DraftWorker
from vllm_double.retrieval.sources import Sources
from vllm_double.target.proposer import Proposer, RequestParams, Row
from vllm_double.transport.shared import SharedDraftChannel, SharedTargetChannel

__all__ = ["main"]

VOCAB = 3072
NUM_LISTED = FrontierLimits(1).children_per_node
PARAMS = RequestParams(0.0, 32768, frozenset({0}))


class TableModel:
    """Next tokens follow a fixed random table with a likely successor, so that texts repeat and drafts are mostly right."""

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        self.logits = rng.normal(size=(512, VOCAB)) * 1.5
        self.logits[np.arange(512), rng.integers(1, VOCAB, 512)] += 6.0

    def __call__(self, context: list[int]) -> np.ndarray:
        return self.logits[(context[-1] * 31 + context[-2]) % 512]


class FastEngine(FakeEngine):
    """The fake engine without its checks of pages: only the last two tokens matter to the table."""

    def __init__(self, model: TableModel) -> None:
        super().__init__(model, vocab_size=VOCAB, num_pages=200_000, page_size=32, max_length=40_000)
        order = np.argsort(-model.logits, axis=1)[:, :NUM_LISTED]
        probs = np.exp(model.logits)
        probs /= probs.sum(axis=1, keepdims=True)
        self.best, self.probs = order.astype(np.int32), np.take_along_axis(probs, order, 1).astype(np.float32)
        self.seconds, self.num_rows = 0.0, 0  # of the latest forward

    def forward(self, batch, num_children):  # type: ignore[no-untyped-def]
        started = time.perf_counter()
        wanted = batch.output_indices
        is_first = np.isin(wanted, batch.query_start)
        before = np.where(is_first, -1, batch.token_ids[wanted - 1])
        states = (batch.token_ids[wanted] * 31 + before) % 512
        found = self.best[states, :num_children], self.probs[states, :num_children]
        self.seconds, self.num_rows = time.perf_counter() - started, len(batch)
        return found

    def copy_slots(self, triples):  # type: ignore[no-untyped-def]
        return


def measure(batch: int, rounds: int, turns: int, nodes_per_iteration: int) -> list[float]:
    """Seconds of the iterations with ``nodes_per_iteration`` paths without their forwards.

    The worker makes ``turns`` iterations between two rounds, as it would while the target verifies.
    """
    rng = random.Random(1)
    model = TableModel()
    end = SharedTargetChannel()
    engine, sources = FastEngine(model), Sources(history_tokens=1 << 20)
    limits = FrontierLimits(16, nodes_per_iteration=nodes_per_iteration)
    worker = DraftWorker(engine, SharedDraftChannel.attach(end.address), limits, retrievers=sources.open())
    proposer = Proposer(16, end, sources.open(), time.perf_counter)
    texts = {f"r{index}": [rng.randrange(1, 40) for _ in range(200)] for index in range(batch)}
    for name, text in texts.items():
        proposer.admit(name, np.array(text, np.int32), PARAMS)
    chains: dict[str, list[int]] = {name: [] for name in texts}
    iterations = []
    for number in range(rounds):
        for _ in range(turns):
            engine.num_rows = 0
            started = time.perf_counter()
            worker.turn()
            if engine.num_rows == nodes_per_iteration:
                iterations.append(time.perf_counter() - started - engine.seconds)
        table = []
        for name, text in texts.items():
            sampled = []
            for token in [*chains[name], None]:
                best = int(np.argmax(model([*text[-2:], *sampled])))
                sampled.append(best if rng.random() < 0.85 else rng.randrange(1, VOCAB))
                if sampled[-1] != token:
                    break
            verified = chains[name]
            text.extend(sampled)
            table.append(Row(name, np.array(text, np.int32), len(sampled), verified))
        found = proposer.propose(table)
        proposer.index(4096)
        chains = dict(zip(texts, found, strict=True))
        if number == 50:
            gc.collect()
    end.close()
    return iterations[50:]


def quantiles(seconds: list[float]) -> dict[str, rows.Value]:
    """Columns in microseconds."""
    found = {"quiet_p50_us": quiet_median(seconds, min(40, len(seconds)))}
    found |= {f"p{int(100 * q)}_us": quantile(seconds, q) for q in (0.5, 0.8, 0.99)} | {"max_us": max(seconds)}
    return {name: 1e6 * value for name, value in found.items()}


def main() -> None:
    """Appends one row per case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=1000)
    parser.add_argument("--output", type=Path, default=rows.RESULTS / "iteration.csv")
    options = parser.parse_args()
    gc.collect()
    gc.freeze()  # as the draft worker does
    for batch, turns, paths in ((2, 12, 16), (32, 12, 256)):
        seconds = measure(batch, options.rounds // 4, turns, paths)
        row: dict[str, rows.Value] = {"batch": batch, "paths": paths, "worker_turns": turns} | quantiles(seconds)
        print(row, flush=True)
        rows.append(options.output, row | {"iterations": len(seconds)} | rows.provenance("benchmarks.iteration_bench"))


if __name__ == "__main__":
    main()
