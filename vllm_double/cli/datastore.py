"""``vllm-double datastore build | inspect | verify``."""

import argparse
import sys
from pathlib import Path

__all__ = ["HELP", "add_arguments", "run"]

HELP = "build, inspect or verify a corpus that draft tokens are retrieved from"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True)
    build = actions.add_parser("build", help="build a datastore from text or token ids")
    build.set_defaults(act=_build)
    build.add_argument("--tokenizer", required=True, help="name or folder of a model")
    sources = '.jsonl files with "text" or "token_ids" in each line, text files, or folders of them'
    build.add_argument("--input", nargs="+", type=Path, required=True, help=sources)
    target = "new file, or a datastore, replaced when the new one is complete; with --shard-tokens a new folder"
    build.add_argument("--output", type=Path, required=True, help=target)
    build.add_argument("--shard-tokens", type=int, help="write a new folder of files with about so many tokens each")
    build.add_argument("--max-match", type=int, default=32, help="longest context that is matched, in tokens (default: 32)")
    inspect = actions.add_parser("inspect", help="show what a datastore holds")
    inspect.set_defaults(act=_inspect)
    inspect.add_argument("store", type=Path)
    verify = actions.add_parser("verify", help="check that a datastore is undamaged")
    verify.set_defaults(act=_verify)
    verify.add_argument("store", type=Path)
    verify.add_argument("--tokenizer", help="name or folder of the model whose tokens the datastore must have")


def run(options: argparse.Namespace) -> int:
    from vllm_double.retrieval.datastore import DatastoreError

    try:
        options.act(options)
    except DatastoreError as error:
        reason = str(error)
    except BrokenPipeError:
        raise
    except OSError as error:
        reason = f"{error.strerror}: {error.filename or getattr(options, 'output', None) or options.store}."
    else:
        return 0
    print(f"vllm-double: {reason}", file=sys.stderr)
    return 1


def _build(options: argparse.Namespace) -> None:
    from vllm_double.retrieval.datastore import fingerprint
    from vllm_double.retrieval.datastore.build import build, build_shards, check_replaced
    from vllm_double.retrieval.datastore.corpus import load_tokenizer, read_documents

    check_replaced(options.output)  # before the documents are tokenized
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


def _inspect(options: argparse.Namespace) -> None:
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


def _verify(options: argparse.Namespace) -> None:
    from vllm_double.retrieval.datastore import Datastore, files_of, fingerprint
    from vllm_double.retrieval.datastore.corpus import load_tokenizer

    tokenizer = load_tokenizer(options.tokenizer) if options.tokenizer else None
    identity = fingerprint(tokenizer.get_vocab()) if tokenizer else None
    for path in files_of(options.store):
        Datastore(path, identity).verify()
    print("The datastore is whole" + (" and has the tokens of this tokenizer." if tokenizer else "."))
