"""What the bytes of a JPEG or PNG file say about how decoders will read it.

Decoders differ over files that bend the rules: one shows a frame of an animation and another its default image, one follows an
orientation in XMP, one stops at a byte between two markers. So a file is *plain* only if everything in it is known to be read
alike by all of them; the rest is left to PIL.
"""

from __future__ import annotations

import re
import struct
import zlib
from typing import NamedTuple

_ORIENTATION = 0x0112
_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7]")
"""What ends a scan; a zero and the restart markers belong to it."""
_SOF, _DHT, _EOI, _SOS, _DQT, _DRI, _APP1, _APP14, _COM = 0xC0, 0xC4, 0xD9, 0xDA, 0xDB, 0xDD, 0xE1, 0xEE, 0xFE
_MOST_PARTS = 1 << 16
"""Segments or chunks; a file with more is left to whoever watches the time."""
_HARMLESS_CHUNKS = {
    b"IHDR", b"IDAT", b"IEND", b"bKGD", b"cHRM", b"eXIf", b"gAMA", b"hIST", b"iCCP", b"iTXt", b"pHYs", b"sBIT", b"sRGB", b"tEXt",
    b"tIME", b"zTXt",
}  # fmt: skip
"""Not among them: palettes, color keys (tRNS), animation (acTL, fcTL, fdAT), and whatever may come to be invented."""


class Marks(NamedTuple):
    """What the bytes of one file say."""

    turn: int | None
    """EXIF orientation, 1 to 8, of a file whose structure every decoder reads alike; None for any other file."""
    scans: int = 1
    """Passes over the picture that a decoder makes, as far as they could be counted."""
    pixels: int = 0
    """Width times height, 0 where they were not found."""


class _Odd(Exception):
    """Something that decoders may take differently."""


def examine(data: bytes, kind: str) -> Marks:
    """The marks of a file of the format ``kind``; nothing is decoded. Formats other than JPEG and PNG are never plain."""
    try:
        if kind == "JPEG":
            return _jpeg(data)
        if kind == "PNG":
            return _png(data)
    except (_Odd, IndexError, struct.error):
        pass
    return Marks(None)


def _jpeg(data: bytes) -> Marks:
    """8-bit Huffman-coded gray or YCbCr, baseline or progressive, complete, with nothing between its segments."""
    place, scans, turn, plain = 2, 0, None, True
    frame = adobe = None
    for _ in range(_MOST_PARTS):
        if data[place] != 0xFF:
            raise _Odd
        marker = data[place + 1]
        if marker == _EOI:
            break
        length = int.from_bytes(data[place + 2 : place + 4], "big")
        body = data[place + 4 : place + 2 + length]
        if length < 2 or len(body) != length - 2:
            raise _Odd
        place += 2 + length
        if _SOF <= marker <= 0xCF and marker not in (_DHT, 0xC8, 0xCC):
            plain &= frame is None and marker in (_SOF, _SOF + 2) and body[0] == 8
            frame = body
        elif marker == _APP1 and body.startswith(b"Exif\0\0"):
            plain &= turn is None
            turn = _exif_turn(body[6:])
        elif marker == _APP14 and body.startswith(b"Adobe"):
            plain &= adobe is None
            adobe = body[11]
        elif marker == _DQT:
            plain &= not any(body[i] >> 4 for i in range(0, len(body), 65))
        elif marker == _SOS:
            scans += 1
            found = _MARKER.search(data, place)
            if found is None:
                raise _Odd
            place = found.start()
        elif not (0xE0 <= marker <= 0xEF or marker in (_DHT, _DRI, _COM)):
            plain = False
    if marker != _EOI or frame is None or not scans:
        raise _Odd
    height, width, count = struct.unpack_from(">HHB", frame, 1)
    ids, sampling = frame[6::3], frame[7::3]
    if count == 3:
        plain &= tuple(ids) == (1, 2, 3) and adobe in (None, 1)  # YCbCr: other names or another transform may mean RGB
    plain &= count in (1, 3) and len(frame) == 6 + 3 * count and height > 0 and width > 0
    plain &= all(s >> 4 in (1, 2, 4) and s & 15 in (1, 2, 4) for s in sampling)
    turn = 1 if turn is None else turn
    return Marks(turn if plain and turn else None, scans, width * height)


def _png(data: bytes) -> Marks:
    """8 bits a channel without a palette, every checksum right, image data in one run, no chunk of unknown meaning."""
    place, turn, last, seen = 8, 1, b"", set()
    width, height, depth, color, compression, filtering, interlace = struct.unpack_from(">IIBBBBB", data, 16)
    plain = depth == 8 and color in (0, 2, 4, 6) and not compression and not filtering and interlace < 2
    for _ in range(_MOST_PARTS):
        length, name = struct.unpack_from(">I4s", data, place)
        end = place + 12 + length
        crc = zlib.crc32(memoryview(data)[place + 4 : end - 4])
        if end > len(data) or crc != int.from_bytes(data[end - 4 : end], "big"):
            raise _Odd
        plain &= name in _HARMLESS_CHUNKS and not (name in seen and name in (b"IHDR", b"eXIf"))
        plain &= not (name == b"IDAT" and name in seen and last != name) and (place > 8 or (name == b"IHDR" and length == 13))
        if name == b"eXIf":
            turn = _exif_turn(data[place + 8 : end - 4])
        seen.add(name)
        place, last = end, name
        if name == b"IEND":
            break
    plain &= last == b"IEND" and b"IDAT" in seen and turn == 1  # an orientation in a PNG is followed by some
    return Marks(1 if plain else None, 1, width * height)


def _exif_turn(block: bytes) -> int:
    """The orientation in the first directory of an EXIF block, 1 where there is none, 0 for a block that is not as it should be."""
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(block[:4])
    if order is None:
        return 0
    try:
        (start,) = struct.unpack_from(f"{order}I", block, 4)
        (count,) = struct.unpack_from(f"{order}H", block, start)
        entries = [struct.unpack_from(f"{order}HHIH", block, start + 2 + 12 * i) for i in range(count)]
    except struct.error:
        return 0
    found = [entry for entry in entries if entry[0] == _ORIENTATION]
    if not found:
        return 1
    sound = len(found) == 1 and found[0][1:3] == (3, 1) and 1 <= found[0][3] <= 8
    return found[0][3] if sound else 0
