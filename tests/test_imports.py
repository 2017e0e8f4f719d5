"""The door between the two houses, and what may not be imported where: every import statement, read from the source."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOOR = {"model.config", "model.contract", "model.storage", "model.accounting"}
"""All that the control plane knows of the data plane, free of torch."""

PARTS_OF_CONFIG = {"model.architectures", "model.data_section", "model.engine_section", "model.sections"}
"""What `model.config` is made of; nobody else's to import."""

PARTS_OF_STORAGE = {"model.anywhere", "model.bucket", "model.s3", "model.store_errors"}
"""What `model.storage` is made of; nobody else's to import."""

PARTS_OF_CONTRACT = {"model.host_list", "model.kept", "model.node_report", "model.run_files", "model.scratch"}
"""What `model.contract` is made of; nobody else's to import, but through it."""

HEAVY = ("torch", "torchvision", "mlflow", "pydantic", "numpy", "fsspec", "submitit", "torchx")
ON_THE_WAY_TO_STATUS = (
    "orchestrator.cli",
    "orchestrator.commands",
    "orchestrator.handoff",
    "orchestrator.status",
    "orchestrator.store",
)
"""What `dinoctl status` cannot do without. It must answer at once."""


def modules() -> dict[str, Path]:
    """Every module of both houses by name."""
    files = [file for house in ("orchestrator", "model") for file in sorted((ROOT / house).rglob("*.py"))]
    return {".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): file for file in files}


MODULES = modules()


def imports(name: str) -> set[str]:
    """The modules that a module imports anywhere in it, functions and TYPE_CHECKING blocks included."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(MODULES[name].read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}, line {node.lineno}: relative import"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add(inner if inner in MODULES else str(node.module))
    return found


def everything_behind(name: str) -> set[str]:
    """What a module imports, and what those of our modules import in turn."""
    found, left = set[str](), {name}
    while left:
        new = imports(left.pop()) - found
        found |= new
        left |= new & MODULES.keys()
    return found


def within(house: str) -> list[str]:
    return [name for name in MODULES if name.split(".")[0] == house]


def top(names: set[str]) -> set[str]:
    return {name.split(".")[0] for name in names}


@pytest.mark.parametrize("name", within("orchestrator"))
def test_the_control_plane_comes_through_the_door_and_never_imports_torch(name: str) -> None:
    crossing = {other for other in imports(name) if other.split(".")[0] == "model"}
    assert crossing <= DOOR, f"a command that needs torch runs `python -P -m model.<name>` as a subprocess: {crossing}"
    assert not top(imports(name)) & {"torch", "torchvision", "safetensors"}


@pytest.mark.parametrize("name", within("model"))
def test_the_data_plane_knows_nothing_of_the_control_plane(name: str) -> None:
    assert "orchestrator" not in top(imports(name))


@pytest.mark.parametrize("name", sorted(DOOR))
def test_the_door_leads_no_further(name: str) -> None:
    behind = {other for other in everything_behind(name) if other.startswith("model.")}
    assert behind <= DOOR | PARTS_OF_CONFIG | PARTS_OF_CONTRACT | PARTS_OF_STORAGE


@pytest.mark.parametrize("name", sorted({*DOOR, "model.agent"} & MODULES.keys()))
def test_the_door_and_the_agent_are_free_of_torch(name: str) -> None:
    assert not top(everything_behind(name)) & {"torch", "torchvision"}


@pytest.mark.parametrize("name", MODULES)
def test_only_the_storage_touches_fsspec_and_nothing_pickles(name: str) -> None:
    allowed = {"model.anywhere": {"fsspec"}, "model.s3": {"s3fs"}, "model.weights.pickled": {"pickle"}}.get(name, set())
    assert top(imports(name)) & {"fsspec", "s3fs", "pickle", "cloudpickle", "dill", "shelve"} <= allowed


@pytest.mark.parametrize("house", ["orchestrator", "model"])
def test_the_houses_themselves_import_nothing(house: str) -> None:
    assert not imports(house)


def test_the_way_to_status_is_light() -> None:
    light = [name for name in ON_THE_WAY_TO_STATUS if name in MODULES]
    code = f"import sys, {', '.join(light)}; print(*[name for name in {HEAVY} if name in sys.modules])"
    answer = subprocess.run(
        [sys.executable, "-P", "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert answer.split() == []


def test_a_trainer_starts_without_what_few_runs_need() -> None:
    """torch.compile's machinery, DTensor and sympy, tifffile: together longer to import than all the rest but torch."""
    code = (
        "import sys, torch, model.train; from model import config, optim, worker\n"
        "from model.networks import init, text; worker.be_deterministic()\n"
        "tower = config.TextTower(dim=8, depth=1, heads=2, context=4, vocabulary=8)\n"
        "init.create(lambda: text.TextTower(tower, 8), 0, 'text_tower'); network = torch.nn.Linear(2, 2)\n"
        "settings = config.read(config.Optim, {'batch_size': 8, 'group_size': 8, 'lr': 0.1})\n"
        "optimizer = optim.build({'network': network}, settings); network(torch.ones(2)).sum().backward()\n"
        "optim.clip({'network': network}, 1.0); optim.update(optimizer, torch.tensor(True)); optimizer.zero_grad()\n"
        "dear = ('torch._dynamo', 'torch.distributed.tensor', 'torch.distributed.fsdp', 'sympy', 'tifffile')\n"
        "print(*[name for name in dear if name in sys.modules])"
    )
    answer = subprocess.run([sys.executable, "-P", "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert answer.stdout.split() == []
