"""What several tests of the control plane stand on."""

from __future__ import annotations

from pathlib import Path

import pytest

from orchestrator import control
from tests.orchestrator.pretend import Bench, tiny_code


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    tiny_code(tmp_path, monkeypatch)
    bench = Bench(tmp_path / "runs")
    monkeypatch.setattr(control, "now", lambda: bench.now)
    return bench
