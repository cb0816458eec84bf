"""Whether the bytes of a JPEG, PNG or TIFF are all there and make sense, walked part by part without decoding.

Some decoders fill the missing part of a file with grey or black and say nothing, others warn in words of their own.

Not here: decoding (:mod:`semseg_automl.data.images`).
"""

from __future__ import annotations

import os
import re
import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, BinaryIO

# A JPEG marker that is neither a stuffed zero, nor a restart, nor a fill byte (ITU-T T.81, B.1.1.2).
_JPEG_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")
_JPEG_END = 0xD9
_JPEG_SCAN = 0xDA
# Comments, and application segments but those of JFIF (0) and Adobe (14), which decoders go by.
_JPEG_ABOUT = frozenset({0xFE, *range(0xE1, 0xEE), 0xEF})

PNG_START = b"\x89PNG\r\n\x1a\n"
"""The first bytes of every PNG."""

_PNG_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
# First column and row of each pass of an interlaced PNG, and the steps (PNG specification, third edition, 8.1).
_ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
_INFLATED = 2**20

# Bytes of a value of each TIFF type (TIFF 6.0, section 2; 13 and 16 to 18: TIFF supplements and BigTIFF).
_TIFF_UNITS = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}
_TIFF_NUMBERS = frozenset({3, 4, 8, 9, 16, 17})
# Tags with one number: kind, sides, compression, photometric and so on; not those of each channel or strip.
_TIFF_SINGLE = frozenset({254, 255, 256, 257, 259, 263, 266, 274, 277, 278, 284, 288, 289, 296, 317, 322, 323})
_MAX_TIFF_PAGES = 1024
_ORIENTATION = 0x0112


def jpeg_flaw(data: bytes, size: tuple[int, int], layers: Sequence[Sequence[Any]], *, progressive: bool) -> str:
    """Return what is wrong with the length of a JPEG, or an empty string.

    Each block of 8 x 8 values takes a Huffman code of at least one bit for its mean, and unless it is progressive
    another for the rest (ITU-T T.81, F.1.2 and G.1.2). Decoders fill what is missing with grey, whatever the size; a
    file that is too short by less than this is not told from a whole one.

    Args:
        data: The file.
        size: Width and height in pixels.
        layers: Of each channel its number, and how often it is sampled across and down.
        progressive: Whether means come in a scan of their own.
    """
    if not _reaches_end_marker(data):
        return "the JPEG ends before its end marker"
    across = max((layer[1] for layer in layers), default=0) or 1
    down = max((layer[2] for layer in layers), default=0) or 1
    width, height = size
    blocks = sum(-(-width * layer[1] // (8 * across)) * -(-height * layer[2] // (8 * down)) for layer in layers)
    if 8 * len(data) < blocks * (1 if progressive else 2):
        return f"{len(data):,} bytes are too few for a JPEG of {height} x {width} pixels"
    return ""


def jpeg_pixel_data(data: bytes) -> bytes:
    """Return a JPEG without what says nothing about its pixels: camera data, previews, profiles, comments.

    Two files of equal pixel data decode to equal pixels. What JFIF and Adobe say of the colours stays.

    >>> jpeg_pixel_data(bytes.fromhex("ffd8" "fffe0004abcd" "ffdb0003ab" "ffda0002" "12")).hex()
    'ffdb0003abffda000212'
    """
    kept = []
    position = 2
    while data[position : position + 1] == b"\xff" and position + 4 <= len(data):
        kind = data[position + 1]
        if kind == _JPEG_SCAN:
            break
        end = position + 2 + int.from_bytes(data[position + 2 : position + 4], "big")
        if kind not in _JPEG_ABOUT:
            kept.append(data[position:end])
        position = end
    return b"".join([*kept, data[position:]])


def png_flaw(data: bytes) -> str:
    """Return what is wrong with the chunks of a PNG, or an empty string."""
    if data[8:16] != b"\0\0\0\rIHDR":
        return "the PNG does not begin with its header"
    found: set[bytes] = set()
    for kind, start, end in _png_chunks(data):
        if zlib.crc32(memoryview(data)[start - 4 : end]) != int.from_bytes(data[end : end + 4], "big"):
            return "a checksum of the PNG is wrong"
        if kind == b"IEND":
            return ""
        if kind in found and kind in (b"IHDR", b"acTL"):
            return "the PNG has two headers"
        if kind == b"acTL" and not 0 < int.from_bytes(data[start : start + 4], "big") <= 2**31:
            return "the animation of the PNG is wrong"
        found.add(kind)
    return "the PNG ends before its last chunk"


def png_pixels_flaw(data: bytes) -> str:
    """Return what is wrong with the amount of pixels in a PNG, or an empty string.

    Pillow leaves rows black for which there is nothing. Of the chunks nothing is wrong, :func:`png_flaw` has told.
    """
    width, height, depth, colour, _, _, interlaced = struct.unpack(">IIBBBBB", data[16:29])
    bits = depth * _PNG_CHANNELS.get(colour, 0)
    passes = _ADAM7 if interlaced else ((0, 0, 1, 1),)
    sides = [(max(0, -(-(width - x) // across)), max(0, -(-(height - y) // down))) for x, y, across, down in passes]
    missing = sum(high * (1 + -(-wide * bits // 8)) for wide, high in sides if wide)
    inflate = zlib.decompressobj()
    try:
        for kind, start, end in _png_chunks(data):
            waiting = data[start:end] if kind == b"IDAT" else b""
            while waiting and missing > 0 and not inflate.eof:
                missing -= len(inflate.decompress(waiting, _INFLATED))
                waiting = inflate.unconsumed_tail
    except zlib.error as error:
        return str(error)
    return "the PNG has fewer pixels than its header says" if missing > 0 else ""


def tiff_flaw(stream: BinaryIO) -> str:
    """Return what is wrong with the directories of a TIFF or BigTIFF, or an empty string; `stream` is left anywhere.

    Checked is what Pillow only warns about: entries that end outside the file, are more than fit into it, or
    have several numbers where there is one.
    """
    length = stream.seek(0, os.SEEK_END)
    stream.seek(0)
    head = stream.read(16)
    order, large = "<" if head[:2] == b"II" else ">", 43 in (head[2], head[3])
    place = "Q" if large else "I"
    seen: set[int] = set()
    try:
        (start,) = struct.unpack_from(order + place, head, 8 if large else 4)
        while start and start not in seen:
            seen.add(start)
            if len(seen) > _MAX_TIFF_PAGES:
                return f"the TIFF has more than {_MAX_TIFF_PAGES} pages"
            stream.seek(min(start, length))
            (entries,) = struct.unpack(order + ("Q" if large else "H"), stream.read(8 if large else 2))
            width = 20 if large else 12
            if entries * width > length:
                return "a directory of the TIFF is longer than the file"
            directory = stream.read(entries * width)
            used = 0
            for tag, kind, count, offset in struct.iter_unpack(f"{order}HH{place}{place}", directory):
                size = count * _TIFF_UNITS.get(kind, 0)
                used += size if size > (8 if large else 4) else 0
                if used > length or (size > (8 if large else 4) and offset + size > length):
                    return f"entry {tag} of the TIFF ends outside the file"
                if count > 1 and tag in _TIFF_SINGLE and kind in _TIFF_NUMBERS:
                    return f"entry {tag} of the TIFF has {count} numbers instead of one"
            (start,) = struct.unpack(order + place, stream.read(8 if large else 4))
    except struct.error:
        return "a directory of the TIFF ends outside the file"
    return ""


def tiff_pixels_flaw(tags: Mapping[int, Any]) -> str:
    """Return what is wrong with the number of strips or tiles of a TIFF (TIFF 6.0, sections 3 and 15), or nothing.

    Args:
        tags: Numbers, or tuples of them, by the number of the tag.

    >>> tiff_pixels_flaw({256: 32, 257: 24, 273: (8, 1544), 278: 16})
    ''
    >>> tiff_pixels_flaw({256: 32, 257: 33, 273: (8, 1544), 278: 16})
    'the TIFF has 2 of 3 strips'
    """

    def number(tag: int, default: int) -> int:
        value = tags.get(tag)
        return value if isinstance(value, int) and value > 0 else default

    width, height = number(256, 1), number(257, 1)
    planes = number(277, 1) if number(284, 1) == 2 else 1
    kind = "tiles" if 324 in tags else "strips"
    if kind == "tiles":
        wanted = planes * -(-width // number(322, width)) * -(-height // number(323, height))
    else:
        wanted = planes * -(-height // min(number(278, height), height))
    found = tags.get(324 if kind == "tiles" else 273, ())
    there = len(found) if isinstance(found, tuple) else 1
    return f"the TIFF has {there} of {wanted} {kind}" if there < wanted else ""


def exif_orientation(block: bytes) -> int | None:
    """Return the orientation, 1 to 8, that an EXIF block gives, 1 where it gives none, None where it is damaged.

    >>> exif_orientation(bytes.fromhex("4d4d002a00000008" "0001" "01120003000000010006" "0000" "00000000"))
    6
    """
    while block.startswith(b"Exif\0\0"):
        block = block[6:]
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(block[:4])
    if order is None:
        return None
    try:
        (start,) = struct.unpack_from(f"{order}I", block, 4)
        (entries,) = struct.unpack_from(f"{order}H", block, start)
        for place in range(start + 2, start + 2 + 12 * entries, 12):
            tag, kind, count = struct.unpack_from(f"{order}HHI", block, place)
            if tag == _ORIENTATION:
                form = {1: "B", 3: "H", 4: "I"}.get(kind)
                value = struct.unpack_from(order + form, block, place + 8)[0] if form and count == 1 else None
                return value if value in range(1, 9) else 1
    except struct.error:
        return None
    return 1


def _reaches_end_marker(data: bytes) -> bool:
    """Walk the segments up to the end marker; one inside an embedded thumbnail does not count."""
    position = 2
    while True:
        marker = _JPEG_MARKER.search(data, position)
        if marker is None:
            return False
        if data[marker.end() - 1] == _JPEG_END:
            return True
        if marker.end() + 2 > len(data):
            return False
        position = marker.end() + int.from_bytes(data[marker.end() : marker.end() + 2], "big")


def _png_chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Yield kind, start and end of the content of every whole chunk."""
    position = 8
    while position + 12 <= len(data):
        start = position + 8
        end = start + int.from_bytes(data[position : position + 4], "big")
        if end + 4 > len(data):
            return
        yield data[position + 4 : start], start, end
        position = end + 4
