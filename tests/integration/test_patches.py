"""The patch table and its gate against the installed vLLM."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import logging
import subprocess
import sys
import zipfile
from dataclasses import replace
from enum import Enum
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.integration.mended import BY_NAME, cpu_kernels, is_applied, without
from vllm_double.cli import main
from vllm_double.integration import hooks as patches
from vllm_double.integration.hooks import registry
from vllm_double.integration.hooks.source import read_function

torch = pytest.importorskip("torch")
vllm = pytest.importorskip("vllm")

__all__ = ["cpu_kernels"]  # a fixture is used by being imported

INSTALLED = vllm.__version__
INSTALLED_MINOR = ".".join(INSTALLED.split(".")[:2])


FUNCTIONS = [entry for entry in patches.ENTRIES if isinstance(entry, patches.Entry)]
NAMES = [entry for entry in patches.ENTRIES if isinstance(entry, patches.Names)]
PACKAGE = Path(patches.__file__).parents[2]


# The table


def test_importing_the_table_imports_neither_vllm_nor_torch() -> None:
    code = "import sys, vllm_double.integration.hooks; sys.exit(any(name in sys.modules for name in ('vllm', 'torch')))"
    assert subprocess.run([sys.executable, "-c", code], cwd=PACKAGE.parent, check=False).returncode == 0


def test_the_installed_vllm_is_as_the_table_says() -> None:
    assert INSTALLED_MINOR in patches.SUPPORTED
    assert patches.check(patches.ENTRIES) == []


def test_each_function_is_in_the_table_once() -> None:
    assert len({entry.target for entry in FUNCTIONS}) == len(FUNCTIONS)


@pytest.mark.parametrize("entry", FUNCTIONS, ids=lambda entry: entry.target)
def test_each_entry_says_what_why_and_what_would_make_it_superfluous(entry: patches.Entry) -> None:
    assert all(len(text.strip()) > 5 for text in (entry.what, entry.why, entry.superfluous_once))


def imported_names() -> set[tuple[str, str]]:
    """(module, name) of all that our package imports from vLLM, wherever it does."""
    found: set[tuple[str, str]] = set()
    for file in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module is not None and node.module.split(".")[0] == "vllm":
                found |= {(node.module, alias.name) for alias in node.names}
            if isinstance(node, ast.Import):
                assert not [alias for alias in node.names if alias.name.split(".")[0] == "vllm"], f"{file}: import a name of it"
    return found


def test_all_that_the_package_imports_of_vllm_is_in_the_table() -> None:
    known = {(entry.target, name) for entry in NAMES for name in entry.names.split()}
    assert len(imported_names()) > 40
    assert imported_names() - known == set()


def test_a_name_that_vllm_no_longer_has_is_found_missing() -> None:
    (mismatch,) = patches.check([patches.Names("vllm.v1.outputs", "DraftTokenIds NoSuchOutput")])
    assert mismatch == "NoSuchOutput of vllm.v1.outputs cannot be found"
    (mismatch,) = patches.check([patches.Names("vllm.v1.core.sched.scheduler:Scheduler", "requests no_such_attribute")])
    assert mismatch == "no_such_attribute of vllm.v1.core.sched.scheduler.Scheduler cannot be found"


def function_with(tmp_path: Path, parameters: str) -> list[str]:
    """What is wrong with a function of these parameters where (self, first, second=None) are relied upon."""
    (tmp_path / "some").mkdir(exist_ok=True)
    (tmp_path / "some/module.py").write_text(f"def function({parameters}):\n    return first\n")
    entry = patches.Entry("some.module:function", "self, first, second=None", "called", "for a test", "it is no more")
    return patches.check([entry], tmp_path)


@pytest.mark.parametrize("more", ["", ", third=None", ", third: int | None = None, *, fourth=()", ", *others, **options"])
def test_a_new_parameter_that_may_be_left_out_fits(tmp_path: Path, more: str) -> None:
    assert function_with(tmp_path, f"self, first: int, second=None{more}") == []


@pytest.mark.parametrize("parameters", ["self, first", "self, second, first=None", "self, zeroth, first, second=None",
                                        "self, first, second=1", "self, first, second=None, *, third"])  # fmt: skip
def test_a_parameter_that_went_or_came_in_between_does_not_fit(tmp_path: Path, parameters: str) -> None:
    (mismatch,) = function_with(tmp_path, parameters)
    assert "(self, first, second=None) was expected" in mismatch


class Global:
    """A default that is a module's global, shown as it is written."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __repr__(self) -> str:
        return self._name


def as_written(parameter: inspect.Parameter, module: ModuleType) -> inspect.Parameter:
    """Without its annotation."""
    default = parameter.default
    if isinstance(default, Enum):
        default = Global(f"{type(default).__name__}.{default.name}")
    elif default is not parameter.empty and not isinstance(default, str | int | float | tuple | None):
        default = next(Global(name) for name, value in vars(module).items() if value is default)
    return parameter.replace(annotation=inspect.Parameter.empty, default=default)


@pytest.mark.parametrize("entry", FUNCTIONS, ids=lambda entry: entry.target)
def test_the_source_reader_agrees_with_inspect(entry: patches.Entry) -> None:
    path, _, name = entry.target.partition(":")
    module = importlib.import_module(path)
    function: Any = module
    for part in name.split("."):
        function = getattr(function, part)
    parameters = inspect.signature(inspect.unwrap(function)).parameters.values()
    named = [as_written(parameter, module) for parameter in parameters]
    found = read_function(entry.target)
    assert found is not None
    written = [part for part in found.parameters if part != "*"]
    assert list(map(str, named)) == written


def test_a_vllm_that_is_not_installed_is_read_from_its_wheel(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = Path(vllm.__file__).parents[1]
    assert main(["check", "--source", str(folder)]) == 0
    modules = {entry.target.partition(":")[0] for entry in patches.ENTRIES}
    sources = [spec.origin for module in modules if (spec := importlib.util.find_spec(module)) is not None and spec.origin]
    paths = {folder / "vllm/__init__.py", *map(Path, sources)}
    # A package's own modules are names of it, too.
    paths |= {folder / "vllm/v1/worker/gpu/spec_decode/__init__.py"}
    texts = {str(path.relative_to(folder)): path.read_text() for path in paths}
    renamed = {name: text.replace("def _input_fits_in_drafter", "def fits") for name, text in texts.items()}
    wheels = [tmp_path / "same.whl", tmp_path / "renamed.whl", tmp_path / "none.whl"]
    for wheel, files in zip(wheels, (texts, renamed, {"other/__init__.py": ""}), strict=True):
        with zipfile.ZipFile(wheel, "w") as archive:
            for name, text in files.items():
                archive.writestr(name, text)
    capsys.readouterr()
    assert [main(["check", "--source", str(wheel)]) for wheel in wheels] == [0, 1, 2]
    first, *others = capsys.readouterr().err.splitlines()
    assert "_input_fits_in_drafter" in first and "does not exist" in first
    assert len(others) == 1 and "neither a wheel of vLLM" in others[0]


def test_the_model_runner_takes_vllms_factory_of_custom_proposers() -> None:
    runner = importlib.import_module("vllm.v1.worker.gpu_model_runner")
    factory = importlib.import_module("vllm.v1.spec_decode.custom_class_proposer").create_custom_proposer
    assert runner.create_custom_proposer is factory


# The gate


PROPOSE = "vllm.v1.worker.gpu_model_runner:GPUModelRunner.propose_draft_token_ids"
UPDATE = "vllm.v1.worker.gpu_model_runner:GPUModelRunner._update_states"
REJECT = "vllm.utils.cpu_triton_utils:_rejection_random_sample_kernel_impl"
EXPAND = "vllm.utils.cpu_triton_utils:_expand_kernel_impl"


def changed(target: str) -> patches.Entry:
    return replace(BY_NAME[target], parameters="self, something_else", patch=None)


def test_a_supported_version_starts_without_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        patches.require(patches.ENTRIES, INSTALLED, "cpu")
    assert caplog.records == []


def test_a_newer_version_with_equal_functions_starts_with_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="vllm_double"):
        patches.require(patches.ENTRIES, "0.77.1+cpu", "cpu")
        patches.require(patches.ENTRIES, "0.77.1+cpu", "cpu")
    assert [record.getMessage().count("0.77.1+cpu") for record in caplog.records] == [1]


def test_a_mismatch_is_refused_in_one_sentence_that_names_it() -> None:
    with pytest.raises(patches.UnsupportedVllm) as refused:
        patches.require([changed(UPDATE), changed(PROPOSE), BY_NAME[REJECT]], "0.33.0", "cpu")
    message = str(refused.value)
    assert "GPUModelRunner._update_states of vllm.v1.worker.gpu_model_runner takes (self, scheduler_output)" in message
    assert "and 1 more differ: see `vllm-double check`" in message
    assert message.endswith(".")
    assert message.count(". ") == 0


@pytest.mark.parametrize("target", ["vllm.no_such_module:function", "vllm.v1.outputs:no_such_function"])
def test_a_missing_function_is_refused(target: str) -> None:
    with pytest.raises(patches.UnsupportedVllm, match="does not exist"):
        patches.require([replace(BY_NAME[UPDATE], target=target)], "0.33.0", "cpu")


def test_an_older_version_is_refused() -> None:
    with pytest.raises(patches.UnsupportedVllm, match=r"needs vLLM 0\.31 or newer, and 0\.30\.4 is installed"):
        patches.require([], "0.30.4", "cpu")


def test_an_unreadable_version_is_refused() -> None:
    with pytest.raises(patches.UnsupportedVllm, match="'dev'"):
        patches.require([], "dev", "cpu")


def test_mends_of_the_cpu_sampler_matter_on_a_cpu_alone() -> None:
    broken = replace(BY_NAME[REJECT], parameters="output")
    patches.require([broken], INSTALLED, "cuda")
    with pytest.raises(patches.UnsupportedVllm):
        patches.require([broken], INSTALLED, "cpu")


def test_a_function_with_another_body_is_not_replaced(cpu_kernels: Any) -> None:
    entry = BY_NAME[REJECT]
    broken = replace(entry, fingerprint="0" * 16)
    with without(entry.target):
        with pytest.raises(patches.UnsupportedVllm, match="the body of _rejection_random_sample_kernel_impl"):
            patches.apply([BY_NAME[EXPAND], broken], INSTALLED)
        assert not is_applied(entry)


def test_a_replacement_without_a_fingerprint_is_not_allowed() -> None:
    with pytest.raises(ValueError, match="fingerprint"):
        replace(BY_NAME[REJECT], fingerprint="")


# Putting mends in place


def test_mends_are_put_in_place_once_and_come_off(cpu_kernels: Any) -> None:
    names = [
        "_expand_kernel_impl",
        "_rejection_random_sample_kernel_impl",
        "_sample_recovered_tokens_kernel_impl",
    ]
    mended = [getattr(cpu_kernels, name) for name in names]
    patches.mend_cpu_sampler({})
    assert [getattr(cpu_kernels, name) for name in names] == mended
    patches.revert(patches.MENDS)
    patches.revert(patches.MENDS)
    for entry in patches.MENDS:
        original = getattr(cpu_kernels, entry.function)
        assert original.__module__ == cpu_kernels.__name__
        assert not hasattr(original, "__wrapped__")


@pytest.mark.parametrize("registered_first", [True, False])
def test_mends_hold_whether_kernels_are_registered_before_or_after_them(cpu_kernels: Any, registered_first: bool) -> None:
    from vllm.platforms import current_platform
    from vllm.v1.sample.rejection_sampler import expand_batch_to_tokens

    patches.revert(patches.MENDS)
    if registered_first:
        current_platform.register_triton_kernel_overrides()
    patches.mend_cpu_sampler({})
    if not registered_first:
        current_platform.register_triton_kernel_overrides()
    for seed in range(3):
        values = torch.rand(64, generator=torch.Generator().manual_seed(seed))
        expanded = expand_batch_to_tokens(values, torch.arange(1, 65, dtype=torch.int32) * 2, 128)
        assert torch.equal(expanded, values.repeat_interleave(2))


def test_the_switch_leaves_mends_off(cpu_kernels: Any) -> None:
    patches.revert(patches.MENDS)
    assert patches.mend_cpu_sampler({"VLLM_DOUBLE_MEND_CPU_SAMPLER": "0"}) == ()
    assert not any(map(is_applied, patches.MENDS))


def test_an_unknown_sampler_is_left_as_it_is_with_a_warning(
    cpu_kernels: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    patches.revert(patches.MENDS)
    with monkeypatch.context() as patched, caplog.at_level(logging.WARNING, logger="vllm_double"):
        patched.setattr(registry, "read_function", lambda target, root: None)
        assert patches.mend_cpu_sampler({}) == ()
    assert "vLLM's CPU sampler is left as it is" in caplog.text
    assert not any(map(is_applied, patches.MENDS))
