"""The scripted target's workload: edits, their script, and the folder that a server is given."""

from __future__ import annotations

import json
from difflib import SequenceMatcher
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from benchmarks import workload
from benchmarks.pair.data import EDIT_MARK, EOS_ID, HELD_OUT
from benchmarks.scripted import ARCHITECTURE
from benchmarks.scripted.edits import PIECE_TOKENS, Edit
from benchmarks.scripted.script import NOTHING, OFF, ROOT, Script
from benchmarks.scripted.write import KIND, write

COUNT = 40


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Edit]]:
    folder = tmp_path_factory.mktemp("scripted") / "target"
    return folder, write(workload.TARGET, folder, COUNT)


def said(script: Script, prompt: list[int]) -> list[int]:
    """What a target says that only the script guides."""
    (*_, node), tokens = script.walk(ROOT, prompt), []
    while (token := script.following[node]) != NOTHING:
        tokens.append(token)
        (node,) = script.walk(node, [token])
    return tokens


def test_a_reply_is_most_of_its_prompt_with_changes(written: tuple[Path, list[Edit]]) -> None:
    shares = []
    for edit in written[1]:
        blocks = SequenceMatcher(None, edit.prompt_tokens, edit.reply_tokens, autojunk=False).get_matching_blocks()
        shares.append(sum(block.size for block in blocks) / len(edit.reply_tokens))
        assert len(blocks) > 2, "one unchanged copy"
        assert edit.module in HELD_OUT
        piece, instruction = edit.prompt.split(EDIT_MARK)
        assert piece != edit.reply
        assert instruction.endswith("\n") and instruction.count("\n") == 1
        assert PIECE_TOKENS[0] * 0.9 < len(edit.prompt_tokens)
        assert len(edit.prompt_tokens) + len(edit.reply_tokens) < 2048
    assert min(shares) > 0.7
    assert sum(shares) / COUNT > 0.9


def test_edits_follow_from_the_seed(written: tuple[Path, list[Edit]], tmp_path: Path) -> None:
    assert write(workload.TARGET, tmp_path / "again", COUNT) == written[1]
    others = write(workload.TARGET, tmp_path / "other", COUNT, seed=1)
    assert len({edit.prompt for edit in [*written[1], *others]}) == 2 * COUNT


def test_the_script_gives_the_replies_and_ends(written: tuple[Path, list[Edit]]) -> None:
    script = Script.read(written[0] / "script.jsonl")
    tokenizer = Tokenizer.from_file(str(written[0] / "tokenizer.json"))
    for edit, prompt in zip(written[1], (written[0] / "prompts.jsonl").read_text().splitlines(), strict=True):
        entry = json.loads(prompt)
        assert entry["kind"] == KIND
        found = said(script, tokenizer.encode(entry["prompt"]).ids)
        assert found == edit.reply_tokens
        assert found.index(EOS_ID) == len(found) - 1
        assert tokenizer.decode(found[:-1]) == entry["reply"]


def test_other_contexts_are_not_scripted(written: tuple[Path, list[Edit]]) -> None:
    script = Script.read(written[0] / "script.jsonl")
    edit = written[1][0]
    assert script.following[script.walk(ROOT, edit.prompt_tokens[:-1])[-1]] == NOTHING
    for context in (edit.prompt_tokens[1:], [5, *edit.prompt_tokens], [*edit.prompt_tokens, edit.reply_tokens[0] + 1, 7]):
        assert script.walk(ROOT, context)[-1] == OFF
    assert script.following[OFF] == NOTHING


def test_a_text_that_repeats_itself_is_not_ambiguous() -> None:
    script = Script()
    script.add([1, 2], [3, 4, 3, 4, 3, 5])
    script.add([1, 2, 3], [4, 3, 4])
    assert said(script, [1, 2]) == [3, 4, 3, 4, 3, 5]
    assert said(script, [1]) == []
    with pytest.raises(ValueError, match="two replies"):
        script.add([1, 2, 3], [5])


def test_the_folder_is_the_target_with_another_architecture(written: tuple[Path, list[Edit]]) -> None:
    config, bundled = (json.loads((folder / "config.json").read_text()) for folder in (written[0], workload.TARGET))
    assert config == bundled | {"architectures": [ARCHITECTURE]}
    for name in ("model.safetensors", "tokenizer.json", "generation_config.json"):
        assert (written[0] / name).samefile(workload.TARGET / name)
