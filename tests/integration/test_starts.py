"""However vLLM is started, method double is there, and a mistake is told in one sentence."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.integration

ROOT = Path(__file__).resolve().parents[2]
TARGET = ROOT / "benchmarks/pair/target"
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "PYTHONPATH": os.environ.get("PYTHONPATH", "")}
DOUBLE = {"method": "double", "num_speculative_tokens": 4}


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *arguments]
    env = {**os.environ, **ENVIRONMENT}
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env, timeout=240, check=False)


_CONFIGURE = f"""
def configured():
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser
    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
    args = parser.parse_args([*"--model {TARGET} --max-model-len 256 --enforce-eager".split(), *options])
    config = AsyncEngineArgs.from_cli_args(args).create_engine_config().speculative_config
    return type(config).__name__, config.num_speculative_tokens
"""


@pytest.mark.parametrize(
    "first",
    [
        "import vllm.plugins; vllm.plugins.load_general_plugins()",
        "import vllm.engine.arg_utils; import vllm.plugins; vllm.plugins.load_general_plugins()",
        "import vllm_double.plugin; vllm_double.plugin.register(); vllm_double.plugin.register()",
    ],
)
def test_the_method_is_known_in_every_order_of_imports_as_json_and_as_flags(first: str) -> None:
    code = f"{first}\noptions = ['--spec-method', 'double', '--spec-tokens', '7']\n{_CONFIGURE}\nprint('found', *configured())"
    code += f"\noptions = ['--speculative-config', {json.dumps(DOUBLE)!r}]\nprint('found', *configured())"
    code += "\noptions += ['--spec-tokens', '7']\nconfigured()"
    done = run("-c", code)
    found = [line for line in done.stdout.splitlines() if line.startswith("found")]
    assert found == ["found DoubleSpeculativeConfig 7", "found DoubleSpeculativeConfig 4"], done.stderr
    sentence = '--spec-tokens and "num_speculative_tokens" in --speculative-config exclude each other: leave one out.'
    assert done.stderr.splitlines()[-1].endswith(sentence)


_OFFLINE = f"from vllm import LLM; LLM({str(TARGET)!r}, max_model_len=256, speculative_config="


@pytest.mark.parametrize("module", ["openai.api_server", "cli.main", "openai.run_batch"])
def test_every_command_of_vllm_says_one_sentence_about_a_setting(module: str, tmp_path: Path) -> None:
    options = ["serve", str(TARGET)] if module == "cli.main" else ["--model", str(TARGET)]
    if module == "openai.run_batch":
        (tmp_path / "in").touch()
        options += ["-i", str(tmp_path / "in"), "-o", str(tmp_path / "out")]
    speculative = json.dumps(DOUBLE | {"double": {"enabeld": False}})
    done = run("-m", f"vllm.entrypoints.{module}", *options, "--speculative-config", speculative)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    said = [line for line in done.stderr.splitlines() if line.startswith("vllm-double: ")]
    assert said == ["""vllm-double: "double" has no setting 'enabeld'; the nearest one is "enabled"."""]


def test_offline_the_last_line_of_the_exception_is_the_sentence() -> None:
    done = run("-c", f"{_OFFLINE}{DOUBLE | {'double': {'enabeld': False}}})")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].endswith("""ConfigError: "double" has no setting 'enabeld'; the nearest one is "enabled".""")
