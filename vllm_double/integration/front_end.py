"""What method double changes in the front end's processes.

A request whose "double" cannot be read is refused where vLLM checks sampling parameters, so that whoever made the mistake hears
of it: the worker can only go without drafts. And `min_p` and `logit_bias` are not refused: method double applies them behind
each draft token.
"""

import functools
from typing import Any

from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import SamplingParams

from vllm_double.config import ConfigError
from vllm_double.integration.request_args import RequestArgs

__all__ = ["check_requests"]

_MARK = "_vllm_double_wrapped"


def check_requests(config_class: type) -> None:
    """Have this process check requests of method double (``config_class``) by what that method needs. Once."""
    original = SamplingParams._validate_spec_decode
    if getattr(original, _MARK, False):
        return

    @functools.wraps(original)
    def validate_spec_decode(self: Any, speculative_config: Any) -> None:
        if not isinstance(speculative_config, config_class):
            original(self, speculative_config)
            return
        try:
            RequestArgs.parse(self.extra_args)
        except ConfigError as error:
            raise VLLMValidationError(str(error), parameter="double") from None

    setattr(validate_spec_decode, _MARK, True)
    SamplingParams._validate_spec_decode = validate_spec_decode
