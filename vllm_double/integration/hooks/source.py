"""What a function of vLLM looks like, read from its source file and without importing it.

Reading the file rather than the live object has two gains: nothing heavy is imported where the configuration
is built, and a function that somebody (we included) has already replaced still shows what was installed.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from zipfile import Path as ZipPath

_FunctionNode = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True, slots=True)
class FunctionSource:
    """A function: parameters without annotations, the body's fingerprint, and where it is."""

    parameters: str
    fingerprint: str
    path: str
    line: int


def read_function(target: str, root: Path | ZipPath | None = None) -> FunctionSource | None:
    """The function named "package.module:Class.method"; None when the module or the function is missing.

    root: the folder, or wheel, that holds the package; None: the installed one.
    """
    module_name, _, qualified_name = target.partition(":")
    path = _installed(module_name) if root is None else _below(root, module_name)
    if path is None:
        return None
    lines, tree = _parse(path.read_text(encoding="utf-8"))
    scope: ast.AST = tree
    for name in qualified_name.split("."):
        found = _member(scope, name)
        if found is None:
            return None
        scope = found
    if not isinstance(scope, _FunctionNode):
        return None
    return FunctionSource(_parameters(scope.args), _fingerprint(lines, scope), str(path), scope.lineno)


def _below(root: Path | ZipPath, module_name: str) -> Path | ZipPath | None:
    folder = module_name.replace(".", "/")
    paths = [root / f"{folder}.py", root / f"{folder}/__init__.py"]
    return next((path for path in paths if path.is_file()), None)


def _installed(module_name: str) -> Path | None:
    try:
        spec = importlib.util.find_spec(module_name)
    except ModuleNotFoundError:
        return None
    if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
        return None
    return Path(spec.origin)


@cache
def _parse(text: str) -> tuple[tuple[str, ...], ast.Module]:
    return tuple(text.splitlines()), ast.parse(text)


def _member(scope: ast.AST, name: str) -> ast.AST | None:
    for node in getattr(scope, "body", []):
        if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) and node.name == name:
            return node
    return None


def _parameters(arguments: ast.arguments) -> str:
    positional = [*arguments.posonlyargs, *arguments.args]
    defaults: list[ast.expr | None] = [None] * (len(positional) - len(arguments.defaults))
    defaults += arguments.defaults
    parts = [_parameter(argument, default) for argument, default in zip(positional, defaults, strict=True)]
    if arguments.posonlyargs:
        parts.insert(len(arguments.posonlyargs), "/")
    if arguments.vararg is not None:
        parts.append(f"*{arguments.vararg.arg}")
    elif arguments.kwonlyargs:
        parts.append("*")
    keyword_only = zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
    parts += [_parameter(argument, default) for argument, default in keyword_only]
    if arguments.kwarg is not None:
        parts.append(f"**{arguments.kwarg.arg}")
    return ", ".join(parts)


def _parameter(argument: ast.arg, default: ast.expr | None) -> str:
    return argument.arg if default is None else f"{argument.arg}={ast.unparse(default)}"


def _fingerprint(lines: tuple[str, ...], function: _FunctionNode) -> str:
    body = function.body
    if ast.get_docstring(function, clean=False) is not None:
        body = body[1:]
    if not body:
        return "empty"
    code = (line.strip() for line in lines[body[0].lineno - 1 : body[-1].end_lineno])
    text = "\n".join(line for line in code if line and not line.startswith("#"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]
