# SPDX-License-Identifier: Apache-2.0
"""SBU Captioned Photos: a list of captions and addresses at Flickr beside a folder of downloaded files."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

from vlp_jax.data.datasets import Dropped, coco, published, web_files
from vlp_jax.data.preparation import tables
from vlp_jax.types import UserError

NAME = "sbu"
VERSION = "1"
LICENCE = "Captions and addresses: for research, Ordonez et al. 2011, no licence stated. Photographs: each its own Flickr licence."
VISUAL_WORDS = coco.VISUAL_WORDS
SOURCE = (
    "SBU_captioned_photo_dataset_urls.txt and SBU_captioned_photo_dataset_captions.txt, or sbu-captions-all.json, from "
    "www.cs.rice.edu/~vo9/sbucaptions, or ViLT's annot.json; beside them what you downloaded, in images/ (images_train/, "
    f"sbu_images/, or with the lists). {web_files.NAMING}"
)
FIELDS = ("captions",)
UPRIGHT = False
OPTIONS = {"images": [], "first_row": 0, "rows": 0}
HELP = {
    "images": "train=FOLDER of the downloaded files, from --source on; empty = by the usual names",
    "first_row": "number of the first row in file names",
    "rows": "rows read, the first ones; 0 = all",
}
URLS, CAPTIONS = "SBU_captioned_photo_dataset_urls.txt", "SBU_captioned_photo_dataset_captions.txt"
PAIRS = ("annot.json", "train_annot.json")
FOLDERS = (
    "images",
    "images_train",
    "sbu_images",
    "train",
    "dataset",
    ".",
)  # torchvision mixes all in dataset/


def check(source: Path, **options) -> None:
    """Looks for the lists and the folder of downloaded files.

    Raises:
        UserError: one is not there, or the two lists have unlike numbers of lines.
    """
    lists = sources(source, **options)
    _folder(Path(source), options)
    if len(lists) == 2:
        captions, urls = (_lines(path) for path in lists)
        if captions != urls:
            raise UserError(
                f"{lists[0].name} has {captions} lines, {lists[1].name} has {urls}: captions would stand by the wrong "
                "pictures. Line by line they belong together. Download both again."
            )


def sources(source: Path, **options) -> list[Path]:
    """The list, or the captions and the addresses.

    Raises:
        UserError: there is none.
    """
    source = Path(source)
    for folder in (source, source / "dataset"):
        if (folder / URLS).is_file() and (folder / CAPTIONS).is_file():
            return [folder / CAPTIONS, folder / URLS]
        found = [*sorted(folder.glob("sbu*captions*.json")), *(folder / name for name in PAIRS)]
        if found := [path for path in found if path.is_file()]:
            return found[:1]
    raise published.missing(source, SOURCE)


def listing(source: Path, each: Callable | None = None, **options) -> Iterator[tuple[str, dict | Dropped]]:
    """Yields ("train", entry) in the order of the list; the image key is the row number, from 0."""
    source = Path(source)
    lists = sources(source, **options)
    folder = web_files.Folder(_folder(source, options))
    most = options.get("rows", 0) or None
    if lists[0].name in PAIRS:
        yield from web_files.by_path("train", web_files.read_pairs(lists[0])[:most], folder, source)
        return
    rows = _columns(lists[0]) if len(lists) == 1 else None

    def read() -> Iterator[web_files.Row | Dropped]:
        return itertools.islice(_rows(*lists) if rows is None else iter(rows), most)

    yield from web_files.by_address("train", read, folder, source, first=options.get("first_row", 0))


def _folder(source: Path, options: dict) -> Path:
    chosen = published.chosen(options.get("images", ()), "images", "train=images")
    if others := chosen.keys() - {"train"}:
        raise UserError(
            f"--images={min(others)}=...: SBU has no such split. Possible: train. Write --images=train=FOLDER."
        )
    return web_files.find_folder(source, FOLDERS, chosen.get("train", ""))


def _rows(captions: Path, urls: Path) -> Iterator[web_files.Row | Dropped]:
    """The rows of two lists that belong together line by line."""
    lines = zip(tables.read_lines(captions), tables.read_lines(urls), strict=True)
    for (number, caption), (_, url) in lines:
        yield _row(number - 1, caption, url.strip())


def _columns(path: Path) -> list[web_files.Row | Dropped]:
    """The rows of a json with the columns image_urls, user_ids and captions."""
    content = tables.read_json(path, "image_urls", "captions")
    captions, urls = content["captions"], content["image_urls"]
    if not isinstance(captions, list) or not isinstance(urls, list) or len(captions) != len(urls):
        raise published.malformed(path, "its columns captions and image_urls", ValueError("are not alike"))
    return [_row(number, *row) for number, row in enumerate(zip(captions, urls, strict=True))]


def _row(number: int, caption: str, url: str) -> web_files.Row | Dropped:
    if not isinstance(url, str) or "://" not in url:
        return Dropped(f"row {number}", "has no address")
    return web_files.Row(number, f"row {number}", url, (caption,))


def _lines(path: Path) -> int:
    return sum(1 for _ in tables.read_lines(path))
