"""The benchmark of the step, made small: what it reports."""

import json
import math

import pytest

from tests.benchmarks import products, step

SMALL = ["--batch", "2", "--global", "2x32", "--local", "1x32", "--prototypes", "32", "--threads", "1", "--rounds", "1"]


@pytest.mark.jobs
@pytest.mark.parametrize("more", [[], ["--gram", "2", "--dtype", "bf16"]], ids=["fp32", "gram in bf16"])
def test_reports_all_that_is_asked_for(monkeypatch, more):
    monkeypatch.setattr(products, "CUBE", 64)
    monkeypatch.setattr(products, "LEAST_SECONDS", 1e-4)
    told = json.loads(json.dumps(step.measure(step.parse([*SMALL, *more]))))
    figures = (
        "images_per_s", "images_per_s_with_data", "flops_per_s", "matmul_peak_flops_per_s", "fraction_of_matmul_peak",
        "shape_ceiling_fraction_of_peak", "fraction_of_shape_ceiling", "peak_memory_mib", "step_ms",
    )  # fmt: skip
    assert all(math.isfinite(told[name]) and told[name] > 0 for name in figures)
    assert set(told["breakdown_ms"]) == set(step.PARTS)
    assert all(taken > 0 for taken in told["breakdown_ms"].values())
    parts = sum(taken for part, taken in told["breakdown_ms"].items() if part != "data")
    assert told["step_ms"] == pytest.approx(parts)
    assert told["images_per_s"] == pytest.approx(2 / parts * 1e3)
    assert told["fraction_of_matmul_peak"] == pytest.approx(
        told["flops_per_step"] / told["step_ms"] * 1e3 / told["matmul_peak_flops_per_s"]
    )


def test_refuses_another_number_of_global_crops():
    with pytest.raises(SystemExit, match="a step has 2 global crops"):
        step.prepare(step.parse(["--global", "3x32"]))
