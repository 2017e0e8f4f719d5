"""Every way to end has a page, and every alert; every page is of one."""

from __future__ import annotations

from pathlib import Path

import pytest

from model.contract import Cause
from orchestrator import failures

ROOT = Path(__file__).parents[1]
PAGES = [cause.value for cause in Cause if cause is not Cause.DONE]
ALERTS = ["nobody-watches", "notice-too-short", "save-skipped"]
"""What goes on all the same, and somebody should look at."""


def test_there_is_a_page_for_each_and_no_other() -> None:
    assert {page.stem for page in (ROOT / "runbooks").glob("*.md")} == {*PAGES, *ALERTS}
    assert all(failures.runbook(Cause(page)) == f"runbooks/{page}.md" for page in PAGES)


@pytest.mark.parametrize("page", [*PAGES, *ALERTS])
def test_a_page_says_what_it_looks_like_what_dinoctl_does_and_what_to_do(page: str) -> None:
    text = (ROOT / "runbooks" / f"{page}.md").read_text()
    assert text.startswith(f"# {page}: ")
    for part in ("**What it looks like.**", "**What dinoctl does.**", "**What you do.**"):
        assert part in text


def test_the_readme_names_every_exit_code_and_command() -> None:
    from orchestrator import cli

    readme = (ROOT / "README.md").read_text()
    for code in (cli.DONE, cli.FAILED, cli.WRONG_INPUT, cli.DISK_FULL, cli.INTERRUPTED):
        assert f"| {code} |" in readme
    for command in ("validate", "plan", "submit", "status", "logs", "cancel", "resume", "schema", "ckpt"):
        assert f"| `{command}" in readme
