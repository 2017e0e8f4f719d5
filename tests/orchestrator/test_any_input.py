"""Whatever stands in a spec or an override: a SpecError at most, never another exception."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings, strategies as st

from orchestrator.problems import SpecError
from orchestrator.spec import read_job

TINY = (Path(__file__).parents[2] / "tests/orchestrator/valid.yaml").read_text()
TREE: dict[str, Any] = yaml.safe_load(TINY)


def paths(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inner: list[Any] = list(value.items()) if isinstance(value, Mapping) else []
    inner += list(enumerate(value)) if isinstance(value, list) else []
    return [at, *(path for key, child in inner for path in paths(child, (*at, key)))]


anything = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.text(max_size=12),
    st.sampled_from(
        ["pretrain@final", "a#b@1", "gram@best(x)", "s3://x", "cache:", "cache:\x00", "pretrain", "~", "."]
    ),
    st.lists(st.integers(-2, 3), max_size=3),
    st.dictionaries(st.sampled_from(["kind", "peak", "every", "path", "x", ""]), st.integers(-1, 3), max_size=3),
)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz") / "job.yaml"


@settings(max_examples=60, deadline=None)
@given(changes=st.lists(st.tuples(st.sampled_from(paths(TREE)[1:]), anything), min_size=1, max_size=4))
def test_no_value_anywhere_gives_a_traceback(scratch: Path, changes: list[tuple[tuple[Any, ...], Any]]) -> None:
    tree = copy.deepcopy(TREE)
    for path, value in changes:
        here = tree
        with contextlib.suppress(KeyError, IndexError, TypeError):  # an earlier change took the place away
            for part in path[:-1]:
                here = here[part]
            here[path[-1]] = value
    scratch.write_text(yaml.safe_dump(tree))
    with contextlib.suppress(SpecError):
        read_job(str(scratch), check_data=False)


@settings(max_examples=40, deadline=None)
@given(text=st.text(max_size=40) | st.sampled_from([f"{'.'.join(map(str, p))}=x" for p in paths(TREE)[1:]]))
def test_no_override_gives_a_traceback(scratch: Path, text: str) -> None:
    scratch.write_text(TINY)
    with contextlib.suppress(SpecError):
        read_job(str(scratch), [text], check_data=False)
