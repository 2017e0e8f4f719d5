"""What `install`, `up`, `down` and `node` call."""

from __future__ import annotations

import argparse
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

from clusters.dev.kubernetes import build, profile
from clusters.dev.kubernetes.cluster import Cluster, ClusterError
from clusters.dev.kubernetes.settings import Settings, free_net, free_port

FOLDER = build.CACHE / "cluster"
HELP = {
    "nodes": "real nodes",
    "fake_nodes": "fake nodes, played by KWOK",
    "gpus": "GPUs of a node, all of them fake",
    "node_grace": "seconds that a node may be silent before it counts as lost",
    "toleration": "seconds that pods then stay on it before they are evicted",
    "memory": "MiB of a real node that the scheduler gives out",
}


def main(words: list[str]) -> int:
    """Returns the exit code: 0, or 2 for what the cluster or the machine will not do."""
    arguments = parser().parse_args(words)
    try:
        if arguments.command == "install":
            build.build(lambda line: print(line, flush=True))
        elif arguments.command == "up":
            up(arguments.folder.absolute(), vars(arguments))
        else:
            cluster = Cluster.found(arguments.folder.absolute())
            if arguments.command == "down":
                cluster.down()
            else:
                act = {"kill": cluster.kill_node, "start": cluster.start_node}[arguments.act]
                act(arguments.node)
    except (ClusterError, build.BuildError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def parser() -> argparse.ArgumentParser:
    how = argparse.ArgumentDefaultsHelpFormatter
    top = argparse.ArgumentParser(prog="clusters/dev/kubernetes", formatter_class=how)
    commands = top.add_subparsers(dest="command", required=True)
    commands.add_parser("install", description="build what is not built yet", formatter_class=how)
    told = (("up", "bring a Kubernetes up"), ("down", "end it, pods included"), ("node", "kill or start a node"))
    for name, what in told:
        command = commands.add_parser(name, description=what, formatter_class=how)
        if name == "node":
            command.add_argument("act", choices=("kill", "start"))
            command.add_argument("node", help="real-0, gpu-000, ...")
        command.add_argument("--folder", type=Path, default=FOLDER, help="where all of it lies")
        if name == "up":
            command.add_argument("--port", type=int, help="the API server's; others follow (default: free ones)")
            command.add_argument("--net", type=int, help="10.213.NET.0/24 is the pods' network (default: a free one)")
            for option, text in HELP.items():
                default = getattr(Settings(0, 0), option)
                command.add_argument(f"--{option.replace('_', '-')}", type=int, metavar="N", default=default, help=text)
    return top


def up(folder: Path, values: dict[str, Any]) -> None:
    chosen = {field.name: values[field.name] for field in fields(Settings)}
    chosen |= {"port": free_port(chosen["nodes"], chosen["port"]), "net": free_net(chosen["net"])}
    cluster = Cluster(folder, Settings(**chosen))
    cluster.up()
    at = "" if folder == FOLDER else f" --folder {folder}"
    print(f"""{folder}: Kubernetes is up, {chosen["nodes"]} real nodes and {chosen["fake_nodes"]} fake ones

    export KUBECONFIG={cluster.kubeconfig} PATH={build.built()}/bin:$PATH
    kubectl get nodes
    dinoctl submit jobs/ci.yaml --cluster {profile.write(cluster)} resources.nodes=2
    clusters/dev/kubernetes/node kill real-1{at}    # and: node start real-1
    clusters/dev/kubernetes/down{at}""")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
