"""Whether the bytes of a JPEG or PNG are all there, walked segment by segment without decoding.

Some OpenCV versions fill the missing part of a truncated file with grey and say nothing.
"""

from __future__ import annotations

import re
import zlib

# A JPEG marker that is neither a stuffed zero, nor a restart, nor a fill byte (ITU-T T.81, B.1.1.2).
_JPEG_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")
_JPEG_END = 0xD9


def jpeg_is_complete(data: bytes) -> bool:
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


def png_flaw(data: bytes) -> str:
    """Return what is wrong with the chunks of a PNG, or an empty string."""
    position = 8
    while position + 12 <= len(data):
        length = int.from_bytes(data[position : position + 4], "big")
        end = position + 8 + length
        if end + 4 > len(data):
            break
        if zlib.crc32(memoryview(data)[position + 4 : end]) != int.from_bytes(data[end : end + 4], "big"):
            return "a checksum of the PNG is wrong"
        if data[position + 4 : position + 8] == b"IEND":
            return ""
        position = end + 4
    return "the PNG ends before its last chunk"
