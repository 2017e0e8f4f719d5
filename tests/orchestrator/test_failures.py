"""Every way to end has a policy, and budgets and back-offs are as the table says."""

from __future__ import annotations

import pytest

from model.contract import Cause
from orchestrator.failures import LONGEST_BACKOFF, POLICIES, backoff, runbook, verdict

ENDS_AT_ONCE = {Cause.USER_ERROR, Cause.DISK_FULL, Cause.BAD_DATA, Cause.BAD_CHECKPOINT, Cause.DIVERGED}


def test_every_cause_but_done_has_a_policy() -> None:
    assert set(POLICIES) == set(Cause) - {Cause.DONE}


@pytest.mark.parametrize("cause", list(POLICIES))
def test_a_budget_is_exactly_its_number_of_retries(cause: Cause) -> None:
    retries = POLICIES[cause].retries
    if retries is None:
        assert backoff(cause, 10_000) == LONGEST_BACKOFF
        return
    assert all(backoff(cause, count) is not None for count in range(1, retries + 1))
    assert backoff(cause, retries + 1) is None


def test_what_a_retry_cannot_mend_ends_the_run_at_once() -> None:
    assert {cause for cause in POLICIES if backoff(cause, 1) is None} == ENDS_AT_ONCE


def test_preemption_never_spends_a_budget() -> None:
    assert POLICIES[Cause.STOPPED].retries is None


def test_the_wait_doubles_and_is_bounded() -> None:
    waits = [backoff(Cause.KILLED, count) for count in range(1, 6)]
    assert waits == [1.0, 2.0, 4.0, 8.0, 16.0]
    assert backoff(Cause.STORE_LOST, 5) == 240.0


def test_the_last_word_names_tries_advice_and_runbook() -> None:
    text = verdict(Cause.CRASHED, 3, "ValueError: no")
    assert text.startswith("ValueError: no (3 times without progress). the trainer raises")
    assert text.endswith("See runbooks/crashed.md")
    assert runbook(Cause.DISK_FULL) == "runbooks/disk-full.md"
