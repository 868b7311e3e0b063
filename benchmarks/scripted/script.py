"""What a scripted target says: a trie of whole contexts, of which the replies are known."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

__all__ = ["NOTHING", "OFF", "ROOT", "Script"]

OFF, ROOT = 0, 1
"""Nodes: of every context that is in no script, and of the empty one."""
NOTHING = -1


class Script:
    """Prompts and their replies, token by token.

    A node stands for a whole context, so two requests never mix and a text that repeats itself is no ambiguity.
    ``following[node]`` is the token that comes next, NOTHING inside of a prompt and off the script.
    """

    def __init__(self) -> None:
        """An empty script."""
        self._children: dict[tuple[int, int], int] = {}
        self.following = [NOTHING, NOTHING]

    def add(self, prompt: Sequence[int], reply: Sequence[int]) -> None:
        """ValueError where a context is known already to go on otherwise."""
        node = ROOT
        for token in prompt:
            node = self._grow(node, token)
        for token in reply:
            if self.following[node] not in (NOTHING, token):
                raise ValueError("the same context has two replies")
            self.following[node] = token
            node = self._grow(node, token)

    def _grow(self, node: int, token: int) -> int:
        child = self._children.setdefault((node, token), len(self.following))
        if child == len(self.following):
            self.following.append(NOTHING)
        return child

    def walk(self, node: int, tokens: Sequence[int]) -> list[int]:
        """The node after each of the tokens that follow ``node``."""
        found = []
        for token in tokens:
            node = self._children.get((node, token), OFF)
            found.append(node)
        return found

    @classmethod
    def read(cls, path: Path) -> Script:
        """A file of lines {"prompt": [tokens], "reply": [tokens]}."""
        script = cls()
        for line in path.read_text().splitlines():
            entry = json.loads(line)
            script.add(entry["prompt"], entry["reply"])
        return script
