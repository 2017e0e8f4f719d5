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
        "shape_ceiling_fraction_of_peak", "fraction_of_shape_ceiling",
        "ceiling_fraction_of_products", "products_ms", "peak_memory_mib", "step_ms",
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


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--arch", "nope"], "--arch: invalid choice: 'nope' (choose from "),
        (["--local", "4x50"], "--local: crops of 50 pixels are not whole patches; sizes are multiples of 16"),
        (["--arch", "dinov2_vitg14", "--local", "4x48"], "--global: crops of 96 pixels are not whole patches"),
        (["--gram", "1.3"], "--gram 1.3: crops of 125 pixels are not whole patches; sizes are multiples of 16"),
        (["--gram", "nan"], "--gram: nan is not a number above 0"),
        (["--local", "4"], "--local: 4 is not COUNTxSIZE, such as 4x48"),
        (["--device", "gpu"], "--device: gpu is none of cpu, cuda, cuda:0"),
        (["--device", "cuda:99"], "--device: cuda:99: torch sees "),
        (["--rounds", "0"], "--rounds: 0 is not a whole number from 1 on"),
        (["--batch", "1"], "--batch 1: KoLeo needs 2 images or more"),
    ],
)
def test_what_cannot_be_measured_is_refused(capsys, words, says):
    with pytest.raises(SystemExit) as caught:
        step.parse(words)
    assert caught.value.code == 2
    assert says in capsys.readouterr().err.splitlines()[-1]
