"""Retrieval: continuations of repeated text, with counts."""

from vllm_double.retrieval.base import Continuation, Retriever, Tokens
from vllm_double.retrieval.context import ContextRetriever
from vllm_double.retrieval.history import HistoryRetriever

__all__ = ["ContextRetriever", "Continuation", "HistoryRetriever", "Retriever", "Tokens"]
