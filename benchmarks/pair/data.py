"""Text for the pair: standard-library modules, the tokenizer, edits and the training curriculum.

Everything comes from the source of the running interpreter's standard library.  A batch depends only on
``(seed, step)``, so an interrupted run resumes with the batches it would have had.
"""

from __future__ import annotations

import hashlib
import json
import keyword
import re
import sysconfig
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.random import Generator
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

VOCABULARY = 3072
EOS = "<|endoftext|>"
EOS_ID = 0
MAX_POSITIONS = 2048
EDIT_MARK = "\n# EDIT "  # opens the instruction line between a chunk and its edited copy

# Never trained on: neither the tokenizer nor the models see a byte of these.
HELD_OUT = (
    "bisect", "calendar", "cmd", "configparser", "csv", "difflib", "fractions", "gettext", "graphlib",
    "heapq", "imaplib", "pprint", "sched", "selectors", "shlex", "statistics", "tarfile", "textwrap",
    "asyncio/queues", "concurrent/futures/thread", "email/header", "http/cookiejar", "json/encoder",
    "logging/config", "multiprocessing/pool", "unittest/suite", "urllib/robotparser", "xmlrpc/client",
)  # fmt: skip
PACKAGES = (
    "asyncio", "collections", "concurrent", "ctypes", "curses", "dbm", "distutils", "email", "ensurepip",
    "html", "http", "importlib", "json", "logging", "multiprocessing", "re", "sqlite3", "tkinter", "tomllib",
    "unittest", "urllib", "venv", "wsgiref", "xml", "xmlrpc", "zoneinfo",
)  # fmt: skip
# Tables, generated files and copies of other modules.
SKIPPED = ("antigravity", "this", "sre_", "__future__", "_sysconfigdata", "_sitebuiltins", "turtle")

IDENTIFIER = re.compile(r"\b[A-Za-z_][A-Za-z0-9_]{2,}\b")


def modules() -> tuple[dict[str, str], dict[str, str]]:
    """Returns {module: source text} for training and for the held-out set, in a fixed order."""
    root = Path(sysconfig.get_paths()["stdlib"])
    paths = sorted(root.glob("*.py"))
    for package in PACKAGES:
        paths += sorted(root.joinpath(package).rglob("*.py"))
    train: dict[str, str] = {}
    held: dict[str, str] = {}
    for path in paths:
        name = path.relative_to(root).with_suffix("").as_posix()
        if name.startswith(SKIPPED) or "/test" in name or "/_distutils_hack" in name:
            continue
        text = path.read_text(encoding="utf-8", errors="ignore").replace("\r\n", "\n").strip("\n") + "\n"
        if name in HELD_OUT:
            held[name] = text
        elif len(text) > 400:
            train[name] = text
    missing = set(HELD_OUT) - set(held)
    if missing:
        raise RuntimeError(f"held-out modules absent from {root}: {sorted(missing)}")
    return train, held


def fingerprint(texts: dict[str, str]) -> str:
    """SHA-256 of the texts, to say which source a pair was trained on."""
    digest = hashlib.sha256()
    for name, text in texts.items():
        digest.update(f"{name}\0{text}\0".encode())
    return digest.hexdigest()


def train_tokenizer(texts: dict[str, str]) -> Tokenizer:
    """Byte-level BPE of ``VOCABULARY`` tokens; token 0 ends a text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(list(texts.values()), trainer)
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Writes the tokenizer as a transformers fast tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": EOS,
        "pad_token": EOS,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": MAX_POSITIONS,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    special = {"eos_token": EOS, "pad_token": EOS}
    (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=2) + "\n")


@dataclass(frozen=True)
class Edit:
    """A chunk of code, an instruction line and the edited copy.

    The training text is ``chunk + EDIT_MARK + instruction + newline + edited`` and then the EOS token.
    """

    kind: str
    chunk: str
    instruction: str
    edited: str

    @property
    def shown(self) -> str:
        """Everything before the edited copy."""
        return f"{self.chunk}{EDIT_MARK}{self.instruction}\n"

    @property
    def text(self) -> str:
        return self.shown + self.edited


def cut_chunk(rng: Generator, lines: list[str], characters: int) -> list[str]:
    """Consecutive lines of about ``characters`` characters, at a random place, without blank ends."""
    start = int(rng.integers(0, max(1, len(lines) - 4)))
    end, size = start, 0
    while end < len(lines) and size < characters:
        size += len(lines[end]) + 1
        end += 1
    chunk = lines[start:end]
    while chunk and not chunk[0].strip():
        chunk = chunk[1:]
    while chunk and not chunk[-1].strip():
        chunk = chunk[:-1]
    return chunk


def make_edit(rng: Generator, lines: list[str], names: list[str], characters: int) -> Edit | None:
    """An edit of a random chunk, or None where the chunk offers nothing to edit.

    Kinds: half ``rename`` (an identifier seen twice or more), a quarter ``remove`` (one line), a quarter
    ``add`` (a line of the same file after a line of the chunk).
    """
    chunk = cut_chunk(rng, lines, characters)
    if len(chunk) < 3:
        return None
    draw = float(rng.random())
    before = "\n".join(chunk)
    if draw < 0.5:
        found = [w for w in IDENTIFIER.findall(before) if not keyword.iskeyword(w)]
        twice = sorted({w for w in found if found.count(w) > 1})
        if not twice:
            return None
        old = twice[int(rng.integers(len(twice)))]
        new = f"{old}_{int(rng.integers(2, 10))}" if rng.random() < 0.2 else names[int(rng.integers(len(names)))]
        if new == old or new in found:
            return None
        return Edit("rename", before, f"rename {old} -> {new}", re.sub(rf"\b{re.escape(old)}\b", new, before))
    places = [i for i in range(1, len(chunk)) if chunk[i].strip() and chunk.count(chunk[i]) == 1]
    if not places:
        return None
    place = places[int(rng.integers(len(places)))]
    if draw < 0.75:
        rest = chunk[:place] + chunk[place + 1 :]
        return Edit("remove", before, f"remove: {chunk[place].strip()}", "\n".join(rest))
    added = lines[int(rng.integers(len(lines)))].strip()
    if not added or len(added) > 80:
        return None
    indent = chunk[place][: len(chunk[place]) - len(chunk[place].lstrip())]
    more = [*chunk[: place + 1], indent + added, *chunk[place + 1 :]]
    return Edit("add", before, f"add: {added} after: {chunk[place].strip()}", "\n".join(more))


@dataclass(frozen=True)
class Phase:
    """A stretch of training: ``until`` is a share of all tokens, ``length`` the sequence length in tokens,
    ``characters`` the (shortest, longest) chunk of an edit."""

    until: float
    length: int
    kind: str  # "spans" (repeated random tokens) or "mix" (2/3 code, 1/3 edits)
    characters: tuple[int, int] = (0, 0)
    focus: bool = False  # only every FOCUS-th module is drawn from


# Copying comes first, on random spans, short before long; without this the edits are not copied at all.
# The initial weights (copyhead.py) already copy, so that these phases are short. A small model that has seen
# everything twice knows little and loops; in the second half it sees a few modules again and again, and then
# writes code.
FOCUS = 5
CURRICULUM = (
    Phase(0.010, 128, "spans"),
    Phase(0.025, 256, "spans"),
    Phase(0.15, 256, "mix", (80, 300)),
    Phase(0.35, 256, "mix", (80, 450)),
    Phase(0.465, 512, "mix", (100, 750)),
    Phase(0.92, 512, "mix", (100, 750), focus=True),
    Phase(1.00, 1024, "mix", (100, 1500), focus=True),
)


def phase_at(share: float) -> Phase:
    """The phase of training that covers ``share`` (0 to 1) of the token budget."""
    return next((phase for phase in CURRICULUM if share < phase.until), CURRICULUM[-1])


@dataclass
class Corpus:
    """Tokenised training text and the sources of edits."""

    tokenizer: Tokenizer
    texts: dict[str, str]
    stream: np.ndarray = field(init=False)  # int64 tokens of all files, each ended with EOS
    lines: list[list[str]] = field(init=False)
    names: list[str] = field(init=False)
    focus_length: int = field(init=False)  # tokens of the first files, on which training focuses in the end
    weights: np.ndarray = field(init=False)  # chance of each file to be the source of an edit
    focus_weights: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        order = np.random.default_rng(0).permutation(len(self.texts))
        files = [list(self.texts.values())[i] for i in order]
        encoded = self.tokenizer.encode_batch(files)
        self.stream = np.concatenate([np.array([*e.ids, EOS_ID], dtype=np.int64) for e in encoded])
        num_focus = -(-len(files) // FOCUS)
        self.focus_length = sum(len(e.ids) + 1 for e in encoded[:num_focus])
        self.lines = [text.splitlines() for text in files]
        self.names = sorted({w for text in files for w in IDENTIFIER.findall(text) if not keyword.iskeyword(w)})
        sizes = np.array([len(text) for text in files], dtype=np.float64)
        self.weights = sizes / sizes.sum()
        focus = np.where(np.arange(len(files)) < num_focus, sizes, 0.0)
        self.focus_weights = focus / focus.sum()

    def edit(self, rng: Generator, characters: tuple[int, int], focus: bool = False) -> Edit:
        """One random edit whose chunk has about ``characters`` = (shortest, longest) characters."""
        weights = self.focus_weights if focus else self.weights
        while True:
            lines = self.lines[int(rng.choice(len(self.lines), p=weights))]
            made = make_edit(rng, lines, self.names, int(rng.integers(characters[0], characters[1])))
            if made is not None:
                return made

    def edit_row(self, rng: Generator, length: int, characters: tuple[int, int], focus: bool) -> np.ndarray:
        """``length`` tokens of edits, each ended with EOS; the last one is cut."""
        row: list[int] = []
        while len(row) < length:
            row += [*self.tokenizer.encode(self.edit(rng, characters, focus).text).ids, EOS_ID]
        return np.array(row[:length], dtype=np.int64)

    def batch(self, seed: int, step: int, phase: Phase, tokens: int) -> tuple[np.ndarray, np.ndarray]:
        """Inputs and labels, each [rows, length] with rows * length = ``tokens``; -100 is not scored."""
        rng = np.random.default_rng((seed, step))
        length, rows = phase.length + 1, tokens // phase.length
        if phase.kind == "spans":
            data = np.empty((rows, length), dtype=np.int64)
            labels = np.empty_like(data)
            for row in range(rows):
                span = int(rng.integers(phase.length // 6, phase.length // 2))
                data[row] = np.resize(rng.integers(1, VOCABULARY, span), length)
                labels[row] = data[row]
                labels[row, : span + 1] = -100
            return data[:, :-1], labels[:, 1:]
        edits = round(rows / 3)
        parts = [self.edit_row(rng, length, phase.characters, phase.focus) for _ in range(edits)]
        end = self.focus_length if phase.focus else len(self.stream)
        parts += [self.stream[at : at + length] for at in rng.integers(0, end - length, rows - edits)]
        data = np.stack(parts)
        return data[:, :-1], data[:, 1:]
