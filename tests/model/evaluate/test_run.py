"""What an evaluation does where there is too little to look at."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from model import config
from model.data import index
from model.data.errors import DataError
from model.data.splits import split_of
from model.evaluate import run, tasks
from model.evaluate.tasks import Bench
from tests.model.data.conftest import picture


def settings(folder: Path, **values: Any) -> config.Evaluate:
    return config.read(config.Evaluate, {"data": {"path": str(folder)}, "image_size": 32, **values})


@pytest.mark.parametrize(
    ("held_out", "says"), [(False, "1 images under .* are in the split test"), (True, "1 images under .* are left to")]
)
def test_a_side_without_an_image_says_so(tmp_path: Path, held_out: bool, says: str) -> None:
    name = next(f"{n}.png" for n in range(100) if (split_of(f"{n}.png") == "test") is held_out)
    picture(0).save(tmp_path / name)
    evaluate = settings(tmp_path)
    found = index.build(tmp_path, evaluate.data, lambda done, total: None)
    with pytest.raises(DataError, match=f"evaluate.data: none of the {says}.*; give more images, or evaluate: null"):
        run.sides(found, evaluate)


def test_no_pictures_are_drawn_of_no_images(tmp_path: Path) -> None:
    nothing: Any = None
    assert tasks.drawn(Bench(settings(tmp_path, pictures=0), 0, nothing, nothing, nothing, nothing)) == {}
