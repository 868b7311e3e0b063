"""What target and worker say to each other, and the one definition of each message on the wire.

Commands go from the target to the worker, reports come back. Every layout below is used by both ends.
Decoding checks structure (sizes, counts, finite numbers) and raises :class:`MessageError` for anything else;
whether a token lies in the vocabulary is for the end that knows the vocabulary.
"""

from __future__ import annotations

import functools
import json
import math
import struct
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt

__all__ = [
    "MAX_CHILDREN",
    "MAX_TOKENS",
    "NODE_DTYPE",
    "Admit",
    "Command",
    "Commit",
    "Commits",
    "Dropped",
    "Forget",
    "MessageError",
    "Nodes",
    "Release",
    "Report",
    "WorkerStats",
    "decode_commands",
    "decode_reports",
    "encode",
    "warm_up",
]

MAX_CHILDREN: Final = 3
"""Tokens that are sent of a node: a less probable one is never on the target's best path."""
MAX_TOKENS: Final = 8192
"""Most tokens in one array of one command; a longer text is sent as an Admit followed by Commits."""

NODE_DTYPE: Final = np.dtype(
    [
        ("handle", "<u8"),
        ("prefix_hash", "<u8"),
        ("position", "<u4"),
        ("count", "<u4"),
        ("tokens", "<i4", (MAX_CHILDREN,)),
        ("probs", "<f4", (MAX_CHILDREN,)),
    ]
)
"""One expanded node, 48 bytes: after the prefix with this hash, of length ``position``, the draft model's
best ``count`` next tokens by falling probability. Entries from ``count`` on mean nothing."""

Buffer: TypeAlias = "bytes | bytearray | memoryview"
IntArray: TypeAlias = npt.NDArray[np.int32]
FloatArray: TypeAlias = npt.NDArray[np.float32]
NodeArray: TypeAlias = npt.NDArray[np.void]

ADMIT: Final = 1
COMMIT: Final = 2
RELEASE: Final = 3
NODES: Final = 4
STATS: Final = 5
FORGET: Final = 6
DROPPED: Final = 7

# Each is followed by its arrays in the order of the counts.
# handle, base, max_length, epoch, temperature, seed, top_k, top_p, min_p, #tokens, #stop tokens, #bytes of the tenant
_ADMIT: Final = struct.Struct("<QIIIdqIddIHH")
_COMMIT: Final = struct.Struct("<QIIII")  # handle, keep, #tokens, #chain, waits (0 or 1); many commits may follow each other
_RELEASE: Final = struct.Struct("<QB")  # handle, keep (0 or 1)

_INT: Final = np.dtype("<i4")
_FLOAT: Final = np.dtype("<f4")


class MessageError(ValueError):
    """A message that cannot be put on the wire, or bytes that are no message."""


@dataclass(frozen=True, slots=True, eq=False)
class Admit:
    """A request enters under a fresh handle.

    ``tokens``: int32 [<= MAX_TOKENS], the first chunk of its text (the rest follows as Commits); ``base``:
    length of the whole text at admission; ``temperature``: 0 is greedy; ``max_length``: the text never grows
    beyond. ``epoch``: of the prefix cache; what was read for a request of another one is not to be found.
    ``seed``: int64, of the noise that the target draws with; ``top_k`` (0: off), ``top_p`` (1: off), ``min_p`` (0: off):
    what it draws from.
    """

    handle: int
    base: int
    tokens: IntArray
    temperature: float
    max_length: int
    stop_token_ids: tuple[int, ...]
    tenant: str
    epoch: int = 0
    seed: int = 0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0


@dataclass(frozen=True, slots=True, eq=False)
class Commit:
    """``tokens[:keep]`` of the text stay (fewer than there are: a rewind), ``tokens`` are appended.

    ``chain``: int32 [n], what the target verifies now, possibly empty; ``chain_probs``: float32 [n].
    ``waits``: the target verifies nothing yet, but waits for what follows.
    """

    handle: int
    keep: int
    tokens: IntArray
    chain: IntArray
    chain_probs: FloatArray
    waits: bool = False

    @classmethod
    def of(cls, handle: int, keep: int, tokens: IntArray) -> Commit:
        """Without a chain."""
        return cls(handle, keep, tokens, np.empty(0, _INT), np.empty(0, _FLOAT))


@dataclass(frozen=True, slots=True)
class Commits:
    """Commits of several requests, encoded by the sender: each as `Commit` is encoded, one behind the other."""

    payload: bytes


@dataclass(frozen=True, slots=True)
class Release:
    """The request is over; its handle never comes back. ``keep``: later requests of its tenant may be offered its text."""

    handle: int
    keep: bool = True


@dataclass(frozen=True, slots=True)
class Forget:
    """The target's weights changed: nothing that it said before is to be offered again."""


@dataclass(frozen=True, slots=True, eq=False)
class Nodes:
    """``records``: NODE_DTYPE [n], expanded nodes of any requests in the order of their making."""

    records: NodeArray


@dataclass(frozen=True, slots=True)
class WorkerStats:
    """Counters that only grow since the worker's start, and gauges. Finite numbers only."""

    values: dict[str, float]


@dataclass(frozen=True, slots=True)
class Dropped:
    """The worker knows nothing of these requests, for lack of room, or because something of their texts was lost."""

    handles: tuple[int, ...]


Command: TypeAlias = "Admit | Commit | Release | Forget"
Report: TypeAlias = "Nodes | WorkerStats | Dropped"


def encode(message: Command | Commits | Report) -> tuple[int, bytes]:
    """Kind and payload of a message. Raises MessageError for arrays of a wrong type or numbers that do not
    fit."""
    try:
        if isinstance(message, Commit):
            return COMMIT, _encode_commit(message)
        if isinstance(message, Commits):
            return COMMIT, message.payload
        if isinstance(message, Nodes):
            return NODES, _raw(message.records, NODE_DTYPE, None)
        if isinstance(message, Admit):
            return ADMIT, _encode_admit(message)
        if isinstance(message, Release):
            return RELEASE, _RELEASE.pack(message.handle, message.keep)
        if isinstance(message, Forget):
            return FORGET, b""
        if isinstance(message, Dropped):
            return DROPPED, struct.pack(f"<{len(message.handles)}Q", *message.handles)
        return STATS, json.dumps(message.values, allow_nan=False).encode()
    except (struct.error, ValueError, TypeError, OverflowError) as error:
        raise MessageError(f"cannot encode {type(message).__name__}: {error}") from error


def decode_commands(kind: int, payload: Buffer) -> list[Command]:
    """The commands in one record's payload; their arrays own their memory. Raises MessageError."""
    try:
        if kind == COMMIT and len(payload):
            return list(_decode_commits(payload))
        if kind == ADMIT:
            return [_decode_admit(payload)]
        if kind == RELEASE:
            handle, keep = _RELEASE.unpack(payload)
            if keep > 1:
                raise ValueError("a flag that is neither 0 nor 1")
            return [Release(handle, bool(keep))]
        if kind == FORGET and len(payload) == 0:
            return [Forget()]
    except (struct.error, ValueError, OverflowError) as error:
        raise MessageError(f"not a command of kind {kind}: {error}") from error
    raise MessageError(f"{kind} is no kind of command")


def decode_reports(records: Iterable[tuple[int, Buffer]]) -> list[Report]:
    """Reports in (kind, payload) records. Damaged records, and damaged nodes of a record, are skipped.

    All nodes come as one Nodes message, because what the reader pays is per message and not per node.
    """
    reports: list[Report] = []
    parts: list[Buffer] = []
    for kind, payload in records:
        if kind == STATS:
            reports += _decode_stats(payload)
        elif kind == DROPPED and len(payload) % 8 == 0:
            reports.append(Dropped(struct.unpack(f"<{len(payload) // 8}Q", payload)))
        elif kind == NODES and len(payload) % NODE_DTYPE.itemsize == 0:
            parts.append(payload)
    if any(len(part) for part in parts):
        # A bytearray, not bytes: the array over it is writable.
        is_private = len(parts) == 1 and not memoryview(parts[0]).readonly
        nodes = np.frombuffer(parts[0] if is_private else bytearray().join(parts), NODE_DTYPE)
        if num_sound := _keep_sound()(nodes):
            reports.insert(0, Nodes(nodes[:num_sound]))
    return reports


def _check_sampling(temperature: float, top_p: float, min_p: float) -> None:
    if not 0.0 <= temperature < math.inf:
        raise ValueError(f"temperature {temperature}")
    if not (0.0 < top_p <= 1.0 and 0.0 <= min_p <= 1.0):
        raise ValueError(f"top_p {top_p}, min_p {min_p}")


def _encode_admit(message: Admit) -> bytes:
    _check_sampling(message.temperature, message.top_p, message.min_p)
    tenant = message.tenant.encode()
    header = _ADMIT.pack(
        message.handle,
        message.base,
        message.max_length,
        message.epoch,
        message.temperature,
        message.seed,
        message.top_k,
        message.top_p,
        message.min_p,
        len(message.tokens),
        len(message.stop_token_ids),
        len(tenant),
    )
    stops = struct.pack(f"<{len(message.stop_token_ids)}i", *message.stop_token_ids)
    return b"".join((header, _raw(message.tokens, _INT, MAX_TOKENS), stops, tenant))


def _decode_admit(payload: Buffer) -> Admit:
    header = _ADMIT.unpack_from(payload)
    handle, base, max_length, epoch, temperature, seed, top_k, top_p, min_p, num_tokens, num_stops, num_bytes = header
    if num_tokens > MAX_TOKENS or len(payload) != _ADMIT.size + 4 * (num_tokens + num_stops) + num_bytes:
        raise ValueError("sizes do not add up")
    _check_sampling(temperature, top_p, min_p)
    tokens = _array(payload, _INT, num_tokens, _ADMIT.size)
    stops = struct.unpack_from(f"<{num_stops}i", payload, _ADMIT.size + 4 * num_tokens)
    tenant = bytes(payload[len(payload) - num_bytes :]).decode()
    return Admit(handle, base, tokens, temperature, max_length, stops, tenant, epoch, seed, top_k, top_p, min_p)


def _encode_commit(message: Commit) -> bytes:
    num_chain = len(message.chain)
    if len(message.chain_probs) != num_chain:
        raise ValueError("chain and chain_probs differ in length")
    header = _COMMIT.pack(message.handle, message.keep, len(message.tokens), num_chain, message.waits)
    tokens = _raw(message.tokens, _INT, MAX_TOKENS)
    if not num_chain:
        return header + tokens
    chain = _raw(message.chain, _INT, MAX_TOKENS)
    return b"".join((header, tokens, chain, _raw(message.chain_probs, _FLOAT, MAX_TOKENS)))


def _decode_commits(payload: Buffer) -> Iterator[Commit]:
    offset = 0
    while offset < len(payload):
        handle, keep, num_tokens, num_chain, waits = _COMMIT.unpack_from(payload, offset)
        offset += _COMMIT.size
        if max(num_tokens, num_chain) > MAX_TOKENS or len(payload) < offset + 4 * (num_tokens + 2 * num_chain):
            raise ValueError("sizes do not add up")
        if waits > 1:
            raise ValueError("a flag that is neither 0 nor 1")
        tokens = _array(payload, _INT, num_tokens, offset)
        chain = _array(payload, _INT, num_chain, offset + 4 * num_tokens)
        probs = _array(payload, _FLOAT, num_chain, offset + 4 * (num_tokens + num_chain))
        if not np.isfinite(probs).all():
            raise ValueError("chain_probs are not finite")
        yield Commit(handle, keep, tokens, chain, probs, bool(waits))
        offset += 4 * (num_tokens + 2 * num_chain)


def warm_up() -> None:
    """Compile what decoding needs, or read it from numba's cache, before the first record comes."""
    _keep_sound()


@functools.cache
def _keep_sound() -> Callable[[NodeArray], int]:
    """See `_ring_steps.keep_sound`. numba is imported late: in a process of vLLM it must not come before vLLM."""
    from vllm_double.jit import machine_code
    from vllm_double.transport import _ring_steps as steps

    return machine_code(steps.keep_sound, np.zeros(1, NODE_DTYPE))


def _decode_stats(payload: Buffer) -> list[WorkerStats]:
    """None if they are damaged."""
    try:
        values = {name: float(value) for name, value in json.loads(bytes(payload)).items()}
    except (AttributeError, TypeError, ValueError, OverflowError, RecursionError):
        return []
    return [WorkerStats(values)] if all(map(math.isfinite, values.values())) else []


def _raw(array: npt.NDArray[Any], dtype: np.dtype[Any], most: int | None) -> bytes:
    if array.dtype != dtype or array.ndim != 1:
        raise ValueError(f"a vector of {dtype} is wanted, not {array.ndim} dimensions of {array.dtype}")
    if most is not None and array.size > most:
        raise ValueError(f"{array.size} entries, at most {most} fit one command")
    return array.tobytes()


def _array(payload: Buffer, dtype: np.dtype[Any], count: int, offset: int) -> npt.NDArray[Any]:
    if not count:
        return np.empty(0, dtype)
    return np.frombuffer(payload, dtype, count, offset).copy()
