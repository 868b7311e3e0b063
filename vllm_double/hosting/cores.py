"""Which CPU cores the target and the draft model run on.

On a CPU-only machine both models compete for cores, and two OpenMP pools on one core ruin each other's step time, so the split
is disjoint. It must be decided in the server's first process, before vLLM spawns its workers: vLLM reads
``VLLM_CPU_OMP_THREADS_BIND`` there, binds each worker's OpenMP threads, and whatever a worker starts inherits its binding. All
functions but :func:`read_topology` and :func:`bind_all_threads` are pure.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

__all__ = ["CoreSplit", "Place", "bind_all_threads", "format_cores", "parse_cores", "read_topology", "split_cores"]

_SYSFS = Path("/sys/devices/system/cpu")


@dataclass(frozen=True, slots=True)
class Place:
    """Where a logical CPU sits: ``core`` names its physical core (hyperthreads share it), ``node`` its memory node."""

    core: int
    node: int


@dataclass(frozen=True, slots=True)
class CoreSplit:
    """Cores of each target rank and of the draft; ``shared`` when the two overlap and will slow each other down."""

    target: tuple[tuple[int, ...], ...]
    draft: tuple[int, ...]
    shared: bool
    bind: str
    """Value of ``VLLM_CPU_OMP_THREADS_BIND`` that gives the target these cores, ranks separated by ``|``."""

    def of_engine(self, index: int, num_engines: int) -> CoreSplit:
        """The part of one of several engines of this machine (data parallelism), each of which has as many ranks."""
        ranks, draft = len(self.target) // num_engines, len(self.draft) // num_engines
        target = self.target[index * ranks : (index + 1) * ranks]
        bind = self.bind if self.bind == "nobind" else "|".join(map(format_cores, target))
        return replace(self, target=target, draft=self.draft[index * draft : (index + 1) * draft], bind=bind)

    def describe(self) -> str:
        ranks = " | ".join(format_cores(cores) for cores in self.target)
        shared = " (shared)" if self.shared else ""
        return f"target on cores {ranks}, draft on cores {format_cores(self.draft)}{shared}"


def parse_cores(text: str) -> tuple[int, ...]:
    """``"0-3,6"`` to ``(0, 1, 2, 3, 6)``, ascending. Raises ValueError with one sentence."""
    cores: set[int] = set()
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        try:
            low, high = int(first), int(last if dash else first)
        except ValueError:
            raise ValueError(f"{text!r} is not a core list such as '0-3,6': {part.strip()!r} is no number.") from None
        if low > high:
            raise ValueError(f"The core range {part.strip()!r} in {text!r} runs backwards.")
        chosen = set(range(low, high + 1))
        if twice := cores & chosen:
            raise ValueError(f"Core {min(twice)} is named twice in {text!r}.")
        cores |= chosen
    return tuple(sorted(cores))


def format_cores(cores: Iterable[int]) -> str:
    """``(0, 1, 2, 3, 6)`` to ``"0-3,6"``; ``"none"`` for no core."""
    runs: list[list[int]] = []
    for core in sorted(cores):
        if runs and core == runs[-1][1] + 1:
            runs[-1][1] = core
        else:
            runs.append([core, core])
    return ",".join(str(low) if low == high else f"{low}-{high}" for low, high in runs) or "none"


def split_cores(
    allowed: Iterable[int],
    *,
    draft: str | None = None,
    target: str = "auto",
    num_draft: int = 1,
    num_ranks: int = 1,
    topology: Mapping[int, Place] | None = None,
) -> CoreSplit:
    """Divides the ``allowed`` logical CPUs of this process between target and draft.

    Args:
        draft: core list of the draft, or None for the last ``num_draft`` physical cores.
        target: the user's ``VLLM_CPU_OMP_THREADS_BIND``: "auto" leaves the choice to us, "nobind" and
            explicit lists (one a rank, separated by "|") are kept as they are.
        num_ranks: target workers on this machine; with "auto" each gets a memory node, or else an equal run
        of cores.
        topology: from :func:`read_topology`; without it every logical CPU counts as a physical core.

    Raises:
        ValueError: one sentence saying what to change.
    """
    cores = tuple(sorted(set(allowed)))
    places = {cpu: (topology or {}).get(cpu, Place(core=-1 - cpu, node=0)) for cpu in cores}
    fixed = None if target == "auto" else _fixed_target(target, cores, num_ranks)
    if draft is not None:
        draft_cores = parse_cores(draft)
        _require(draft_cores, cores, "draft")
    else:
        taken = {cpu for rank in fixed or () for cpu in rank} if target != "nobind" else set()
        draft_cores = _last_physical_cores(cores, places, taken, num_draft, num_ranks)
    if fixed is not None:
        overlap = any(set(rank) & set(draft_cores) for rank in fixed)
        return CoreSplit(fixed, draft_cores, overlap, target)
    busy = {places[cpu].core for cpu in draft_cores}
    free = _one_per_core([cpu for cpu in cores if places[cpu].core not in busy], places)
    if not free and draft is None and num_ranks == 1:
        # One physical core: two hyperthreads if there are two, else the same one for both.
        rest = tuple(cpu for cpu in cores if cpu not in draft_cores) or cores
        return CoreSplit((rest,), draft_cores, True, format_cores(rest))
    if len(free) < num_ranks:
        raise ValueError(
            f"The draft cores {format_cores(draft_cores)} leave {len(free)} of {len(cores)} allowed cores to "
            f"{num_ranks} target worker(s); give the draft fewer cores."
        )
    ranks = _ranks(free, places, num_ranks)
    return CoreSplit(ranks, draft_cores, False, "|".join(format_cores(rank) for rank in ranks))


def read_topology(root: Path = _SYSFS) -> dict[int, Place]:
    """Physical core and memory node of every logical CPU, from sysfs; CPUs that sysfs does not describe are left out."""
    places: dict[int, Place] = {}
    for folder in root.glob("cpu[0-9]*"):
        try:
            siblings = parse_cores((folder / "topology/thread_siblings_list").read_text().strip())
        except (OSError, ValueError):
            continue
        nodes = [int(node.name[4:]) for node in folder.glob("node[0-9]*")]
        places[int(folder.name[3:])] = Place(core=min(siblings), node=nodes[0] if nodes else 0)
    return places


def bind_all_threads(cores: Iterable[int]) -> None:
    """Have every thread of this process run on ``cores`` alone; threads and processes that it starts later inherit that."""
    for thread in Path("/proc/self/task").iterdir():
        with suppress(ProcessLookupError):
            os.sched_setaffinity(int(thread.name), cores)


def _fixed_target(target: str, cores: tuple[int, ...], num_ranks: int) -> tuple[tuple[int, ...], ...]:
    if target == "nobind":
        return (cores,) * num_ranks
    ranks = tuple(parse_cores(part) for part in target.split("|"))
    if len(ranks) != num_ranks:
        raise ValueError(f"VLLM_CPU_OMP_THREADS_BIND={target!r} names {len(ranks)} rank(s), the target has {num_ranks}.")
    for rank in ranks:
        _require(rank, cores, "target")
    return ranks


def _require(wanted: Sequence[int], cores: tuple[int, ...], role: str) -> None:
    if missing := sorted(set(wanted) - set(cores)):
        raise ValueError(
            f"The {role} asks for core {format_cores(missing)}, but this process may only use cores {format_cores(cores)}."
        )


def _last_physical_cores(
    cores: tuple[int, ...], places: Mapping[int, Place], taken: set[int], num_draft: int, num_ranks: int
) -> tuple[int, ...]:
    if num_draft < 1:
        raise ValueError(f"The draft needs at least one core, not {num_draft}.")
    candidates = _one_per_core(cores, places)
    if len(candidates) == 1 and num_draft == 1:
        return cores[-1:]
    if not taken and num_draft + num_ranks > len(candidates):
        raise ValueError(
            f"{num_draft} draft core(s) and {num_ranks} target worker(s) need "
            f"{num_draft + num_ranks} physical cores, but this process may only use {format_cores(cores)}."
        )
    busy = {places[cpu].core for cpu in taken}
    free = [cpu for cpu in candidates if places[cpu].core not in busy] or candidates
    if num_draft > len(free):
        raise ValueError(f"The draft asks for {num_draft} cores, but the target leaves it only {format_cores(free)}.")
    return tuple(free[len(free) - num_draft :])


def _one_per_core(cpus: Sequence[int], places: Mapping[int, Place]) -> list[int]:
    """The last hyperthread of each physical core, as vLLM's own binding takes it: a second one adds no OpenMP speed."""
    return sorted({places[cpu].core: cpu for cpu in sorted(cpus)}.values())


def _ranks(free: list[int], places: Mapping[int, Place], num_ranks: int) -> tuple[tuple[int, ...], ...]:
    by_node: dict[int, list[int]] = {}
    for cpu in free:
        by_node.setdefault(places[cpu].node, []).append(cpu)
    if len(by_node) >= num_ranks:
        return tuple(tuple(by_node[node]) for node in sorted(by_node)[:num_ranks])
    bounds = [len(free) * rank // num_ranks for rank in range(num_ranks + 1)]
    return tuple(tuple(free[low:high]) for low, high in pairwise(bounds))
