"""Which sources of repeated text there are, on either side."""

import logging
from dataclasses import dataclass, replace
from pathlib import Path

from vllm_double.config import DoubleConfig
from vllm_double.retrieval.base import Source
from vllm_double.retrieval.context import ContextRetriever
from vllm_double.retrieval.context_steps import context_steps
from vllm_double.retrieval.datastore import Datastore, DatastoreError, DatastoreRetriever
from vllm_double.retrieval.edit import EditRetriever
from vllm_double.retrieval.edit_steps import edit_steps
from vllm_double.retrieval.history import HistoryRetriever
from vllm_double.retrieval.history_steps import history_steps
from vllm_double.retrieval.suffix_automaton.arena import BYTES_PER_TOKEN, Arena

__all__ = ["Sources", "warm_up"]

_logger = logging.getLogger(__name__)
# Generations are powers of two, and texts wait beside them.
_ROOM_PER_HISTORY_TOKEN = 4


def warm_up() -> None:
    """Compile, or load what an earlier process compiled. Call it at start-up; later calls cost nothing."""
    for steps in (context_steps, edit_steps, history_steps):
        steps()


@dataclass(frozen=True, slots=True)
class Sources:
    """context: a request's own text, with and without changes. history_tokens: of what earlier requests were answered; 0: none.
    share_history: requests that name no tenant share a history. datastores: files that `vllm-double datastore build` made, each
    with the fingerprint (hexadecimal) of the tokenizer that it must be of. context_bytes: the most that indexes of running
    requests take; a request that finds no room is answered nothing by them. tenant_share: quota of an owner of tenants in the
    history, see `HistoryRetriever`."""

    context: bool = True
    history_tokens: int = 0
    share_history: bool = False
    datastores: tuple[tuple[str, str], ...] = ()
    context_bytes: int = 2 << 30
    tenant_share: float = 0.5

    @classmethod
    def of(cls, double: DoubleConfig, datastores: tuple[tuple[str, str], ...]) -> "Sources":
        """As the settings say."""
        return cls(
            double.context_retrieval, double.history_tokens, double.share_history, datastores, int(double.context_gib * 2**30),
            double.tenant_share,
        )  # fmt: skip

    def open(self) -> list[Source]:
        """The sources, empty but for what lies on disk, and compiled: no request waits for that. Raises DatastoreError."""
        arena = Arena(self.context_bytes + _ROOM_PER_HISTORY_TOKEN * BYTES_PER_TOKEN * self.history_tokens)
        sources: list[Source] = []
        if self.context:
            context = ContextRetriever(arena=arena)
            sources.extend((context, EditRetriever(context)))
        if self.history_tokens:
            sources.append(
                HistoryRetriever(
                    self.history_tokens, share_unnamed=self.share_history, arena=arena, tenant_share=self.tenant_share
                )
            )
        if self.datastores:
            opened = (Datastore(Path(path), bytes.fromhex(tokenizer)) for path, tokenizer in self.datastores)
            sources.append(DatastoreRetriever(*opened))
        return sources

    def open_again(self) -> list[Source]:
        """As `open`, while a server runs: a datastore that is not what it was at the start is left out."""
        try:
            return self.open()
        except DatastoreError as error:
            _logger.warning("%s It is left out.", error)
            return replace(self, datastores=()).open()
