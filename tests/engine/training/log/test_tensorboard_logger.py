"""TensorBoard events: TensorBoard reads back what was written, and a disk that is full is an error of the caller."""

from __future__ import annotations

import errno
import io
import threading
from pathlib import Path

import numpy as np
import pytest
import small_methods
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import metadata, plugin_data_pb2

from engine.config import Config, OptimConfig, RunConfig, flatten, to_yaml
from engine.training import Trainer, checkpoint
from engine.training.log.records import Records
from ppssl.encoder import Trunk

SIDE = 32


def read(out: Path) -> EventAccumulator:
    return EventAccumulator(str(out / "tensorboard"), {"scalars": 0, "images": 0, "tensors": 0}).Reload()


def test_curves_pictures_and_the_configuration(tmp_path: Path) -> None:
    settings = flatten(Config())
    records = Records(tmp_path, settings)
    records.write({"kind": "train", "step": 10, "epoch": 0, "loss": 1.25})
    records.write({"kind": "eval", "step": 10, "epoch": 1, "rank1": 0.5, "queries": 7}, ["rank1"])
    pixels = np.random.default_rng(0).integers(0, 256, (6, 9, 3), np.uint8)
    records.picture("attention", pixels, 10)
    found = read(tmp_path)
    assert found.Tags()["scalars"] == ["train/loss", "eval/rank1"] and found.Tags()["images"] == ["attention"]
    assert [(e.step, e.value) for e in found.Scalars("train/loss")] == [(10, 1.25)]
    (shown,) = found.Images("attention")
    assert shown.step == 10 and np.array_equal(np.asarray(Image.open(io.BytesIO(shown.encoded_image_string))), pixels)
    (text,) = found.Tensors("config/text_summary")
    (body,) = text.tensor_proto.string_val
    assert "".join(line[4:] + "\n" for line in body.decode().splitlines()) == to_yaml(settings)
    starts = found.SummaryMetadata(metadata.SESSION_START_INFO_TAG).plugin_data.content
    values = plugin_data_pb2.HParamsPluginData.FromString(starts).session_start_info.hparams
    assert values["optim.lr"].number_value == 0.03 and values["eval.protocols"].string_value == "retrieval"
    assert values["amp"].string_value == "null" and values["bn.sync"].bool_value is False


def test_a_resumed_run_takes_back_what_came_after_its_checkpoint(tmp_path: Path) -> None:
    first = Records(tmp_path)
    for step in (10, 20, 30):
        first.write({"kind": "train", "step": step, "epoch": 0, "loss": 1.0})
    first.close()
    again = Records(tmp_path)
    again.rewind(20)
    again.write({"kind": "train", "step": 30, "epoch": 0, "loss": 2.0})
    assert [(e.step, e.value) for e in read(tmp_path).Scalars("train/loss")] == [(10, 1.0), (20, 1.0), (30, 2.0)]
    assert len(list((tmp_path / "tensorboard").iterdir())) == 2


class Views:
    steps_per_epoch = 4

    def batches(self, start_step: int, stop_step: int):
        for step in range(start_step, stop_step):
            yield small_methods.batch(4, SIDE, seed=step)


def trainer(out: Path) -> Trainer:
    method = small_methods.build_by_name("moco", Trunk("resnet18_w8_s16"), SIDE)
    run = RunConfig(log_every=1, save_every_steps=1)
    return Trainer(method, Views(), epochs=1, optim=OptimConfig(lr=0.01), run=run, out=out, device="cpu")


def test_the_first_views_are_shown_once(tmp_path: Path) -> None:
    run = trainer(tmp_path / "run")
    run.fit()
    found = read(tmp_path / "run")
    (shown,) = found.Images("views")
    sheet = np.asarray(Image.open(io.BytesIO(shown.encoded_image_string)))
    # the first query's view, undone: the pixel in the middle of the first tile of the sheet
    batch = next(Views().batches(0, 1))
    mean, std = (np.array(v) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    pixel = ((batch.x_q[0, :, 16, 16].numpy() * std + mean) * 255).clip(0, 255).round()
    assert (np.abs(sheet.astype(float) - pixel).max(2) < 1).any()
    again = trainer(tmp_path / "run")
    again.epochs, again.total_steps = 1, 4
    again.fit()
    assert len(read(tmp_path / "run").Images("views")) == 1


def test_a_full_disk_ends_the_run_in_one_line_and_no_thread_complains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    run = trainer(tmp_path / "run")
    whole = Path.open
    threads = set(threading.enumerate())

    def no_space(self: Path, mode: str = "r", *args, **options):
        if "tfevents" in self.name and run.step.steps_done >= 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        return whole(self, mode, *args, **options)

    monkeypatch.setattr(Path, "open", no_space)
    with pytest.raises(
        OSError, match="writing the log of step 3 failed .*tfevents.*make room, then run the same command"
    ) as caught:
        run.fit()
    assert "last good checkpoint" in str(caught.value) and "step_000000002.pt" in str(caught.value)
    assert "Traceback" not in capfd.readouterr().err and set(threading.enumerate()) <= threads
    assert [p.name for p in checkpoint.list_checkpoints(tmp_path / "run/checkpoints")] == ["step_000000001.pt", "step_000000002.pt"]
    monkeypatch.undo()
    trainer(tmp_path / "run").fit()
    assert [e.step for e in read(tmp_path / "run").Scalars("train/loss")] == [1, 2, 3, 4]
