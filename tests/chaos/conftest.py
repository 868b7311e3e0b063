from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.chaos.targets import Target


@pytest.fixture
def start_target() -> Iterator[Callable[..., Target]]:
    """Starts targets with these DraftSettings; ends them, and fails if one of their processes stays."""
    targets: list[Target] = []

    def start(**settings: Any) -> Target:
        targets.append(Target(**settings))
        return targets[-1]

    yield start
    for target in targets:
        target.end()
