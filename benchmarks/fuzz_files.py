"""Damaged image and mask files for :mod:`benchmarks.fuzz`: small good files of every kind, and ways to spoil them.

Every file says what may become of it: as good as the one it was made from, that or refused, refused, or anything but an
exception. Not here: reading them.
"""

from __future__ import annotations

import io
import os
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from semseg_automl.data.images import SUFFIXES

HEIGHT, WIDTH = 24, 32

MAX_REAL_BYTES = 150_000
MAX_REAL_FILES = 30

Verdict: TypeAlias = Literal["same", "same or refused", "refused", "any"]
"""What may become of a file. ``same``: the pixels of the file it was made from, or refused where that is."""

Rng: TypeAlias = np.random.Generator


@dataclass(frozen=True)
class Seed:
    """A good file."""

    name: str
    suffix: str
    data: bytes
    drawn: bool = True
    """Whether it is known what becomes of it."""

    @property
    def format(self) -> str:
        """Return what the first bytes say."""
        return next(format for format, start in SIGNATURES.items() if self.data.startswith(start))


@dataclass(frozen=True)
class Spoiled:
    """A file to read, and what may become of it."""

    path: str
    kind: str
    seed: Seed
    verdict: Verdict


SIGNATURES = {
    "png": b"\x89PNG\r\n\x1a\n",
    "jpeg": b"\xff\xd8\xff",
    "bmp": b"BM",
    "tiff": b"II*\0",
    "tiff, big-endian": b"MM\0*",
    "webp": b"RIFF",
    "npy": b"\x93NUMPY",
}

REFUSED = {("varying alpha", ".png", True), ("F", ".tiff", False), ("int64", ".npy", False)}
"""Name and suffix of the drawn files that are not read, and whether as masks or as images; all others are."""

# Height and width that no file of ours can fill. The first is allowed by its pixels; the last is one row in BMP, where
# it is -1, and may be that few in JPEG.
HUGE = ((8_000, 11_000), (60_000, 60_000), (65_535, 65_535), (2**31 - 1, 2**31 - 1), (2**32 - 1, 1))


def drawn_seeds(rng: Rng) -> list[Seed]:
    """Draw images and masks in every format and mode that is read here, and a few that are not."""
    noise = rng.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    colour, grey = Image.fromarray(noise), Image.fromarray(noise[:, :, 0])
    classes = np.zeros((HEIGHT, WIDTH), np.uint8)
    classes[4:12, 5:20] = 1
    classes[14:20, 10:30] = 2
    palette = Image.frombytes("P", (WIDTH, HEIGHT), classes.tobytes())
    palette.putpalette([0, 0, 0, 200, 30, 30, 30, 200, 30])
    deep = Image.fromarray(noise[:, :, 0].astype(np.uint16) * 257)
    exif = Image.Exif()
    exif[0x0112] = 6
    wanted: list[tuple[str, Image.Image, str, dict[str, Any]]] = [
        ("RGB", colour, "png", {}),
        ("L", grey, "png", {}),
        ("mask", Image.fromarray(classes * 127), "png", {}),
        ("RGBA", colour.convert("RGBA"), "png", {}),
        ("varying alpha", Image.fromarray(np.dstack([noise, noise[:, :, :1]])), "png", {}),
        ("LA", grey.convert("LA"), "png", {}),
        ("P", palette, "png", {}),
        ("P with transparency", palette, "png", {"transparency": b"\x00\x80\xff"}),
        ("1", grey.convert("1"), "png", {}),
        ("I;16", deep, "png", {}),
        ("turned", colour, "png", {"exif": exif}),
        ("RGB", colour, "jpg", {"quality": 90}),
        ("L", grey, "jpg", {}),
        ("progressive", colour, "jpg", {"progressive": True}),
        ("CMYK", colour.convert("CMYK"), "jpg", {}),
        ("turned", colour, "jpg", {"exif": exif}),
        ("RGB", colour, "bmp", {}),
        ("P", palette, "bmp", {}),
        ("1", grey.convert("1"), "bmp", {}),
        ("RGB", colour, "tiff", {}),
        ("P, LZW", palette, "tiff", {"compression": "tiff_lzw"}),
        ("I;16", deep, "tiff", {}),
        ("I;16, deflated", deep, "tiff", {"compression": "tiff_adobe_deflate"}),
        ("CMYK", colour.convert("CMYK"), "tiff", {}),
        ("F", grey.convert("F"), "tiff", {}),
        ("1, fax", grey.convert("1"), "tiff", {"compression": "group4"}),
        ("turned", colour, "tiff", {"tiffinfo": {0x0112: 6}}),
        ("JPEG in TIFF", colour, "tiff", {"compression": "jpeg"}),
        ("lossy", colour, "webp", {}),
        ("lossless", colour, "webp", {"lossless": True}),
        ("RGBA, turned", colour.convert("RGBA"), "webp", {"exif": exif}),
    ]
    seeds = [Seed(name, f".{suffix}", _coded(image, suffix, options)) for name, image, suffix, options in wanted]
    arrays: dict[str, NDArray[Any]] = {"RGB": noise, "L": noise[:, :, 0], "mask": classes}
    arrays["int64"] = classes.astype(np.int64)
    return seeds + [Seed(name, ".npy", _npy(array)) for name, array in arrays.items()]


def real_seeds(folder: Path, rng: Rng) -> list[Seed]:
    """Take some small image files from a folder and its subfolders."""
    found = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and p.stat().st_size <= MAX_REAL_BYTES)
    chosen = rng.permutation(len(found))[:MAX_REAL_FILES]
    taken = [Seed(found[i].name, found[i].suffix.lower(), found[i].read_bytes(), drawn=False) for i in chosen]
    return [seed for seed in taken if seed.data.startswith(tuple(SIGNATURES.values()))]


def spoil(rng: Rng, seeds: list[Seed], folder: Path, name: str, kind: str | None = None) -> Spoiled:
    """Write a spoiled copy of one of `seeds` into `folder`; by default in a way chosen by chance."""
    kind = kind or str(rng.choice(list(KINDS)))
    seed = seeds[int(rng.integers(len(seeds)))]
    path = os.path.join(folder, f"{name}{seed.suffix}")
    made = KINDS[kind](rng, seed, path, seeds)
    return Spoiled(made[0], kind, seed, made[1])


def _coded(image: Image.Image, suffix: str, options: dict[str, Any]) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "jpeg" if suffix == "jpg" else suffix, **options)
    return stream.getvalue()


def _npy(array: NDArray[Any]) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array, allow_pickle=False)
    return stream.getvalue()


def _write(path: str, data: bytes) -> None:
    with open(path, "wb") as stream:
        stream.write(data)


Made: TypeAlias = tuple[str, Verdict]
Spoil: TypeAlias = Callable[[Rng, Seed, str, list[Seed]], Made]


def _of_bytes(change: Callable[[Rng, Seed, list[Seed]], tuple[bytes, Verdict]]) -> Spoil:
    """Make a way to spoil of one that changes the bytes."""

    def made(rng: Rng, seed: Seed, path: str, seeds: list[Seed]) -> Made:
        data, verdict = change(rng, seed, seeds)
        _write(path, data)
        return path, verdict

    return made


def _untouched(rng: Rng, seed: Seed, path: str, seeds: list[Seed]) -> Made:
    _write(path, seed.data)
    return path, "same"


def _wrong_suffix(rng: Rng, seed: Seed, path: str, seeds: list[Seed]) -> Made:
    suffix = str(rng.choice([".jpg", ".PNG", ".npy", ".webp", ".tif", ".txt", ".csv", ""]))
    target = f"{os.path.splitext(path)[0]}-{suffix}"
    _write(target, seed.data)
    return target, "same"


def _odd_name(rng: Rng, seed: Seed, path: str, seeds: list[Seed]) -> Made:
    folder, own = os.path.split(path)
    odd = ["\n", " ", "'\"", "<script>alert(1)</script>".replace("/", "&#47;"), os.fsdecode(b"\xff\xfe"), "🙂", "%s{0}",
           "\x1b[31m", "\u202e", "x" * 200]  # fmt: skip
    target = os.path.join(folder, f"{rng.choice(odd)}{own}")
    _write(target, seed.data)
    return target, "same"


def _impossible_name(rng: Rng, seed: Seed, path: str, seeds: list[Seed]) -> Made:
    paths = [f"{path[:-4]}\0.png", f"{path}{'x' * 300}", f"{path}/below.png", "\udcff/gone.png"]
    return str(rng.choice(paths)), "refused"


def _truncated(rng: Rng, seed: Seed, seeds: list[Seed]) -> tuple[bytes, Verdict]:
    data = seed.data[: int(rng.integers(1, len(seed.data)))]
    return data, "refused" if seed.format in ("png", "npy") else "same or refused"


def _flipped(rng: Rng, seed: Seed, seeds: list[Seed]) -> tuple[bytes, Verdict]:
    data = bytearray(seed.data)
    for place in rng.integers(0, len(data), int(rng.integers(1, 9))):
        data[place] ^= 1 << int(rng.integers(8))
    return bytes(data), "same or refused" if seed.format == "png" else "any"


def _noisy_header(rng: Rng, seed: Seed, seeds: list[Seed]) -> tuple[bytes, Verdict]:
    """Overwrite some of the bytes behind the signature, where the sizes and types are."""
    data = bytearray(seed.data)
    start = len(SIGNATURES[seed.format])
    for place in rng.integers(start, min(len(data), start + 96), int(rng.integers(1, 6))):
        data[place] = int(rng.choice([0, 1, 2, 127, 128, 255, int(rng.integers(256))]))
    return bytes(data), "same or refused" if seed.format == "png" else "any"


def _wrong_header(rng: Rng, seed: Seed, seeds: list[Seed]) -> tuple[bytes, Verdict]:
    others = [start for format, start in SIGNATURES.items() if format[:4] != seed.format[:4]]
    start = others[int(rng.integers(len(others)))]
    if start == b"RIFF":
        start = b"RIFF\x10\0\0\0WEBP"
    return start + seed.data[len(start) :], "refused"


def _huge(rng: Rng, seed: Seed, seeds: list[Seed]) -> tuple[bytes, Verdict]:
    height, width = HUGE[int(rng.integers(len(HUGE)))]
    data = bytearray(seed.data)
    if seed.format == "png":
        data[16:24] = struct.pack(">II", width, height)
        data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    elif seed.format == "bmp":
        data[18:26] = struct.pack("<II", width, height)
    elif seed.format == "jpeg":
        place = _frame_of_jpeg(seed.data)
        data[place + 5 : place + 9] = struct.pack(">HH", min(height, 65_535), min(width, 65_535))
    elif seed.format.startswith("tiff"):
        _set_tiff_size(data, height, width)
    elif seed.format == "webp":
        _set_webp_size(data, height, width)
    else:
        head, body = seed.data[:10], seed.data[128:]
        shape = f"({height}, {width}, 3)"
        text = f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
        return head + text.encode("ascii") + body, "refused"
    return bytes(data), "any" if width == 1 else "refused"


def _frame_of_jpeg(data: bytes) -> int:
    """Return where the marker of the frame (SOF0 or SOF2) is."""
    position = 2
    while data[position + 1] not in (0xC0, 0xC1, 0xC2):
        position += 2 + int.from_bytes(data[position + 2 : position + 4], "big")
    return position


def _set_tiff_size(data: bytearray, height: int, width: int) -> None:
    order = "<" if data[:2] == b"II" else ">"
    (start,) = struct.unpack_from(f"{order}I", data, 4)
    (entries,) = struct.unpack_from(f"{order}H", data, start)
    for place in range(start + 2, start + 2 + 12 * entries, 12):
        (tag,) = struct.unpack_from(f"{order}H", data, place)
        if tag in (256, 257):
            struct.pack_into(f"{order}HII", data, place + 2, 4, 1, width if tag == 256 else height)


def _set_webp_size(data: bytearray, height: int, width: int) -> None:
    lossy, lossless = data.find(b"\x9d\x01\x2a"), data.find(b"VP8L")
    if data[12:16] == b"VP8X":
        data[24:30] = min(width, 2**24).to_bytes(4, "little")[:3] + min(height, 2**24).to_bytes(4, "little")[:3]
    width, height = min(width, 16_383), min(height, 16_383)
    if lossy > 0:
        struct.pack_into("<HH", data, lossy + 3, width, height)
    elif lossless > 0:
        (bits,) = struct.unpack_from("<I", data, lossless + 9)
        struct.pack_into("<I", data, lossless + 9, bits & ~0xFFFFFFF | width - 1 | height - 1 << 14)


def _taller(rng: Rng, seed: Seed, seeds: list[Seed]) -> tuple[bytes, Verdict]:
    """Say in the header that there are a few rows more than there are."""
    data = bytearray(seed.data)
    if seed.format == "png":
        data[20:24] = (int.from_bytes(data[20:24], "big") + int(rng.integers(1, 40))).to_bytes(4, "big")
        data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
        return bytes(data), "refused"
    if seed.format == "bmp":
        struct.pack_into("<i", data, 22, struct.unpack_from("<i", data, 22)[0] + int(rng.integers(1, 40)))
        return bytes(data), "refused"
    if seed.format == "jpeg":  # nobody can tell without decoding the Huffman codes
        place = _frame_of_jpeg(seed.data) + 5
        height = int.from_bytes(data[place : place + 2], "big") + int(rng.integers(1, 40))
        data[place : place + 2] = height.to_bytes(2, "big")
        return bytes(data), "any"
    if seed.format == "npy":
        return seed.data.replace(b"(24,", b"(25,", 1), "refused"
    if seed.format.startswith("tiff"):
        _set_tiff_size(data, (WIDTH if seed.name == "turned" else HEIGHT) + int(rng.integers(1, 40)), WIDTH)
        return bytes(data), "refused"
    return seed.data[:-1], "same or refused"


def _channels(rng: Rng, seed: Seed, seeds: list[Seed]) -> tuple[bytes, Verdict]:
    """Give an array a number of channels that no image has, or a PNG another colour type and depth."""
    if seed.format == "png":
        data = bytearray(seed.data)
        data[24], data[25] = int(rng.choice([1, 2, 3, 4, 8, 16, 255])), int(rng.choice([0, 1, 2, 3, 4, 5, 6, 255]))
        data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
        return bytes(data), "any"
    shapes = [(HEIGHT, WIDTH, 5), (HEIGHT, WIDTH, 0), (3, HEIGHT, WIDTH), (1, HEIGHT, WIDTH, 3), (HEIGHT,), ()]
    return _npy(rng.integers(0, 256, shapes[int(rng.integers(len(shapes)))], dtype=np.uint8)), "refused"


def _npy_header(rng: Rng, seed: Seed, seeds: list[Seed]) -> tuple[bytes, Verdict]:
    heads = [
        "{'descr': '|O', 'fortran_order': False, 'shape': (2, 2), }",
        "{'descr': '|u1', 'fortran_order': False, 'shape': (-2, 2), }",
        "{'descr': '|u1', 'fortran_order': False, 'shape': (999999999999, 999999999999, 3), }",
        "{'descr': '|u1', 'fortran_order': False, 'shape': (__import__('os').getpid(), 2), }",
        "{'descr': [('a', '<u1')], 'fortran_order': False, 'shape': (2, 2), }",
        "{" * 2000,
        "",
    ]
    text = heads[int(rng.integers(len(heads)))].encode("ascii") + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + bytes(4), "refused"


def _png_chunks(rng: Rng, seed: Seed, seeds: list[Seed]) -> tuple[bytes, Verdict]:
    """Change, drop, double or add a chunk of a PNG, with right checksums."""
    pngs = [each for each in seeds if each.format == "png"]
    data = (seed if seed.format == "png" else pngs[int(rng.integers(len(pngs)))]).data
    chunks: list[tuple[bytes, bytes]] = []
    position = 8
    while position < len(data):
        length = int.from_bytes(data[position : position + 4], "big")
        chunks.append((data[position + 4 : position + 8], data[position + 8 : position + 8 + length]))
        position += 12 + length
    which = int(rng.integers(len(chunks)))
    kind, body = chunks[which]
    way = int(rng.integers(5))
    if way == 0:
        del chunks[which]
    elif way == 1:
        chunks.insert(which, (kind, body))
    elif way == 2:
        names = (b"tRNS", b"PLTE", b"gAMA", b"iCCP", b"eXIf", b"acTL", b"fcTL", b"zTXt", b"iTXt", b"sBIT", b"ABCD")
        chunks.insert(which, (names[int(rng.integers(len(names)))], rng.bytes(int(rng.integers(0, 40)))))
    else:
        changed = bytearray(body or b"\0")
        changed[int(rng.integers(len(changed)))] = int(rng.integers(256))
        chunks[which] = (kind, bytes(changed[: int(rng.integers(len(changed) + 1))] if way == 3 else changed))
    joined = [struct.pack(">I", len(b)) + k + b + struct.pack(">I", zlib.crc32(k + b)) for k, b in chunks]
    return SIGNATURES["png"] + b"".join(joined), "any"


def _spliced(rng: Rng, seed: Seed, seeds: list[Seed]) -> tuple[bytes, Verdict]:
    alike = [each for each in seeds if each.format == seed.format]
    other = alike[int(rng.integers(len(alike)))]
    return seed.data[: int(rng.integers(len(seed.data)))] + other.data[int(rng.integers(len(other.data))) :], "any"


def _signed_noise(rng: Rng, seed: Seed, seeds: list[Seed]) -> tuple[bytes, Verdict]:
    return SIGNATURES[seed.format] + rng.bytes(int(rng.integers(0, 2000))), "any"


def _link(rng: Rng, seed: Seed, path: str, seeds: list[Seed]) -> Made:
    _write(f"{path}.target", seed.data)
    os.symlink(f"{path}.target", path)
    return path, "same"


def _link_to(target: str | None) -> Spoil:
    def made(rng: Rng, seed: Seed, path: str, seeds: list[Seed]) -> Made:
        os.symlink(path if target is None else target, path)
        return path, "refused"

    return made


def _folder(rng: Rng, seed: Seed, path: str, seeds: list[Seed]) -> Made:
    os.mkdir(path)
    return path, "refused"


def _pipe(rng: Rng, seed: Seed, path: str, seeds: list[Seed]) -> Made:
    os.mkfifo(path)
    return path, "refused"


def _missing(rng: Rng, seed: Seed, path: str, seeds: list[Seed]) -> Made:
    return path, "refused"


def _forbidden(rng: Rng, seed: Seed, path: str, seeds: list[Seed]) -> Made:
    """Take the right to read away; the superuser reads on."""
    _write(path, seed.data)
    os.chmod(path, 0)
    return path, "same" if os.geteuid() == 0 else "refused"


KINDS: dict[str, Spoil] = {
    "untouched": _untouched,
    "wrong suffix": _wrong_suffix,
    "odd name": _odd_name,
    "impossible name": _impossible_name,
    "truncated": _of_bytes(_truncated),
    "bits flipped": _of_bytes(_flipped),
    "header overwritten": _of_bytes(_noisy_header),
    "wrong header": _of_bytes(_wrong_header),
    "huge size in header": _of_bytes(_huge),
    "too tall in header": _of_bytes(_taller),
    "wrong channels": _of_bytes(_channels),
    "npy header": _of_bytes(_npy_header),
    "PNG chunks": _of_bytes(_png_chunks),
    "two files spliced": _of_bytes(_spliced),
    "bytes behind the end": _of_bytes(lambda rng, seed, seeds: (seed.data + rng.bytes(50), "same or refused")),
    "no bytes": _of_bytes(lambda rng, seed, seeds: (b"", "refused")),
    "zeros": _of_bytes(lambda rng, seed, seeds: (bytes(int(rng.integers(1, 3000))), "refused")),
    "noise": _of_bytes(lambda rng, seed, seeds: (rng.bytes(int(rng.integers(1, 3000))), "refused")),
    "signature and noise": _of_bytes(_signed_noise),
    "link": _link,
    "link to nowhere": _link_to("nowhere"),
    "link to itself": _link_to(None),
    "link to a device": _link_to(os.devnull),
    "folder": _folder,
    "named pipe": _pipe,
    "missing": _missing,
    "no permission": _forbidden,
}
"""Ways to spoil a file, by name."""
