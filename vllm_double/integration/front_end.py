"""What method double changes in the front end's processes.

A request whose "double" cannot be read is refused where vLLM checks sampling parameters, so that whoever made the mistake hears
of it: the worker can only go without drafts.
"""

import functools
from typing import Any

from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import SamplingParams

from vllm_double.config import ConfigError
from vllm_double.request_args import RequestArgs

__all__ = ["refuse_malformed"]

_MARK = "_vllm_double_wrapped"


def refuse_malformed(config_class: type) -> None:
    """Have this process refuse requests whose "double" cannot be read, where speculation is configured by this class. Once."""
    original = SamplingParams.verify
    if getattr(original, _MARK, False):
        return

    @functools.wraps(original)
    def verify(self: Any, model_config: Any, speculative_config: Any, *args: Any, **kwargs: Any) -> None:
        original(self, model_config, speculative_config, *args, **kwargs)
        if isinstance(speculative_config, config_class):
            try:
                RequestArgs.parse(self.extra_args)
            except ConfigError as error:
                raise VLLMValidationError(str(error), parameter="double") from None

    setattr(verify, _MARK, True)
    SamplingParams.verify = verify
