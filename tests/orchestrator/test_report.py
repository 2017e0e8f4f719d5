"""The report: read strictly, drawn whole, and plain about what trained does not beat."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import msgspec
import pytest
from rich.console import Console

from model import contract
from model.evaluate.report import Report as Written
from orchestrator import report
from tests.orchestrator.written import Run, row


def drawn(table: report.Report) -> str:
    out = io.StringIO()
    Console(file=out, width=200).print(report.render(table))
    return out.getvalue()


def read(tmp_path: Path, *rows: dict[str, Any], **changes: Any) -> report.Report:
    run = Run(tmp_path / "tiny")
    run.report(*rows, **changes)
    table = report.read(run.path)
    assert table is not None
    return table


def test_there_is_none_before_the_evaluation(tmp_path: Path) -> None:
    assert report.read(str(tmp_path)) is None


def test_a_torn_report_is_named(tmp_path: Path) -> None:
    (tmp_path / "report").mkdir()
    (tmp_path / contract.REPORT_FILE).write_text('{"rows": [')
    with pytest.raises(contract.ContractError, match=r"report\.json: not a report"):
        report.read(str(tmp_path))


def test_it_reads_what_the_evaluation_writes() -> None:
    """Both houses have a record of their own; every field that is read is one that is written."""
    written = set(msgspec.structs.asdict(EXAMPLE))
    assert set(report.Report.__struct_fields__) <= written
    assert msgspec.json.decode(msgspec.json.encode(EXAMPLE), type=report.Report).rows == []


EXAMPLE = Written(
    run="r", seed=0, split="test", n_images=1, n_groups=1, checkpoints={}, rows=[], left_out=[], pictures=[]
)


def test_every_score_with_its_intervals_and_baselines(tmp_path: Path) -> None:
    text = drawn(read(tmp_path, row(), row("mIoU", baselines={"position only": 57.4}, trained=61.6)))
    assert "linear probe accuracy (%)" in text
    assert "52.4 [47.0, 57.0]" in text
    assert "44.7 [40.0, 49.0]" in text
    assert "+7.7 [+3.1, +12.0]" in text
    assert "position only 57.4" in text
    assert "5 images (4 groups of near-duplicates) of the test split, seed 0" in text


def test_nothing_to_say_if_everything_is_beaten(tmp_path: Path) -> None:
    assert report.not_beaten(read(tmp_path, row())) == []


def test_what_trained_does_not_beat_is_said(tmp_path: Path) -> None:
    table = read(
        tmp_path,
        row(
            "instance retrieval R@1", trained=29.1, untrained=28.0, difference=1.1, interval=[-2.0, 4.0],
            trained_interval=[25.0, 33.0], baselines={"raw pixels": 34.7, "colour": 26.0, "majority": 1.0},
            beats_untrained=False, note="97 images",
        ),
    )  # fmt: skip
    assert report.not_beaten(table) == [
        "instance retrieval R@1: trained does not beat untrained "
        "(29.1 against 28.0, difference between -2.0 and +4.0). 97 images",
        "instance retrieval R@1: trained (29.1) does not beat raw pixels (34.7).",
        "instance retrieval R@1: trained (29.1) is above colour (26.0), "
        "which its interval [25.0, 33.0] does not exclude.",
    ]
    assert "does not beat raw pixels" in drawn(table)


def test_what_was_left_out_is_named(tmp_path: Path) -> None:
    table = read(tmp_path, left_out=[{"score": "caption-to-image R@1", "why": "no captions"}])
    assert "Left out: caption-to-image R@1 (no captions)." in drawn(table)
