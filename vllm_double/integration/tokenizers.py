"""Checks that target, draft model and datastores have the same tokenizer."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vllm.config import ModelConfig
from vllm.tokenizers import get_tokenizer

from vllm_double.config import ConfigError

__all__ = ["check_datastores", "check_same_tokenizer", "difference"]

_SAMPLE = "def f(x):\n    return x ** 2  # naïve café, 東京, 12345.678\n\tEnd. \U0001f600 <|im_end|></s>"


def check_same_tokenizer(target: ModelConfig, draft: str, draft_revision: str | None) -> None:
    """Raises ConfigError with one sentence if the draft's tokenizer cannot be read or is another.

    With --skip-tokenizer-init there may be no tokenizers: whoever serves token ids knows what they mean.
    """
    if target.skip_tokenizer_init:
        return
    draft_tokenizer = _read(f'draft model "{draft}"', draft, draft_revision, target)
    found = difference(_tokenizer_of(target), draft_tokenizer)
    if found is not None:
        raise ConfigError(f'The draft model "{draft}" has another tokenizer than the target: {found}.')


def check_datastores(target: ModelConfig, paths: Sequence[str]) -> tuple[tuple[str, str], ...]:
    """Of each file the absolute path and the fingerprint (hexadecimal) of its tokenizer, with which it is to be opened.

    Raises ConfigError with one sentence if a file cannot be used or has another tokenizer.
    """
    # Not at the top: it imports numba, and vLLM 0.31's workers fail in what llvmlite has put into sys.modules before them.
    from vllm_double.retrieval.datastore import Datastore, DatastoreError, files_of, fingerprint

    if not paths:
        return ()
    tokenizer = fingerprint(_tokenizer_of(target).get_vocab())
    found: dict[str, str] = {}
    try:
        for file in (file for path in paths for file in files_of(Path(path))):
            if Datastore(file, tokenizer).header.vocab_size > target.get_vocab_size():
                raise ConfigError(f'The datastore "{file}" has token ids that the target has no embedding for.')
            found[str(file.resolve())] = tokenizer.hex()
    except DatastoreError as error:
        raise ConfigError(str(error)) from None
    return tuple(found.items())


def _tokenizer_of(target: ModelConfig) -> Any:
    return _read("target", target.tokenizer, target.tokenizer_revision, target)


def _read(whose: str, name: str, revision: str | None, target: ModelConfig) -> Any:
    """A tokenizer, as vLLM reads the target's. Raises ConfigError with one sentence."""
    token = {} if target.hf_token is None else {"token": target.hf_token}
    try:
        return get_tokenizer(
            name,
            tokenizer_mode=target.tokenizer_mode,
            revision=revision,
            trust_remote_code=target.trust_remote_code,
            **token,
        )
    except Exception as error:  # whatever a loader of foreign files can raise
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(f"The tokenizer of the {whose} cannot be read: {reason}") from None


def difference(target: Any, draft: Any) -> str | None:
    """The first difference of two tokenizers; None if every common id means the same and text is cut alike.

    Padded or slightly extended vocabularies of one family are the same: only ids that both have are compared.
    """
    target_tokens = {index: token for token, index in target.get_vocab().items()}
    draft_tokens = {index: token for token, index in draft.get_vocab().items()}
    common = target_tokens.keys() & draft_tokens.keys()
    differing = [index for index in common if target_tokens[index] != draft_tokens[index]]
    if differing:
        first = min(differing)
        return f"token {first} is {target_tokens[first]!r} there and {draft_tokens[first]!r} here"
    if target.encode(_SAMPLE, add_special_tokens=False) != draft.encode(_SAMPLE, add_special_tokens=False):
        return "the same text is cut into other tokens"
    return None
