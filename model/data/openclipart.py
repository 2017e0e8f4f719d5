"""The longer demo's other images: the drawings of Open Clip Art, from Debian or Ubuntu.

    python -P -m model.data.openclipart

Fetches the package `openclipart-png` (131 MB, public domain) with apt, without root and without installing it, and
prepares `cache:openclipart`: a folder a category, in it one PNG with alpha a drawing, cut and brought down as the
stamps are. Every seventh stamp is drawn here too, so what is like a stamp is left out, whichever third of them it
is in: training sees no form of an image that the table is about. Of drawings that are alike one is kept. LEFT_OUT says
which were left out, and why. Exit code 2: it cannot be had this way, and what to do.
"""

from __future__ import annotations

import hashlib
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image
from rich.console import Console
from rich.progress import track

from model.data import duplicates, index, package, stamps
from model.data.errors import UnreadableImageError
from model.data.images import load, over
from model.data.package import Package, PackageError, cut
from model.data.threads import cores, in_threads

LEFT_OUT = "LEFT_OUT"
WHITE = (1.0, 1.0, 1.0)


def sources(unpacked: Path) -> dict[str, Path]:
    """Name -> file of every drawing, sorted; not the links, by which the package files a drawing in two places."""
    root = unpacked / "usr/share/openclipart/png"
    found = {path.relative_to(root).as_posix(): path for path in root.rglob("*.png") if not path.is_symlink()}
    return dict(sorted(found.items()))


def contents_digest(unpacked: Path) -> str:
    """Digest of the drawings' pixels: the same for every build of the same drawings."""
    digest = hashlib.sha256()
    for name, image in _look(sources(unpacked), lambda image: image.convert("RGBA")):
        shown = b"" if isinstance(image, str) else image.tobytes()
        digest.update(f"{name}\0".encode() + hashlib.sha256(shown).digest())
    return digest.hexdigest()


def prepare(unpacked: Path, folder: Path, console: Console) -> int:
    """Write the drawings that are like no stamp and like no other, and LEFT_OUT; the number of drawings.

    Raises PackageError if the stamps are not there to be compared with.
    """
    if not package.is_complete(stamps.PACKAGE.folder):
        raise PackageError(
            f"The drawings are compared with the stamps, and {stamps.PACKAGE.folder} is not there or not whole.\n"
            "Fetch them first: make data"
        )
    found = sources(unpacked)
    left_out: dict[str, str] = {}
    drawings: dict[str, Image.Image] = {}
    for name, image in track(_look(found, cut), "Preparing drawings", total=len(found), console=console):
        if isinstance(image, str):
            left_out[name] = image
        else:
            drawings[name] = image
    left_out |= alike(_stamps(), drawings)
    for name in drawings.keys() - left_out.keys():
        out = folder / name
        out.parent.mkdir(parents=True, exist_ok=True)
        drawings[name].save(out)
    lines = [f"{name}\t{why}\n" for name, why in sorted(left_out.items())]
    (folder / LEFT_OUT).write_text("".join(lines), encoding="utf-8")
    return len(drawings.keys() - left_out.keys())


def alike(stamps_by_name: dict[str, Image.Image], drawings: dict[str, Image.Image]) -> dict[str, str]:
    """The drawings to leave out, and why: of each group of near-duplicates, as the index makes them, all where there is
    a stamp among them, else all but the first by name."""
    both = [*((f"stamp {name}", image) for name, image in stamps_by_name.items()), *drawings.items()]
    names = [name for name, _ in both]
    thumbnails = np.stack([duplicates.thumbnail(np.array(over(image, WHITE))) for _, image in both])
    first: dict[int, str] = {}
    found = {}
    for name, group in zip(names, duplicates.near_duplicates(names, names, thumbnails), strict=True):
        known = first.setdefault(group, name)
        if known != name and name in drawings:
            found[name] = f"like {known}"
    return found


def _stamps() -> dict[str, Image.Image]:
    root = stamps.PACKAGE.folder
    return {name: load(root / name) for name in index.list_images(root)}


def _look(
    found: dict[str, Path], change: Callable[[Image.Image], Image.Image]
) -> Iterator[tuple[str, Image.Image | str]]:
    """Each drawing, changed, or why it cannot be had."""

    def one(path: Path) -> Image.Image | str:
        try:
            return change(load(path))
        except UnreadableImageError as error:
            return str(error)

    return zip(found, in_threads(one, list(found.values()), cores()), strict=True)


PACKAGE = Package(
    name="openclipart-png",
    megabytes=131,
    cache="openclipart",
    images="drawings",
    module="model.data.openclipart",
    instead="Without them: dinoctl submit jobs/demo.yaml, or a folder of your own: data.also.0.path=FOLDER",
    known={"f07f1545a2970c2cf3fa339bc2405da1a95cf2b1827bfa05bf73eb1c20291c02": "1:0.18+dfsg-19"},
    known_contents={"24e81bb1b313426b86630423b09cccbe1ba911b35c706b2472858f27a10af12f": "0.18"},
    digest=contents_digest,
    prepare=prepare,
)

if __name__ == "__main__":
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # `load` refuses such a drawing; LEFT_OUT names it
    sys.exit(package.main(PACKAGE, __doc__))
