"""The one rule of what stays."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from model import kept

RULE: dict[str, Any] = {"keep_last": 2, "keep_every": None, "keep_steps": ()}


def stays(sealed: list[kept.Sealed], **changes: Any) -> list[kept.Sealed]:
    return list(kept.why(sealed, **{**RULE, **changes}))


ONE = [(1, step) for step in (6, 12, 18, 24)]


@pytest.mark.parametrize(
    ("sealed", "changes", "left"),
    [
        (ONE, {}, [(1, 24), (1, 18)]),
        (ONE, {"keep_last": 1, "keep_every": 12}, [(1, 24), (1, 12)]),
        (ONE, {"keep_last": 1, "keep_steps": [6]}, [(1, 24), (1, 6)]),
        (ONE, {"keep_last": 1, "pinned": [(1, 12), (7, 6)]}, [(1, 24), (1, 12)]),
        ([], {}, []),
        # Over attempts: the newest steps, whoever sealed them; of a step that was sealed twice only the later one.
        ([(1, 6), (1, 12), (2, 18), (3, 24)], {}, [(3, 24), (2, 18)]),
        ([(1, 6), (1, 12), (2, 12)], {"keep_last": 1}, [(2, 12)]),
        ([(1, 6), (1, 12), (2, 12)], {"keep_last": 1, "pinned": [(1, 12)]}, [(2, 12), (1, 12)]),
        # Bad ones do not count among the newest, but stay until whole ones have been sealed behind them.
        (ONE, {"bad": [(1, 24)]}, [(1, 24), (1, 18), (1, 12)]),
        (ONE, {"bad": [(1, 6)]}, [(1, 24), (1, 18)]),
        (ONE, {"bad": ONE}, [(1, 24), (1, 18), (1, 12), (1, 6)]),
        (ONE, {"keep_last": 1, "keep_every": 6, "bad": [(1, 12)]}, [(1, 24), (1, 18), (1, 6)]),
        (ONE, {"keep_last": 1, "keep_steps": [6], "bad": [(1, 6)]}, [(1, 24), (1, 6)]),
        ([(1, 12), (2, 12), (2, 18)], {"keep_last": 1, "keep_steps": [12], "bad": [(2, 12)]}, [(2, 18), (1, 12)]),
    ],
)
def test_what_stays(sealed: list[kept.Sealed], changes: dict[str, Any], left: list[kept.Sealed]) -> None:
    assert stays(sealed, **changes) == left


def test_each_has_its_reasons() -> None:
    why = kept.why([(1, 12), (1, 24)], keep_last=1, keep_every=12, keep_steps=[24], pinned=[(1, 24)])
    assert why == {(1, 24): ("newest", "every 12", "referred to", "pinned"), (1, 12): ("every 12",)}


SEALED = st.lists(st.tuples(st.integers(1, 4), st.integers(1, 12)), unique=True)


@given(
    older=SEALED, newer=SEALED, bad=st.sets(st.tuples(st.integers(1, 8), st.integers(1, 12))), last=st.integers(1, 3)
)
def test_what_an_older_state_lets_go_no_newer_one_wants_back(
    older: list[kept.Sealed], newer: list[kept.Sealed], bad: set[kept.Sealed], last: int
) -> None:
    """So a controller that removes by an old state of the log takes nothing from attempts launched since: later
    attempts add checkpoints, and go on from whole ones that are kept."""
    later = [(attempt + 4, step) for attempt, step in newer]
    rule: dict[str, Any] = {**RULE, "keep_last": last, "keep_every": 4, "keep_steps": [5], "bad": bad}
    gone = set(older) - set(kept.why(older, **rule))
    assert not gone & set(kept.why([*older, *later], **rule))


def test_names_of_pins_and_marks() -> None:
    names = ["a-1-2.json", "a-1-3-c0ffee-init.json", "a-b-4-5.json", "a-1.json", "ab-1-2.json", "a-1-2.json.tmp"]
    assert kept.named(names, "a") == {(1, 2), (1, 3)}
    assert kept.named(names, "a-b") == {(4, 5)}
