"""The programs of the cluster, built from Go modules: `modules/NAME/go.mod` and `go.sum` pin every one of them.

They are kept outside of the repository, under a key of all that they are made from, so that a change makes new ones.
"""

from __future__ import annotations

import functools
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from clusters.dev.kubernetes import image

MODULES = Path(__file__).with_name("modules")
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dinoctl" / "kubernetes"
OLDEST_GO = (1, 26)
NO_GO = "Go 1.26 or newer is needed to build Kubernetes, and {}: install it from https://go.dev/dl"
FLAGS = "-s -w"
"""Of the linker: no symbols, which halves the files."""

JOBSET_FILES = {
    "jobset-crd.yaml": "config/components/crd/bases/jobset.x-k8s.io_jobsets.yaml",
    "jobset-role.yaml": "config/components/rbac/role.yaml",
}
"""What JobSet's module ships with: one object each."""


class BuildError(Exception):
    """The programs cannot be built here; says why and what to do about it."""


@dataclass(frozen=True)
class Program:
    """One file in `bin`, made from a package of a module."""

    name: str
    module: str
    package: str


K8S = "k8s.io/kubernetes/cmd/"
CNI = "github.com/containernetworking/plugins/plugins/"
PROGRAMS = (
    *(Program(name, "k8s", K8S + name) for name in ("kube-apiserver", "kube-controller-manager", "kube-scheduler")),
    *(Program(name, "k8s", K8S + name) for name in ("kubelet", "kubectl")),
    Program("etcd", "etcd", "go.etcd.io/etcd/server/v3"),
    Program("kwok", "kwok", "sigs.k8s.io/kwok/cmd/kwok"),
    Program("jobset", "jobset", "sigs.k8s.io/jobset"),
    *(Program(f"cni/{path.rpartition('/')[2]}", "cni", CNI + path) for path in ("main/bridge", "main/loopback")),
    Program("cni/host-local", "cni", CNI + "ipam/host-local"),
    Program("coredns", "coredns", "."),
    Program("pause", "pause", "."),
)


@functools.cache
def built() -> Path:
    """The folder of what this checkout's modules come to: `bin/`, `images.tar` and JobSet's own files."""
    files = [path for path in sorted(MODULES.rglob("*")) if path.is_file()]
    parts = [(str(path.relative_to(MODULES)), path.read_text()) for path in files]
    made_from = (parts, PROGRAMS, FLAGS, Path(image.__file__).read_text())
    return CACHE / hashlib.sha256(repr(made_from).encode()).hexdigest()[:12]


def missing() -> list[str]:
    """What is not built yet."""
    wanted = [f"bin/{program.name}" for program in PROGRAMS] + ["images.tar", *JOBSET_FILES]
    return [name for name in wanted if not (built() / name).exists()]


def lacks_go() -> str:
    """What to do about Go; "" where it is new enough."""
    if shutil.which("go") is None:
        return NO_GO.format("there is none here")
    said = _go(MODULES / "pause", "env", "GOVERSION").strip()
    number = re.match(r"go(\d+)\.(\d+)", said)
    if number is None or (int(number[1]), int(number[2])) < OLDEST_GO:
        return NO_GO.format(f"{shutil.which('go')} is {said}")
    return ""


def build(say: Callable[[str], None] = print) -> None:
    """Build what is missing. Raises BuildError."""
    names = missing()
    if not names:
        return
    if lack := lacks_go():
        raise BuildError(lack)
    for program in PROGRAMS:
        if f"bin/{program.name}" in names:
            begun = time.monotonic()
            _build(program)
            say(f"{program.name} built in {time.monotonic() - begun:.0f} s")
    _write("images.tar", image.archive(built() / "bin" / "pause"))
    folder = Path(_go(MODULES / "jobset", "list", "-m", "-f", "{{.Dir}}", "sigs.k8s.io/jobset").strip())
    for name, source in JOBSET_FILES.items():
        _write(name, (folder / source).read_bytes())


def _build(program: Program) -> None:
    flags = FLAGS
    if program.module == "k8s":
        version = _version("k8s")
        numbers = dict(zip(("gitMajor", "gitMinor"), version.removeprefix("v").split("."), strict=False))
        for name, value in {"gitVersion": version, **numbers}.items():
            flags += f" -X k8s.io/component-base/version.{name}={value}"
    target = built() / "bin" / program.name
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        _go(MODULES / program.module, "build", "-ldflags", flags, "-o", f"{folder}/it", program.package)
        os.replace(f"{folder}/it", target)


def _version(module: str) -> str:
    """Of the one module that ours requires for itself."""
    required = re.search(r"^require \S+ (v\S+)$", (MODULES / module / "go.mod").read_text(), re.MULTILINE)
    assert required is not None, module
    return required[1]


def _write(name: str, data: bytes) -> None:
    """Whole or not at all."""
    file = built() / f".{name}.{os.getpid()}"
    file.write_bytes(data)
    os.replace(file, built() / name)


def _go(folder: Path, *words: str) -> str:
    """What `go` prints. -trimpath: the same packages in two checkouts are compiled once."""
    environment = {
        **os.environ, "CGO_ENABLED": "0", "GOTOOLCHAIN": "local", "GOWORK": "off",
        "GOFLAGS": "-mod=readonly -trimpath -buildvcs=false",
    }  # fmt: skip
    done = subprocess.run(["go", *words], cwd=folder, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise BuildError(f"go {' '.join(words)} in {folder}: exit {done.returncode}\n{done.stderr[-3000:]}")
    return done.stdout
