"""numba's cache when the package is installed where the process may not write."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from vllm_double import jit as compiling

STEPS = """
def total(numbers):
    return numbers.sum()
"""
USE = """
import numpy as np
from vllm_double.jit import compiled
from vllm_double.retrieval.some_steps import total
total = compiled(total, "int64(int32[::1])")
assert total(np.arange(4, dtype=np.int32)) == 6
print(sum(total.stats.cache_hits.values()))
"""


def compile_in(package: Path, cache_home: Path) -> int:
    """How many functions a fresh process, which uses one, finds in a cache."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("NUMBA_")}
    environment |= {
        "XDG_CACHE_HOME": str(cache_home),
        "PYTHONPATH": str(package.parent),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", USE],
        cwd=package.parent,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.fixture
def read_only_package(tmp_path: Path) -> Path:
    """A copy with no room for a cache beside it: a file in the folder's place stops root, too."""
    package = tmp_path / "vllm_double"
    (package / "retrieval").mkdir(parents=True)
    shutil.copy(compiling.__file__, package)
    (package / "retrieval" / "some_steps.py").write_text(STEPS)
    for folder in (package, package / "retrieval"):
        (folder / "__init__.py").touch()
        (folder / "__pycache__").touch()
    return package


def test_a_read_only_package_is_cached_for_the_user_and_a_damaged_cache_is_no_error(
    read_only_package: Path, tmp_path: Path
) -> None:
    home = tmp_path / "home"
    assert compile_in(read_only_package, home) == 0
    (index,) = home.rglob("*.nbi")
    assert compile_in(read_only_package, home) == 1
    (read_only_package / "_other_steps.py").write_text("SIZE = 1")  # what is in it may be compiled into any of them
    assert compile_in(read_only_package, home) == 0
    index.write_bytes(b"damaged")
    assert compile_in(read_only_package, home) == 0


def test_nowhere_to_cache_is_no_error(read_only_package: Path, tmp_path: Path) -> None:
    (tmp_path / "home").touch()
    assert compile_in(read_only_package, tmp_path / "home") == 0
