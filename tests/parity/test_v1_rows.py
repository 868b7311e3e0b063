"""What depends on the position is right in every row of a verification, the last one included: texts with chains are plain
vLLM's.

vLLM's own batch and samplers, with a model whose logits are a table; its answers are compared with and without drafts.
"""

from __future__ import annotations

from collections.abc import Callable
from inspect import signature
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("vllm")
pytestmark = pytest.mark.usefixtures("cpu_sampler")

VOCAB, LENGTH, MAX_CHAIN, MAX_ROWS = 12, 24, 5, 4
THINK, DONE, ALSO_DONE, STOP = 1, 2, 3, 4
REASONING = SimpleNamespace(reasoning_start_token_ids=[THINK], reasoning_end_token_ids=[DONE, ALSO_DONE])
CONFIG = SimpleNamespace(scheduler_config=SimpleNamespace(max_num_seqs=MAX_ROWS), reasoning_config=REASONING)
Texts = dict[str, list[int]]


class Model:
    """Logits by the last two tokens. Its texts think, stop and repeat themselves."""

    def __init__(self, seed: int) -> None:
        random = np.random.default_rng(seed)
        table = random.normal(size=(VOCAB, VOCAB, VOCAB)).astype(np.float32)
        table[:, :, [THINK, DONE, STOP]] += 0.8
        table[:, DONE, ALSO_DONE] += 3
        self.table = torch.from_numpy(table)

    def __call__(self, text: list[int]) -> Any:
        return self.table[text[-2], text[-1]]


class Steps:
    """The steps of a model runner. chain_of: what is drafted behind a text; None: plain vLLM."""

    def __init__(self, model: Model, chain_of: Callable[[str, int], list[int]] | None) -> None:
        from vllm.v1.sample.logits_processor import BUILTIN_LOGITS_PROCESSORS, LogitsProcessors, MinTokensLogitsProcessor
        from vllm.v1.sample.sampler import Sampler
        from vllm.v1.worker.gpu_input_batch import InputBatch

        from vllm_double.integration.v1_sampling import Draws, share_noise

        kinds = BUILTIN_LOGITS_PROCESSORS if chain_of is None else [MinTokensLogitsProcessor]
        device = torch.device("cpu")
        self.model, self.chain_of = model, chain_of
        self.batch = InputBatch(
            MAX_ROWS, 64, 64, device, VOCAB, block_sizes=[16], max_num_blocks_per_req=[4],
            logitsprocs=LogitsProcessors(kind(CONFIG, device, False) for kind in kinds),
            num_spec_tokens=0 if chain_of is None else MAX_CHAIN, reasoning_config=REASONING,
            **{"kernel_block_sizes": [16]} if "kernel_block_sizes" in signature(InputBatch).parameters else {},
        )  # fmt: skip
        self.runner = SimpleNamespace(
            sampler=Sampler(), rejection_sampler=None, device=device, vllm_config=CONFIG, input_batch=self.batch
        )
        if chain_of is not None:
            share_noise(self.runner, lambda: Draws(*np.zeros((2, self.batch.num_reqs), np.int64)))

    def run(self, requests: dict[str, Any]) -> Texts:
        """Outputs of requests that come one by one and end at STOP or at LENGTH."""
        from vllm.v1.worker.gpu_input_batch import CachedRequestState

        waiting, states, outputs = list(requests), {}, {}
        while waiting or states:
            if waiting and len(states) < MAX_ROWS:
                name = waiting.pop(0)
                outputs[name] = list[int]()
                params = requests[name]
                states[name] = CachedRequestState(name, [5, 6, 7], [], params, None, ([0, 1, 2, 3],), 0, outputs[name])
                self.batch.add_request(states[name])
            chains = {name: self.chain_of(name, len(outputs[name])) if self.chain_of is not None else [] for name in states}
            for state in states.values():
                self.batch.update_req_spec_token_ids(state, chains)
            self.batch.condense()
            self.batch.refresh_metadata()
            for name, tokens in zip(list(self.batch.req_ids), self._sample(states, chains), strict=True):
                for token in tokens:
                    outputs[name].append(token)
                    if token == STOP or len(outputs[name]) == LENGTH:
                        self.batch.remove_request(name)
                        del states[name]
                        break
                else:
                    index = self.batch.req_id_to_index[name]
                    self.batch.num_tokens_no_spec[index] += len(tokens)
        return outputs

    def _sample(self, states: dict[str, Any], chains: dict[str, list[int]]) -> list[list[int]]:
        ordered = [(states[name], chains[name]) for name in self.batch.req_ids]
        texts = [
            state.prompt_token_ids + state.output_token_ids + chain[:depth]
            for state, chain in ordered
            for depth in range(len(chain) + 1)
        ]
        logits = torch.stack([self.model(text) for text in texts])
        counts = np.array([len(chain) for _, chain in ordered])
        if not counts.any():
            drawn = self.runner.sampler(logits, self.batch.sampling_metadata).sampled_token_ids
        else:
            from tests.parity.v1_steps import _metadata

            padded = np.array([(chain + [0] * MAX_CHAIN)[:MAX_CHAIN] for _, chain in ordered])
            verified = _metadata(counts, padded, MAX_CHAIN)
            drawn = self.runner.rejection_sampler(verified, None, logits, self.batch.sampling_metadata).sampled_token_ids
        return [[token for token in row if token >= 0] for row in drawn.tolist()]


def requests_of(seed: int) -> dict[str, Any]:
    """Greedy, so that there is one right text."""
    from vllm import SamplingParams

    random = np.random.default_rng(seed)

    def params(**settings: Any) -> Any:
        return SamplingParams(temperature=0, max_tokens=LENGTH, stop_token_ids=[STOP], **settings)

    def length() -> int:
        return int(random.integers(1, 16))

    kinds: list[Callable[[], Any]] = [
        params,
        lambda: params(min_tokens=length()),
        lambda: params(thinking_token_budget=length() // 3),
        lambda: params(min_tokens=length(), thinking_token_budget=length() // 2),
        lambda: params(min_tokens=length(), logit_bias={STOP: 1.0, DONE: -1.0}, presence_penalty=0.4),
        lambda: params(min_tokens=length(), repetition_penalty=1.3, thinking_token_budget=length() // 2),
    ]
    return {f"r{number}": kinds[number % len(kinds)]() for number in range(24)}


def compare(seed: int, drafts: Callable[[list[int], int, Any], list[int]]) -> None:
    """drafts: a chain from the right text, how much of it is there, and random numbers."""
    model, requests, random = Model(seed), requests_of(seed), np.random.default_rng(seed)
    # One by one: in a batch vLLM's thinking budgets may pass from one request to the next.
    plain = {name: Steps(model, None).run({name: params})[name] for name, params in requests.items()}
    assert any(DONE in text for text in plain.values()) and any(text[-1] == STOP for text in plain.values())
    given = Steps(model, lambda name, known: drafts(plain[name], known, random)).run(requests)
    assert given == plain


@pytest.mark.parametrize("seed", range(6))
def test_texts_behind_right_chains_of_any_length_are_plain_ones(seed: int) -> None:
    """A chain may end right before a token that only its position allows, or forbids."""
    compare(seed, lambda text, known, random: text[known : known + random.integers(0, MAX_CHAIN + 1)])


@pytest.mark.parametrize("seed", range(6))
def test_texts_behind_wrong_chains_are_plain_ones(seed: int) -> None:
    def wrong(text: list[int], known: int, random: Any) -> list[int]:
        chain = text[known : known + random.integers(0, MAX_CHAIN + 1)]
        return [token if random.random() < 0.7 else int(random.integers(VOCAB)) for token in chain]

    compare(seed, wrong)


@pytest.mark.parametrize("seed", range(3))
def test_texts_without_chains_are_plain_ones(seed: int) -> None:
    compare(seed, lambda text, known, random: [])
