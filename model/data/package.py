"""Images that are a package of Debian or Ubuntu: fetched with apt, without root and without installing it; checked,
prepared, and kept in dinoctl's cache as a folder with its checksums. `model.data.stamps` and `model.data.openclipart`
say what the packages are."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from rich.console import Console

from model import contract
from model.data.errors import UnreadableImageError

LONGEST_SIDE = 160
"""Pixels: what a drawing is brought down to. Crops are of 48 to 96."""
SUMS = "SHA256SUMS"


class PackageError(RuntimeError):
    """The images cannot be had; the message says why and what to do."""


@dataclass(frozen=True)
class Package:
    """What is fetched. `module` is run by `python -P -m`, `instead` is what to do where it cannot be had.

    `known`: sha256 of the package's file -> version, of those looked at. `known_contents`: `digest` of what is in it ->
    version; Ubuntu builds the same images into a file of its own.
    """

    name: str
    megabytes: int
    cache: str
    images: str
    module: str
    instead: str
    known: Mapping[str, str]
    known_contents: Mapping[str, str]
    digest: Callable[[Path], str]
    prepare: Callable[[Path, Path, Console], int]
    """(unpacked package, new folder, console) -> number of images. Raises PackageError."""

    @property
    def folder(self) -> Path:
        """Where the prepared images are: `data.path: cache:<cache>`."""
        return contract.cache_dir() / self.cache


def main(package: Package, doc: str) -> int:
    """The command line of `package.module`, described by the first line of `doc`."""
    command = f"python -P -m {package.module}"
    parser = argparse.ArgumentParser(prog=command, description=doc.split("\n")[0])
    parser.add_argument("--accept", metavar="SHA256", help="take a package with this checksum, though it is not known")
    accepted: str | None = parser.parse_args().accept
    console = Console()
    try:
        if is_complete(package.folder):
            count = len(sums(package.folder))
            said = f"The {package.images} are there already, {count} files, each as it should be: {package.folder}"
            console.print(said, soft_wrap=True)
            return 0
        fetch(package, accepted, console)
    except PackageError as error:
        print(f"{error}\n{package.instead}", file=sys.stderr)
        return 2
    return 0


def fetch(package: Package, accepted: str | None, console: Console) -> None:
    """Download, check, prepare beside the package's folder, and rename. Raises PackageError."""
    if shutil.which("apt-get") is None or shutil.which("dpkg") is None:
        raise PackageError(
            f"The {package.images} come from Debian's or Ubuntu's package {package.name}, and apt is not here."
        )
    target = package.folder
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{package.cache}-") as scratch:
        console.print(f"Fetching {package.name} ({package.megabytes} MB) with apt")
        file = download(package.name, Path(scratch))
        unpacked = Path(scratch, "unpacked")
        _run(["dpkg", "-x", str(file), str(unpacked)])
        check(package, file, unpacked, accepted)
        prepared = Path(scratch, "prepared")
        count = package.prepare(unpacked, prepared, console)
        shutil.copyfile(unpacked / f"usr/share/doc/{package.name}/copyright", prepared / "COPYRIGHT")
        write_sums(prepared)
        if target.exists():
            target.rename(Path(scratch, "replaced"))
        with contextlib.suppress(FileExistsError):  # another process was first, with the same images
            prepared.rename(target)
    console.print(f"{count} {package.images} are ready: {target}", soft_wrap=True)


def download(name: str, folder: Path) -> Path:
    """The package's file in `folder`, its signature checked by apt. Raises PackageError.

    Where this machine's package lists are missing or old, takes new ones into `folder`, which needs no root either.
    """
    fetching = ["apt-get", "download", name]
    try:
        _run([*fetching, *_unsandboxed()], folder)
    except PackageError:
        own = _own_lists(folder)
        _run(["apt-get", "-qq", "update", *own], folder)
        _run([*fetching, *own], folder)
    return next(folder.glob(f"{name}_*.deb"))


def _unsandboxed() -> list[str]:
    """As root apt would hand the download to a user who may not write here, and warn that it did not."""
    return ["-o", "APT::Sandbox::User=root"] if os.geteuid() == 0 else []


def _own_lists(folder: Path) -> list[str]:
    (folder / "lists/partial").mkdir(parents=True)
    (folder / "apt/archives/partial").mkdir(parents=True)
    return [*_unsandboxed(), "-o", f"Dir::State::Lists={folder}/lists", "-o", f"Dir::Cache={folder}/apt"]


def _run(command: list[str], folder: Path | None = None) -> None:
    """Run a command with its progress on the screen. Raises PackageError with what it complained of."""
    done = subprocess.run(command, cwd=folder, stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise PackageError(f"`{' '.join(command)}` failed:\n{done.stderr.strip()}")


def check(package: Package, file: Path, unpacked: Path, accepted: str | None) -> None:
    """Raises PackageError unless the package's file, or what is in it, is known or was accepted by name."""
    seen = _sha256(file)
    if seen in package.known or seen == accepted or package.digest(unpacked) in package.known_contents:
        return
    raise PackageError(
        f"{file.name} is not a version that dinoctl was tried with: sha256 {seen}.\n"
        f"apt has checked its signature. To take it: python -P -m {package.module} --accept {seen}"
    )


def cut(image: Image.Image) -> Image.Image:
    """What is not transparent, at most LONGEST_SIDE pixels long, RGBA. Raises UnreadableImageError if nothing is."""
    image = image.convert("RGBA")
    box = image.getchannel("A").getbbox()
    if box is None:
        raise UnreadableImageError("all of it is transparent")
    image = image.crop(box)
    scale = LONGEST_SIDE / max(image.size)
    if scale >= 1:
        return image
    width, height = (max(1, round(side * scale)) for side in image.size)
    return image.resize((width, height), Image.Resampling.LANCZOS)  # Pillow weighs by alpha


# --- checksums of what was prepared -----------------------------------------------------------------------------------


def write_sums(folder: Path) -> None:
    """The list of checksums, last: a folder without it is not complete."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    lines = [f"{_sha256(path)}  {path.relative_to(folder).as_posix()}\n" for path in files]
    (folder / SUMS).write_text("".join(lines), encoding="utf-8")


def sums(folder: Path) -> dict[str, str]:
    """Path -> sha256 of what was prepared; empty if nothing was."""
    try:
        lines = (folder / SUMS).read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return {}
    return {name: digest for digest, _, name in (line.partition("  ") for line in lines)}


def is_complete(folder: Path) -> bool:
    """Every file that was prepared is there, unchanged."""
    expected = sums(folder)
    return bool(expected) and all(_sha256(folder / name) == digest for name, digest in expected.items())


def _sha256(path: Path) -> str | None:
    if not path.is_file():
        return None
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
