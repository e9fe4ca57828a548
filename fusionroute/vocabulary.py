"""Tokenizers: loading them, and the fingerprint by which services agree on what a token id means."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

from fusionroute.errors import ModelRejected, Reason

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_GENERIC_CLASSES = ("PreTrainedTokenizerFast", "TokenizersBackend")


def load_tokenizer(path_or_id: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a local model folder or a hub id.

    Raises:
        ModelRejected: MODEL_NOT_FOUND or MODEL_BROKEN, naming the path.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast
    from transformers.models.auto.tokenization_auto import get_tokenizer_config

    check_location(path_or_id)
    try:
        declared = get_tokenizer_config(path_or_id).get("tokenizer_class")
        # AutoTokenizer lets the model's family overrule a generic class, and may add that family's special tokens.
        loader = PreTrainedTokenizerFast if declared in _GENERIC_CLASSES else AutoTokenizer
        tokenizer: PreTrainedTokenizerBase = loader.from_pretrained(path_or_id, trust_remote_code=False)
    except Exception as error:
        raise ModelRejected(
            Reason.MODEL_BROKEN, f"no tokenizer can be loaded from {path_or_id!r}: {first_line(error)}"
        ) from error
    return tokenizer


def logits_width(tokenizer: PreTrainedTokenizerBase) -> int:
    """Columns of a logits row: one more than the highest id the tokenizer knows. Padding beyond is cut off."""
    return int(max(tokenizer.get_vocab().values())) + 1


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Digest of the map from id to token, equal for tokenizers that give each id the same meaning."""
    hasher = hashlib.sha256()
    for token, index in sorted(tokenizer.get_vocab().items(), key=lambda item: (item[1], item[0])):
        hasher.update(f"{index}\t{token}\n".encode("utf-8", errors="surrogatepass"))
    return hasher.hexdigest()[:32]


def end_ids(tokenizer: PreTrainedTokenizerBase, model_config: object | None = None) -> frozenset[int]:
    """The ids that end an answer: the tokenizer's, and those that the model's generation settings add."""
    ids: set[int] = set()
    for source in (tokenizer.eos_token_id, getattr(model_config, "eos_token_id", None)):
        if isinstance(source, int):
            ids.add(source)
        elif source is not None:
            ids.update(int(item) for item in source)
    return frozenset(ids)


def check_location(path_or_id: str) -> None:
    """Rejects what is neither an existing folder nor shaped like a hub id.

    Raises:
        ModelRejected: MODEL_NOT_FOUND.
    """
    if not path_or_id:
        raise ModelRejected(Reason.MODEL_NOT_FOUND, "model = '' names no folder and no hub id")
    path = Path(path_or_id).expanduser()
    looks_like_hub_id = path_or_id.count("/") == 1 and not path_or_id.startswith((".", "/", "~"))
    if path.is_dir() or looks_like_hub_id:
        return
    raise ModelRejected(Reason.MODEL_NOT_FOUND, f"model folder {path_or_id!r} does not exist")


def first_line(error: BaseException) -> str:
    """What an error says, in one line."""
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__
