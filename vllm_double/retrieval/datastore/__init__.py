"""A static corpus to retrieve from: building it, its file, and looking up."""

from vllm_double.retrieval.datastore.file import FORMAT_VERSION, Datastore, DatastoreError, files_of, fingerprint
from vllm_double.retrieval.datastore.source import DatastoreRetriever

__all__ = ["FORMAT_VERSION", "Datastore", "DatastoreError", "DatastoreRetriever", "files_of", "fingerprint"]
