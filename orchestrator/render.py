"""Draws one run in full, as `orchestrator.status` gathered it. Pure: no files, no clock."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from model.contract import Cause
from orchestrator import report
from orchestrator.overview import duration, queued, steps, watched
from orchestrator.problems import listed
from orchestrator.status import AttemptView, Detail, StageView

STYLES = {
    "done": "green",
    "running": "cyan",
    "stopped": "yellow",
    "cancelled": "yellow",
    "failed": "red",
    "inherited": "dim",
    "waiting": "dim",
}
ATTEMPTS_SHOWN = 20


def _styled(status: str) -> Text:
    return Text(status, style=STYLES.get(status, ""))


def detail(view: Detail, now: float) -> RenderableType:
    """Everything about one run, what matters most last, where a terminal leaves the eye."""
    parts: list[RenderableType] = [*_head(view, now), _stages(view.stages), Text("")]
    if view.attempts:
        parts += [_attempts(view.attempts, now), *_placed(view, now), Text("")]
    if view.tail:
        parts += [Text(f"end of the log of attempt {view.attempts[-1].attempt}:", style="bold")]
        parts += [Text(f"  {line}") for line in view.tail] + [Text("")]
    if view.report:
        parts += [report.render(view.report)]
        parts += [Text(f"picture: {view.summary.path}/{name}") for name in view.report.pictures]
    parts += _next(view)
    return Group(*parts)


def _head(view: Detail, now: float) -> list[Text]:
    run = view.summary
    lines = [Text.assemble((run.run, "bold"), ": ", _styled(run.status)), Text(f"directory: {run.path}", style="dim")]
    ids = f"run id {view.run_id}, spec {view.spec_digest[:12]}, code {view.code_digest[:12]}"
    lines.append(Text(ids, style="dim"))
    if view.forked_from:
        lines.append(Text(f"forked from {view.forked_from}"))
    if run.watch:
        style = "" if run.watch.pid or run.watch.job else "yellow"  # nobody: the run stands still
        lines.append(Text.assemble("watched by ", (watched(run.watch, now), style)))
        lines += [Text(f"cannot be read: {error}", style="yellow") for error in run.watch.unreadable]
    return [*lines, Text("")]


def _stages(stages: Sequence[StageView]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("phase", "status"):
        table.add_column(name, no_wrap=True)
    table.add_column("step", justify="right", no_wrap=True)
    table.add_column("attempts")
    table.add_column("checkpoints that are there")
    for stage in stages:
        shown = steps(stage.step, stage.steps) if stage.step is not None else ""
        numbers = [str(number) for number in stage.attempts]
        there = [str(step) for step in stage.there]
        table.add_row(stage.name, _styled(stage.status), shown, _short(numbers), _short(there))
    return table


def _short(items: Sequence[str], most: int = 12) -> str:
    """The first ones and the last ones, where there are many."""
    if len(items) <= most:
        return ", ".join(items)
    return ", ".join([*items[: most // 2], "...", *items[-most // 2 :]])


def _attempts(attempts: Sequence[AttemptView], now: float) -> Table:
    left_out = len(attempts) - ATTEMPTS_SHOWN
    title = f"the last {ATTEMPTS_SHOWN} attempts; {left_out} before are in --json" if left_out > 0 else None
    table = Table(box=None, pad_edge=False, header_style="bold", title=title, title_justify="left")
    table.add_column("attempt", justify="right")
    table.add_column("phase", no_wrap=True)
    table.add_column("took", justify="right", no_wrap=True)
    table.add_column("reached", justify="right")
    table.add_column("how it ended")
    for attempt in attempts[-ATTEMPTS_SHOWN:]:
        table.add_row(
            str(attempt.attempt),
            attempt.phase,
            duration((attempt.ended or now) - attempt.begun),
            "" if attempt.reached is None else str(attempt.reached),
            _end(attempt),
        )
    return table


def _end(attempt: AttemptView) -> Text:
    fewer = attempt.nodes is not None and attempt.nodes < attempt.of_nodes
    where = f" (on {attempt.nodes} of {attempt.of_nodes} nodes)" if fewer else ""
    if attempt.cause is None:
        return Text(("under way" if attempt.status == "launched" else "being launched") + where, style="cyan")
    style = "green" if attempt.cause is Cause.DONE else "yellow" if attempt.cause is Cause.STOPPED else "red"
    message = f": {attempt.message}" if attempt.message else ""
    return Text.assemble((attempt.cause.value, style), message, where)


def _placed(view: Detail, now: float) -> list[Text]:
    """Where the live attempt is, or why it is nowhere yet, and which nodes this run does without."""
    lines = []
    attempt = f"attempt {view.attempts[-1].attempt}" if view.attempts else ""
    if launch := view.launch:
        queue = queued(launch.state, launch.detail, launch.starts_at, now)
        text = queue or (f"on {listed(launch.nodes)}" if launch.nodes else launch.detail or launch.state)
        style = "cyan" if launch.state == "running" else "yellow"
        lines.append(Text.assemble(f"{attempt}: ", (text, style)))
    if view.looked:
        lines.append(Text.assemble(f"{attempt}, before its first step: ", (view.looked, "cyan")))
    if view.excluded:
        nodes = [f"{node} (for {duration(until - now)} yet)" for node, until in view.excluded.items()]
        lines.append(Text(f"left out, as they failed this run: {listed(nodes)}", style="yellow"))
        if view.launch and view.launch.state == "pending":
            lines.append(Text("it waits for other nodes; if too few are left: runbooks/vanished.md"))
    return lines


def _next(view: Detail) -> list[Text]:
    run = view.summary
    lines = []
    if run.cause and run.status != "done":
        lines.append(Text.assemble((run.cause.value, "bold"), f": {run.message}"))
    if view.runbook and view.runbook not in run.message:
        lines.append(Text(f"what to do: {view.runbook}"))
    if run.advice:
        lines.append(Text.assemble("to go on: ", (run.advice, "bold")))
    return lines
