"""The entry point (group vllm.general_plugins). It never raises, and imports next to nothing.

vLLM calls it in every process before a configuration is built; an exception here would end every `vllm serve` on the machine.
"""

import logging
import sys
from typing import Any

__all__ = ["register"]

_logger = logging.getLogger("vllm.double")


def register() -> None:
    """Teach vLLM the method "double" and mend the CPU sampler; without the method nothing else of vLLM changes."""
    try:
        # Only processes that build configurations have loaded the engine's arguments.
        arguments = sys.modules.get("vllm.engine.arg_utils")
        engine_args = getattr(arguments, "EngineArgs", None)
        if engine_args is not None:
            _wrap(engine_args)
        from vllm_double.integration.hooks import mend_cpu_sampler

        mend_cpu_sampler()
    except Exception:
        _logger.exception("vllm-double cannot be registered; vLLM runs without it.")


def _wrap(engine_args: Any) -> None:
    from vllm_double.wrap import wrap_once

    @wrap_once(engine_args, "create_speculative_config")
    def create_speculative_config(original: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
        raw = {key.replace("-", "_"): value for key, value in (self.speculative_config or {}).items()}
        if raw.get("method", getattr(self, "spec_method", None)) != "double":
            return original(self, *args, **kwargs)
        return _create(self, raw, *args, **kwargs)


def _create(engine_args: Any, raw: dict[str, Any], target_model_config: Any = None, target_parallel_config: Any = None) -> Any:
    from vllm_double.config import ConfigError
    from vllm_double.integration.hooks import ENTRIES, UnsupportedVllm, require

    try:
        require(ENTRIES)
        from vllm_double.integration.speculative_config import SCHEDULER_PATH, build
        from vllm_double.operations.metrics import expose

        for flag, key in (("spec_model", "model"), ("spec_tokens", "num_speculative_tokens")):
            value = getattr(engine_args, flag, None)
            if value is not None:
                raw.setdefault(key, value)
        raw.update(target_model_config=target_model_config, target_parallel_config=target_parallel_config)
        config = build(raw)
        if config is None:
            _logger.info('Method double is switched off ("enabled": false); vLLM runs without it.')
            return None
        if getattr(engine_args, "async_scheduling", None):
            raise ConfigError('Method "double" needs synchronous scheduling: leave out --async-scheduling.')
        if getattr(engine_args, "watermark_config", None) is not None:
            raise ConfigError('Method "double" does not support watermarking: leave out --watermark-config.')
        if getattr(engine_args, "scheduler_cls", None) not in (None, SCHEDULER_PATH):
            raise ConfigError('Method "double" has a scheduler of its own: leave out --scheduler-cls.')
        engine_args.scheduler_cls = SCHEDULER_PATH
        # Not every vLLM turns it off by itself for a speculator of its V2 runner that it does not know.
        engine_args.async_scheduling = False
        if engine_args._api_process_count == 1 or engine_args._api_process_rank < 0:  # once, of however many front ends
            _logger.info("Method double: asynchronous scheduling is off, because draft tokens are proposed between two steps.")
        expose(config.metrics_key, target_parallel_config.data_parallel_size)
        return config
    except (ConfigError, UnsupportedVllm) as error:
        if _is_command():
            # A person typed this: one sentence, not a traceback.
            print(f"vllm-double: {error}", file=sys.stderr, flush=True)
            raise SystemExit(2) from None
        raise


def _is_command() -> bool:
    return "vllm.entrypoints.cli.main" in sys.modules and sys.argv[1:2] == ["serve"]
