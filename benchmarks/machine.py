"""What a result depends on: the machine, its cores, the versions and the commit."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

__all__ = ["ROOT", "commit", "cores", "has_cuda", "machine", "parse_cores", "preload", "versions"]

ROOT = Path(__file__).resolve().parent.parent


def cores() -> list[int]:
    """The cores that this process may use."""
    return sorted(os.sched_getaffinity(0))


def parse_cores(text: str) -> list[int]:
    """``0-3,6`` -> [0, 1, 2, 3, 6]; ValueError for anything else."""
    found: set[int] = set()
    for part in text.split(","):
        first, _, last = part.partition("-")
        found.update(range(int(first), int(last or first) + 1))
    if not found:
        raise ValueError(f"no cores in {text!r}")
    return sorted(found)


def has_cuda() -> bool:
    """Whether this machine has a device that vLLM, if it is installed, was built for."""
    return not _vllm_version().endswith("+cpu") and any(Path("/dev").glob("nvidia[0-9]*"))


def _vllm_version() -> str:
    """Empty where there is none: the kernels are measured without it."""
    try:
        return version("vllm")
    except PackageNotFoundError:
        return ""


def preload() -> str:
    """LD_PRELOAD of a CPU server: Intel's OpenMP of the environment and, where the system has it, tcmalloc.

    vLLM recommends both; without Intel's OpenMP, alternating threads of speculative decoding are much slower.
    """
    libraries = [Path(sys.prefix) / "lib" / "libiomp5.so"]
    for folder in ("/usr/lib/x86_64-linux-gnu", "/usr/lib/aarch64-linux-gnu", "/usr/lib64", "/usr/lib"):
        libraries += sorted(Path(folder).glob("libtcmalloc_minimal.so.*"))[:1]
    return ":".join(str(library) for library in libraries if library.exists())


def machine() -> str:
    """One line: processor, usable cores, and GPUs if there are any."""
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        model = names[0] if names else model
    text = f"{model}, {len(cores())} cores"
    if has_cuda():
        query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        names = subprocess.run(query, capture_output=True, text=True, check=False).stdout.split("\n")
        text += ", " + " + ".join(name for name in names if name)
    return text


def versions() -> str:
    """``vllm 0.32.0+cpu, torch 2.13.0+cpu, ...``: what a row was measured with."""
    found = []
    for name in ("vllm", "torch", "ray", "vllm-double", "arctic-inference"):
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    return ", ".join([*found, f"python {platform.python_version()}"])


def commit() -> str:
    """Short hash of the checkout, with ``+`` when tracked files differ; empty outside of a checkout."""

    def git(*arguments: str) -> str:
        run = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
        return run.stdout.strip() if run.returncode == 0 else ""

    found = git("rev-parse", "--short", "HEAD")
    return found + ("+" if found and git("status", "--porcelain", "--untracked-files=no") else "")
