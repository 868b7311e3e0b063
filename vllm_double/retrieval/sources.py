"""Which sources of repeated text there are, on either side."""

from dataclasses import dataclass

from vllm_double.retrieval.base import Retriever
from vllm_double.retrieval.context import ContextRetriever
from vllm_double.retrieval.history import HistoryRetriever

__all__ = ["Sources"]


@dataclass(frozen=True, slots=True)
class Sources:
    """context: a request's own text. history_tokens: of what earlier requests were answered; 0: none. share_history: requests
    that name no tenant share a history."""

    context: bool = True
    history_tokens: int = 0
    share_history: bool = False

    def open(self) -> list[Retriever]:
        """The sources, each empty but for what lies on disk. Call `automaton.warm_up` before the first request."""
        sources: list[Retriever] = []
        if self.context:
            sources.append(ContextRetriever())
        if self.history_tokens:
            sources.append(HistoryRetriever(self.history_tokens, share_unnamed=self.share_history))
        return sources
