"""What `dinoctl doctor` runs on each node: `python -P -m model.doctor FOLDER [--node I]`. No torch in this process.

Node by node into FOLDER, which the nodes are to share: who wins a name that all want, how fast the folder is written,
how far the clocks are apart, what torch is here and which GPUs it sees, whether given commands work, whether the nodes
reach each other by name, and an all-reduce over all of them by torchrun. Each step is bounded, and one that fails is
noted while the rest goes on.
"""

from __future__ import annotations

import argparse
import os
import platform
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import msgspec

from model import contract, nodes, storage
from model.contract import node_report

RACES = 20
PIECE = 1 << 23
LOOK_SECONDS = 0.05
REDUCES = 5
CPU_BYTES, GPU_BYTES = 1 << 22, 1 << 27

ABOUT_TORCH = """
import json, torch
there = torch.cuda.is_available()
names = [torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count())] if there else []
print(json.dumps([torch.__version__, torch.version.cuda, names]))
"""


def main(folder: str, node: int) -> int:
    """Examine this node and publish what was found. 0, whatever that is; 1 if the folder cannot be used."""
    host = nodes.here(os.environ).name
    try:
        ask = msgspec.json.decode(storage.read(f"{folder}/{node_report.ASK_FILE}"), type=node_report.Ask)
    except OSError as error:
        print(f"node {node}, {host}: {folder} cannot be read here, as user {os.getuid()}: {error}", flush=True)
        return 1
    try:
        storage.publish(f"{folder}/came-{node}", b"")  # before the steps: each of them waits for what all nodes write
    except OSError as error:
        return _cannot_write(folder, node, host, error)
    errors: list[str] = []
    found: dict[str, Any] = {}
    for step in (_race, _clock, _speed, _tries, _torch, _reach, _reduce):
        try:
            found.update(step(folder, node, ask))
        except Exception as error:  # noted, and the rest is still worth knowing
            errors.append(f"{step.__name__.strip('_')}: {error or type(error).__name__}")
    report = node_report.NodeReport(
        node=node, host=host, python=platform.python_version(), user=os.getuid(), errors=errors, **found
    )
    try:
        storage.publish(f"{folder}/{node_report.node_file(node)}", msgspec.json.encode(report))
    except OSError as error:
        return _cannot_write(folder, node, host, error)
    return 0


def _cannot_write(folder: str, node: int, host: str, error: OSError) -> int:
    print(f"node {node}, {host}: {folder} cannot be written, as user {os.getuid()}: {error}", flush=True)
    return 1


def _race(folder: str, node: int, ask: node_report.Ask) -> dict[str, Any]:
    """All nodes want the same names at once; then each looks who has them."""
    _meet(folder, "here", node, ask)
    wins = []
    for race in range(RACES):
        try:
            storage.publish(f"{folder}/race-{race}", b"%d" % node)
            wins.append(race)
        except storage.AlreadyPublished:
            pass
    _meet(folder, "raced", node, ask)
    return {"wins": wins, "winners": [int(storage.read(f"{folder}/race-{race}")) for race in range(RACES)]}


def _clock(folder: str, node: int, ask: node_report.Ask) -> dict[str, Any]:
    """The other clock was read after we asked and before we had the answer."""
    before = contract.now()
    storage.publish(f"{folder}/{node_report.clock_file(node)}", b"?")
    answer = _wait_for(f"{folder}/{node_report.answer_file(node)}", ask, "no answer about the time")
    after = contract.now()
    return {"clock": (float(answer) - after, float(answer) - before)}


def _speed(folder: str, node: int, ask: node_report.Ask) -> dict[str, Any]:
    _meet(folder, "writes", node, ask)
    path, begun = f"{folder}/speed-{node}", time.monotonic()
    storage.publish_pieces(path, _pieces(ask.bytes))
    seconds = time.monotonic() - begun
    storage.remove(path)
    return {"write_mb_s": ask.bytes / 1e6 / seconds}


def _pieces(count: int) -> Iterator[bytes]:
    piece = os.urandom(PIECE)
    for begin in range(0, count, PIECE):
        yield piece[: count - begin]


def _tries(folder: str, node: int, ask: node_report.Ask) -> dict[str, Any]:
    return {"tries": {name: _try(command, ask) for name, command in ask.tries.items()}}


def _try(command: list[str], ask: node_report.Ask) -> node_report.Try:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=ask.patience, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return node_report.Try(code=None, said=str(error))
    return node_report.Try(code=done.returncode, said=_tail(done.stdout + done.stderr))


def _torch(folder: str, node: int, ask: node_report.Ask) -> dict[str, Any]:
    """In a process of its own: a broken driver takes down who asks it."""
    told = _try([sys.executable, "-P", "-c", ABOUT_TORCH], ask)
    if told.code != 0:
        raise RuntimeError(told.said)
    version, cuda, gpus = msgspec.json.decode(told.said.splitlines()[-1])
    storage.publish(f"{folder}/gpus-{node}", b"%d" % len(gpus))
    return {"torch": version, "cuda": cuda, "gpus": gpus}


def _reach(folder: str, node: int, ask: node_report.Ask) -> dict[str, Any]:
    """Every node listens, and connects to each other by the name that it gives."""
    with socket.socket() as mine:
        mine.bind(("", 0))
        mine.listen(ask.nodes)
        storage.publish(f"{folder}/reach-{node}", f"{nodes.address()} {mine.getsockname()[1]}".encode())
        reached = []
        for other in range(ask.nodes):
            if other != node:
                told = _wait_for(f"{folder}/reach-{other}", ask, f"node {other} says no name").decode().split()
                _until(partial(_connects, told[0], int(told[1])), ask.patience, f"node {other} is not at {told[0]}")
                reached.append(told[0])
        _meet(folder, "reached", node, ask)
    return {"reached": reached}


def _connects(address: str, port: int) -> bytes | None:
    """None as long as the name is not known, or nobody answers there."""
    try:
        with socket.create_connection((address, port), timeout=5.0):
            return b""
    except OSError:
        return None


def _reduce(folder: str, node: int, ask: node_report.Ask) -> dict[str, Any]:
    """One process a GPU that every node has, else one a node."""
    gpus = [int(_wait_for(f"{folder}/gpus-{n}", ask, f"torch does not work on node {n}")) for n in range(ask.nodes)]
    if node == 0:
        storage.publish(f"{folder}/address", f"{nodes.address()} {nodes.free_port()}".encode())
    address, port = _wait_for(f"{folder}/address", ask, "node 0 says no address").decode().split()
    command = [
        sys.executable, "-P", "-m", "torch.distributed.run", "--nnodes", str(ask.nodes), "--node-rank", str(node),
        "--nproc-per-node", str(max(1, min(gpus))), "--master-addr", address, "--master-port", port,
        "--max-restarts", "0", "-m", "model.doctor", folder, "--reduce",
    ]  # fmt: skip
    env = {**os.environ, "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"}
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=ask.patience, check=False)
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"no all-reduce within {ask.patience:g} s; node 0 is {address}, port {port}") from None
    if done.returncode != 0:
        raise RuntimeError(f"torchrun failed; node 0 is {address}, port {port}: {_tail(done.stderr)}")
    return {}


def reduce(folder: str) -> None:
    """One rank of the all-reduce, started by torchrun."""
    import torch
    import torch.distributed as dist

    gpu = torch.cuda.is_available()
    if gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if gpu else "gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    size = GPU_BYTES if gpu else CPU_BYTES
    right, seconds = True, 0.0
    for number in range(REDUCES + 1):
        tensor = torch.full((size // 4,), float(rank + 1), device="cuda" if gpu else "cpu")
        begun = time.monotonic()
        dist.all_reduce(tensor)
        right = right and bool((tensor == ranks * (ranks + 1) / 2).all())  # waits for the device, too
        seconds += (time.monotonic() - begun) / REDUCES if number else 0.0  # the first one connects
    if rank == 0:
        report = node_report.ReduceReport(
            ranks=ranks, backend=dist.get_backend(), right=right, bytes=size, seconds=seconds
        )
        storage.publish(f"{folder}/{node_report.REDUCE_FILE}", msgspec.json.encode(report))
    dist.destroy_process_group()


# --- small things -----------------------------------------------------------------------------------------------------


def _meet(folder: str, what: str, node: int, ask: node_report.Ask) -> None:
    """Wait until every node has come to this point."""
    storage.publish(f"{folder}/{what}-{node}", b"")
    for other in range(ask.nodes):
        _wait_for(f"{folder}/{what}-{other}", ask, f"nothing is seen here of what node {other} writes to {folder}")


def _wait_for(path: str, ask: node_report.Ask, otherwise: str) -> bytes:
    return _until(lambda: storage.read(path) if storage.exists(path) else None, ask.patience, otherwise)


def _until(look: Callable[[], bytes | None], seconds: float, otherwise: str) -> bytes:
    deadline = time.monotonic() + seconds
    while (seen := look()) is None:
        if time.monotonic() > deadline:
            raise RuntimeError(f"{otherwise}, within {seconds:g} s")
        time.sleep(LOOK_SECONDS)
    return seen


def _tail(text: str, most: int = 600) -> str:
    return text.strip()[-most:]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="model.doctor")
    parser.add_argument("folder")
    parser.add_argument("--node", type=int, default=nodes.here(os.environ).number)
    parser.add_argument("--reduce", action="store_true")
    options = parser.parse_args()
    if options.reduce:
        reduce(options.folder)
    else:
        sys.exit(main(options.folder, options.node))
