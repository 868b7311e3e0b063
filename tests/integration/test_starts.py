"""However vLLM is started, method double is there, and a mistake is told in one sentence."""

import json
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from tests.chaos.chaos import MARKER, Run, wait_for
from vllm_double.operations.control_socket import Address, ask, find

pytestmark = pytest.mark.integration

ROOT = Path(__file__).resolve().parents[2]
TARGET = ROOT / "benchmarks/pair/target"
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "PYTHONPATH": os.environ.get("PYTHONPATH", "")}
SENTENCE = """"double" has no setting 'enabeld'; the nearest one is "enabled"."""
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
    assert said == [f"vllm-double: {SENTENCE}"]


def test_offline_the_last_line_of_the_exception_is_the_sentence() -> None:
    done = run("-c", f"{_OFFLINE}{DOUBLE | {'double': {'enabeld': False}}})")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].endswith(
        """ConfigError: "double" has no setting 'enabeld'; the nearest one is "enabled"."""
    )


def accepted(address: Address) -> int:
    """Tokens of the draft model that the target accepted so far; 0: a busy engine gave no answer."""
    try:
        return int(ask(address, timeout_s=5).values["accepted"].get("draft", 0))
    except (OSError, ValueError):
        return 0


@pytest.mark.parametrize("timeout_s", [0, 60], ids=["at once", "after the requests"])
def test_a_stop_is_quiet_about_what_is_ours_and_drafts_go_on_while_requests_drain(timeout_s: int, tmp_path: Path) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = str(unused.getsockname()[1])
    others, run, log = set(find()), Run(secrets.token_hex(8)), tmp_path / "log"
    speculative = json.dumps(DOUBLE | {"model": str(TARGET.parent / "draft"), "double": {"target_retrieval": False}})
    options = f"--dtype float32 --enforce-eager --max-model-len 512 --shutdown-timeout {timeout_s} --port {port}".split()
    command = [str(Path(sys.executable).with_name("vllm")), "serve", str(TARGET), *options, "--speculative-config", speculative]
    with log.open("w") as output:
        env = {**os.environ, **ENVIRONMENT, MARKER: run.token}
        server = subprocess.Popen(command, stdout=output, stderr=output, cwd=ROOT, env=env)
    try:
        wait_for(lambda: set(find()) - others, 180, log.read_text)
        (address,) = set(find()) - others
        wait_for(lambda: ask(address, timeout_s=5).values["worker_up"], 120, log.read_text)
        wait_for(lambda: "Application startup complete" in log.read_text(), 60, log.read_text)
        wanted = {
            "model": str(TARGET),
            "prompt": "def f(x):",
            "max_tokens": 400,
            "ignore_eos": True,
            "temperature": 0,
            "stream": True,
        }
        request = urllib.request.Request(f"http://127.0.0.1:{port}/v1/completions", json.dumps(wanted).encode())
        request.add_header("Content-Type", "application/json")
        with urllib.request.urlopen(request, timeout=60) as response:
            response.readline()
            told, before = len(log.read_text()), accepted(address)
            server.send_signal(signal.SIGTERM)
            if timeout_s:
                wait_for(lambda: "mode=drain" in log.read_text(), 30, log.read_text)
                wait_for(lambda: accepted(address) > before + 20, 30, log.read_text)
                assert b'"finish_reason":"length"' in response.read()
        assert server.wait(60) == 0
        run.wait_until_gone(15)
        said = log.read_text()[told:]
        assert set(re.findall(r"force killing sub process (\S+)", said)) <= ({"VLLM::Worker"} if not timeout_s else set())
        assert not [line for line in said.splitlines() if re.search("WARNING|ERROR", line) and "draft" in line]
    finally:
        run.end()
        server.wait()
