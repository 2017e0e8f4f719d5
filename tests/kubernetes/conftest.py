"""What every test on Kubernetes begins with."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from orchestrator import asking_kubernetes
from tests.kubernetes.fake import as_a_new_process


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """Nothing is remembered of other clusters and other tests."""
    as_a_new_process()
    asking_kubernetes.forget()
    yield
    asking_kubernetes.forget()
