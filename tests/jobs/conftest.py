"""What the job tests share: images, and the run that nobody disturbed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.jobs.harness import PATIENCE, Job, cleaned_up, draw_images


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    draw_images(folder)
    return folder


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory, images: Path) -> Iterator[Job]:
    """All four phases and the evaluation, undisturbed, shown in MLflow."""
    job = Job(tmp_path_factory.mktemp("reference"), images, name="reference")
    with cleaned_up(job):
        code = job.start(job.submit("tracking.enabled=true")).wait(2 * PATIENCE)
        assert code == 0, job.output()
        yield job


@pytest.fixture
def make_job(tmp_path: Path, images: Path) -> Iterator[Callable[..., Job]]:
    """Makes jobs in the test's own folder, and ends what they leave behind."""
    with ExitStack() as stack:

        def make(**fields: Any) -> Job:
            return stack.enter_context(cleaned_up(Job(**{"folder": tmp_path, "images": images, **fields})))

        yield make
