"""``python -m engine.embed``: what the file holds, what is left out, what a kill leaves, several processes, what is refused."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from made_runs import draw, reported_run
from PIL import Image

from engine.data.catalog import load
from engine.embed import main
from engine.evaluation import embed as embed_module
from engine.evaluation import embedding_file
from engine.evaluation.features import content_hash, extract
from engine.pretrained import load_run

ROOT = str(Path(__file__).parents[2])
CPU = torch.device("cpu")


@pytest.fixture
def run(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PPSSL_CACHE", str(tmp_path / "cache"))
    return reported_run(tmp_path / "run", photos, maps=False)


@pytest.fixture
def flat(tmp_path: Path) -> Path:
    """Eleven photos without labels, in nested folders, and two files that cannot be read."""
    folder = tmp_path / "flat"
    for i in range(11):
        draw(folder / ("here", "here/deeper", "there")[i % 3] / f"{i:02d}.png", i % 3, i)
    (folder / "there/cut.jpg").write_bytes(b"\xff\xd8\xff\xe0nothing")
    (folder / "here/notes.txt").write_text("no photo")
    return folder


def said(capsys: pytest.CaptureFixture[str]) -> str:
    return " ".join(capsys.readouterr().err.split())


def expected(run: Path, root: Path, split: str = "train") -> tuple[tuple[str, ...], np.ndarray]:
    """Names and features as evaluation makes them: another loader, every file checked before."""
    made = load_run(run, CPU)
    images = getattr(load("folder", root, progress=False), split)
    return images.names, extract(made.network, images, made.config, CPU).numpy()


def test_an_unlabelled_folder_with_nested_folders(run: Path, flat: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "e.npz"
    assert main([str(run), str(flat), "--out", str(out)]) == 0
    found, (names, features) = embedding_file.read(out), expected(run, flat)
    assert tuple(found.path) == names and len(names) == 11 and found.label is None and found.split is None
    assert found.feature.dtype == np.float32 and np.array_equal(found.feature, features)
    assert np.allclose(np.linalg.norm(found.feature, axis=1), 1, atol=1e-6)
    bad = (tmp_path / "e.npz.bad_files.txt").read_text().splitlines()
    assert sorted(line.split("\t")[0] for line in bad) == ["here/notes.txt", "there/cut.jpg"] and all(
        line.split("\t")[1] for line in bad
    )
    assert not (tmp_path / "e.npz.parts").exists()
    told = said(capsys)
    assert "2 files left out" in told and "e.npz.bad_files.txt" in told and "11 photos" in told and "photos/s" in told
    about = found.about
    assert about["weights_sha256"] == content_hash(load_run(run, CPU).network.state_dict())
    assert (about["arch"], about["dim"], about["image_size"], about["photos"]) == ("resnet18_w8_s16", 64, 32, 11)
    assert about["mean"] == [0.485, 0.456, 0.406] and about["std"] == [0.229, 0.224, 0.225]
    assert about["root"] == str(flat) and "engine" in about and (about["epoch"], about["step"]) == (4, 12)


def test_the_data_of_the_run_with_labels_splits_and_float16(run: Path, photos: Path, tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    out = tmp_path / "e.parquet"
    assert main([str(run), "--out", str(out), "--half", "--batch-size", "5", "--workers", "2", "--device", "cpu"]) == 0
    found = embedding_file.read(out)
    assert found.feature.dtype == np.float16 and found.split == ["train"] * 12 + ["test"] * 12
    for split, rows in (("train", slice(0, 12)), ("test", slice(12, 24))):
        names, features = expected(run, photos, split)
        assert tuple(found.path[rows]) == names and found.label[rows] == [name.split("/")[1] for name in names]
        assert np.abs(found.feature[rows] - features).max() < 1e-3
    assert found.about["batch_size"] == 5 and found.about["dtype"] == "float16"


def test_class_folders_and_a_list(run: Path, flat: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main([str(run), str(flat), "data.train=.", "--out", str(tmp_path / "a.npz")]) == 0
    assert set(embedding_file.read(tmp_path / "a.npz").label) == {"here", "there"}
    (flat / "list.csv").write_text("path,label\nthere/02.png,tit\nhere/00.png,kite\nhere/gone.png,kite\n")
    assert main([str(run), str(flat / "list.csv"), "--out", str(tmp_path / "b.npz")]) == 0
    found = embedding_file.read(tmp_path / "b.npz")
    assert found.path == ["there/02.png", "here/00.png"] and found.label == ["tit", "kite"]
    assert "here/gone.png\tcannot be read (No such file or directory)" in (tmp_path / "b.npz.bad_files.txt").read_text()
    assert "1 file left out" in said(capsys)


def test_every_photo_of_a_folder_with_splits_has_a_row(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    def names(folder: Path, *more: str) -> list[tuple[str, str, str]]:
        out = tmp_path / f"{folder.name}.npz"
        assert main([str(run), str(folder), "--out", str(out), "--force", *more]) == 0
        found = embedding_file.read(out)
        empty = [""] * len(found.path)
        return list(zip(found.path, found.label or empty, found.split or empty, strict=True))

    bare = tmp_path / "bare"
    for i, name in enumerate(("train/a.png", "test/b.png", "val/c.png", "more/d.png", "e.png", "test_masks/m.png")):
        draw(bare / name, 0, i)
    (bare / "more/again").symlink_to(bare / "train")
    assert names(bare) == [
        ("train/a.png", "", "train"), ("test/b.png", "", "test"), ("val/c.png", "", "val"), ("e.png", "", "other"),
        ("more/d.png", "", "other"),
    ]  # fmt: skip
    told = said(capsys)
    assert "(1 of train, 1 of test, 1 of val, 2 of other)" in told and "masks or annotations by the name: test_masks/" in told
    assert "cannot be the test split" not in told
    assert [name for name, _, _ in names(bare, "data.train=train")] == ["train/a.png"]  # a setting says which

    sorted_out = tmp_path / "sorted"
    for i, name in enumerate(("train/kite/a.png", "train/loose.png", "test/kite/b.png", "val/kite/c.png", "val/new/d.png")):
        draw(sorted_out / name, 0, i)
    assert names(sorted_out) == [
        ("train/kite/a.png", "kite", "train"), ("train/loose.png", "", "train"), ("test/kite/b.png", "kite", "test"),
        ("val/kite/c.png", "kite", "val"), ("val/new/d.png", "", "val"),
    ]  # fmt: skip
    assert not (tmp_path / "sorted.npz.bad_files.txt").exists()


def test_a_full_disk_is_said_and_what_is_finished_is_kept(
    run: Path, flat: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    line = [str(run), str(flat), "--out", str(tmp_path / "e.csv")]
    with monkeypatch.context() as patch:
        patch.setattr(embedding_file, "write", full)
        assert main(line) == 1
    told = said(capsys)
    assert "e.csv cannot be written (No space left on device); finished parts are kept in" in told and "same command again" in told
    assert main(line) == 0 and "12 of 12 photos are in" in said(capsys)
    (tmp_path / "plain").write_text("")
    assert main([str(run), str(flat), "--out", str(tmp_path / "plain/e.csv")]) == 1
    told = said(capsys)
    assert "plain/e.csv cannot be written (Not a directory); make room" in told


def test_an_output_that_exists_is_refused(run: Path, flat: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "e.npz"
    line = [str(run), str(flat), "--out", str(out)]
    out.write_text("mine")
    assert main(line) == 1 and out.read_text() == "mine"
    told = said(capsys)
    assert "exists" in told and "--force" in told and "another name" in told
    assert main([*line, "--force"]) == 0 and len(embedding_file.read(out).path) == 11


KILLED = """
import os, sys
from engine.evaluation import embed
from engine.pretrained import weights_file
embed.PHOTOS, save, written = 4, weights_file.save_weights, []
def once_more(*arguments):
    save(*arguments)
    written.append(1)
    if len(written) == 2:
        os.kill(os.getpid(), 9)
weights_file.save_weights = once_more
from engine.embed import main
sys.exit(main(sys.argv[1:]))
"""


def test_killed_in_the_middle_the_same_command_goes_on(
    run: Path, flat: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    line = [str(run), str(flat), "--out", str(tmp_path / "e.npz"), "--batch-size", "2"]
    environment = os.environ | {"PYTHONPATH": ROOT, "OMP_NUM_THREADS": "1"}
    ended = subprocess.run([sys.executable, "-c", KILLED, *line], env=environment, cwd=tmp_path, capture_output=True, timeout=120)
    assert ended.returncode == -signal.SIGKILL, ended.stderr.decode()
    parts = tmp_path / "e.npz.parts"
    kept = sorted(parts.glob("part_*.safetensors"))
    assert len(kept) == 2 and not (tmp_path / "e.npz").exists()

    for more, word in (
        (["data.image_size=48"], "the options"),
        (["amp=bf16"] if embed_module.precision.cpu_has_bf16() else [], ""),
    ):
        if more:
            assert main([*line, *more]) == 1
            told = said(capsys)
            assert word in told and "another embedding" in told and "--force" in told
    draw(flat / "here/later.png", 0, 77)
    assert main(line) == 1 and "the list of photos differ" in said(capsys)
    (flat / "here/later.png").unlink()
    shutil.copy(run / "weights.safetensors", tmp_path / "mine.safetensors")
    assert (
        main([str(tmp_path / "mine.safetensors"), *line[1:], "--cfg", str(run / "config.yaml"), "encoder.arch=resnet18_w8_s8"]) == 1
    )
    assert "the options" in said(capsys)

    made: list[range] = []
    whole = embed_module.embedded

    def counting(run, photos, batches, device):
        made.extend(batches)
        return whole(run, photos, batches, device)

    monkeypatch.setattr(embed_module, "embedded", counting)
    kept[1].write_bytes(kept[1].read_bytes()[:-1] + b"?")  # a damaged part is made again
    assert main(line) == 0
    told = said(capsys)
    assert "damaged" in told and "it is made again" in told and "4 of 12 photos are in" in told
    assert [b.start for b in made] == [4, 6, 8, 10] and not parts.exists()
    resumed = embedding_file.read(tmp_path / "e.npz")
    assert main([*line[:3], str(tmp_path / "whole.npz"), *line[4:]]) == 0
    once = embedding_file.read(tmp_path / "whole.npz")
    assert resumed.path == once.path and np.array_equal(resumed.feature, once.feature) and resumed.about == once.about
    assert (tmp_path / "e.npz.bad_files.txt").read_text() == (tmp_path / "whole.npz.bad_files.txt").read_text()


def test_parts_of_another_embedding_are_replaced_on_request(run: Path, flat: Path, tmp_path: Path) -> None:
    parts = tmp_path / "e.npz.parts"
    parts.mkdir()
    (parts / "part_0000000000.safetensors").write_bytes(b"?")
    line = [str(run), str(flat), "--out", str(tmp_path / "e.npz")]
    assert main(line) == 1 and main([*line, "--force"]) == 0
    assert len(embedding_file.read(tmp_path / "e.npz").path) == 11


@pytest.mark.skipif(os.name == "nt", reason="no locks")
def test_two_that_write_the_same_file(run: Path, flat: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "e.npz.parts").mkdir()
    code = textwrap.dedent(f"""
        import time
        from pathlib import Path
        from engine.files import locked
        with locked(Path({str(tmp_path / "e.npz.parts/.lock")!r}), None):
            print("held", flush=True)
            time.sleep(60)
    """)
    holder = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": ROOT})
    try:
        assert holder.stdout.readline() == b"held\n"
        assert main([str(run), str(flat), "--out", str(tmp_path / "e.npz")]) == 1
        assert "another process embeds here" in said(capsys)
    finally:
        holder.kill()
        holder.wait()


def test_two_processes_embed_a_shard_each(run: Path, flat: Path, tmp_path: Path) -> None:
    out = tmp_path / "two.npz"
    arguments = [str(run), str(flat), "--batch-size", "2", "--out"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "engine.embed"]
    environment = os.environ | {"PYTHONPATH": ROOT, "OMP_NUM_THREADS": "1"}
    ended = subprocess.run([*launcher, *arguments, str(out)], env=environment, capture_output=True, text=True, timeout=240)
    assert ended.returncode == 0, ended.stderr
    assert main([*arguments, str(tmp_path / "one.npz")]) == 0
    two, one = embedding_file.read(out), embedding_file.read(tmp_path / "one.npz")
    assert two.path == one.path and np.array_equal(two.feature, one.feature) and two.about == one.about
    assert (tmp_path / "two.npz.bad_files.txt").read_text() == (tmp_path / "one.npz.bad_files.txt").read_text()
    assert ended.stderr.count("written:") == 1 and not (tmp_path / "two.npz.parts").exists()


def test_a_timm_model_and_its_own_input(flat: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PPSSL_CACHE", str(tmp_path / "cache"))
    line = ["timm/mobilenetv3_small_050", str(flat), "encoder.weights=none", "--out", str(tmp_path / "t.npz")]
    assert main([*line, "data.image_size=64"]) == 0
    found = embedding_file.read(tmp_path / "t.npz")
    assert found.feature.shape == (11, found.about["dim"]) and found.about["interpolation"] == "bicubic"
    assert found.about["arch"] == "timm/mobilenetv3_small_050" and found.about["image_size"] == 64 and "epoch" not in found.about


def test_what_cannot_be_embedded_is_said(
    run: Path, flat: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    out = ["--out", str(tmp_path / "e.npz")]
    for line, words in (
        ([str(run), str(tmp_path / "absent"), *out], "absent is not there"),
        ([str(tmp_path / "absent"), str(flat), *out], "run folder or a weights file"),
        ([str(run), str(flat), "--out", str(tmp_path / "e.json")], "use .parquet, .npz, .csv"),
        ([str(run), str(flat), *out, "encoder.arch=resnet50"], "evaluated as it was trained"),
        ([str(run), str(flat), *out, f"data.root={tmp_path}"], "name one of them"),
        ([str(run / "weights.safetensors"), str(flat), *out], "encoder.arch="),
    ):
        assert main(line) == 1
        assert words in said(capsys)
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "a.jpg").write_bytes(b"\xff\xd8\xff")
    assert main([str(run), str(empty), *out]) == 1 and "none of 1 photo could be read; a.jpg" in said(capsys)
    with pytest.raises(SystemExit) as usage:
        main([str(run), str(flat), *out, "--batch-size", "0"])
    assert usage.value.code == 2
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    assert main([str(run), str(flat), "--out", str(tmp_path / "e.parquet")]) == 1
    told = said(capsys)
    assert "pip install pyarrow" in told and "e.npz" in told and "e.csv" in told and not (tmp_path / "e.parquet.parts").exists()


def test_a_feature_that_is_not_finite_names_its_photo(
    run: Path, flat: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    whole = embed_module.embedded

    def broken(*arguments):
        for batch in whole(*arguments):
            features = batch.features.clone()
            features[1] = torch.nan
            yield batch._replace(features=features)

    monkeypatch.setattr(embed_module, "embedded", broken)
    assert main([str(run), str(flat), "--out", str(tmp_path / "e.npz")]) == 1
    assert "here/03.png: its feature is not finite" in said(capsys)


@pytest.fixture
def embedding(run: Path, tmp_path: Path) -> Path:
    """A folder with e.npz and e.parquet, and the current one meanwhile, so that the lines of the README run as they stand."""
    for name in ("e.npz", "e.parquet"):
        if name == "e.npz" or pytest.importorskip("pyarrow"):
            assert main([str(run), "--out", str(tmp_path / name)]) == 0
    return tmp_path


@pytest.mark.parametrize("package", ["faiss", "pandas", "sklearn"])
def test_loads_elsewhere_in_the_lines_of_the_readme(package: str, embedding: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip(package)
    monkeypatch.chdir(embedding)
    text = (Path(ROOT) / "engine/evaluation/README.md").read_text()
    blocks = [block.split("```")[0].strip() for block in text.split("```python\n")[1:]]
    (block,) = [b for b in blocks if package in b.splitlines()[0]]
    assert sum(bool(line) and not line.startswith("import") for line in block.splitlines()) <= 3
    names: dict = {}
    exec(block, names)
    features = embedding_file.read(embedding / "e.npz").feature
    cosine = features @ features.T
    if package == "faiss":
        found, row = names["index"].search(names["feature"], 5)
        assert np.array_equal(row[:, 0], np.arange(24))
        assert np.allclose(np.sort(found), np.sort(cosine)[:, -5:], atol=1e-6)
    elif package == "pandas":
        assert list(names["table"].columns) == ["path", "label", "split", "feature"]
        assert np.array_equal(names["x"], features)
    else:
        labels = np.array(embedding_file.read(embedding / "e.npz").label)
        np.fill_diagonal(cosine, -1)
        assert names["knn"].predict(features).tolist() == labels.tolist()  # its own nearest
        near = names["knn"].kneighbors(return_distance=False)[:, 0]
        assert np.allclose(cosine[np.arange(24), near], cosine.max(1), atol=1e-6)


def test_a_photo_is_rotated_as_its_exif_says(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "turned"
    draw(folder / "a.png", 0, 1)
    upright = Image.open(folder / "a.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    upright.transpose(Image.Transpose.ROTATE_90).save(folder / "b.png", exif=exif)
    assert main([str(run), str(folder), "--out", str(tmp_path / "e.npz")]) == 0
    a, b = embedding_file.read(tmp_path / "e.npz").feature
    assert np.abs(a - b).max() < 1e-5
