"""The entry point (group vllm.general_plugins). It never raises, and imports next to nothing.

vLLM calls it in every process before a configuration is built; an exception here would end every `vllm serve` on the machine.
"""

import importlib
import logging
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

__all__ = ["register"]

_logger = logging.getLogger("vllm.double")
_ARGUMENTS = "vllm.engine.arg_utils"  # only processes that build configurations import it


def register() -> None:
    """Teach vLLM the method "double" and mend the CPU sampler; without the method nothing else of vLLM changes."""
    try:
        if _ARGUMENTS in sys.modules:
            _wrap(importlib.import_module(_ARGUMENTS))  # waits for a thread that is importing it
        elif not any(isinstance(finder, _WrapAfterImport) for finder in sys.meta_path):
            sys.meta_path.insert(0, _WrapAfterImport())
        from vllm_double.integration.hooks import mend_cpu_sampler

        mend_cpu_sampler()
    except Exception:
        _logger.exception("vllm-double cannot be registered; vLLM runs without it.")


class _WrapAfterImport:
    """A finder of modules, which has the others find the module and wraps what is in it once it is imported."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != _ARGUMENTS:
            return None
        found = (finder.find_spec(name, path, target) for finder in sys.meta_path if finder is not self)
        spec: Any = next(filter(None, found), None)
        if spec is not None:
            execute = spec.loader.exec_module

            def execute_and_wrap(module: ModuleType) -> None:
                execute(module)
                register()

            spec.loader.exec_module = execute_and_wrap
        return spec


def _wrap(arguments: Any) -> None:
    from vllm_double.wrap import wrap_once

    @wrap_once(arguments.EngineArgs, "create_speculative_config")
    def create_speculative_config(original: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
        raw = {key.replace("-", "_"): value for key, value in (self.speculative_config or {}).items()}
        if raw.get("method", getattr(self, "spec_method", None)) != "double":
            return original(self, *args, **kwargs)
        return _create(self, raw, *args, **kwargs)

    @wrap_once(arguments.EngineArgs, "create_engine_config")
    def create_engine_config(original: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
        before = self.scheduler_cls, self.async_scheduling
        try:
            return original(self, *args, **kwargs)
        finally:
            self.scheduler_cls, self.async_scheduling = before

    @wrap_once(arguments.EngineArgs, "add_cli_args")
    def add_cli_args(original: Any, parser: Any) -> Any:
        parser = original(parser)
        for action in parser._actions:
            if "--spec-method" in action.option_strings and action.choices is not None:
                action.choices = [*action.choices, "double"]
        return parser


def _create(engine_args: Any, raw: dict[str, Any], target_model_config: Any = None, target_parallel_config: Any = None) -> Any:
    from vllm_double.config import ConfigError
    from vllm_double.integration.hooks import ENTRIES, UnsupportedVllm, require

    try:
        require(ENTRIES)
        from vllm_double.integration.speculative_config import SCHEDULER_PATH, build
        from vllm_double.operations.metrics import expose

        for name, key in (("method", "method"), ("model", "model"), ("tokens", "num_speculative_tokens")):
            value = getattr(engine_args, f"spec_{name}", None)
            if value is not None and key in raw:
                raise ConfigError(f'--spec-{name} and "{key}" in --speculative-config exclude each other: leave one out.')
            if value is not None:
                raw[key] = value
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
        expose(config, target_parallel_config.data_parallel_size)
        return config
    except (ConfigError, UnsupportedVllm) as error:
        if _is_command():
            # A person typed this: one sentence, not a traceback.
            print(f"vllm-double: {error}", file=sys.stderr, flush=True)
            raise SystemExit(2) from None
        raise


def _is_command() -> bool:
    """Whether a person started a program of vLLM's: `vllm ...` or `python -m vllm...`."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    if spec is not None:
        return str(spec.name).startswith("vllm.")
    return "vllm.entrypoints.cli.main" in sys.modules and Path(sys.argv[0]).name == "vllm"
