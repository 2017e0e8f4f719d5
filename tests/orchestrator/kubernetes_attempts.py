"""Attempts and a profile of a Kubernetes, for tests of what is made of them."""

from __future__ import annotations

from typing import Any

from model import contract
from model.contract import Attempt
from orchestrator.cluster import ClusterProfile

RUN_ID, DIGEST = "0123456789abcdef" * 2, "f" * 64


def profile(**section: Any) -> dict[str, Any]:
    """A resolved profile whose pods ask for no GPU."""
    told = {"image": f"registry.example.org/worker@sha256:{'0' * 64}", "gpus": False, **section}
    values = {"name": "site", "launcher": "kubernetes", "gpus_per_node": 1, "kubernetes": told}
    return ClusterProfile.model_validate(values).model_dump(mode="json")


def attempt(number: int = 1, nodes: int = 1, **resources: Any) -> Attempt:
    return Attempt(
        format=contract.FORMAT, run="demo", run_id=RUN_ID, run_dir="/runs/demo", attempt=number, phase="pretrain",
        launch_name=f"demo-{RUN_ID[:8]}-pretrain-{number}", seed=0, model={}, settings={"resources": resources},
        inputs={}, resume=[], keep_steps=[], nodes=nodes, processes_per_node=1, threads=1, code_dir="", on_end=[],
        spec_digest="0" * 64, code_digest="0" * 64,
    )  # fmt: skip
