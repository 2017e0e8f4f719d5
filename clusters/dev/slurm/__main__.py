"""What `up`, `down` and `node` call."""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

from clusters.dev.slurm.cluster import Cluster, ClusterError
from clusters.dev.slurm.settings import Settings, free_port

FOLDER = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dinoctl" / "slurm"
HELP = {
    "nodes": "virtual nodes",
    "gpus": "fake GPUs of a node",
    "accounting": "slurmdbd with a MariaDB of its own, or none: sacct knows nothing then",
    "preempt_mode": "what becomes of a job of partition low that one of partition high needs to be gone",
    "grace": "GraceTime: seconds that a preempted job is given before it is ended",
    "send_user_signal": "a preempted job also gets the signal that it named with --signal",
    "proctrack": "whom a signal reaches: every process of a step, or its task's process group",
    "kill_wait": "seconds between TERM and KILL",
    "node_timeout": "seconds that a node may be silent before it is DOWN",
    "min_job_age": "seconds that squeue goes on knowing a job that has ended",
}


def main(words: list[str]) -> int:
    """Returns the exit code: 0, or 2 for what the cluster or the machine will not do."""
    arguments = parser().parse_args(words)
    folder = arguments.folder.absolute()
    try:
        if arguments.command == "up":
            up(folder, vars(arguments))
        elif arguments.command == "down":
            Cluster.found(folder).down(keep=arguments.keep)
        else:
            cluster = Cluster.found(folder)
            act = {"kill": cluster.kill_node, "start": cluster.start_node}[arguments.act]
            act(arguments.node)
    except (ClusterError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="clusters/dev/slurm", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    commands = top.add_subparsers(dest="command", required=True)
    for name, what in (("up", "bring a Slurm up"), ("down", "end it, jobs included"), ("node", "kill or start a node")):
        command = commands.add_parser(name, description=what, formatter_class=top.formatter_class)
        if name == "node":
            command.add_argument("act", choices=("kill", "start"))
            command.add_argument("node")
        command.add_argument("--folder", type=Path, default=FOLDER, help="where all of it lies")
        if name == "down":
            command.add_argument(
                "--keep", action="store_true", help="leave the folder: its logs, and what the next up goes on with"
            )
        if name == "up":
            command.add_argument("--port", type=int, help="the controller's; others follow (default: free ones)")
            _add_settings(command)
    return top


def _add_settings(command: argparse.ArgumentParser) -> None:
    """An option for each setting but the port."""
    types = get_type_hints(Settings)
    for field in fields(Settings):
        if field.name == "port":
            continue
        how: dict[str, Any] = {"default": field.default, "help": HELP[field.name]}
        if types[field.name] is bool:
            how["action"] = argparse.BooleanOptionalAction
        elif choices := get_args(types[field.name]):
            how["choices"] = choices
        else:
            how |= {"type": int, "metavar": "N"}
        command.add_argument(f"--{field.name.replace('_', '-')}", **how)


def up(folder: Path, values: dict[str, Any]) -> None:
    chosen = {field.name: values[field.name] for field in fields(Settings)}
    port = free_port(chosen["nodes"], chosen["port"])
    cluster = Cluster(folder, Settings(**{**chosen, "port": port}))
    cluster.up()
    at = "" if folder == FOLDER else f" --folder {folder}"
    print(f"""{folder}: Slurm is up, {chosen["nodes"]} nodes of {chosen["gpus"]} fake GPUs each, partitions low and high

    export SLURM_CONF={folder}/slurm.conf
    sinfo
    dinoctl submit jobs/ci.yaml --cluster dev_slurm resources.nodes=2
    sbatch --partition high --nodes 2 --exclusive --wrap 'sleep 30'    # preempts it
    clusters/dev/slurm/node kill node2{at}    # and: node start node2
    clusters/dev/slurm/down{at}""")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
