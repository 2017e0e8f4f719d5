"""The two images of the pods, made without a registry or a builder: an OCI archive that containerd imports.

`localhost/dev/pause:1` is one static program that waits: every pod's first container. `localhost/dev/host:1` is
next to nothing: mount points and a few files. Pods mount this machine's /usr into it, and so run its Python.
"""

from __future__ import annotations

import hashlib
import io
import json
import platform
import tarfile
from pathlib import Path
from typing import Any

PAUSE, HOST = "localhost/dev/pause:1", "localhost/dev/host:1"
MEDIA = "application/vnd.oci.image."
MACHINE = {"x86_64": "amd64", "aarch64": "arm64"}
FOLDERS = ("usr", "etc", "etc/ssl", "proc", "sys", "dev", "run", "var", "var/lib", "root")
LINKS = ("bin", "sbin", "lib", "lib64")
FILES = {
    "etc/passwd": "root:x:0:0:root:/root:/bin/sh\nworker:x:1000:1000::/tmp:/bin/sh\n",
    "etc/group": "root:x:0:\nworker:x:1000:\n",
    "etc/nsswitch.conf": "hosts: files dns\n",
}


def archive(pause: Path) -> bytes:
    """Both images. pause: the program."""
    blobs: dict[str, bytes] = {}
    manifests = [
        _image(blobs, PAUSE, [_file("pause", pause.read_bytes(), 0o755)], {"Entrypoint": ["/pause"]}),
        _image(blobs, HOST, _host(), {"Env": ["PATH=/usr/local/bin:/usr/bin:/bin"], "Cmd": ["/bin/sh"]}),
    ]
    index = {"schemaVersion": 2, "mediaType": MEDIA + "index.v1+json", "manifests": manifests}
    members = [
        _file("oci-layout", b'{"imageLayoutVersion":"1.0.0"}'),
        _file("index.json", json.dumps(index).encode()),
        *(_file(f"blobs/sha256/{digest}", data) for digest, data in blobs.items()),
    ]
    return _tar(members)


Member = tuple[tarfile.TarInfo, bytes]


def _host() -> list[Member]:
    folders = [_member(name, tarfile.DIRTYPE, 0o755) for name in FOLDERS] + [_member("tmp", tarfile.DIRTYPE, 0o1777)]
    links = [_member(name, tarfile.SYMTYPE, 0o777) for name in LINKS]
    for info, _ in links:
        info.linkname = f"usr/{info.name}"
    return folders + links + [_file(name, text.encode()) for name, text in FILES.items()]


def _image(blobs: dict[str, bytes], name: str, members: list[Member], config: dict[str, Any]) -> dict[str, Any]:
    """Its entry in the index; its layer, configuration and manifest go to `blobs`."""

    def blob(data: bytes, kind: str) -> dict[str, Any]:
        digest = hashlib.sha256(data).hexdigest()
        blobs[digest] = data
        return {"mediaType": MEDIA + kind, "digest": f"sha256:{digest}", "size": len(data)}

    layer = blob(_tar(members), "layer.v1.tar")
    machine = {"architecture": MACHINE[platform.machine()], "os": "linux"}
    root = {"type": "layers", "diff_ids": [layer["digest"]]}
    told = blob(json.dumps({**machine, "config": config, "rootfs": root}).encode(), "config.v1+json")
    manifest = {"schemaVersion": 2, "mediaType": MEDIA + "manifest.v1+json", "config": told, "layers": [layer]}
    annotations = {"io.containerd.image.name": name, "org.opencontainers.image.ref.name": name.rpartition(":")[2]}
    return {**blob(json.dumps(manifest).encode(), "manifest.v1+json"), "platform": machine, "annotations": annotations}


def _member(name: str, kind: bytes, mode: int) -> Member:
    info = tarfile.TarInfo(name)
    info.type, info.mode = kind, mode
    return info, b""


def _file(name: str, data: bytes, mode: int = 0o644) -> Member:
    info, _ = _member(name, tarfile.REGTYPE, mode)
    info.size = len(data)
    return info, data


def _tar(members: list[Member]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for info, data in members:
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()
