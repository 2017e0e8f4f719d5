"""YAML 1.2, plain and bounded: what is read, what is refused, and how it says so."""

from __future__ import annotations

import contextlib
import math
from pathlib import Path

import pytest
from hypothesis import given, strategies as st

from orchestrator.problems import SpecError
from orchestrator.yaml_reader import MAX_BYTES, MAX_DEPTH, dump, parse_value, parse_yaml, read_yaml


def refusal(text: str | bytes) -> str:
    data = text.encode() if isinstance(text, str) else text
    with pytest.raises(SpecError) as caught:
        parse_yaml(data, "job.yaml")
    assert all(problem.file == "job.yaml" for problem in caught.value.problems)
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("5e-5", 5e-5),
        ("1E+3", 1000.0),
        (".5", 0.5),
        ("1.", 1.0),
        ("-0x1F", "-0x1F"),
        ("0x1F", 31),
        ("0o17", 15),
        ("017", 17),
        ("+3", 3),
        ("1_000", "1_000"),
        ("12:30:45", "12:30:45"),
        ("2026-11-24", "2026-11-24"),
        ("on", "on"),
        ("no", "no"),
        ("Yes", "Yes"),
        ("True", True),
        ("false", False),
        ("null", None),
        ("~", None),
        ("", None),
        ("'5'", "5"),
        ("! 5", "5"),
        ("!!str 5", "5"),
        ("!!float 5", 5.0),
        ("-.inf", -math.inf),
        ("[1, a, {b: no}]", [1, "a", {"b": "no"}]),
    ],
)
def test_values_are_those_of_yaml_1_2(text: str, value: object) -> None:
    read = parse_value(text, "here")
    assert read == value
    assert type(read) is type(value)


def test_lines_are_those_of_the_keys() -> None:
    document = parse_yaml(b"a: 1\nb:\n  c:\n    - x\n    - {d: 2}\n", "job.yaml")
    assert document.values == {"a": 1, "b": {"c": ["x", {"d": 2}]}}
    assert document.lines == {
        ("a",): 1,
        ("b",): 2,
        ("b", "c"): 3,
        ("b", "c", 0): 4,
        ("b", "c", 1): 5,
        ("b", "c", 1, "d"): 5,
    }


def test_an_alias_repeats_its_value() -> None:
    assert parse_yaml(b"a: &x {b: 1}\nc: *x\n", "f").values == {"a": {"b": 1}, "c": {"b": 1}}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: 1\nb: 2\na: 3\n", ["job.yaml:3", "key 'a' is there twice", "first on line 1"]),
        ("a: !!python/object/apply:os.system ['true']\n", ["job.yaml:1", "!!python/object/apply:os.system", "refused"]),
        ("a: !!python/name:os.system\n", ["!!python/name:os.system"]),
        ("a: !local x\n", ["!local"]),
        ("a: !!set {x}\n", ["!!set"]),
        ("a: !!binary aGk=\n", ["!!binary"]),
        ("a: !!int x\n", ["not a !!int", "'x'"]),
        ("1: x\n", ["a key must be text", "1", "quotes"]),
        ("[a, b]: x\n", ["a key must be text"]),
        ("a: *nowhere\n", ["job.yaml:1: *nowhere names no anchor"]),
        ("a: &x [*x]\n", ["*x stands inside what it names"]),
        ("a: 1\n---\nb: 2\n", ["job.yaml:2: more than one document"]),
        ("a: [1\n", ["not YAML"]),
        ("a: b: c\n", ["job.yaml:1", "not YAML"]),
        ("a:\n\t- b\n", ["job.yaml:2", "not YAML"]),
        ('a: "\\UFFFFFFFF"\n', ["not YAML"]),
        ('a: "\\ud800"\n', ["control character"]),
        ('a: "x\\0y"\n', ["control character"]),
        (f"a: {'9' * 5000}\n", ["beyond 64 bits"]),
        ("", ["must be a mapping", "nothing"]),
        ("# only a comment\n", ["must be a mapping"]),
        ("just text\n", ["must be a mapping", "just text"]),
        ("- a\n- b\n", ["must be a mapping"]),
        ("%YAML 3.0\n---\na: 1\n", ["not YAML"]),
    ],
)
def test_what_is_refused_and_how(text: str, said: list[str]) -> None:
    message = refusal(text)
    assert all(word in message for word in said), message


def test_every_mistake_is_told_at_once() -> None:
    message = refusal("a: 1\na: 2\nb: !!python/none x\n3: c\n")
    assert [word for word in ("twice", "!!python/none", "must be text") if word in message] == [
        "twice",
        "!!python/none",
        "must be text",
    ]


def test_a_bomb_is_refused_by_name_before_it_is_expanded() -> None:
    levels = ["l0: &l0 [x, x, x, x, x, x, x, x, x, x]"]
    levels += [f"l{n}: &l{n} [{', '.join([f'*l{n - 1}'] * 10)}]" for n in range(1, 30)]
    assert "a YAML bomb" in refusal("\n".join(levels))


def test_nesting_is_bounded_also_through_aliases() -> None:
    assert refusal("a: " + "[" * 100_000).startswith("job.yaml:1: nested too deeply")
    chain = ["a0: &a0 x"] + [f"a{n}: &a{n} [*a{n - 1}]" for n in range(1, MAX_DEPTH + 2)]
    assert "nested too deeply" in refusal("\n".join(chain))
    assert "nested too deeply" in refusal("- " * 60 + "x\n")


def test_size_is_bounded() -> None:
    assert "too large" in refusal(b"a: " + b"x" * MAX_BYTES)
    assert "too many values" in refusal("a: [" + "1," * 60_000 + "]")


def test_a_file_of_100_mb_is_refused_without_being_read(tmp_path: Path) -> None:
    file = tmp_path / "large.yaml"
    with file.open("wb") as stream:
        stream.truncate(100_000_000)
    with pytest.raises(SpecError, match="too large for a spec"):
        read_yaml(str(file))


def test_text_that_is_not_utf_8(tmp_path: Path) -> None:
    assert "not UTF-8" in refusal(b"a: \xff\xfe\n")
    assert parse_yaml("\ufeffa: é\n".encode(), "f").values == {"a": "é"}


@pytest.mark.parametrize("name", ["missing.yaml", ".", "a\0b"])
def test_a_file_that_cannot_be_read(tmp_path: Path, name: str) -> None:
    with pytest.raises(SpecError, match="cannot be read"):
        read_yaml(f"{tmp_path}/{name}")


words = st.text(st.characters(exclude_categories=["Cc", "Cs"]))
values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False)
    | words
    | st.sampled_from(["on", "1e5", "5", "null", "0x1", "~", "", "1_0", "=", "<<", "2026-01-01", "- a", "a: b", "no"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(words, inner, max_size=4),
    max_leaves=8,
)


@given(st.dictionaries(words, values, max_size=4))
def test_what_is_dumped_is_read_back(mapping: dict[str, object]) -> None:
    assert parse_yaml(dump(mapping).encode(), "f").values == mapping


pieces = st.lists(
    st.sampled_from(
        [*"{}[]:,-?!&*|>'\"%@`#\n \t", "a", "1", "&a ", "*a", "!!python/x ", "? ", ": ", "- ", "---\n", "\\u"]
    ),
    max_size=40,
).map("".join)


@given(pieces | st.text(max_size=60) | st.binary(max_size=60))
def test_no_text_gives_anything_but_a_mapping_or_a_spec_error(text: str | bytes) -> None:
    data = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
    with contextlib.suppress(SpecError):
        assert isinstance(parse_yaml(data, "f").values, dict)
