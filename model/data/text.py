"""The tokenizer of a text phase: byte-level BPE (Hugging Face `tokenizers`), learnt from the training captions alone.

A caption becomes start token, pieces, end token, padding. The end token has the highest id, as in CLIP, so that the
text tower finds it as the argmax of the ids. Captions are lower-cased, as there.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor

from model import storage
from model.data.captions import Captions
from model.data.errors import DataError

log = logging.getLogger(__name__)

PAD, START, END = "<|pad|>", "<|start|>", "<|end|>"
SPECIAL = [PAD, START, END]  # added in this order after training: END's id is the highest
SMALLEST = 256 + len(SPECIAL)


def build_or_read(captions: Captions, vocabulary: int, run_dir: str) -> str:
    """The run's tokenizer for these captions as JSON, learnt if this is the first to ask.

    The JSON goes into the checkpoint's manifest, so that an evaluation needs no spec. Raises DataError.
    """
    key = f"{vocabulary}\n{captions.identity}"
    path = f"{run_dir}/data/tokenizer-{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"
    try:
        return storage.read(path).decode()
    except FileNotFoundError:
        pass
    read = captions.read()
    log.info("learning the tokenizer from %s captions", f"{len(read):,}")
    learnt = train(read, vocabulary)
    try:
        storage.publish(path, learnt.encode())
    except storage.AlreadyPublished:
        return storage.read(path).decode()
    return learnt


def train(captions: Sequence[str], vocabulary: int) -> str:
    """A tokenizer of at most `vocabulary` ids, as JSON. Raises DataError if that is too few for single bytes."""
    if vocabulary < SMALLEST:
        raise DataError(f"text.vocabulary: {vocabulary} is too few: 256 bytes and {len(SPECIAL)} marks need {SMALLEST}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary - len(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(captions, trainer)
    tokenizer.add_special_tokens(SPECIAL)
    return str(tokenizer.to_str())


def load(json: str) -> Tokenizer:
    """A tokenizer from its JSON. Raises DataError if it is not one of ours."""
    try:
        tokenizer = Tokenizer.from_str(json)
    except Exception as error:  # the library raises Exception itself
        raise DataError(f"not a tokenizer: {error}") from error
    for token in SPECIAL:
        _id(tokenizer, token)
    return tokenizer


def _id(tokenizer: Tokenizer, token: str) -> int:
    found: int | None = tokenizer.token_to_id(token)
    if found is None:
        raise DataError(f"not a tokenizer that dinoctl made: it has no {token}")
    return found


def encode(tokenizer: Tokenizer, captions: Sequence[str], context: int) -> Tensor:
    """Ids of the captions, int64 [n, context]; a caption that is too long loses its end, never its end token."""
    pad, start, end = (_id(tokenizer, token) for token in SPECIAL)
    out = torch.full((len(captions), context), pad, dtype=torch.int64)
    for row, caption in zip(out, captions, strict=True):
        pieces = tokenizer.encode(caption, add_special_tokens=False).ids[: context - 2]
        ids = [start, *pieces, end]
        row[: len(ids)] = torch.tensor(ids)
    return out
