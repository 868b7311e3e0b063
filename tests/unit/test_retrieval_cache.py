"""numba's cache when the package is installed where the process may not write."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from vllm_double.retrieval import _steps

USE = """
import numpy as np, _steps
kernels = _steps.steps()
edges = np.array([[0, 5, 1, -1]], np.int32)
table = np.zeros(8, np.int32)
kernels.rehash(edges, 1, table)
assert table.sum() == 1
print(sum(sum(f.stats.cache_hits.values()) for f in kernels), sum(len(f.signatures) for f in kernels))
"""


def compile_in(package: Path, cache_home: Path) -> tuple[int, int]:
    """(functions found in a cache, functions compiled or loaded) by a fresh process."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("NUMBA_")}
    environment |= {
        "XDG_CACHE_HOME": str(cache_home),
        "PYTHONPATH": str(package),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", USE], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    hits, functions = done.stdout.split()
    return int(hits), int(functions)


@pytest.fixture
def read_only_package(tmp_path: Path) -> Path:
    """A copy with no room for a cache beside it: a file in the folder's place stops root, too."""
    package = tmp_path / "package"
    package.mkdir()
    shutil.copy(_steps.__file__, package / "_steps.py")
    (package / "__pycache__").touch()
    return package


def test_a_read_only_package_is_cached_for_the_user_and_a_damaged_cache_is_no_error(
    read_only_package: Path, tmp_path: Path
) -> None:
    home = tmp_path / "home"
    assert compile_in(read_only_package, home) == (0, 3)
    cached = list(home.rglob("*.nbi"))
    assert len(cached) == 3
    assert compile_in(read_only_package, home) == (3, 3)
    for index in cached:
        index.write_bytes(b"damaged")
    assert compile_in(read_only_package, home) == (0, 3)


def test_nowhere_to_cache_is_no_error(read_only_package: Path, tmp_path: Path) -> None:
    (tmp_path / "home").touch()
    assert compile_in(read_only_package, tmp_path / "home") == (0, 3)
