"""The evaluation of a run: `python -P -m model.rank model.evaluate.run ATTEMPT_YAML`, one process, by the agent.

Loads the backbone that the run ended with and the same one untrained, scores both on images that training never saw,
and publishes `report/report.json` and the pictures. What the images do not allow is left out, by name.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import partial

import numpy as np

from model import config, contract, sealed, storage, worker
from model.contract import REPORT_DIR, REPORT_FILE, Attempt, Cause, RankEnd
from model.data import index as images, splits
from model.data.errors import DataError
from model.data.index import Entry, Index
from model.data.threads import Tell, untold
from model.evaluate import features, pixels, report, tasks
from model.evaluate.report import LeftOut, Report, Row, Scored
from model.evaluate.scores import Ints
from model.evaluate.tasks import Bench, Side
from model.looking import Looking
from model.progress import Progress

STAGES = ("images", "features", "classification", "dense", "instance retrieval", "captions", "intervals", "pictures")


class StopError(Exception):
    """The agent asks for a stop. An evaluation seals nothing: the next attempt begins again."""


@dataclass
class Work:
    """How far the evaluation is, told stage by stage."""

    attempt: Attempt
    progress: Progress
    done: int = 0

    def finished(self) -> None:
        """Raises StopError if the agent asked for a stop meanwhile."""
        self.progress.note(f"{STAGES[self.done]} done")
        self.done += 1
        self.progress.step(self.done, 0.0, {})
        pulse = contract.pulse_file(self.attempt.launch_name, 0)
        pulse.parent.mkdir(parents=True, exist_ok=True)
        pulse.touch()
        if contract.stop_file(self.attempt.launch_name).exists():
            raise StopError


def evaluate(work: Work) -> None:
    """Publish the report of the attempt's run.

    Raises StopError, DataError, CheckpointError or storage.StoreError.
    """
    attempt = work.attempt
    settings = config.read(config.Evaluate, attempt.settings)
    model = config.read(config.Model, attempt.model)
    looking = Looking(attempt, rank=0)
    index = images.build_or_read(settings.data, attempt.run_dir, partial(looking, images.LOOKED_AT))
    train, held_out = sides(index, settings, partial(looking, pixels.OPENED))
    work.finished()
    weights = sealed.load(attempt.inputs["backbone"], "teacher_backbone")
    trained, untrained = (
        tasks.look(features.backbone(model, attempt.seed, state), train, held_out, settings)
        for state in (weights, None)
    )
    bench = Bench(settings, attempt.seed, train, held_out, trained, untrained)
    work.finished()
    scored, left_out = all_scores(bench, index, work)
    rows = [report.row(one, settings.bootstrap, attempt.seed) for one in scored]
    work.finished()
    publish(attempt, bench, rows, left_out)
    work.finished()


def sides(index: Index, settings: config.Evaluate, tell: Tell = untold) -> tuple[Side, Side]:
    """What training saw, and the split that it did not. Raises DataError if there is nothing of either."""
    hidden: tuple[str, ...] = splits.HIDDEN["test" if settings.split == "test" else "validation"]
    seen = [entry for entry in index.entries if entry.split not in hidden]
    held_out = images.entries_of(index, settings.split)
    for which, entries in (("left to train on", seen), (f"in the split {settings.split}", held_out)):
        if not entries:
            raise DataError(
                f"evaluate.data: none of the {len(index.entries)} images under {index.root} are {which}; give more "
                "images, or evaluate: null"
            )
    return _side(seen, index, settings, tell), _side(held_out, index, settings, tell)


def _side(entries: list[Entry], index: Index, settings: config.Evaluate, tell: Tell) -> Side:
    return Side(entries, pixels.squares(entries, index.root, settings.image_size, settings.data, tell))


def all_scores(bench: Bench, index: Index, work: Work) -> tuple[list[Scored], list[LeftOut]]:
    """Every score that the images allow, and those that they do not."""
    scored: list[Scored] = []
    left_out: list[LeftOut] = []
    if tasks.can_be_classified(bench):
        scored += tasks.classification(bench)
    else:
        why = "it needs training images in at least two folders inside data.path, as classes, and three unlike ones"
        left_out += [LeftOut(score="k-NN accuracy", why=why), LeftOut(score="linear probe accuracy", why=why)]
    work.finished()
    if all(any(alpha is not None for alpha in side.squares.opacity) for side in (bench.train, bench.held_out)):
        scored.append(tasks.dense(bench))
    else:
        left_out.append(LeftOut(score="foreground mIoU", why="it needs images with transparent pixels, as masks"))
    work.finished()
    scored.append(tasks.instance_retrieval(bench))
    work.finished()
    captioned = np.array([i for i, entry in enumerate(bench.held_out.entries) if entry.caption], dtype=np.int64)
    if "text" not in work.attempt.inputs:
        left_out.append(LeftOut(score="caption-to-image R@1", why="the run has no text phase"))
    elif not len(captioned):
        left_out.append(LeftOut(score="caption-to-image R@1", why="it needs captions: a .txt beside each image"))
    else:
        scored.append(_captions(work.attempt, bench, captioned))
    work.finished()
    return scored, left_out


def _captions(attempt: Attempt, bench: Bench, captioned: Ints) -> Scored:
    ref = attempt.inputs["text"]
    manifest = sealed.read_manifest(ref)
    phase = config.read(config.TextPhase, manifest.model["phase"])
    tokens = tasks.tokens_of(bench.held_out.entries, captioned, manifest.model["tokenizer"], phase.text.context)
    weights = sealed.load_files(ref, manifest, "student")
    trained = features.aligned(bench.trained.network, phase, attempt.seed, weights)
    untrained = features.aligned(bench.untrained.network, phase, attempt.seed, None)
    return tasks.caption_recall(bench, trained, untrained, tokens, captioned)


def publish(attempt: Attempt, bench: Bench, rows: list[Row], left_out: list[LeftOut]) -> None:
    """Pictures first, then the report that names them."""
    drawn = tasks.drawn(bench)
    for name, png in drawn.items():
        storage.replace(f"{attempt.run_dir}/{REPORT_DIR}/{name}", png)
    made = Report(
        run=attempt.run,
        seed=attempt.seed,
        split=bench.settings.split,
        n_images=len(bench.held_out.entries),
        n_groups=len(np.unique(bench.held_out.groups)),
        checkpoints={name: str(ref) for name, ref in attempt.inputs.items()},
        rows=rows,
        left_out=left_out,
        pictures=[f"{REPORT_DIR}/{name}" for name in drawn],
    )
    storage.replace(f"{attempt.run_dir}/{REPORT_FILE}", report.encode(made))


def run(attempt: Attempt) -> RankEnd:
    """Evaluate in this process, to whatever end."""
    work = Work(attempt, Progress(attempt, len(STAGES)))
    try:
        evaluate(work)
        work.progress.flush()
    except StopError:
        return RankEnd(cause=Cause.STOPPED, message="stopped as asked; it will begin again", step=work.done)
    except Exception as error:
        if isinstance(error, sealed.DamagedError):
            sealed.mark(error.ref, str(error), attempt)
        return worker.failed(error, work.done)
    return RankEnd(cause=Cause.DONE, message=f"the report is in {REPORT_FILE}", step=work.done)


if __name__ == "__main__":
    sys.exit(worker.main(sys.argv[1], run))
