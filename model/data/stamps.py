"""The demo's images: Tux Paint's stamps, from Debian or Ubuntu.

    python -P -m model.data.stamps

Fetches the package `tuxpaint-stamps-default` (161 MB, GPL-2) with apt, without root and without installing it, and
prepares `cache:tuxpaint-stamps`: a folder a category, in it one PNG with alpha a stamp (cut to what is opaque, at most
160 pixels long) with its English caption in a .txt beside it. Exit code 2: it cannot be had this way, and what to do.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import resvg_py
from PIL import Image
from rich.console import Console
from rich.progress import track

from model import contract
from model.data.errors import UnreadableImageError
from model.data.images import load

NAME = "tuxpaint-stamps"
PACKAGE = "tuxpaint-stamps-default"
KNOWN = {"6db6c1bfc870a47f1499d6203b083522eacb57c5f9c87d468f2e92eb6d9d5f34": "2022.06.04-1"}
"""sha256 of the package's file -> version, of those looked at."""
KNOWN_CONTENTS = {"0a0e972803ffedd84e780d3feeb76c7f5052f69d2c879c5f324fafd93ca4e098": "2022.06.04"}
"""Digest of the stamps in it (`contents_digest`) -> version: Ubuntu builds the same stamps into a file of its own."""

LONGEST_SIDE = 160
RENDERED_WIDTH = 2 * LONGEST_SIDE
SUMS = "SHA256SUMS"


class StampsError(RuntimeError):
    """The stamps cannot be had; the message says why and what to do."""


INSTEAD = "Any folder of images will do instead: dinoctl submit jobs/demo.yaml data.path=FOLDER"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -P -m model.data.stamps", description=__doc__.split("\n")[0])
    parser.add_argument("--accept", metavar="SHA256", help="take a package with this checksum, though it is not known")
    accepted: str | None = parser.parse_args().accept
    console = Console()
    target = contract.cache_dir() / NAME
    try:
        if is_complete(target):
            console.print(
                f"The stamps are there already, {len(sums(target))} files, each as it should be: {target}",
                soft_wrap=True,
            )
            return 0
        fetch(target, accepted, console)
    except StampsError as error:
        print(f"{error}\n{INSTEAD}", file=sys.stderr)
        return 2
    return 0


def fetch(target: Path, accepted: str | None, console: Console) -> None:
    """Download, check, prepare beside `target`, and rename. Raises StampsError."""
    if shutil.which("apt-get") is None or shutil.which("dpkg") is None:
        raise StampsError(f"The demo's images come from Debian's or Ubuntu's package {PACKAGE}, and apt is not here.")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{NAME}-") as scratch:
        console.print(f"Fetching {PACKAGE} (161 MB) with apt")
        package = download(Path(scratch))
        unpacked = Path(scratch, "unpacked")
        _run(["dpkg", "-x", str(package), str(unpacked)])
        check(package, unpacked, accepted)
        prepared = Path(scratch, "prepared")
        count = prepare(unpacked, prepared, console)
        if target.exists():
            target.rename(Path(scratch, "replaced"))
        with contextlib.suppress(FileExistsError):  # another process was first, with the same stamps
            prepared.rename(target)
    console.print(f"{count} stamps are ready: {target}", soft_wrap=True)


def download(folder: Path) -> Path:
    """The package's file in `folder`, its signature checked by apt. Raises StampsError.

    Where this machine's package lists are missing or old, takes new ones into `folder`, which needs no root either.
    """
    fetching = ["apt-get", "download", PACKAGE]
    try:
        _run([*fetching, *_unsandboxed()], folder)
    except StampsError:
        own = _own_lists(folder)
        _run(["apt-get", "-qq", "update", *own], folder)
        _run([*fetching, *own], folder)
    return next(folder.glob(f"{PACKAGE}_*.deb"))


def _unsandboxed() -> list[str]:
    """As root apt would hand the download to a user who may not write here, and warn that it did not."""
    return ["-o", "APT::Sandbox::User=root"] if os.geteuid() == 0 else []


def _own_lists(folder: Path) -> list[str]:
    (folder / "lists/partial").mkdir(parents=True)
    (folder / "apt/archives/partial").mkdir(parents=True)
    return [*_unsandboxed(), "-o", f"Dir::State::Lists={folder}/lists", "-o", f"Dir::Cache={folder}/apt"]


def _run(command: list[str], folder: Path | None = None) -> None:
    """Run a command with its progress on the screen. Raises StampsError with what it complained of."""
    done = subprocess.run(command, cwd=folder, stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise StampsError(f"`{' '.join(command)}` failed:\n{done.stderr.strip()}")


def check(package: Path, unpacked: Path, accepted: str | None) -> None:
    """Raises StampsError unless the package, or the stamps in it, are known or were accepted by name."""
    with package.open("rb") as file:
        seen = hashlib.file_digest(file, "sha256").hexdigest()
    if seen in KNOWN or seen == accepted or contents_digest(unpacked) in KNOWN_CONTENTS:
        return
    raise StampsError(
        f"{package.name} is not a version that dinoctl was tried with: sha256 {seen}.\n"
        f"apt has checked its signature. To take it: python -P -m model.data.stamps --accept {seen}"
    )


def sources(unpacked: Path) -> dict[str, Path]:
    """Name -> image of every stamp that has a caption, sorted. A stamp drawn both ways is taken as PNG; the drawings
    without a caption are the mirrored forms of others, and leaving them out is no loss."""
    root = unpacked / "usr/share/tuxpaint/stamps"
    found: dict[str, Path] = {}
    for path in sorted([*root.rglob("*.svg"), *root.rglob("*.png")], key=lambda path: path.suffix == ".png"):
        if path.with_suffix(".txt").exists():
            found[path.relative_to(root).with_suffix("").as_posix()] = path
    return dict(sorted(found.items()))


def contents_digest(unpacked: Path) -> str:
    """Digest of the stamps' pixels, drawings and captions: the same for every build of the same stamps, even where
    the builder has packed the PNGs tighter."""
    digest = hashlib.sha256()
    for name, path in sources(unpacked).items():
        shown = path.read_bytes() if path.suffix == ".svg" else load(path).convert("RGBA").tobytes()
        digest.update(f"{name}\0{caption(path)}\0".encode() + hashlib.sha256(shown).digest())
    return digest.hexdigest()


def caption(path: Path) -> str:
    """The English caption: the first line of the text beside an image."""
    lines = path.with_suffix(".txt").read_text(encoding="utf-8").splitlines()
    return lines[0].strip() if lines else ""


def prepare(unpacked: Path, folder: Path, console: Console) -> int:
    """Write every stamp, its caption and the list of checksums into `folder`; the number of stamps."""
    count = 0
    for name, path in track(sources(unpacked).items(), "Preparing stamps", console=console):
        try:
            image = cut(load(path) if path.suffix == ".png" else render(path))
        except UnreadableImageError as error:
            console.print(f"left out {path.name}: {error}")
            continue
        out = folder / f"{name}.png"
        out.parent.mkdir(parents=True, exist_ok=True)
        image.save(out)
        out.with_suffix(".txt").write_text(f"{caption(path)}\n", encoding="utf-8")
        count += 1
    shutil.copyfile(unpacked / f"usr/share/doc/{PACKAGE}/copyright", folder / "COPYRIGHT")
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    lines = [f"{_sha256(path)}  {path.relative_to(folder).as_posix()}\n" for path in files]
    (folder / SUMS).write_text("".join(lines), encoding="utf-8")
    return count


def render(path: Path) -> Image.Image:
    """An SVG as RGBA. Raises UnreadableImageError."""
    try:
        # The resolution is what `pt` is measured by: without one, drawings sized in points have no size.
        drawn = resvg_py.svg_to_bytes(svg_path=str(path), width=RENDERED_WIDTH, dpi=96, skip_system_fonts=True)
    except ValueError as error:
        raise UnreadableImageError(str(error)) from error
    return Image.open(io.BytesIO(bytes(drawn))).convert("RGBA")


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
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None


if __name__ == "__main__":
    sys.exit(main())
