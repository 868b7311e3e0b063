"""Tokens per target forward on edits of code by retrieval alone, without any model: python -m benchmarks.edit_rounds

The real round proposes chains for scripted replies (benchmarks.scripted.edits, modules that the pair is not trained on), with
the context alone and with edits; beside it vLLM's method "suffix" where arctic-inference is installed
(scripts/install-suffix.sh), as vLLM asks it, without earlier requests. A verified token costs 3 % of a step, as float32 does
on one core. Rows of results/edit_rounds.csv.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from benchmarks import rows, workload
from benchmarks.pair.data import EOS_ID, modules
from benchmarks.scripted.edits import Edit, make_edits
from benchmarks.stats import first_difference
from vllm_double.retrieval import ContextRetriever, EditRetriever, Source
from vllm_double.retrieval.sources import warm_up
from vllm_double.target.proposer import Proposer, RequestParams
from vllm_double.target.proposer import Row as ProposerRow

SUFFIX_DEPTH = 24  # vLLM's default
TOKEN_COST = 0.03

Chains = Callable[[int, list[int], int], list[int]]
"""(index of the edit, the text so far, tokens of it that are new) -> the chain to be verified."""


def ours(retrievers: Sequence[Source], edits: Sequence[Edit], num_speculative_tokens: int) -> Chains:
    """Chains of the real round without a draft model."""
    proposer = Proposer(num_speculative_tokens, None, retrievers, time.perf_counter)
    for num_tokens in range(1, 10):
        proposer.step_cost.observe(num_tokens, 1.0 + TOKEN_COST * num_tokens)
    chain: list[int] = []

    def propose(index: int, text: list[int], num_new: int) -> list[int]:
        nonlocal chain
        if len(text) - num_new == (length := len(edits[index].prompt_tokens)):
            params = RequestParams(0.0, length + 2 * len(edits[index].reply_tokens), frozenset([EOS_ID]))
            proposer.admit(str(index), np.array(text[:length], np.int32), params)
            while proposer.index(4096):
                pass
        (chain,) = proposer.propose([ProposerRow(str(index), np.array(text, np.int32), num_new, chain[: num_new - 1])])
        return chain

    return propose


def suffix(edits: Sequence[Edit], num_speculative_tokens: int) -> Chains:
    """Chains of arctic-inference's suffix cache with vLLM's defaults."""
    from arctic_inference.suffix_decoding import SuffixDecodingCache

    cache: Any = SuffixDecodingCache(max_tree_depth=SUFFIX_DEPTH, max_cached_requests=0)

    def propose(index: int, text: list[int], num_new: int) -> list[int]:
        if len(text) - num_new == len(edits[index].prompt_tokens):
            cache.start_request(index, np.array(text[:-num_new], np.int32))
        cache.add_active_response(index, text[len(text) - num_new :])
        last = np.array(text[-SUFFIX_DEPTH:], np.int32)
        return list(cache.speculate(index, last, num_speculative_tokens, max_spec_factor=1.0, min_token_prob=0.1).token_ids)

    return propose


def play(edits: Sequence[Edit], chains: Chains) -> dict[str, rows.Value]:
    """Decode every reply; the target says what is scripted."""
    forwards = tokens = proposed = accepted = 0
    for index, edit in enumerate(edits):
        text, left, num_new = [*edit.prompt_tokens, edit.reply_tokens[0]], edit.reply_tokens[1:], 1
        while left:
            chain = chains(index, text, num_new)
            difference = first_difference(chain, left[: len(chain)])
            num_right = len(chain) if difference is None else difference
            num_new = min(num_right + 1, len(left))
            text, left = text + left[:num_new], left[num_new:]
            forwards, tokens = forwards + 1, tokens + num_new
            proposed, accepted = proposed + len(chain), accepted + num_right
    return {
        "edits": len(edits),
        "tokens": tokens,
        "forwards": forwards,
        "tokens_per_forward": tokens / forwards,
        "chain_length": proposed / forwards,
        "acceptance": accepted / max(proposed, 1),
    }


def main() -> None:
    """Print and file one row for each source."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=32, help="edits")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--k", type=int, default=16, help="num_speculative_tokens")
    parser.add_argument("--output", type=Path, default=rows.RESULTS / "edit_rounds.csv")
    options = parser.parse_args()
    tokenizer = Tokenizer.from_file(str(workload.TARGET / "tokenizer.json"))
    edits = make_edits(modules()[1], tokenizer, options.count, options.seed)
    warm_up()
    context = ContextRetriever()
    arms = {
        "context": ours([ContextRetriever()], edits, options.k),
        "context and edit": ours([context, EditRetriever(context)], edits, options.k),
    }
    if find_spec("arctic_inference") is not None:
        arms["suffix"] = suffix(edits, options.k)
    for source, chains in arms.items():
        row = {"source": source, "k": options.k, "seed": options.seed} | play(edits, chains)
        print("  ".join(f"{key} {value:.2f}" if isinstance(value, float) else f"{key} {value}" for key, value in row.items()))
        rows.append(options.output, row | rows.provenance("benchmarks.edit_rounds"))


if __name__ == "__main__":
    main()
