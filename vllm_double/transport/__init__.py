"""The data plane between the target and the draft worker: messages, rings, and two transports."""

from vllm_double.transport.base import AttachError, TargetEnd, TransportStats, WorkerEnd
from vllm_double.transport.inprocess import in_process_pair
from vllm_double.transport.messages import (
    MAX_CHILDREN,
    MAX_TOKENS,
    NODE_DTYPE,
    Admit,
    Command,
    Commit,
    Commits,
    Forget,
    MessageError,
    Nodes,
    Release,
    Report,
    WorkerStats,
)
from vllm_double.transport.shared import PROTOCOL_VERSION, SharedTargetEnd, SharedWorkerEnd

__all__ = [
    "MAX_CHILDREN",
    "MAX_TOKENS",
    "NODE_DTYPE",
    "PROTOCOL_VERSION",
    "Admit",
    "AttachError",
    "Command",
    "Commit",
    "Commits",
    "Forget",
    "MessageError",
    "Nodes",
    "Release",
    "Report",
    "SharedTargetEnd",
    "SharedWorkerEnd",
    "TargetEnd",
    "TransportStats",
    "WorkerEnd",
    "WorkerStats",
    "in_process_pair",
]
