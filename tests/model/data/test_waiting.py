from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest

from model.data.batch import Batch
from model.data.waiting import awaited


def test_the_file_is_there_while_a_batch_is_awaited_and_not_while_it_is_used(tmp_path: Path) -> None:
    file = tmp_path / "scratch/waiting-0"
    seen: list[str] = []

    def slow() -> Iterator[Batch]:
        for number in range(3):
            seen.append(file.read_text())
            yield cast(Any, number)
        raise RuntimeError("no more")

    batches = awaited(slow(), file, "/images")
    for _ in range(3):
        next(batches)
        assert not file.exists()
    with pytest.raises(RuntimeError, match="no more"):
        next(batches)
    assert seen == ["/images"] * 3
