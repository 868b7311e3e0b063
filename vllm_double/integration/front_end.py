"""What method double changes in every process with its configuration: any can be a front end or run the model."""

import os
import sys
from typing import Any

from vllm.config import VllmConfig
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import SamplingParams
from vllm.utils.ompmultiprocessing import OMPProcessManager
from vllm.v1.worker.gpu import spec_decode

from vllm_double.config import ConfigError
from vllm_double.integration.request_args import RequestArgs
from vllm_double.wrap import wrap_once

__all__ = ["allow_v2", "bind_target", "check_requests"]

_METHOD = "'custom_class'"  # what method double is to vLLM, as it names it among what V2 does not support
_BIND = "VLLM_CPU_OMP_THREADS_BIND"
_RUNNER = "vllm.v1.worker.gpu.model_runner"  # imports init_speculator by name; not loaded if V1 runs


def check_requests(config_class: type) -> None:
    """Check requests of method double (``config_class``) by what that method needs. Once per process.

    A request whose "double" cannot be read is refused where vLLM checks sampling parameters, so that its sender learns of it.
    `min_p` and `logit_bias` are not refused: method double applies them behind each draft token.
    """

    @wrap_once(SamplingParams, "_validate_spec_decode")
    def validate_spec_decode(original: Any, self: Any, speculative_config: Any) -> None:
        if not isinstance(speculative_config, config_class):
            original(self, speculative_config)
            return
        try:
            RequestArgs.parse(self.extra_args)
        except ConfigError as error:
            raise VLLMValidationError(str(error), parameter="double") from None


def allow_v2(config_class: type) -> None:
    """Leave the choice of the target's model runner to vLLM, which takes V2 if it can, and build V2's speculator. Once per
    process.
    """

    @wrap_once(VllmConfig, "_get_v2_model_runner_unsupported_features")
    def unsupported_features(original: Any, self: Any) -> list[str]:
        features: list[str] = original(self)
        if isinstance(self.speculative_config, config_class):
            features = [feature for feature in features if _METHOD not in feature]
        return features

    @wrap_once(spec_decode, "init_speculator")
    def init_speculator(original: Any, vllm_config: Any, device: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(vllm_config.speculative_config, config_class):
            return original(vllm_config, device, *args, **kwargs)
        from vllm_double.integration.v2 import DoubleSpeculator

        return DoubleSpeculator(vllm_config, device)

    if _RUNNER in sys.modules:
        setattr(sys.modules[_RUNNER], "init_speculator", spec_decode.init_speculator)  # noqa: B010 (a module's, to mypy)


def bind_target(config_class: type) -> None:
    """Give the target's workers their cores of a CPU. The variable by which vLLM's executor is told is the user's again
    afterwards, because an engine that this process starts later has cores of its own. Once per process.
    """

    @wrap_once(OMPProcessManager, "__init__")
    def init(original: Any, self: Any, config: Any) -> None:
        speculative: Any = config.speculative_config
        cores = getattr(speculative, "cores", None) if isinstance(speculative, config_class) else None
        if cores is None:
            original(self, config)
            return
        before = os.environ.get(_BIND)
        os.environ[_BIND] = cores.bind
        try:
            original(self, config)
        finally:
            if before is None:
                del os.environ[_BIND]
            else:
                os.environ[_BIND] = before
