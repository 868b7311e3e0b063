"""Edits of code as one asks for them: a piece of a file that the pair has not seen, and the piece as it should be."""

from __future__ import annotations

import builtins
import keyword
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from numpy.random import Generator, default_rng
from tokenizers import Tokenizer

from benchmarks.pair.data import EDIT_MARK, EOS_ID, IDENTIFIER

__all__ = ["Edit", "Piece", "make_edits"]

PIECE_TOKENS = (300, 700)
"""Shortest and longest piece."""
MIN_LINES, MIN_PIECE_LINES = 120, 8
MAX_TRIES = 100
NAME = re.compile(r"\b[A-Za-z_]\w{2,}(?= = |[(\[]|\.\w)")
"""Identifiers where code has them and prose has not: assigned to, called, indexed, with an attribute."""
LITERAL = re.compile(r"(?<![\w'\"])(?:\d+|'[^'\\\n]{2,30}'|\"[^\"\\\n]{2,30}\")(?![\w'\"])")


@dataclass(frozen=True)
class Edit:
    """The prompt (piece and instructions) and the reply, as text and as tokens; the reply's tokens end with EOS."""

    module: str
    prompt: str
    reply: str
    prompt_tokens: list[int]
    reply_tokens: list[int]


@dataclass(frozen=True)
class Piece:
    """Lines to be edited, and all lines of their module, from which new names and new lines are taken."""

    lines: list[str]
    module: list[str]

    @property
    def words(self) -> list[str]:
        """All words of the piece that could be identifiers, as often as they occur."""
        return IDENTIFIER.findall("\n".join(self.lines))

    @property
    def names(self) -> list[str]:
        """Identifiers of the piece."""
        return _names(self.lines)


Choice = TypeVar("Choice")
Change = tuple[list[str], str]
"""The changed lines and the instruction."""


def rename(rng: Generator, piece: Piece) -> Change | None:
    """An identifier that occurs three times or more gets the name of another one of the module."""
    words = piece.words
    old = _one_of(rng, [name for name in piece.names if words.count(name) > 2])
    new = _one_of(rng, [name for name in _names(piece.module) if name not in words])
    if old is None or new is None:
        return None
    return [re.sub(rf"\b{re.escape(old)}\b", new, line) for line in piece.lines], f"rename {old} -> {new}"


def change_literal(rng: Generator, piece: Piece) -> Change | None:
    """A number or a short string becomes another one."""
    place = _one_of(rng, [index for index, line in enumerate(piece.lines) if LITERAL.search(line)])
    if place is None:
        return None
    old = LITERAL.findall(piece.lines[place])[0]
    new = str(int(old) + int(rng.integers(1, 100))) if old.isdigit() else f"{old[0]}{_one_of(rng, piece.words)}{old[0]}"
    return [*piece.lines[:place], piece.lines[place].replace(old, new, 1), *piece.lines[place + 1 :]], f"change {old} -> {new}"


def remove(rng: Generator, piece: Piece) -> Change | None:
    """One to four consecutive lines go."""
    place, count = int(rng.integers(1, len(piece.lines) - 4)), int(rng.integers(1, 5))
    return [*piece.lines[:place], *piece.lines[place + count :]], f"remove {count}: {piece.lines[place].strip()}"


def insert(rng: Generator, piece: Piece) -> Change | None:
    """One to four consecutive lines from elsewhere in the module come in."""
    place, count = int(rng.integers(1, len(piece.lines))), int(rng.integers(1, 5))
    start = int(rng.integers(0, len(piece.module) - count))
    more = [line for line in piece.module[start : start + count] if line.strip() and line not in piece.lines]
    if not more:
        return None
    return [*piece.lines[:place], *more, *piece.lines[place:]], f"add {len(more)} after: {piece.lines[place - 1].strip()}"


CHANGES: tuple[Callable[[Generator, Piece], Change | None], ...] = (rename, change_literal, remove, insert)


def _names(lines: Sequence[str]) -> list[str]:
    return sorted(set(NAME.findall("\n".join(lines))) - set(keyword.kwlist) - {*dir(builtins), "self", "cls"})


def _one_of(rng: Generator, choices: Sequence[Choice]) -> Choice | None:
    return choices[int(rng.integers(len(choices)))] if choices else None


def make_edits(
    modules: dict[str, str], tokenizer: Tokenizer, count: int, seed: int = 0, piece_tokens: tuple[int, int] = PIECE_TOKENS
) -> list[Edit]:
    """``count`` edits, from the modules in turn, each with two to four kinds of changes; ValueError if they cannot be made."""
    rng = default_rng(seed)
    files = {name: lines for name, text in sorted(modules.items()) if len(lines := text.splitlines()) >= MIN_LINES}
    order = [sorted(files)[i] for i in rng.permutation(len(files))]
    found: list[Edit] = []
    for index in range(count):
        name = order[index % len(order)]
        tries = (_edit(rng, name, files[name], tokenizer, piece_tokens) for _ in range(MAX_TRIES))
        edit = next((edit for edit in tries if edit is not None), None)
        if edit is None:
            raise ValueError(f"{name} offers nothing to edit")
        found.append(edit)
    return found


def _edit(rng: Generator, name: str, module: list[str], tokenizer: Tokenizer, piece_tokens: tuple[int, int]) -> Edit | None:
    """One edit of a random piece, or None where a wanted change is not possible."""
    before = _cut(rng, module, tokenizer, int(rng.integers(*piece_tokens)))
    if before is None or len(before) < MIN_PIECE_LINES:
        return None
    lines, instructions = before, []
    for kind in sorted(rng.permutation(len(CHANGES))[: int(rng.integers(2, len(CHANGES) + 1))]):
        change = CHANGES[kind](rng, Piece(lines, module))
        if change is None:
            return None
        lines, instruction = change
        instructions.append(instruction)
    prompt, reply = "\n".join(before) + EDIT_MARK + "; ".join(instructions) + "\n", "\n".join(lines)
    return Edit(name, prompt, reply, tokenizer.encode(prompt).ids, [*tokenizer.encode(reply).ids, EOS_ID])


def _cut(rng: Generator, module: list[str], tokenizer: Tokenizer, num_tokens: int) -> list[str] | None:
    """Consecutive lines of about ``num_tokens`` tokens, from a random one on that is not blank; None at the module's end."""
    start = int(rng.integers(len(module)))
    taken, size = [], 0
    for line in module[start:]:
        taken.append(line)
        size += len(tokenizer.encode(line + "\n").ids)
        if size >= num_tokens:
            return taken if taken[0].strip() and taken[-1].strip() else None
    return None
