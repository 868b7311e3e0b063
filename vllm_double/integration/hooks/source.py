"""What a function of vLLM looks like, read from its source file and without importing it.

Reading the file rather than the live object has two gains. Nothing heavy is imported where the configuration is built, and a
function that somebody (we included) has already replaced still shows what was installed.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from zipfile import Path as ZipPath

__all__ = ["FunctionSource", "names_in", "read_function"]

Root = Path | ZipPath
_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


@dataclass(frozen=True, slots=True)
class FunctionSource:
    """A function: its parameters without annotations, as they are written, and the fingerprint of its body."""

    parameters: tuple[str, ...]
    fingerprint: str


def read_function(target: str, root: Root | None = None) -> FunctionSource | None:
    """The function named "package.module:Class.method"; None if the module or the function is missing.

    root: the folder, or wheel, that holds the package; None: the installed one.
    """
    lines, scope = _find(target, root)
    if not isinstance(scope, _FUNCTIONS):
        return None
    arguments = scope.args
    for argument in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg):
        if argument is not None:
            argument.annotation = None
    # A default may hold commas, a parameter's name cannot.
    parameters = tuple(part.strip() for part in ast.unparse(arguments).split(", "))
    return FunctionSource(parameters, _fingerprint(lines, scope))


def names_in(target: str, root: Root | None = None) -> set[str]:
    """All names that occur in "package.module" or "package.module:Class", comments left out, and a package's own modules."""
    module_name, _, class_name = target.partition(":")
    path = _path_of(module_name, root)
    if path is None:
        return set()
    text = path.read_text(encoding="utf-8")
    if class_name:
        found = re.search(rf"^class {class_name}\b.*?(?=^[^\s)]|\Z)", text, re.MULTILINE | re.DOTALL)
        text = found[0].partition("class")[2] if found is not None else ""
    names = set(re.findall(r"\w+", re.sub(r"#.*", "", text)))
    if path.name == "__init__.py":
        folder: Any = path.parent
        names |= {child.name.removesuffix(".py") for child in folder.iterdir()}
    return names


def _find(target: str, root: Root | None) -> tuple[list[str], ast.AST | None]:
    """The lines of a target's file, and its node."""
    module_name, _, qualified_name = target.partition(":")
    path = _path_of(module_name, root)
    if path is None:
        return [], None
    text = path.read_text(encoding="utf-8")
    scope: ast.AST | None = _parse(text)
    for name in filter(None, qualified_name.split(".")):
        members = [node for node in getattr(scope, "body", []) if isinstance(node, (ast.ClassDef, *_FUNCTIONS))]
        scope = next((node for node in members if node.name == name), None)
    return text.splitlines(), scope


@cache
def _path_of(module_name: str, root: Root | None) -> Root | None:
    if root is not None:
        folder = module_name.replace(".", "/")
        paths = [root / f"{folder}.py", root / f"{folder}/__init__.py"]
        return next((path for path in paths if path.is_file()), None)
    try:
        spec = importlib.util.find_spec(module_name)
    except ModuleNotFoundError:
        return None
    return Path(spec.origin) if spec is not None and spec.origin is not None and spec.origin.endswith(".py") else None


@cache
def _parse(text: str) -> ast.Module:
    return ast.parse(text)


def _fingerprint(lines: list[str], function: ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    body = function.body
    if ast.get_docstring(function, clean=False) is not None:
        body = body[1:]
    if not body:
        return "empty"
    code = (line.strip() for line in lines[body[0].lineno - 1 : body[-1].end_lineno])
    text = "\n".join(line for line in code if line and not line.startswith("#"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]
