"""The demo's images: Tux Paint's stamps, from Debian or Ubuntu.

    python -P -m model.data.stamps

Fetches the package `tuxpaint-stamps-default` (161 MB, GPL-2) with apt, without root and without installing it, and
prepares `cache:tuxpaint-stamps`: a folder a category, in it one PNG with alpha a stamp (cut to what is opaque, at most
160 pixels long) with its English caption in a .txt beside it. Exit code 2: it cannot be had this way, and what to do.
"""

from __future__ import annotations

import hashlib
import io
import sys
from pathlib import Path

import resvg_py
from PIL import Image
from rich.console import Console
from rich.progress import track

from model.data import package
from model.data.errors import UnreadableImageError
from model.data.images import load
from model.data.package import Package, cut

RENDERED_WIDTH = 2 * package.LONGEST_SIDE


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
    """Write every stamp and its caption into `folder`; the number of stamps."""
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
    return count


def render(path: Path) -> Image.Image:
    """An SVG as RGBA. Raises UnreadableImageError."""
    try:
        # The resolution is what `pt` is measured by: without one, drawings sized in points have no size.
        drawn = resvg_py.svg_to_bytes(svg_path=str(path), width=RENDERED_WIDTH, dpi=96, skip_system_fonts=True)
    except ValueError as error:
        raise UnreadableImageError(str(error)) from error
    return Image.open(io.BytesIO(bytes(drawn))).convert("RGBA")


PACKAGE = Package(
    name="tuxpaint-stamps-default",
    megabytes=161,
    cache="tuxpaint-stamps",
    images="stamps",
    module="model.data.stamps",
    instead="Any folder of images will do instead: dinoctl submit jobs/demo.yaml data.path=FOLDER",
    known={"6db6c1bfc870a47f1499d6203b083522eacb57c5f9c87d468f2e92eb6d9d5f34": "2022.06.04-1"},
    known_contents={"0a0e972803ffedd84e780d3feeb76c7f5052f69d2c879c5f324fafd93ca4e098": "2022.06.04"},
    digest=contents_digest,
    prepare=prepare,
)

if __name__ == "__main__":
    sys.exit(package.main(PACKAGE, __doc__))
