"""The one rule of what stays."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, strategies as st

from model import kept

RULE: dict[str, Any] = {"keep_last": 2, "keep_every": None, "keep_steps": {}}


def stays(sealed: list[kept.Sealed], **changes: Any) -> list[kept.Sealed]:
    return list(kept.why(sealed, **{**RULE, **changes}))


TEACHER = frozenset({"teacher_backbone"})
ONE = [(1, step) for step in (6, 12, 18, 24)]


@pytest.mark.parametrize(
    ("sealed", "changes", "left"),
    [
        (ONE, {}, [(1, 24), (1, 18)]),
        (ONE, {"keep_last": 1, "keep_every": 12}, [(1, 24), (1, 12)]),
        (ONE, {"keep_last": 1, "keep_steps": {6: None}}, [(1, 24), (1, 6)]),
        (ONE, {"keep_last": 1, "pinned": {(1, 12): None, (7, 6): None}}, [(1, 24), (1, 12)]),
        ([], {}, []),
        # Over attempts: the newest steps, whoever sealed them; of a step that was sealed twice only the later one.
        ([(1, 6), (1, 12), (2, 18), (3, 24)], {}, [(3, 24), (2, 18)]),
        ([(1, 6), (1, 12), (2, 12)], {"keep_last": 1}, [(2, 12)]),
        ([(1, 6), (1, 12), (2, 12)], {"keep_last": 1, "pinned": {(1, 12): None}}, [(2, 12), (1, 12)]),
        # Bad ones do not count among the newest, but stay until whole ones have been sealed behind them.
        (ONE, {"bad": [(1, 24)]}, [(1, 24), (1, 18), (1, 12)]),
        (ONE, {"bad": [(1, 6)]}, [(1, 24), (1, 18)]),
        (ONE, {"bad": ONE}, [(1, 24), (1, 18), (1, 12), (1, 6)]),
        (ONE, {"keep_last": 1, "keep_every": 6, "bad": [(1, 12)]}, [(1, 24), (1, 18), (1, 6)]),
        (ONE, {"keep_last": 1, "keep_steps": {6: None}, "bad": [(1, 6)]}, [(1, 24), (1, 6)]),
        ([(1, 12), (2, 12), (2, 18)], {"keep_last": 1, "keep_steps": {12: None}, "bad": [(2, 12)]}, [(2, 18), (1, 12)]),
    ],
)
def test_what_stays(sealed: list[kept.Sealed], changes: dict[str, Any], left: list[kept.Sealed]) -> None:
    assert stays(sealed, **changes) == left


def test_each_has_its_reasons() -> None:
    why = kept.why(
        [(1, 12), (1, 24)], keep_last=1, keep_every=12, keep_steps={24: TEACHER}, pinned={(1, 24): frozenset()}
    )
    assert why == {
        (1, 24): (("newest", "every 12", "referred to", "pinned"), None),
        (1, 12): (("every 12",), None),
    }


def test_of_what_only_something_refers_to_the_named_parts_stay() -> None:
    pinned = {(1, 6): frozenset({"student"}), (1, 12): frozenset({"optimizer"}), (1, 18): None}
    why = kept.why(ONE, keep_last=1, keep_every=None, keep_steps={6: TEACHER, 18: TEACHER, 24: TEACHER}, pinned=pinned)
    assert {one: stays.parts for one, stays in why.items()} == {
        (1, 24): None, (1, 18): None, (1, 12): {"optimizer"}, (1, 6): {"teacher_backbone", "student"},
    }  # fmt: skip


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
    rule: dict[str, Any] = {**RULE, "keep_last": last, "keep_every": 4, "keep_steps": {5: TEACHER}, "bad": bad}
    was, now = kept.why(older, **rule), kept.why([*older, *later], **rule)
    assert not (set(older) - set(was)) & set(now)
    assert all(was[one].parts is None for one in set(older) & set(now) if now[one].parts is None), "nor parts of it"


def test_names_of_pins_and_marks() -> None:
    names = ["a-1-2.json", "a-1-3-c0ffee-init.json", "a-b-4-5.json", "a-1.json", "ab-1-2.json", "a-1-2.json.tmp"]
    assert kept.named(names, "a") == {(1, 2), (1, 3)}
    assert kept.named(names, "a-b") == {(4, 5)}


def test_what_pins_keep() -> None:
    pins = {
        "r/pins/a-1-2-user.json": b'{"run": "", "parts": ["student"], "why": ""}',
        "r/pins/a-1-2-c0ffee-init.json": b'{"parts": ["optimizer"]}',
        "r/pins/a-1-3.json": b"{}",
        "r/pins/a-1-4-user.json": b"torn",
        "r/pins/b-1-5-user.json": b"{}",
    }
    assert kept.pinned(pins, "a") == {(1, 2): {"student", "optimizer"}, (1, 3): None, (1, 4): None}
    found = kept.pinned(pins, "a")
    assert kept.wanted(found, (1, 2), ["student", "x"])
    assert not kept.wanted(found, (1, 2), ["x"])
    assert kept.wanted(found, (1, 2))
    assert kept.wanted(found, (1, 3), ["x"])
    assert not kept.wanted(found, (1, 9))
