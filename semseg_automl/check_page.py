"""A report as one HTML page: tables and pictures, nothing fetched, nothing run, every text escaped.

Not here: what is reported (:mod:`semseg_automl.checking`).
"""

from __future__ import annotations

import base64
import html
import os
import re
import unicodedata
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
from numpy.typing import NDArray

from semseg_automl.data.channels import Channels
from semseg_automl.data.images import ImageSource, read_image, read_mask
from semseg_automl.errors import DataError
from semseg_automl.files import replaced
from semseg_automl.report import overlay
from semseg_automl.task import SegmentationTask

SIDE = 240
"""Longer side of a picture at most, in pixels."""

QUALITY = 80
"""Of the pictures, JPEG."""


_NUMBER = re.compile(r"[-\d.,%]*")


@dataclass(frozen=True)
class View:
    """An image and its mask, to be shown."""

    name: str
    image: ImageSource
    mask: ImageSource | None
    channels: Channels | None = None
    """Of the image."""


@dataclass(frozen=True)
class Card:
    """A finding with the images that it is about."""

    level: str
    kind: str
    text: str
    views: tuple[View, ...]


@dataclass(frozen=True)
class PageTable:
    """A table under a heading; tables of findings have a level."""

    title: str
    frame: pd.DataFrame
    level: str = ""


@dataclass(frozen=True)
class Page:
    """What stands on the page."""

    title: str
    verdict: str
    level: str
    lines: tuple[str, ...]
    tables: tuple[PageTable, ...]
    cards: tuple[Card, ...]


# No script, no network: the policy forbids both, whatever a file name tries.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"

_STYLE = """
:root { color-scheme: light dark; --ink: #1d1d1f; --soft: #5b5b62; --paper: #fff; --line: #d8d8de; --tint: #f4f4f7;
  --error: #b3261e; --warning: #8a5a00; --note: #2f5f9e; --ok: #1e7a3c; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8e8ec; --soft: #a5a5ae; --paper: #17181b; --line: #3a3b42;
  --tint: #212227; --error: #ff8a80; --warning: #ffc15c; --note: #8fb8ff; --ok: #7fd69a; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 64rem; padding: 1rem; color: var(--ink); background: var(--paper);
  font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; margin: 0; } h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; }
.verdict { font-weight: 600; margin: .25rem 0 1rem; }
.error { color: var(--error); } .warning { color: var(--warning); }
.note { color: var(--note); } .ok { color: var(--ok); }
pre { background: var(--tint); padding: .75rem; border-radius: .5rem; white-space: pre-wrap; font-size: .85rem; }
.wide { overflow-x: auto; } .summary td { white-space: nowrap; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; vertical-align: top; padding: .3rem .8rem .3rem 0; border-bottom: 1px solid var(--line); }
th { color: var(--soft); font-weight: 500; white-space: nowrap; } td.number, th.number { text-align: right; }
summary { cursor: pointer; font-weight: 600; padding: .4rem 0; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 18rem), 1fr)); gap: 1rem; }
.card { border: 1px solid var(--line); border-radius: .5rem; padding: .75rem; font-size: .85rem; break-inside: avoid; }
.card p { margin: 0 0 .5rem; } .views { display: flex; flex-wrap: wrap; gap: .5rem; }
figure { margin: 0; flex: 1 1 7rem; } img { max-width: 100%; height: auto; border-radius: .25rem; display: block; }
figcaption { color: var(--soft); font-size: .75rem; }
@media print { body { max-width: none; font-size: 11px; } .wide { overflow: visible; }
  details::details-content { content-visibility: visible; } }
"""


def write_page(page: Page, path: str | os.PathLike[str], task: SegmentationTask | None) -> Path:
    """Write a page, whole or not at all.

    Args:
        page: What stands on it; the images of its cards are read here, one at a time.
        path: Of the file; missing folders are made.
        task: What masks hold, to draw them; None shows images alone.

    Raises:
        DataError: The file cannot be written.
    """
    target = Path(path)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with replaced(target) as part:
            part.write_text(_page(page, task), encoding="utf-8")
    except OSError as error:
        raise DataError(f"{path}: cannot be written ({error.strerror}); check the folder and its free space") from error
    return target


def picture_of(view: View, task: SegmentationTask | None) -> bytes | None:
    """Return an image with its mask over it as JPEG, at most 240 pixels a side; None where it cannot be read."""
    try:
        image = read_image(view.image, channels=view.channels)
    except DataError:
        return None  # the card says what is wrong with it
    labels = None if task is None or view.mask is None else _labels(view.mask, task, image.shape[:2])
    scale = min(1.0, SIDE / max(image.shape[:2]))
    size = max(1, round(image.shape[1] * scale)), max(1, round(image.shape[0] * scale))
    small: NDArray[np.uint8] = cv2.resize(image, size, interpolation=cv2.INTER_AREA).astype(np.uint8, copy=False)
    if labels is not None and task is not None:
        shrunk = cv2.resize(labels, size, interpolation=cv2.INTER_NEAREST).astype(np.uint8, copy=False)
        small = overlay(small, shrunk, binary=task.kind == "binary")
    coded = cv2.imencode(".jpg", np.ascontiguousarray(small[:, :, ::-1]), [cv2.IMWRITE_JPEG_QUALITY, QUALITY])[1]
    return coded.tobytes()


def _labels(mask: ImageSource, task: SegmentationTask, size: tuple[int, ...]) -> NDArray[np.uint8] | None:
    """Return class indices, None where the mask is the very thing that is wrong."""
    try:
        labels = task.encode(read_mask(mask, colours=task.colours))
    except DataError:
        return None
    return labels if labels.shape == size else None


def _page(page: Page, task: SegmentationTask | None) -> str:
    cards = "\n".join(_card(card, task) for card in page.cards)
    shown = f'<h2>Pictures</h2>\n<div class="cards">\n{cards}\n</div>' if page.cards else ""
    summary = [table for table in page.tables if not table.level]
    findings = [table for table in page.tables if table.level]
    return "\n".join(
        [
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{_text(page.title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>",
            f"<h1>{_text(page.title)}</h1>",
            f'<p class="verdict {_text(page.level)}">{_text(page.verdict)}</p>',
            f"<pre>{_text(chr(10).join(page.lines))}</pre>",
            *(["<h2>Findings</h2>"] if findings else []),
            *(_found(table) for table in findings),
            shown,
            '<section class="summary">',
            *(f"<h2>{_text(table.title)}</h2>\n{_table(table.frame)}" for table in summary),
            "</section>",
            "</body>\n</html>\n",
        ]
    )


def _found(table: PageTable) -> str:
    opened = "" if table.level == "note" else " open"
    head = f'<summary class="{_text(table.level)}">{_text(table.title)}</summary>'
    return f"<details{opened}>{head}\n{_table(table.frame)}\n</details>"


def _table(frame: pd.DataFrame) -> str:
    numbers = [all(_NUMBER.fullmatch(str(cell)) for cell in frame[column]) for column in frame.columns]
    marks = [' class="number"' if number else "" for number in numbers]
    head = "".join(f"<th{mark}>{_text(name)}</th>" for mark, name in zip(marks, frame.columns, strict=True))
    lines = [
        "<tr>" + "".join(f"<td{mark}>{_text(cell)}</td>" for mark, cell in zip(marks, row, strict=True)) + "</tr>"
        for row in frame.itertuples(index=False, name=None)
    ]
    body = "\n".join(lines)
    return f'<div class="wide"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>'


def _card(card: Card, task: SegmentationTask | None) -> str:
    figures = []
    for view in card.views:
        coded = picture_of(view, task)
        caption = f"<figcaption>{_text(view.name)}</figcaption>"
        if coded is None:
            figures.append(f"<figure>{caption}<p>cannot be shown</p></figure>")
            continue
        data = base64.b64encode(coded).decode("ascii")
        figures.append(f'<figure><img alt="{_text(view.name)}" src="data:image/jpeg;base64,{data}">{caption}</figure>')
    head = f'<p><strong class="{_text(card.level)}">{_text(card.kind)}</strong> {_text(card.text)}</p>'
    return f'<div class="card">{head}<div class="views">{"".join(figures)}</div></div>'


def plain_text(value: object) -> str:
    """Return text that can be printed: control characters, and bytes of a file name that are no text, become a box."""
    return "".join(c if c == "\n" or not unicodedata.category(c).startswith("C") else "\ufffd" for c in str(value))


def _text(value: object) -> str:
    """Return text that is only text in HTML."""
    return html.escape(plain_text(value), quote=True)
