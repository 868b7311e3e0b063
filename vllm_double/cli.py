"""``vllm-double``: what an operator may want to know before the server runs, and to change while it does."""

import argparse
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from vllm_double import __version__
from vllm_double.planning.arguments import add_arguments

__all__ = ["main"]


class _Parser(argparse.ArgumentParser):
    """Answers wrong arguments with a sentence, and without a page of usage above it."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"vllm-double: {message}.\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="vllm-double", description="Tools around the vLLM plug-in vllm-double.")
    parser.add_argument("--version", action="version", version=f"vllm-double {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, parser_class=_Parser)
    check = commands.add_parser("check", help="whether a vLLM is one that method double works with")
    check.add_argument("--source", type=Path, help="its wheel, or the folder that holds vllm/; without it: what is installed")
    commands.add_parser("settings", help='the settings under "double" in --speculative-config')
    _add_datastore(commands.add_parser("datastore", help="the corpus that drafts are retrieved from"))
    add_arguments(commands.add_parser("plan", help="what speed-up to expect, of double and of other methods"))
    _add_switch(commands.add_parser("switch", help="turn drafting off and on in a running server"))
    options = parser.parse_args(arguments)
    if options.command == "switch":
        return _switch(options)
    if options.command == "datastore":
        return _datastore(options)
    if options.command == "plan":
        from vllm_double.planning.command import plan

        return plan(options)
    return _check(options.source) if options.command == "check" else _settings()


def _check(source: Path | None) -> int:
    from vllm_double.integration.hooks import UnsupportedVllm, require

    if source is not None:
        return _check_source(source)
    try:
        require()
    except UnsupportedVllm as error:
        print(f"vllm-double: {error}", file=sys.stderr)
        return 1
    print("The installed vLLM fits: every function that vllm-double wraps or relies on is as expected.")
    return 0


def _check_source(source: Path) -> int:
    """Whether a vLLM that need not be installed fits. Names everything that does not."""
    from vllm_double.integration.hooks import ENTRIES, check

    try:
        root = zipfile.Path(source) if source.is_file() else source
    except zipfile.BadZipFile:
        root = source
    if not (root / "vllm/__init__.py").is_file():
        print(f"vllm-double: {source} is neither a wheel of vLLM nor a folder that holds it.", file=sys.stderr)
        return 2
    mismatches = check(ENTRIES, root)
    for mismatch in mismatches:
        print(f"vllm-double: {mismatch.reason}", file=sys.stderr)
    if not mismatches:
        print(f"It fits: all {len(ENTRIES)} functions that vllm-double wraps or relies on are as expected.")
    return int(bool(mismatches))


def _settings() -> int:
    from vllm_double.config import DoubleConfig

    for name, entry in DoubleConfig.model_fields.items():
        print(f"{name} = {entry.default!r}\n    {entry.description}")
    return 0


def _add_switch(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("action", choices=("off", "on", "status"))
    parser.add_argument("--pid", type=int, help="any process of the server; needed where several servers of yours run")
    parser.add_argument("--port", type=int, help="port on which the server listens; likewise")
    parser.add_argument("--reason", default="", help="for the line in the server's log")
    parser.add_argument("--calibration", action="store_true", help="and how often each source was right, by its own figure")


def _switch(options: argparse.Namespace) -> int:
    from vllm_double.operations.switch import SwitchError, find_servers, select, switch

    servers, left_out = find_servers()
    for sentence in left_out:
        print(f"vllm-double: {sentence}", file=sys.stderr)
    try:
        servers = select(servers, options.pid, options.port)
        if options.action != "status":
            servers = [switch(servers, options.action == "on", options.reason)]
    except SwitchError as error:
        print(f"vllm-double: {error}", file=sys.stderr)
        return 1
    for server in servers:
        print(*server.lines(options.calibration), sep="\n")
    return 0


def _add_datastore(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True)
    build = actions.add_parser("build", help="build a datastore from text or token ids")
    build.add_argument("--tokenizer", required=True, help="model, or its folder")
    build.add_argument(
        "--input",
        nargs="+",
        type=Path,
        required=True,
        help='.jsonl files with "text" or "token_ids" in each line, text files, or folders of them',
    )
    build.add_argument(
        "--output",
        type=Path,
        required=True,
        help="file to write, which is replaced once the new one is whole; of shards a new folder",
    )
    build.add_argument("--shard-tokens", type=int, help="write a new folder of files of about so many tokens each")
    build.add_argument("--max-match", type=int, default=32, help="tokens of context that are told apart (default: 32)")
    inspect = actions.add_parser("inspect", help="what a datastore holds")
    inspect.add_argument("store", type=Path)
    verify = actions.add_parser("verify", help="whether a datastore is undamaged")
    verify.add_argument("store", type=Path)
    verify.add_argument("--tokenizer", help="model, or its folder, whose tokens the datastore must have")


def _datastore(options: argparse.Namespace) -> int:
    from vllm_double.retrieval.datastore import DatastoreError

    actions = {"build": _datastore_build, "inspect": _datastore_inspect, "verify": _datastore_verify}
    try:
        actions[options.action](options)
    except DatastoreError as error:
        reason = str(error)
    except OSError as error:
        reason = f"{error.strerror}: {error.filename or getattr(options, 'output', None) or options.store}."
    else:
        return 0
    print(f"vllm-double: {reason}", file=sys.stderr)
    return 1


def _datastore_build(options: argparse.Namespace) -> None:
    from vllm_double.retrieval.datastore import fingerprint
    from vllm_double.retrieval.datastore.build import build, build_shards
    from vllm_double.retrieval.datastore.corpus import load_tokenizer, read_documents

    tokenizer = load_tokenizer(options.tokenizer)
    vocabulary = tokenizer.get_vocab()
    documents = read_documents(options.input, tokenizer, show_progress=True)
    rest = max(vocabulary.values()) + 1, fingerprint(vocabulary), options.max_match
    if options.shard_tokens is None:
        headers = [build(options.output, documents, *rest, show_progress=True)]
    else:
        headers = build_shards(options.output, documents, options.shard_tokens, *rest, show_progress=True)
    for header in headers:
        print(f"{header.num_corpus_tokens} tokens of {header.num_documents} documents: {header.num_bytes} bytes")


def _datastore_inspect(options: argparse.Namespace) -> None:
    from vllm_double.retrieval.datastore import FORMAT_VERSION, Datastore, files_of

    for path in files_of(options.store):
        header = Datastore(path).header
        facts = {
            "file": path,
            "format": FORMAT_VERSION,
            "documents": header.num_documents,
            "tokens": header.num_corpus_tokens,
            "vocabulary": header.vocab_size,
            "tokenizer": header.fingerprint.hex(),
            "max_match": header.max_match,
            "bytes": header.num_bytes,
            "bytes per token": f"{header.num_bytes / header.num_corpus_tokens:.2f}",
        }
        facts |= {f"bytes of {section.name}": section.num_bytes for section in header.sections}
        for name, fact in facts.items():
            print(f"{name:20} {fact}")


def _datastore_verify(options: argparse.Namespace) -> None:
    from vllm_double.retrieval.datastore import Datastore, files_of, fingerprint
    from vllm_double.retrieval.datastore.corpus import load_tokenizer

    tokenizer = load_tokenizer(options.tokenizer) if options.tokenizer else None
    identity = fingerprint(tokenizer.get_vocab()) if tokenizer else None
    for path in files_of(options.store):
        Datastore(path, identity).verify()
    print("The datastore is whole" + (" and has the tokens of this tokenizer." if tokenizer else "."))


if __name__ == "__main__":
    sys.exit(main())
