"""Which sources of repeated text there are, on either side."""

from dataclasses import dataclass
from pathlib import Path

from vllm_double.retrieval.automaton import warm_up
from vllm_double.retrieval.base import Source
from vllm_double.retrieval.context import ContextRetriever
from vllm_double.retrieval.datastore import Datastore, DatastoreRetriever
from vllm_double.retrieval.edit import EditRetriever
from vllm_double.retrieval.history import HistoryRetriever

__all__ = ["Sources"]


@dataclass(frozen=True, slots=True)
class Sources:
    """context: a request's own text, with and without changes. history_tokens: of what earlier requests were answered; 0: none.
    share_history: requests that name no tenant share a history. datastores: files that `vllm-double datastore build` made, each
    with the fingerprint (hexadecimal) of the tokenizer that it must be of."""

    context: bool = True
    history_tokens: int = 0
    share_history: bool = False
    datastores: tuple[tuple[str, str], ...] = ()

    def open(self) -> list[Source]:
        """The sources, each empty but for what lies on disk, and compiled, so that no request waits for that.

        Raises DatastoreError.
        """
        warm_up()
        sources: list[Source] = []
        if self.context:
            context = ContextRetriever()
            sources.extend((context, EditRetriever(context)))
        if self.history_tokens:
            sources.append(HistoryRetriever(self.history_tokens, share_unnamed=self.share_history))
        if self.datastores:
            opened = (Datastore(Path(path), bytes.fromhex(tokenizer)) for path, tokenizer in self.datastores)
            sources.append(DatastoreRetriever(*opened))
        return sources
