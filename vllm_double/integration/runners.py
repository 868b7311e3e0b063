"""Which of vLLM's model runners runs the target: vLLM's own choice, V2 where it can."""

import functools
import sys
from typing import Any

from vllm.config import VllmConfig
from vllm.v1.worker.gpu import spec_decode

__all__ = ["allow_v2"]

_MARK = "_vllm_double_wrapped"
_METHOD = "'custom_class'"  # what method double is to vLLM, as it names it among what V2 does not support
_RUNNER = "vllm.v1.worker.gpu.model_runner"  # imports the function by name; nobody loads it where V1 runs


def allow_v2(config_class: type) -> None:
    """Have this process take method double (``config_class``) for one that V2 supports, and build its speculator. Once."""
    unsupported, build = VllmConfig._get_v2_model_runner_unsupported_features, spec_decode.init_speculator
    if getattr(build, _MARK, False):
        return

    @functools.wraps(unsupported)
    def unsupported_features(self: Any) -> list[str]:
        features: list[str] = unsupported(self)
        if isinstance(self.speculative_config, config_class):
            features = [feature for feature in features if _METHOD not in feature]
        return features

    @functools.wraps(build)
    def init_speculator(vllm_config: Any, device: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(vllm_config.speculative_config, config_class):
            return build(vllm_config, device, *args, **kwargs)
        from vllm_double.integration.v2 import DoubleSpeculator

        return DoubleSpeculator(vllm_config, device)

    setattr(init_speculator, _MARK, True)
    VllmConfig._get_v2_model_runner_unsupported_features = unsupported_features
    spec_decode.init_speculator = init_speculator
    if _RUNNER in sys.modules:
        setattr(sys.modules[_RUNNER], "init_speculator", init_speculator)  # noqa: B010 (a module's attribute, to mypy)
