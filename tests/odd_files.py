"""Image files of every kind, sound and odd, as bytes: 32 x 32 pixels when upright."""

from __future__ import annotations

import io
import struct
import zlib
from itertools import product

import numpy as np
from PIL import Image

SIDE = 32


def picture(mode: str = "RGB") -> Image.Image:
    """Smooth color that differs in every corner."""
    y, x = np.mgrid[:SIDE, :SIDE]
    rgb = np.stack((8 * x, 8 * y, 4 * (x + SIDE - y)), -1).clip(0, 255).astype(np.uint8)
    image = Image.fromarray(rgb)
    if mode == "I;16":
        return Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
    if mode == "F":
        return Image.fromarray(np.asarray(image.convert("L")).astype(np.float32) / 255)
    if mode in ("RGBA", "LA"):
        image.putalpha(Image.fromarray((255 - 8 * x).astype(np.uint8)))
    return image if image.mode == mode else image.convert(mode)


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def segment(marker: int, body: bytes) -> bytes:
    """Of a JPEG."""
    return struct.pack(">BBH", 0xFF, marker, len(body) + 2) + body


def chunk(name: bytes, body: bytes) -> bytes:
    """Of a PNG."""
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def png(levels: np.ndarray, color: int, depth: int, *chunks: bytes, interlace: int = 0) -> bytes:
    """A PNG of rows of bytes; ``chunks`` stand before its pixels."""
    rows = b"".join(b"\0" + row.tobytes() for row in levels)
    header = struct.pack(">IIBBBBB", SIDE, SIDE, depth, color, 0, 0, interlace)
    body = chunk(b"IHDR", header) + b"".join(chunks) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def tiff(levels: np.ndarray, photometric: int, *, more: dict[int, list[int]] | None = None, deflate: bool = False) -> bytes:
    """A TIFF of [height, width, channels] of any number type; ``more``: short tags, which win over the usual ones."""
    height, width, channels = levels.shape
    kind = {"u": 1, "i": 2, "f": 3}[levels.dtype.kind]
    order = ">" if levels.dtype.byteorder == ">" else "<"
    data = zlib.compress(levels.tobytes()) if deflate else levels.tobytes()
    tags = {256: [width], 257: [height], 258: [8 * levels.itemsize] * channels, 259: [8 if deflate else 1], 262: [photometric]}
    tags |= {273: [0], 277: [channels], 278: [height], 279: [0], 339: [kind] * channels} | (more or {})
    start = 8 + 2 + 12 * len(tags) + 4
    entries, beyond = b"", b""
    for tag in sorted(tags):
        values = struct.pack(f"{order}{len(tags[tag])}H", *tags[tag])
        if tag in (273, 279):  # where the pixels lie: known when all else is
            entries += struct.pack(f"{order}HHI", tag, 4, 1) + b"%04d" % tag
        elif len(values) > 4:
            entries += struct.pack(f"{order}HHII", tag, 3, len(tags[tag]), start + len(beyond))
            beyond += values
        else:
            entries += struct.pack(f"{order}HHI", tag, 3, len(tags[tag])) + values.ljust(4, b"\0")
    for tag, value in ((b"0273", start + len(beyond)), (b"0279", len(data))):
        entries = entries.replace(tag, struct.pack(f"{order}I", value))
    lead = b"II*\0" if order == "<" else b"MM\0*"
    return lead + struct.pack(f"{order}IH", 8, len(tags)) + entries + bytes(4) + beyond + data


def exif(turn: int, kind: int = 3, order: str = "<", times: int = 1) -> bytes:
    """A block with an orientation, or several, held as a short (``kind`` 3) or a long number (4)."""
    value = struct.pack(f"{order}HH", turn, 0) if kind == 3 else struct.pack(f"{order}I", turn)
    entry = struct.pack(f"{order}HHI", 0x112, kind, 1) + value
    lead = b"II*\0" if order == "<" else b"MM\0*"
    return lead + struct.pack(f"{order}IH", 8, times) + entry * times + bytes(4)


def xmp(turn: int, style: str = '="{}"') -> bytes:
    tag = f"tiff:Orientation{style.format(turn)}"
    inside = f" {tag}/>" if "=" in style else f"><{tag}</tiff:Orientation></rdf:Description>"
    return f'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description{inside}</x:xmpmeta>'.encode()


def every() -> dict[str, bytes]:
    """Name -> content of more than 300 files."""
    return _jpegs() | _pngs() | _turned() | _damaged() | _others()


def _jpegs() -> dict[str, bytes]:
    files = {}
    for mode, sampling, progressive, quality in product(("RGB", "CMYK"), ("4:4:4", "4:2:2", "4:2:0", "4:1:1"), (0, 1), (30, 95)):
        name = f"{mode} {sampling.replace(':', '')} {'progressive' if progressive else 'baseline'} {quality}.jpg"
        files[name] = encoded(picture(mode), "JPEG", subsampling=sampling, progressive=bool(progressive), quality=quality)
    for progressive, restart in product((0, 1), (0, 1, 3)):
        options = {"progressive": bool(progressive), "restart_marker_blocks": restart}
        files[f"gray {progressive} {restart}.jpg"] = encoded(picture("L"), "JPEG", **options)
        files[f"color {progressive} {restart}.jpg"] = encoded(picture(), "JPEG", **options)
    files["rgb kept.jpg"] = encoded(picture(), "JPEG", keep_rgb=True)
    base = encoded(picture(), "JPEG", quality=90)
    frame, scan = base.find(b"\xff\xc0"), base.find(b"\xff\xda")
    for transform in range(4):
        adobe = segment(0xEE, b"Adobe\0\x64\0\0\0\0" + bytes([transform]))
        files[f"adobe {transform}.jpg"] = base[:20] + adobe + base[20:]
        files[f"adobe alone {transform}.jpg"] = base[:2] + adobe + base[20:]
    for ids in (b"RGB", bytes((0, 1, 2)), bytes((1, 34, 35))):
        named = bytearray(base)
        for i, byte in enumerate(ids):
            named[frame + 10 + 3 * i] = named[scan + 5 + 2 * i] = byte
        files[f"ids {ids.hex()}.jpg"] = bytes(named)
        files[f"ids {ids.hex()} alone.jpg"] = bytes(named[:2] + named[20:])
    marked = {"extended": 0xC1, "progressive in name": 0xC2, "lossless": 0xC3, "arithmetic": 0xC9}
    for name, marker in marked.items():
        files[f"frame {name}.jpg"] = base[: frame + 1] + bytes([marker]) + base[frame + 2 :]
    inserted = {
        "icc": segment(0xE2, b"ICC_PROFILE\0\1\1" + bytes(200)), "comment": segment(0xFE, b"hello"), "junk": b"junk",
        "fill": b"\xff", "ff00": b"\xff\0", "zeros": bytes(3), "photoshop": segment(0xED, b"Photoshop 3.0\0" + bytes(20)),
        "unknown": segment(0xF0, b"what"), "restart": b"\xff\xd0", "start": b"\xff\xd8", "short": b"\xff\xe5\0\1",
        "mpf": segment(0xE2, b"MPF\0" + bytes(30)), "truncated adobe": segment(0xEE, b"Adobe"), "dnl": segment(0xDC, b"\0\x20"),
        "frame twice": base[frame : base.find(b"\xff\xc4")], "number of lines": segment(0xDC, b"\0\x10"),
    }  # fmt: skip
    for name, data in inserted.items():
        files[f"{name} inside.jpg"] = base[:20] + data + base[20:]
        files[f"{name} before scan.jpg"] = base[:scan] + data + base[scan:]
        files[f"{name} after.jpg"] = base + data
    files["two.jpg"] = base + encoded(Image.new("RGB", (SIDE, SIDE), "red"), "JPEG")
    files["12 bits.jpg"] = base[: frame + 4] + b"\x0c" + base[frame + 5 :]
    files["no lines.jpg"] = base[: frame + 5] + b"\0\0" + base[frame + 7 :]
    files["many scans.jpg"] = base[:-2] + base[scan:-2] * 120 + base[-2:]
    return files


def _pngs() -> dict[str, bytes]:
    files = {}
    for mode in ("1", "L", "P", "RGB", "RGBA", "LA", "I;16"):
        files[f"{mode.replace(';', '')}.png"] = encoded(picture(mode), "PNG")
    rng = np.random.default_rng(0)
    channels = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
    for color, depths in {0: (1, 2, 4, 8, 16), 2: (8, 16), 3: (1, 2, 4, 8), 4: (8, 16), 6: (8, 16)}.items():
        for depth in depths:
            row = SIDE * channels[color] * depth // 8
            levels = rng.integers(0, 256, (SIDE, row), np.uint8)
            palette = (chunk(b"PLTE", rng.integers(0, 256, 3 << depth, np.uint8).tobytes()),) if color == 3 else ()
            files[f"color {color} depth {depth}.png"] = png(levels, color, depth, *palette)
            if color in (0, 2, 3):
                key = bytes(range(2)) if color == 3 else bytes(2 if color == 0 else 6)
                files[f"color {color} depth {depth} key.png"] = png(levels, color, depth, *palette, chunk(b"tRNS", key))
    for opaque in (0, 7, 255):
        image = picture()
        image.putalpha(opaque)
        files[f"alpha {opaque}.png"] = encoded(image, "PNG")
    base = encoded(picture(), "PNG")
    inserted = {
        "gAMA": struct.pack(">I", 220000), "sRGB": b"\0", "sBIT": b"\5\5\5", "bKGD": bytes(6), "tIME": bytes(7),
        "cHRM": struct.pack(">8I", 31270, 32900, 64000, 33000, 30000, 60000, 15000, 6000), "pHYs": struct.pack(">IIB", 1, 2, 0),
        "tRNS": struct.pack(">3H", 8, 8, 128), "tEXt": b"key\0text", "zTXt": b"key\0\0" + zlib.compress(b"text"), "abCd": b"new",
        "acTL": struct.pack(">II", 1, 0), "fcTL": bytes(26), "PLTE": bytes(6), "ABCD": b"critical", "IEND": b"", "hIST": bytes(4),
        "iCCP": b"x\0\0" + zlib.compress(bytes(128)), "IDAT": b"", "fdAT": bytes(8), "iDOT": bytes(28), "vpAg": bytes(9),
    }  # fmt: skip
    end = len(base) - 12
    for name, body in inserted.items():
        files[f"{name} before.png"] = base[:33] + chunk(name.encode(), body) + base[33:]
        files[f"{name} behind.png"] = base[:end] + chunk(name.encode(), body) + base[end:]
    files["trailing.png"] = base + b"junk"
    files["header twice.png"] = base[:33] + base[8:33] + base[33:]
    for loops, default in product((0, 2), (False, True)):
        frames = [Image.new("RGB", (SIDE, SIDE), color) for color in ("red", "lime")]
        options = {"save_all": True, "append_images": frames, "default_image": default, "loop": loops}
        files[f"animated {loops} {default}.png"] = encoded(picture(), "PNG", **options)
    return files


def _turned() -> dict[str, bytes]:
    files = {}
    jpeg, flat = encoded(picture(), "JPEG", quality=95), encoded(picture(), "PNG")
    for turn, kind, order in product(range(10), (3, 4), "<>"):
        name = f"exif {turn} {kind} {'little' if order == '<' else 'big'}"
        block = exif(turn, kind, order)
        files[f"{name}.jpg"] = jpeg[:20] + segment(0xE1, b"Exif\0\0" + block) + jpeg[20:]
        files[f"{name} alone.jpg"] = jpeg[:2] + segment(0xE1, b"Exif\0\0" + block) + jpeg[20:]
        files[f"{name}.png"] = flat[:33] + chunk(b"eXIf", block) + flat[33:]
    for turn, style in product(range(1, 9), ('="{}"', ">{}")):
        name = f"xmp {turn} {'attribute' if '=' in style else 'element'}"
        for kind, suffix in (("JPEG", "jpg"), ("WEBP", "webp"), ("TIFF", "tif")):
            options = {"tiffinfo": {700: xmp(turn, style)}} if kind == "TIFF" else {"xmp": xmp(turn, style)}
            files[f"{name}.{suffix}"] = encoded(picture(), kind, **options)
        text = b"XML:com.adobe.xmp\0\0\0\0\0" + xmp(turn, style)
        files[f"{name}.png"] = flat[:33] + chunk(b"iTXt", text) + flat[33:]
    for turn in range(1, 9):
        packet = segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0" + xmp(9 - turn))
        files[f"exif and xmp {turn}.jpg"] = jpeg[:20] + segment(0xE1, b"Exif\0\0" + exif(turn)) + packet + jpeg[20:]
        twice = segment(0xE1, b"Exif\0\0" + exif(turn)) + segment(0xE1, b"Exif\0\0" + exif(9 - turn))
        files[f"exif twice {turn}.jpg"] = jpeg[:20] + twice + jpeg[20:]
        files[f"two orientations {turn}.jpg"] = jpeg[:20] + segment(0xE1, b"Exif\0\0" + exif(turn, times=2)) + jpeg[20:]
        files[f"damaged exif {turn}.jpg"] = jpeg[:20] + segment(0xE1, b"Exif\0\0" + exif(turn)[: 8 + turn]) + jpeg[20:]
    return files


def _damaged() -> dict[str, bytes]:
    files = {}
    rng = np.random.default_rng(1)
    for suffix, whole in (("jpg", encoded(picture(), "JPEG", quality=95)), ("png", encoded(picture(), "PNG"))):
        start = whole.find(b"\xff\xda" if suffix == "jpg" else b"IDAT") + 14
        for i in range(20):
            cut = int(rng.integers(start, len(whole)))
            files[f"cut {i}.{suffix}"] = whole[:cut]
            files[f"cut and closed {i}.{suffix}"] = whole[:cut] + (b"\xff\xd9" if suffix == "jpg" else chunk(b"IEND", b""))
            flipped = bytearray(whole)
            flipped[int(rng.integers(start, len(whole) - 12))] ^= 1 << int(rng.integers(0, 8))
            files[f"flipped {i}.{suffix}"] = bytes(flipped)
    return files


def _others() -> dict[str, bytes]:
    files = {}
    for mode in ("1", "L", "RGB", "RGBA", "CMYK", "I;16", "F", "P", "LA"):
        for compression in (None, "tiff_lzw", "tiff_adobe_deflate", "jpeg"):
            if compression != "jpeg" or mode in ("L", "RGB"):
                name = f"{mode.replace(';', '')} {compression}.tif"
                files[name] = encoded(picture(mode), "TIFF", compression=compression)
    for mode in ("1", "L", "P", "RGB", "RGBA"):
        files[f"{mode}.bmp"] = encoded(picture(mode), "BMP")
    for mode in ("1", "L", "RGB", "I;16"):
        files[f"{mode.replace(';', '')}.ppm"] = encoded(picture(mode), "PPM")
    files["12 bits.pgm"] = b"P5 32 32 4095\n" + (np.asarray(picture("L")).astype(">u2") * 16).tobytes()
    files["written.ppm"] = b"P3\n32 32\n255\n" + " ".join(map(str, np.asarray(picture()).ravel())).encode()
    for mode, kind in product(("L", "RGB", "RGBA", "LA"), ("WEBP", "JPEG2000", "AVIF")):
        files[f"{mode}.{kind.lower()}"] = encoded(picture(mode), kind)
    frames = [Image.new("RGB", (SIDE, SIDE), color) for color in ("red", "lime")]
    for kind in ("GIF", "WEBP", "AVIF", "TIFF"):
        files[f"animated.{kind.lower()}"] = encoded(picture(), kind, save_all=True, append_images=frames)
    files["clear.gif"] = encoded(picture("P"), "GIF", transparency=0)
    files["postscript.jpg"] = encoded(picture(), "EPS")
    return files
