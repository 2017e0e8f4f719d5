"""A real Slurm for tests: what clusters/dev/slurm/up brings up, with settings of the test's own.

with running(folder, grace=0) as cluster: ...       ready for jobs; ended, jobs included, at the end
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from clusters.dev.slurm.cluster import Cluster, ClusterError, lacking
from clusters.dev.slurm.settings import Settings, free_port
from tests.guarded import guarded

__all__ = ["Cluster", "ClusterError", "Settings", "as_it_was", "lacking", "running"]


@contextmanager
def running(folder: Path, *, nodes: int = 2, port: int | None = None, **chosen: Any) -> Iterator[Cluster]:
    """A cluster in `folder`, on free ports unless `port` says which. chosen: other fields of Settings."""
    cluster = Cluster(folder, Settings(port=free_port(nodes, port), nodes=nodes, **chosen))
    with guarded("slurm", folder):
        cluster.up()
        try:
            yield cluster
        finally:
            cluster.down()


@contextmanager
def as_it_was(cluster: Cluster) -> Iterator[Cluster]:
    """For one test: at its end its jobs are gone, its settings undone, every node is back and idle."""
    settings = cluster.settings
    yield cluster
    try:
        _undo(cluster, settings)
    except ClusterError:  # a Slurm that was restarted in the middle of a job's end may hold on to it for ever
        cluster.down()
        cluster.settings = settings
        cluster.up()


def _undo(cluster: Cluster, settings: Settings) -> None:
    """Raises ClusterError if the cluster does not come to rest."""
    if not cluster.answers():
        cluster.start_controller()
    cluster.cancel_all()
    if cluster.settings != settings:
        cluster.configure(**asdict(settings))
    for name, state in cluster.node_states().items():
        cluster.start_node(name)
        if state.startswith("drain"):
            cluster.run("scontrol", "update", f"nodename={name}", "state=resume")
    cluster.wait_idle()
