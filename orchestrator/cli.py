"""`dinoctl`: parse, call `orchestrator.commands`, turn a user's mistake into a message and an exit code.

Imports nothing heavy: `dinoctl --help` and `dinoctl status` answer at once.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    Commands = argparse._SubParsersAction[argparse.ArgumentParser]

DONE, FAILED, WRONG_INPUT, DISK_FULL, INTERRUPTED = 0, 1, 2, 3, 130
STAYING = ("submit", "resume", "watch")
"""Commands that stay with a run: one that leaves early has not done it, though the run may go on."""

EXIT_CODES = f"""\
exit codes:
  {DONE}    done
  {FAILED}    the run failed; `dinoctl status RUN` names a page in runbooks/
  {WRONG_INPUT}    the input is wrong: a spec, an option, a run that is not there
  {DISK_FULL}    the run stopped because the disk is full; its last checkpoint is whole
  {INTERRUPTED}  interrupted (Ctrl-C, SIGTERM, stop, cancel): `dinoctl resume RUN` goes on. On a cluster Ctrl-C only
       detaches: the run goes on, and `dinoctl watch RUN` comes back to it

RUN is a name in the folder of runs (--runs, else DINOCTL_RUNS, else ./runs), a path, or s3://BUCKET/PREFIX/NAME.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; its exit code."""
    options = parse(sys.argv[1:] if arguments is None else arguments)
    from orchestrator import commands

    commands.be_patient(options.command)
    try:
        return int(getattr(commands, options.command)(options))
    except KeyboardInterrupt:
        print("dinoctl: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # whoever reads our output has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return INTERRUPTED if options.command in STAYING and not getattr(options, "dry_run", False) else DONE
    except Exception as error:
        from orchestrator.mistakes import explain

        explained = explain(error)
        if explained is None:  # a bug of ours: its traceback is the report
            raise
        if explained.problems is not None and getattr(options, "json", False):
            commands.print_json({"valid": False, "problems": explained.problems})
        else:
            with contextlib.suppress(BrokenPipeError):  # the exit code says it too
                print(f"dinoctl: {explained.message}", file=sys.stderr)
        return explained.exit_code


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options. Overrides may stand anywhere among them, which argparse alone does not allow. Exits 2."""
    parser = build_parser()
    options, rest = parser.parse_known_args(arguments)
    takes_overrides = hasattr(options, "overrides")
    unknown = [word for word in rest if word.startswith("-") or not takes_overrides]
    if unknown:
        parser.error(f"{options.command} does not know {' '.join(unknown)}; see dinoctl {options.command} --help")
    if takes_overrides:
        options.overrides += rest
    return options


class _Version(argparse.Action):
    """Looks the version up only when it is asked for."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from importlib.metadata import version

        print(f"dinoctl {version('dinoctl')}")
        parser.exit()


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dinoctl",
        description="One YAML turns a folder of unlabelled images into a DINOv3 vision foundation model.",
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_job_commands(commands)
    _add_run_commands(commands)
    _add_step_commands(commands)
    _add_ckpt(commands)
    _add_weights(commands)
    _add_data(commands)
    return parser


def _add(commands: Commands, name: str, help_: str) -> argparse.ArgumentParser:
    return commands.add_parser(
        name, help=help_, description=help_, epilog=EXIT_CODES, formatter_class=argparse.RawDescriptionHelpFormatter
    )


# --- commands on a job file -------------------------------------------------------------------------------------------


def _add_job_commands(commands: Commands) -> None:
    validate = _add(commands, "validate", "check a job file: every mistake at once, each with its YAML path")
    _add_job(validate)
    validate.add_argument("--resolved", action="store_true", help="print the job with every default filled in")
    _add_json(validate)

    plan = _add(commands, "plan", "say what would be launched, in order, with which inputs; starts nothing")
    _add_job(plan)
    _add_json(plan)

    submit = _add(commands, "submit", "run a job, or go on with it; a run that is under way is shown")
    _add_job(submit)
    submit.add_argument("--run", metavar="NAME", help="name of the run; the job's own name if absent")
    submit.add_argument("--detach", action="store_true", help="return at once; a process in the background watches")
    submit.add_argument("--dry-run", action="store_true", help="print exactly what would be sent first; starts nothing")
    submit.add_argument("--amend", action="store_true", help="take up the differences to the run that is there")
    submit.add_argument("--fork", metavar="RUN#PHASE@STEP", help="begin a new run with what another has trained")
    _add_runs(submit)

    doctor = _add(commands, "doctor", "look for what goes wrong first on a cluster; exits 1 if something is wrong")
    doctor.add_argument("file", nargs="?", metavar="FILE", help="a job, to look whether it fits the cluster too")
    doctor.add_argument("overrides", nargs="*", default=[], metavar="a.b.c=value", help="laid over the file")
    doctor.add_argument("--cluster", metavar="NAME_OR_FILE", help="a profile; the job's if absent, or this machine")
    doctor.add_argument("--no-jobs", dest="jobs", action="store_false", help="ask the scheduler only; start nothing")
    doctor.add_argument("--nodes", type=int, default=2, metavar="N", help="that the checks by jobs take; 2 if absent")
    doctor.add_argument(
        "--timeout", type=float, default=300.0, metavar="SECONDS", help="of these checks, queue included; 300 if absent"
    )
    _add_runs(doctor)
    _add_json(doctor)

    _add(commands, "schema", "print the JSON Schema of a job file, for editors")


def _add_job(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", help="the job, YAML")
    parser.add_argument("overrides", nargs="*", default=[], metavar="a.b.c=value", help="laid over the file")
    parser.add_argument("--cluster", metavar="NAME_OR_FILE", help="a profile in clusters/, or a file")


# --- commands on a run ------------------------------------------------------------------------------------------------


def _add_run_commands(commands: Commands) -> None:
    status = _add(commands, "status", "all runs, or one in full: why it stands, who watches it")
    status.add_argument("run", nargs="?", metavar="RUN")
    _add_runs(status)
    _add_json(status)

    logs = _add_run(commands, "logs", "print the log of an attempt")
    logs.add_argument("--attempt", type=int, metavar="N", help="the newest if absent")
    which = logs.add_mutually_exclusive_group()
    which.add_argument("--rank", type=int, metavar="R", help="of one process; the agent's log if absent")
    which.add_argument("--node", type=int, metavar="I", help="of the agent of one node; of node 0 if absent")
    logs.add_argument("--follow", action="store_true", help="go on printing until the attempt ends")

    stop = _add_run(commands, "stop", "seal, stop, and start nothing more until it is resumed")
    stop.add_argument("--now", action="store_true", help="end at once; steps since the last seal are lost")

    _add_run(commands, "cancel", "give a run up: seal, stop, and do not go on")

    resume = _add_run(commands, "resume", "go on with a run that was stopped, cancelled or failed")
    resume.add_argument("--code", choices=["new"], help="go on with the installed code; no longer bit for bit")
    resume.add_argument("--skip-data", type=int, metavar="N", help="jump over the data of the N steps to come")
    resume.add_argument("--detach", action="store_true", help="return at once; a process in the background watches")

    watch = _add(commands, "watch", "keep a run going and show it; without RUN, all live runs of the folder")
    tick = _add(commands, "tick", "look once and do what is due; without RUN, for all live runs of the folder")
    for parser in (watch, tick):
        parser.add_argument("run", nargs="?", metavar="RUN")
        _add_runs(parser)


def _add_step_commands(commands: Commands) -> None:
    replay = _add(commands, "replay", "compute a recorded step again and compare; exits 1 if a number differs")
    replay.add_argument("file", metavar="FILE", help="RUN/attempts/<n>/recorded/*.safetensors, a path or a URI")
    replay.add_argument("--device", help="cpu, cuda, cuda:1; a GPU where there is one if absent")
    replay.add_argument("--tolerance", metavar="X", help="relative; 1e-4 if absent, or 2e-2 for bf16 products")
    replay.add_argument("--double", action="store_true", help="compute in float64, to tell rounding from a fault")


def _add_run(commands: Commands, name: str, help_: str) -> argparse.ArgumentParser:
    parser = _add(commands, name, help_)
    parser.add_argument("run", metavar="RUN")
    _add_runs(parser)
    return parser


# --- checkpoints ------------------------------------------------------------------------------------------------------


def _add_ckpt(commands: Commands) -> None:
    ckpt = _add(commands, "ckpt", "a run's checkpoints: look, verify, keep, remove, take out (docs/checkpoints.md)")
    actions = ckpt.add_subparsers(dest="action", required=True, metavar="ACTION")

    ls = _add_run(actions, "ls", "all that are sealed: size, age, parts, and why each stays")
    prune = _add_run(actions, "prune", "remove what is not kept, of ended attempts; dinoctl does so at each end")
    prune.add_argument("--dry-run", action="store_true", help="say what would be removed; removes nothing")

    inspect = _add_checkpoint(actions, "inspect", "one in full: files, checksums, names and shapes of all tensors")
    verify = _add(actions, "verify", "read every byte and compare checksums; exits 1 if a checkpoint is not whole")
    verify.add_argument("what", metavar="RUN[#PHASE@STEP]", help="a run, or one checkpoint of it")
    verify.add_argument("--mark", action="store_true", help="mark bad ones, which nothing then takes; lift other marks")
    for action in (ls, inspect, verify):
        _add_json(action)

    pin = _add_checkpoint(actions, "pin", "keep one, whatever retention says")
    pin.add_argument("--parts", nargs="+", metavar="PART", help="keep these parts only; all if absent")
    pin.add_argument("--why", default="", metavar="TEXT", help="for whoever asks later")
    unpin = _add_checkpoint(actions, "unpin", "leave it to retention again")
    unpin.add_argument("--force", action="store_true", help="remove the pins of other runs too")

    export = _add_checkpoint(actions, "export", "one part as one safetensors file")
    export.add_argument("file", metavar="FILE")
    export.add_argument("--part", default="teacher_backbone", metavar="PART", help="teacher_backbone if absent")
    copy = _add_checkpoint(actions, "copy", "copy one, whole or not at all, to a folder or URI that a phase can take")
    copy.add_argument("target", metavar="TARGET")
    copy.add_argument("--parts", nargs="+", metavar="PART", help="these parts only; all if absent")
    for action in (inspect, verify, pin, unpin, export, copy):
        _add_runs(action)


def _add_checkpoint(actions: Commands, name: str, help_: str) -> argparse.ArgumentParser:
    parser = _add(actions, name, help_)
    parser.add_argument("checkpoint", metavar="RUN#PHASE@STEP", help="or the folder of a checkpoint")
    return parser


# --- weights ----------------------------------------------------------------------------------------------------------


def _add_weights(commands: Commands) -> None:
    weights = _add(commands, "weights", "look into weights, and bring them into another form")
    actions = weights.add_subparsers(dest="action", required=True, metavar="ACTION")

    info = _add(actions, "info", "names, shapes and number of parameters, of an architecture or of a file")
    info.add_argument("what", metavar="ARCH_OR_FILE", help="a released architecture, or as SRC of `convert`")
    _add_json(info)

    convert = _add(actions, "convert", "checkpoints, official files, Hugging Face's and timm's, each into the others")
    convert.add_argument("source", metavar="SRC", help="RUN, RUN#<phase>@<step>, a file, a folder or a URI")
    convert.add_argument("target", metavar="DST", help="FILE.safetensors for ours and official, else a folder")
    convert.add_argument("--to", choices=["ours", "official", "huggingface", "timm"], required=True)
    networks = ["teacher", "student", "gram_teacher"]
    for action in (info, convert):
        action.add_argument("--arch", metavar="ARCH", help="the released architecture, where a file does not tell")
        action.add_argument("--network", choices=networks, default="teacher", help="the teacher if absent")
        _add_runs(action)


# --- data -------------------------------------------------------------------------------------------------------------


def _add_data(commands: Commands) -> None:
    data = _add(commands, "data", "index tar shards, make them of a folder, check and measure images")
    actions = data.add_subparsers(dest="action", required=True, metavar="ACTION")
    what = "a folder of images, or tar shards: paths, globs, x-{000000..000123}.tar, URIs"

    index = _add(actions, "index", "note where each image of tar shards lies, once for all runs (docs/data.md)")
    index.add_argument("paths", nargs="+", metavar="PATH", help=what.partition("or ")[2])
    index.add_argument("--to", required=True, metavar="FOLDER", help="where the index is kept: data.index of a job")

    pack = _add(actions, "pack", "tar shards of a folder of images, with captions and labels, shuffled")
    pack.add_argument("folder", metavar="FOLDER")
    pack.add_argument("target", metavar="TARGET", help="the folder of the shards, or a URI: s3://bucket/prefix")
    pack.add_argument("--name", default="images", help="of the shards: NAME-000000.tar; images if absent")
    pack.add_argument("--images-per-shard", type=int, default=1000, metavar="N", help="1000 if absent")
    pack.add_argument("--seed", type=int, default=0, help="of the shuffling")

    check = _add(actions, "check", "decode every image and name each that cannot be read; exits 1 if there is one")
    stats = _add(actions, "stats", "mean and standard deviation of the channels, for data.normalise")
    for action in (pack, check, stats):
        action.add_argument(
            "--channels", type=int, metavar="N", help="of an image, as data.channels; 3 (RGB) if absent"
        )
        action.add_argument("--bits", type=int, choices=[8, 16], help="of a channel, as data.bits; 8 if absent")
    for action in (check, stats):
        action.add_argument("paths", nargs="+", metavar="PATH", help=what)
        action.add_argument("--index", metavar="FOLDER", help="the index of tar shards; made for now if absent")
    stats.add_argument("--images", type=int, default=10_000, metavar="N", help="spread over all; 10000 if absent")
    stats.add_argument("--to", metavar="FILE", help="write them there: data.normalise of a job takes that file")
    _add_json(stats)


def _add_runs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--runs",
        metavar="DIR",
        default=os.environ.get("DINOCTL_RUNS"),
        help="the folder of runs, or s3://BUCKET/PREFIX",
    )


def _add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="for programs")


if __name__ == "__main__":
    sys.exit(main())
