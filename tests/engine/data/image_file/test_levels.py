"""Pictures keep their content: 16 bits, floating point, alpha."""

from __future__ import annotations

import numpy as np
import odd_files
import pytest
from miniatures import open_set, picture
from odd_files import encoded, png, tiff
from PIL import Image

from engine.data import Transform
from engine.data.catalog import load
from engine.data.image_file import read_image

SIDE = odd_files.SIDE
RAMP = np.arange(SIDE * SIDE).reshape(SIDE, SIDE, 1) / (SIDE * SIDE - 1)
COLOR = np.concatenate((RAMP, RAMP[::-1], RAMP[:, ::-1]), -1)


def levels_of(data: bytes, tmp_path) -> tuple[np.ndarray, str]:
    (tmp_path / "x").write_bytes(data)
    image, plain, note = read_image(tmp_path / "x")
    assert image.mode == "RGB" and not plain
    return np.asarray(image), note


@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
@pytest.mark.parametrize(
    "kind", ["png", "png color", "png alpha", "png gray alpha", "tif", "tif >", "tif color", "tif color >", "tif deflate"]
)
def test_16_bit_levels_are_read_by_the_bits_that_they_use(kind, bits, tmp_path):
    most = (1 << bits) - 1
    exact = np.rint((COLOR if "color" in kind or kind == "png alpha" else RAMP) * most)
    opaque = np.full((SIDE, SIDE, 1), 65535)
    if kind.startswith("png"):
        channels = np.concatenate((exact, opaque), -1) if "alpha" in kind else exact
        color = {"png": 0, "png color": 2, "png alpha": 6, "png gray alpha": 4}[kind]
        data = png(channels.astype(">u2").reshape(SIDE, -1), color, 16)
    else:
        number = exact.astype(">u2" if ">" in kind else "<u2")
        data = tiff(number, 2 if "color" in kind else 1, deflate="deflate" in kind)
    got, note = levels_of(data, tmp_path)
    np.testing.assert_array_equal(got, np.broadcast_to(exact.astype(int) >> bits - 8, got.shape))
    assert note == ("" if bits == 16 else f"{bits}-bit levels in 16 bits")
    assert got.min() == 0 and got.max() == 255


def test_a_declared_range_wins_over_the_levels_that_are_there(tmp_path):
    dark = np.rint(RAMP * 900).astype("<u2")
    for data, bits in (
        (tiff(dark, 1), 10), (tiff(dark, 1, more={281: [4095]}), 12), (tiff(dark, 1, more={281: [500]}), 10),
        (b"P5 32 32 4095\n" + dark.astype(">u2").tobytes(), 12), (b"P5 32 32 65535\n" + dark.astype(">u2").tobytes(), 10),
    ):  # fmt: skip
        got, _ = levels_of(data, tmp_path)
        assert np.abs(got[..., :1].astype(int) - (dark.astype(int) >> bits - 8)).max() <= 1


def test_white_is_zero_in_every_depth(tmp_path):
    for kind in ("u1", "<u2"):
        exact = np.rint(RAMP * np.iinfo(kind).max).astype(kind)
        got, _ = levels_of(tiff(exact, 0), tmp_path)
        assert np.abs(got - 255 * (1 - RAMP)).max() <= 1


@pytest.mark.parametrize(("most", "note"), [(1, "from 0 to 1"), (255, "8 bits"), (4095, "12 bits"), (65535, "16 bits")])
def test_floating_point_levels_in_a_range_that_means_something_are_read(most, note, tmp_path):
    got, said = levels_of(tiff((RAMP * most).astype("<f4"), 1), tmp_path)
    assert np.abs(got - 255 * RAMP).max() <= 1 and note in said


@pytest.mark.parametrize(
    ("levels", "reason"),
    [
        ((RAMP * 3.5).astype("<f4"), "from 0 to 3.5: no scale"), ((RAMP - 0.5).astype("<f4"), "from -0.5 to 0.5: no scale"),
        ((RAMP * 1e9).astype("<f4"), "no scale"), (np.full_like(RAMP, np.nan).astype("<f4"), "infinite or no number"),
        ((RAMP * 1e6).astype("<u4"), "32-bit or signed levels from 0 to 1000000"),
        ((RAMP * 900 - 450).astype("<i2"), "from -450"),
        (COLOR.astype("<f4"), "3 channels of 32 floating-point bits"),
        (np.tile(RAMP, 5).astype("<u2"), "5 channels of 16 unsigned"),
    ],
)  # fmt: skip
def test_what_no_scale_can_be_told_for_is_refused_with_its_range(levels, reason, tmp_path):
    (tmp_path / "x").write_bytes(tiff(levels, 1))
    with pytest.raises(ValueError, match=reason):
        read_image(tmp_path / "x")


def test_alpha_that_varies_is_laid_on_gray_and_other_alpha_dropped(tmp_path):
    shape = (255 * RAMP[..., 0]).astype(np.uint8)
    for color, mode in (((0, 0, 0), "RGBA"), ((255, 255, 255), "RGBA"), ((0, 0, 0), "LA")):
        image = Image.new("RGB", (SIDE, SIDE), color)
        image.putalpha(Image.fromarray(shape))
        got, note = levels_of(encoded(image.convert(mode), "PNG"), tmp_path)
        expected = color[0] * RAMP + 128 * (1 - RAMP)
        assert np.abs(got - expected).max() <= 1.5 and note == "alpha laid on gray 128"
    keyed = Image.fromarray(np.tile(np.arange(SIDE, dtype=np.uint8), (SIDE, 1)))
    got, note = levels_of(encoded(keyed, "PNG", transparency=3), tmp_path)
    assert note and got[:, 3].tolist() == [[128] * 3] * SIDE and got[:, 4].tolist() == [[4] * 3] * SIDE
    for opaque in (0, 7, 255):
        image = odd_files.picture()
        image.putalpha(opaque)
        image.save(tmp_path / "x.png")
        same, plain, note = read_image(tmp_path / "x.png")
        assert plain and not note and np.array_equal(same, odd_files.picture())


def test_a_picture_in_memory_is_converted_as_a_file_is():
    deep = Image.fromarray((RAMP[..., 0] * 4095).astype(np.uint16))
    exact = Image.fromarray(((RAMP[..., 0] * 4095).astype(np.uint16) >> 4).astype(np.uint8))
    assert Transform(SIDE)(deep).equal(Transform(SIDE)(exact))


def test_what_was_scaled_and_what_shows_nothing_is_said_and_cached(tmp_path, capfd):
    folder, cache = tmp_path / "photos", tmp_path / "cache"
    picture(folder / "good.png")
    before = open_set("folder", folder).train.fingerprint
    (folder / "deep.png").write_bytes(png((RAMP * 4095).astype(">u2").reshape(SIDE, -1), 0, 16))
    Image.new("RGB", (300, 300), (3, 2, 1)).save(folder / "night.jpg")
    Image.new("RGB", (300, 300), (90, 120, 80)).save(folder / "wall.jpg")
    spot = Image.new("RGB", (300, 300))
    spot.putpixel((200, 200), (255, 255, 255))
    spot.save(folder / "stars.png")
    capfd.readouterr()
    said, prints = [], set()
    for _ in range(2):
        prints.add(load("folder", folder, cache_dir=cache).train.fingerprint)
        said.append(capfd.readouterr().err)
    assert said[0] == said[1] and len(prints) == 1 and before not in prints
    assert "not read as they are: 1 x 12-bit levels in 16 bits; of 5 files (the first is deep.png)" in said[0]
    assert "warning: nothing to see in: 1 x nearly black, 1 x of one color; of 5 files (the first is night.jpg)" in said[0]
    open_set("folder", folder, cache_dir=cache)  # as the report does at the end of a run that has said it
    assert not capfd.readouterr().err


def test_a_tiff_of_several_pages_says_that_one_was_read(tmp_path):
    pages = [Image.new("RGB", (SIDE, SIDE), color) for color in ("red", "lime", "blue")]
    pages[0].save(tmp_path / "x.tif", save_all=True, append_images=pages[1:])
    image, _, note = read_image(tmp_path / "x.tif")
    assert note == "first of 3 pages" and image.getpixel((0, 0)) == (255, 0, 0)
