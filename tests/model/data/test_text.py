from __future__ import annotations

from pathlib import Path

import pytest

from model.data import text
from model.data.captions import Captions
from model.data.errors import DataError

CAPTIONS = ["A red fire engine.", "A red frog, sitting.", "A fire.", "The frog's engine is on fire!"] * 5


@pytest.mark.parametrize("caption", ["a red frog.", "nothing learnt: zyx 123", "überraschung ünd 🐸 漢字", ""])
def test_round_trip(caption: str) -> None:
    tokenizer = text.load(text.train(CAPTIONS, 300))
    ids = text.encode(tokenizer, [caption], 64)
    assert tokenizer.decode(ids[0].tolist(), skip_special_tokens=True) == caption


def test_layout_of_a_row() -> None:
    tokenizer = text.load(text.train(CAPTIONS, 300))
    pad, start, end = (tokenizer.token_to_id(token) for token in text.SPECIAL)
    short, long = text.encode(tokenizer, ["A frog.", "fire " * 50], 12)
    assert short.dtype.is_signed
    assert short[0] == long[0] == start
    assert long[-1] == end
    assert short[-1] == pad
    assert short.max() == end == tokenizer.get_vocab_size() - 1
    assert short.argmax() < 11


def test_the_vocabulary_is_at_most_what_was_asked_for() -> None:
    assert text.load(text.train(CAPTIONS, 270)).get_vocab_size() == 270
    assert text.load(text.train(CAPTIONS, 5000)).get_vocab_size() < 400
    with pytest.raises(DataError, match=r"text\.vocabulary: 100 is too few.* need 259"):
        text.train(CAPTIONS, 100)


def test_frequent_words_are_one_token() -> None:
    tokenizer = text.load(text.train(CAPTIONS, 350))
    assert tokenizer.encode(" fire").tokens == ["Ġfire"]


def test_case_does_not_matter() -> None:
    tokenizer = text.load(text.train(CAPTIONS, 300))
    upper, lower = text.encode(tokenizer, ["A FROG", "a frog"], 12)
    assert upper.tolist() == lower.tolist()


def said(captions: list[str]) -> Captions:
    return Captions("\n".join(captions), lambda: captions)


def test_a_run_learns_its_tokenizer_once(tmp_path: Path) -> None:
    first = text.build_or_read(said(CAPTIONS), 300, str(tmp_path))
    (file,) = (tmp_path / "data").iterdir()
    assert text.build_or_read(said(CAPTIONS), 300, str(tmp_path)) == first == file.read_text()
    assert text.train(CAPTIONS, 300) == first
    text.build_or_read(said(CAPTIONS[:3]), 300, str(tmp_path))
    assert len(list((tmp_path / "data").iterdir())) == 2


@pytest.mark.parametrize("json", ["", "{}", '{"version":"1.0","model":{"type":"BPE","vocab":{},"merges":[]}}'])
def test_what_is_not_our_tokenizer_is_refused(json: str) -> None:
    with pytest.raises(DataError, match="not a tokenizer"):
        text.load(json)
