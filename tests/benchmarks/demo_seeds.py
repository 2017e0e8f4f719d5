"""The demo with three seeds, fixed beforehand, and their tables in one: `make demo_seeds`.

Runs `dinoctl submit jobs/demo.yaml` once a seed (a run that is done already is not run again) and prints the reports
side by side, as Markdown, with what the README says of each score.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.benchmarks import options as ask

ROOT = Path(__file__).parents[2]
SEEDS = (0, 1, 2)


def run(seed: int) -> dict[str, Any]:
    """The report of the demo with this seed."""
    name = "demo" if seed == 0 else f"demo-seed-{seed}"
    command = [sys.executable, "-P", "-m", "orchestrator.cli", "submit", "jobs/demo.yaml", "--run", name]
    subprocess.run([*command, f"seed={seed}"], cwd=ROOT, check=True)
    report: dict[str, Any] = json.loads((ROOT / "runs" / name / "report" / "report.json").read_text())
    return report


def cell(row: dict[str, Any]) -> str:
    low, high = row["interval"]
    return f"{row['untrained']:.1f} -> {row['trained']:.1f} ({row['difference']:+.1f}: {low:+.1f} to {high:+.1f})"


def table(reports: dict[int, dict[str, Any]]) -> str:
    """A row a score, a column a seed: untrained -> trained (difference: its 95% interval), then the baselines."""
    lines = ["| score | " + " | ".join(f"seed {seed}" for seed in reports) + " | baselines |"]
    lines.append("|" + "---|" * (len(reports) + 2))
    first = next(iter(reports.values()))
    for index, row in enumerate(first["rows"]):
        cells = [cell(report["rows"][index]) for report in reports.values()]
        baselines = ", ".join(f"{name} {value:.1f}" for name, value in row["baselines"].items())
        lines.append(f"| {row['score']} | " + " | ".join(cells) + f" | {baselines} |")
    return "\n".join(lines)


def main() -> None:
    ask.parser(__doc__).parse_args()
    print(table({seed: run(seed) for seed in SEEDS}))


if __name__ == "__main__":
    main()
