"""A target that answers edit prompts by a script: their replies repeat the prompt, which the small target cannot do by itself.

`write` makes a folder with the prompts, the script and the bundled target's weights; servers started with
`environment` know the architecture that its config names. To all other prompts it is the bundled target.
"""

import os
from pathlib import Path

from benchmarks.machine import ROOT

__all__ = ["ARCHITECTURE", "environment", "register"]

ARCHITECTURE = "ScriptedLlamaForCausalLM"


def register() -> None:
    """vLLM's general plug-in, called in every process of a server."""
    from vllm import ModelRegistry

    ModelRegistry.register_model(ARCHITECTURE, f"benchmarks.scripted.model:{ARCHITECTURE}")


def environment() -> dict[str, str]:
    """The variables with which a server finds the plug-in: a distribution without an installation."""
    folders = [str(Path(__file__).with_name("distribution")), str(ROOT), os.environ.get("PYTHONPATH", "")]
    return {"PYTHONPATH": os.pathsep.join(filter(None, folders))}
