"""What a Slurm cluster says of itself: its settings, partitions, nodes, QOS, accounts. Asks, reads, judges nothing.

Text with named fields throughout: `--json` changes its shape with every release of Slurm.
"""

from __future__ import annotations

import getpass
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass

from orchestrator.asking_slurm import ask

COMMANDS = ("sbatch", "srun", "squeue", "sacct", "scancel", "scontrol", "sinfo")
"""What dinoctl calls; `sacctmgr` only where accounting is on."""

Fields = dict[str, str]


@dataclass(frozen=True)
class Node:
    name: str
    state: str  # as sinfo writes it: idle, mixed, down*, drained ...
    gres: str  # gpu:h100:8(S:0-1)
    cpus: int
    reason: str  # why it is out of service; "none" if it is not

    @property
    def gpus(self) -> int:
        return gpus(self.gres)

    @property
    def usable(self) -> bool:
        return is_usable(self.state)


def is_usable(state: str) -> bool:
    """Whether jobs can be placed on a node in that state (as sinfo writes it), now or when what runs there is over. Not
    on one that does not respond, which a `*` says."""
    return re.fullmatch("(idle|mixed|allocated|completing|planned)[+~#%@^-]*", state) is not None


def missing() -> list[str]:
    """Those of Slurm's commands that are not on the PATH."""
    return [command for command in COMMANDS if shutil.which(command) is None]


def version() -> str:
    """`22.05.8`, of the commands here."""
    return ask("sinfo", "--version").split()[-1]


def settings() -> Fields:
    """`scontrol show config`, by name."""
    return read_settings(ask("scontrol", "show", "config"))


def read_settings(text: str) -> Fields:
    pairs = (line.split("=", 1) for line in text.splitlines() if "=" in line)
    return {name.strip(): value.strip() for name, value in pairs}


def partitions() -> dict[str, Fields]:
    """Every partition that we may see, by name, with what `scontrol show partition` says of it."""
    return read_partitions(ask("scontrol", "-o", "show", "partition"))


def read_partitions(text: str) -> dict[str, Fields]:
    rows = [dict(word.split("=", 1) for word in line.split() if "=" in word) for line in text.splitlines()]
    return {row["PartitionName"]: row for row in rows if "PartitionName" in row}


def default_partition(known: dict[str, Fields]) -> str | None:
    return next((name for name, fields in known.items() if fields.get("Default") == "YES"), None)


def nodes(partition: str) -> list[Node]:
    return read_nodes(ask("sinfo", "-h", "-N", "-p", partition, "-o", "%N|%T|%G|%c|%E"))


def read_nodes(text: str) -> list[Node]:
    rows = (line.split("|", 4) for line in text.splitlines() if line.count("|") >= 4)
    return [Node(name, state, gres, int(cpus.rstrip("+")), reason) for name, state, gres, cpus, reason in rows]


def accounting(config: Fields) -> bool:
    """Whether jobs that are over can be looked up."""
    return config.get("AccountingStorageType", "").endswith("slurmdbd")


def qos(name: str) -> Fields | None:
    """What the accounting database says of a QOS; None if it knows none of that name."""
    return next(iter(_table("qos", "name", name, ("Name", "PreemptMode", "GraceTime", "MaxWall"))), None)


def associations(user: str) -> list[Fields]:
    """The accounts of a user, each with the QOS that may be asked for there."""
    return _table("associations", "user", user, ("Account", "Partition", "QOS", "DefaultQOS", "MaxWall"))


def default_qos(account: str | None) -> str | None:
    """The QOS of this user's jobs that name none; None if the accounting database does not say."""
    mine = [row for row in associations(getpass.getuser()) if account in (None, row["Account"])]
    return next(
        (row["DefaultQOS"] or row["QOS"].split(",")[0] for row in mine if row["DefaultQOS"] or row["QOS"]), None
    )


def _table(what: str, key: str, value: str, names: Sequence[str]) -> list[Fields]:
    where = [f"{key}={value}"] if what == "qos" else ["where", f"{key}={value}"]
    text = ask("sacctmgr", "-n", "-P", "show", what, *where, f"format={','.join(names)}")
    return [dict(zip(names, line.split("|"), strict=False)) for line in text.splitlines() if line.strip()]


# --- words of Slurm's -------------------------------------------------------------------------------------------------


def gpus(gres: str) -> int:
    """GPUs of a node's `Gres`: gpu:8, gpu:h100:8(S:0-1), two kinds of them, or (null)."""
    counts = re.findall(r"(?:^|,)gpu(?::[^:,()]+)?:(\d+)", gres)
    return sum(map(int, counts))


def duration(text: str) -> float | None:
    """Seconds of `5 sec`, `30`, `10:00`, `00:00:30`, `1-12:00:00`; None for no limit (UNLIMITED, INFINITE, NONE, none).

    A number alone is seconds, as GraceTime is written. Raises ValueError for anything else.
    """
    text = text.strip()
    if text.upper() in ("UNLIMITED", "INFINITE", "NONE", "", "N/A", "(NULL)"):
        return None
    if match := re.fullmatch(r"(\d+)(?: sec)?", text):
        return float(match[1])
    if match := re.fullmatch(r"(\d+) min", text):
        return 60.0 * int(match[1])
    match = re.fullmatch(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)", text)
    if match is None:
        raise ValueError(f"not a duration as Slurm writes it: {text}")
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    return 86400.0 * days + 3600 * hours + 60 * minutes + seconds
