"""Reads a server's /metrics page: vLLM's counters of speculation and, where present, those of double."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from prometheus_client.parser import text_string_to_metric_families

__all__ = ["Speculation", "counters", "growth", "speculation"]


def counters(page: str) -> dict[str, float]:
    """All samples summed over their labels, by sample name (a counter's ends in ``_total``); of histograms sum and count."""
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(page):
        if family.type in ("counter", "gauge", "histogram"):
            for sample in family.samples:
                if not sample.name.endswith(("_created", "_bucket")):
                    found[sample.name] = found.get(sample.name, 0.0) + sample.value
    return found


@dataclass(frozen=True)
class Speculation:
    """What a server did between two readings; None where it does not count such a thing."""

    tokens_per_forward: float | None
    acceptance: float | None
    chain_length: float | None
    hit_rate: float | None
    draft_step_ms: float | None
    waits_per_round: float | None
    wait_ms: float | None
    missed_share: float | None
    propose_ms: float | None


def _ratio(numerator: float | None, denominator: float | None) -> float | None:
    return None if numerator is None or not denominator else numerator / denominator


def growth(before: Mapping[str, float], after: Mapping[str, float]) -> dict[str, float]:
    """What every sample of a later reading grew by."""
    return {name: value - before.get(name, 0.0) for name, value in after.items()}


def speculation(grown: Mapping[str, float]) -> Speculation:
    """Rates from the counters' growth; ``tokens_per_forward`` counts forwards without drafts too.

    ``waits_per_round``: times per target forward that the target waited for the draft's first tokens. ``wait_ms``: their
    mean length. ``missed_share``: the share of them that ended without a token. ``propose_ms``: a round of double's.
    """
    generated = grown.get("vllm:generation_tokens_total")
    drafts = grown.get("vllm:spec_decode_num_drafts_total")
    drafted = grown.get("vllm:spec_decode_num_draft_tokens_total")
    accepted = grown.get("vllm:spec_decode_num_accepted_tokens_total")
    forwards = grown.get("vllm:double_request_forwards_total")
    if forwards is None and generated is not None:
        # A sequence's forward commits one token of its own and the accepted ones.
        forwards = generated - (accepted or 0.0)
    waits = grown.get("vllm:double_waits_total")
    waited_s = _ratio(grown.get("vllm:double_wait_seconds_total"), waits)
    step = _ratio(grown.get("vllm:double_worker_forward_seconds_total"), grown.get("vllm:double_worker_iterations_total"))
    propose_s = _ratio(grown.get("vllm:double_propose_seconds_sum"), grown.get("vllm:double_propose_seconds_count"))
    return Speculation(
        tokens_per_forward=_ratio(generated, forwards),
        acceptance=_ratio(accepted, drafted),
        chain_length=_ratio(drafted, drafts),
        hit_rate=_ratio(grown.get("vllm:double_hits_total"), grown.get("vllm:double_harvests_total")),
        draft_step_ms=None if step is None else 1000 * step,
        waits_per_round=_ratio(waits, grown.get("vllm:double_target_forwards_total")),
        wait_ms=None if waited_s is None else 1000 * waited_s,
        missed_share=_ratio(grown.get("vllm:double_waits_missed_total"), waits),
        propose_ms=None if propose_s is None else 1000 * propose_s,
    )
