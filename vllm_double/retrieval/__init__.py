"""Retrieval: continuations of repeated text, with counts."""

from vllm_double.retrieval.base import Continuation, Found, Queries, Source, Tokens
from vllm_double.retrieval.context import ContextRetriever
from vllm_double.retrieval.datastore import Datastore, DatastoreError, DatastoreRetriever
from vllm_double.retrieval.edit import EditRetriever
from vllm_double.retrieval.history import HistoryRetriever

__all__ = [
    "ContextRetriever",
    "Continuation",
    "Datastore",
    "DatastoreError",
    "DatastoreRetriever",
    "EditRetriever",
    "Found",
    "HistoryRetriever",
    "Queries",
    "Source",
    "Tokens",
]
