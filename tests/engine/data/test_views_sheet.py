"""The sheet of originals and views: every loader that runs here, in order, from the same values."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from engine import check
from engine.config import Config, DataConfig, command_line
from engine.data import views_sheet
from engine.data.catalog import load
from engine.data.loaders.choose import dali_problem
from engine.data.views import view_values

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for i in range(6):
        small = Image.fromarray(rng.integers(0, 256, (5, 5, 3), np.uint8))
        small.resize((60 + i, 50), Image.Resampling.BICUBIC).save(root / f"photo {i}.jpg")
    return root


def test_backends_of_a_machine_without_a_gpu(monkeypatch):
    titles = [backend.title for backend in views_sheet.backends(CPU)]
    dali = [] if dali_problem() else ["DALI", "DALI's own colour"]
    assert titles == ["torchvision", *dali, "resident, host"]
    assert views_sheet.backends(torch.device("cuda"))[-1].settings["resident"] == "device"


def test_the_sheet_shows_every_backend_and_how_far_it_is_from_torchvision(root, monkeypatch):
    drawn = {}

    def keep(tiles, *, columns, side, title):
        drawn.update(tiles=tiles, columns=columns, title=title)
        return Image.new("RGB", (1, 1))

    monkeypatch.setattr(views_sheet.contact_sheet, "draw", keep)
    images = load("folder", root, progress=False).train
    views_sheet.draw(images, Config(data=DataConfig(name="folder", image_size=32, workers=1)), CPU)
    count = len(views_sheet.backends(CPU))
    assert drawn["columns"] == 1 + 2 * count and len(drawn["tiles"]) == views_sheet.IMAGES * drawn["columns"]
    row = drawn["tiles"][: drawn["columns"]]
    assert row[0].caption.startswith("original\nphoto ")
    assert all(tile.pixels.shape == (32, 32, 3) and tile.pixels.dtype == np.uint8 for tile in row)
    by_title = {tile.caption.split(":")[0]: tile for tile in row}
    assert set(by_title) >= {"torchvision", "resident, host"}
    for tile in drawn["tiles"]:
        if tile.caption.startswith(("resident", "DALI:")):
            assert float(tile.caption.split("\n")[1].split()[0]) < 6, tile.caption


def test_values_in_words():
    values = view_values(0, 0, np.arange(40), 0, np.tile(np.array([[50, 60]], np.int32), (40, 1)), 32)
    words = [views_sheet.describe(values, b, np.array([50, 60])) for b in range(40)]
    for b, text in enumerate(words):
        assert text.endswith("no jitter") != values.jitter[b]
        assert text.startswith(f"{values.crop[b, 2:].prod() / 3000:.0%}")
        assert ("flip" in text) == values.flip[b] and ("grey" in text) == values.grey[b]
        assert ("blur" in text) == (values.blur_sigma[b] > 0)


def test_from_the_command_line(root, tmp_path, capfd):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(f"batch_size: 2\nqueue: {{size: 8}}\ndata: {{name: folder, root: {root}, image_size: 32, workers: 1}}\n")
    assert check.main(["--cfg", str(recipe), "--views", str(tmp_path / "sheet.png")]) == 0
    with Image.open(tmp_path / "sheet.png") as picture:
        assert picture.width > 500 and np.asarray(picture).std() > 10
    assert check.main(["--cfg", str(recipe), "--views", str(tmp_path / "none.png"), "data.root=/nowhere"]) == 1
    assert "/nowhere" in capfd.readouterr().err and not (tmp_path / "none.png").exists()
    assert command_line.parse(["--cfg", str(recipe)]).config.out is None
