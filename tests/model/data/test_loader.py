from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from model import config
from model.data import skips, sources
from model.data.batch import PairBatch, SslBatch
from model.data.errors import DataError
from model.data.loader import Loader, Stream
from model.data.threads import ASYNCHRONOUS
from model.data.views import PairViews, SslViews, Views
from tests.model.data.loading import assert_equal, tensors

SIZES = config.Resolution(global_size=16, local_size=8, gram_size=24)


def phase(root: Path, kind: str = "pretrain", **data: Any) -> config.AnyPhase:
    values: dict[str, Any] = {
        "kind": kind,
        "steps": 100,
        "data": {"path": str(root), "workers": 0, **data},
        "optim": {"batch_size": 8, "group_size": 2, "lr": 1e-3},
        "checkpoints": {"every": 10},
    }
    if kind == "text":
        values |= {"vision_tower": "pretrain@final", "text": {"vocabulary": 300, "context": 12}}
    else:
        values["crops"] = {"resolutions": [{"global_size": 16, "local_size": 8}], "local_count": 2}
    return config.read_phase(values)


def gram_views(_: int) -> Views:
    return SslViews(SIZES, patch_size=4, gram=True)


def make(
    settings: config.AnyPhase,
    run_dir: Path,
    clocks: tuple[int, int] = (0, 7),
    rank: tuple[int, int] = (0, 1),
    views: Callable[[int], Views] = gram_views,
    jumps: tuple[tuple[int, int], ...] = (),
    ahead: int = 0,
) -> Loader:
    built = sources.build_or_read(settings.data, str(run_dir), lambda *_: None)
    return Loader(settings, Stream(0, "pretrain", range(*clocks), *rank, jumps, ahead), built, str(run_dir), views)


def test_shapes(images: Path, tmp_path: Path) -> None:
    batch = next(iter(make(phase(images), tmp_path)))
    assert isinstance(batch, SslBatch)
    shapes = {name: tuple(value.shape) for name, value in tensors(batch).items()}
    assert shapes == {
        "positions": (8,),
        "groups": (4,),
        "global_crops": (2, 8, 3, 16, 16),
        "local_crops": (2, 8, 3, 8, 8),
        "gram_crops": (2, 8, 3, 24, 24),
        "masks": (2, 8, 16),
    }
    assert batch.masks.dtype == torch.bool
    assert batch.groups.tolist() == [0, 1, 2, 3]


def test_the_same_batches_for_any_number_of_workers(images: Path, tmp_path: Path) -> None:
    inline = list(make(phase(images), tmp_path))
    assert [batch.positions[0].item() for batch in inline] == [0, 8, 16, 24, 32, 40, 48]
    assert_equal(inline, list(make(phase(images, workers=3), tmp_path)))


def test_ranks_and_micro_batches_are_slices_of_the_global_batch(images: Path, tmp_path: Path) -> None:
    whole = list(make(phase(images), tmp_path))
    for rank in range(2):
        part = list(make(phase(images), tmp_path, rank=(rank, 2)))
        assert_equal(part, [batch.slice(4 * rank, 4 * rank + 4) for batch in whole])
        assert part[0].groups.tolist() == [2 * rank, 2 * rank + 1]


def test_a_slice_through_a_group_is_refused(images: Path, tmp_path: Path) -> None:
    batch = next(iter(make(phase(images), tmp_path)))
    with pytest.raises(ValueError, match="not whole groups of 2"):
        batch.slice(1, 3)
    with pytest.raises(ValueError, match="not whole groups of 2"):
        batch.slice(4, 10)


def test_going_on_at_a_clock_is_as_if_never_stopped(images: Path, tmp_path: Path) -> None:
    whole = list(make(phase(images, workers=2), tmp_path, (0, 9)))
    assert_equal(whole[4:], list(make(phase(images, workers=2), tmp_path, (4, 9))))


def test_what_is_jumped_over_is_never_seen_and_the_rest_keeps_its_order(images: Path, tmp_path: Path) -> None:
    whole = list(make(phase(images), tmp_path, (0, 12)))
    jumps = ((3, 2), (5, 1))
    seen = list(make(phase(images, workers=2), tmp_path, (0, 9), jumps=jumps))
    positions = [batch.positions[0].item() // 8 for batch in seen]
    assert positions == [0, 1, 2, 5, 6, 8, 9, 10, 11]
    assert [batch.positions.tolist() for batch in seen] == [whole[at].positions.tolist() for at in positions]
    for batch, at in zip(seen, positions, strict=True):
        assert torch.equal(tensors(batch)["global_crops"], tensors(whole[at])["global_crops"])
    assert_equal(seen[4:], list(make(phase(images), tmp_path, (4, 9), jumps=jumps, ahead=2)))


def test_world_sizes_that_do_not_fit_are_refused(images: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="do not divide over 3 processes; take a number of processes that divides 4"):
        make(phase(images), tmp_path, rank=(0, 3))


def test_an_image_that_goes_bad_is_replaced_and_shifts_nothing(images: Path, tmp_path: Path) -> None:
    settings = phase(images, max_skip_rate=0.2)
    before = list(make(settings, tmp_path))
    (images / "a/04.png").write_bytes(b"")
    (images / "b/05.png").write_bytes((images / "b/05.png").read_bytes()[:60])
    broken = make(settings, tmp_path)
    after = list(broken)
    assert broken.skipped.count == 2
    assert {one.path for one in broken.skipped.last} == {"a/04.png", "b/05.png"}
    assert all(one.reason for one in broken.skipped.last)
    changed = 0
    for one, other in zip(before, after, strict=True):
        assert torch.equal(one.positions, other.positions)
        assert isinstance(one, SslBatch)
        assert isinstance(other, SslBatch)
        assert torch.equal(one.masks, other.masks)
        changed += int((one.global_crops != other.global_crops).flatten(2).any(2).any(0).sum())
    assert changed in (2, 3, 4)  # 56 images of 40: each of the two comes once or twice
    assert_equal(after, list(make(phase(images, max_skip_rate=0.2, workers=3), tmp_path)))


@pytest.mark.parametrize("workers", [0, 2])
def test_what_was_due_and_what_was_replaced_is_counted_batch_by_batch(
    images: Path, tmp_path: Path, workers: int
) -> None:
    made = make(phase(images, workers=workers), tmp_path, (0, 5))
    assert (made.due, made.total) == (0, 40)
    for number in (2, 4, 6, 8):
        (images / f"a/{number:02d}.png").unlink()
    counted = [(made.due, made.skipped.replaced) for _ in made]
    assert [due for due, _ in counted] == [8, 16, 24, 32, 40]
    replaced = [count for _, count in counted]
    assert replaced == sorted(replaced)
    assert replaced[-1] >= 4  # an epoch: each of the four was due once, and may have been drawn for another


@pytest.mark.parametrize(
    ("replaced", "due", "total", "left_out", "too_many"),
    [
        (3, 8, 40, 0, True),  # of 40 images there are, 5 % are 2, however few were due
        (2, 8, 40, 0, False),
        (500, 4096, 1_700_000_000, 0, False),  # too few were due to tell
        (501, 4096, 1_700_000_000, 0, True),
        (50_000, 1_000_000, 1_700_000_000, 0, False),
        (50_001, 1_000_000, 1_700_000_000, 0, True),
        (1, 8, 38, 2, True),  # two of forty are 5 % already
        (0, 8, 38, 2, False),
        (2, 99, 99, 1, False),
        (4, 99, 99, 1, True),
    ],
)
def test_a_share_is_judged_of_what_was_due(replaced: int, due: int, total: int, left_out: int, too_many: bool) -> None:
    assert skips.are_too_many(replaced, due, total, left_out, 0.05) == too_many


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_in_a_thread_comes_out_at_its_batch(images: Path, tmp_path: Path, workers: int) -> None:
    def views(clock: int) -> Views:
        if clock == 3:
            raise RuntimeError("no views at 3")
        return gram_views(clock)

    batches = iter(make(phase(images, workers=workers), tmp_path, views=views))
    assert [next(batches).positions[0].item() for _ in range(3)] == [0, 8, 16]
    with pytest.raises(RuntimeError, match="no views at 3"):
        next(batches)


def test_threads_end_when_closed_and_few_batches_are_made_ahead(images: Path, tmp_path: Path) -> None:
    asked: list[int] = []

    def views(clock: int) -> Views:
        asked.append(clock)
        return gram_views(clock)

    made = make(phase(images, workers=2), tmp_path, (0, 1000), views=views)
    batches = iter(made)
    next(batches)
    made.close()
    assert max(asked) <= 3
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("loader")]


def test_loader_threads_take_no_signals(images: Path, tmp_path: Path) -> None:
    """A handler runs in the main thread whatever the loader does, and no worker is interrupted in its place."""
    handled: list[threading.Thread] = []
    before = signal.signal(signal.SIGTERM, lambda *_: handled.append(threading.current_thread()))
    blocked: set[bool] = set()

    def views(clock: int) -> Views:
        blocked.add(set(signal.pthread_sigmask(signal.SIG_BLOCK, [])) >= ASYNCHRONOUS)
        os.kill(os.getpid(), signal.SIGTERM)
        return gram_views(clock)

    try:
        batches = list(make(phase(images, workers=3), tmp_path, views=views))
    finally:
        signal.signal(signal.SIGTERM, before)
    assert blocked == {True}
    assert handled
    assert set(handled) == {threading.main_thread()}
    assert_equal(batches, list(make(phase(images), tmp_path)))


def test_views_may_change_from_step_to_step(images: Path, tmp_path: Path) -> None:
    def views(clock: int) -> Views:
        return SslViews(config.Resolution(global_size=16 + 8 * (clock % 2), local_size=8), patch_size=4)

    sides = []
    for batch in make(phase(images), tmp_path, (0, 2), views=views):
        assert isinstance(batch, SslBatch)
        assert batch.gram_crops is None
        sides.append((batch.global_crops.shape[-1], batch.masks.shape[-1]))
    assert sides == [(16, 16), (24, 36)]


def test_decoding_each_time_gives_the_same(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = list(make(phase(images), tmp_path))
    monkeypatch.setattr(sources, "MEMORY_BUDGET", 0)
    assert_equal(kept, list(make(phase(images), tmp_path)))


def pairs(_: int) -> Views:
    return PairViews(image_size=16, context=12)


def test_pairs(images: Path, tmp_path: Path) -> None:
    made = make(phase(images, "text", hold_out="test"), tmp_path, views=pairs)
    whole = list(made)
    assert made.tokenizer is not None
    batch = whole[0]
    assert isinstance(batch, PairBatch)
    assert batch.images.shape == (8, 3, 16, 16)
    assert batch.tokens.shape == (8, 12)
    assert_equal(whole, list(make(phase(images, "text", hold_out="test", workers=3), tmp_path, views=pairs)))
    part = list(make(phase(images, "text", hold_out="test"), tmp_path, rank=(1, 2), views=pairs))
    assert_equal(part, [batch.slice(4, 8) for batch in whole])


def test_a_text_phase_takes_the_images_with_captions_and_needs_some(images: Path, tmp_path: Path) -> None:
    for path in sorted(images.rglob("*.txt"))[1:]:
        path.unlink()
    with_one = next(iter(make(phase(images, "text"), tmp_path / "one", views=pairs)))
    assert isinstance(with_one, PairBatch)
    assert len(with_one.tokens.unique(dim=0)) == 1
    next(images.rglob("*.txt")).unlink()
    with pytest.raises(DataError, match=r"no training image .* has a caption"):
        make(phase(images, "text"), tmp_path / "none", views=pairs)
