"""The command line: overrides anywhere, ``--amp`` that swallows nothing, known spellings, errors with exit code 2."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from engine.config import flatten, from_yaml, keys, to_yaml
from engine.config.command_line import find_recipe, parse, recipe_names


def changed(line: str) -> dict[str, object]:
    """What a line on top of ``--cfg cub.yaml`` changes."""
    before = flatten(parse(["--cfg", "cub.yaml"]).config)
    after = flatten(parse(line.split()).config)
    return {key: value for key, value in after.items() if value != before[key]}


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("--cfg cub.yaml --amp epochs=3", {"amp": "bf16", "epochs": 3}),
        ("epochs=3 --amp --cfg cub.yaml", {"amp": "bf16", "epochs": 3}),
        ("--cfg cub.yaml --amp fp16", {"amp": "fp16"}),
        ("--cfg cub.yaml --amp=fp16", {"amp": "fp16"}),
        ("--amp --cfg cub", {"amp": "bf16"}),
        ("--cfg cub.yaml --amp bf16 --amp null", {}),
        ("--cfg=cub epochs=3 epochs=4", {"epochs": 4}),
        ("-c cub -- optim.lr=0.1 data.workers=8", {"optim.lr": 0.1, "data.workers": 8}),
        ("--cfg cub --optim.lr 1e-2 --optim.weight-decay=0", {"optim.lr": 0.01, "optim.weight_decay": 0.0}),
        ("--cfg cub --resume", {}),
        ("--cfg cub --resume none", {"resume": "none"}),
        ("--cfg cub --resume runs/lr=1/checkpoints/step_1.pt", {"resume": "runs/lr=1/checkpoints/step_1.pt"}),
        ("--cfg cub --resume epochs=7", {"epochs": 7}),
        ("--cfg cub --seed 4 --out runs/x", {"seed": 4, "out": "runs/x"}),
        ("--cfg cub out=2024 encoder.weights=none", {"out": "2024", "encoder.weights": "none"}),
        ("--cfg cub run.compile=off run.cuda_graph=on", {"run.compile": "off", "run.cuda_graph": "on"}),
        (
            "--cfg cub --opt adamw optim.betas=0.9,0.95 --warmup-epochs 0.5 --layer-decay=0.75 --clip-grad 1",
            {"optim.name": "adamw", "optim.betas": (0.9, 0.95), "optim.warmup": 0.5, "optim.layer_decay": 0.75, "optim.clip": 1.0},
        ),
        ("--cfg cub --encoder.freeze stem,layer1,bn", {"encoder.freeze": ("stem", "layer1", "bn")}),
        ("--cfg cub iadm.sources=image,layer4", {"iadm.sources": ("image", "layer4")}),
        ("--cfg cub iadm.sources=[layer4]", {"iadm.sources": ("layer4",)}),
        ("--cfg cub --queue.exclude-same-image bn.sync=true", {"queue.exclude_same_image": True, "bn.sync": True}),
        ("--cfg cub iadm.weight=0.5 iadm.weight=null", {}),
        ("--cfg cub eval.every=7", {"eval.every": 7}),
        ("--cfg cub eval.every=auto", {"eval.every": "auto"}),
    ],
)
def test_lines(line: str, expected: dict[str, object]):
    assert changed(line) == expected


def test_spellings_of_moco_and_timm():
    line = "--cfg cub -a resnet18 -j 2 -b64 --lr 0.1 --wd 1e-3 --momentum 0.8 --epochs 7 "
    line += "--moco-k 4096 --moco-m 0.99 --moco-t 0.07 --moco-dim 64"
    assert changed(line) == {
        "encoder.arch": "resnet18",
        "data.workers": 2,
        "batch_size": 64,
        "optim.lr": 0.1,
        "optim.weight_decay": 1e-3,
        "optim.momentum": 0.8,
        "epochs": 7,
        "queue.size": 4096,
        "ema.decay": 0.99,
        "contrast.temperature": 0.07,
        "encoder.dim": 64,
    }
    same = changed("--cfg cub --arch resnet18 --workers=2 --batch-size 64 --weight-decay 0.001")
    assert same == changed("--cfg cub -a resnet18 -j=2 -b 64 --wd 1e-3")


def test_switches():
    arguments = parse(["--cfg", "demo", "--dry-run", "--print-config"])
    assert arguments.dry_run and arguments.print_config
    assert arguments.cfg_path.stem == "demo"
    arguments = parse(["--cfg", "demo"])
    assert not arguments.dry_run and not arguments.print_config


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("--cfg cub optim.lrr=1", ["optim.lrr", "did you mean optim.lr?"]),
        ("--cfg cub --optim.lrr 1", ["--optim.lrr", "did you mean optim.lr?"]),
        ("--cfg cub --batchsize 1", ["--batchsize", "did you mean batch_size?"]),
        ("--cfg cub -x 1", ["-x"]),
        ("--cfg cub --b 1", ["--b"]),
        ("--cfg cub optim=1", ["optim", "section", "optim.lr"]),
        ("--cfg cub epochs=many", ["epochs", "'many'", "a whole number"]),
        ("--cfg cub epochs=", ["epochs", "a whole number"]),
        ("--cfg cub epochs=[", ["epochs", "a whole number"]),
        ("--cfg cub optim.lr=fast", ["optim.lr", "'fast'", "a number"]),
        ("--cfg cub queue.exclude_same_image=maybe", ["queue.exclude_same_image", "true or false"]),
        ("--cfg cub --amp fp32", ["amp", "'fp32'", "bf16, fp16 or null"]),
        ("--cfg cub iadm.sources=layer5", ["iadm.sources", "layer5", "layer4"]),
        ("--cfg cub ema.decay=1", ["ema.decay", "[0, 1)"]),
        ("--cfg cub batch_size=128 queue.size=64", ["queue.size", "batch_size", "128"]),
        ("--cfg cub data.image_size=100", ["data.image_size", "100", "multiple of 32"]),
        ("--cfg cub --lr", ["--lr", "needs a value", "a number"]),
        ("--cfg cub --lr --amp", ["--lr", "needs a value"]),
        ("--cfg", ["--cfg", "needs a value"]),
        ("--cfg cub --dry-run=yes", ["--dry-run", "no value"]),
        ("cub.yaml", ["cub.yaml", "--cfg"]),
        ("--cfg nothing.yaml", ["nothing.yaml", "demo"]),
        ("--cfg cub out=${HOME}/x", ["out", "interpolation", "${HOME}/x", "write the value out"]),
        ("--cfg cub --data.root ${data.name}", ["data.root", "interpolation", "write the value out"]),
        ("--cfg cub data.csv=1", ["data.csv", "--help lists every key"]),
        ("epochs=3", ["--cfg", "demo"]),
    ],
)
def test_an_unusable_line_exits_with_2_and_says_why(capsys: pytest.CaptureFixture[str], line: str, words: list[str]):
    with pytest.raises(SystemExit) as caught:
        parse(line.split())
    assert caught.value.code == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ") and message.count("\n") == 1
    for word in words:
        assert word in message


def test_a_file_wins_over_a_shipped_recipe_and_errors_name_it(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert find_recipe("cub.yaml") == find_recipe("cub")
    (tmp_path / "cub.yaml").write_text("epochs: 7\ndata: {root: here}\n")
    (tmp_path / "cub").mkdir()
    assert parse(["--cfg", "cub.yaml"]).config.epochs == 7
    assert parse(["--cfg", "cub"]).config.epochs == 100
    (tmp_path / "bad.yaml").write_text("epoch: 7\n")
    with pytest.raises(SystemExit):
        parse(["--cfg", "bad.yaml"])
    assert "bad.yaml" in capsys.readouterr().err


def test_a_run_folder_is_not_a_recipe_but_its_config_is(tmp_path: Path, capsys):
    (tmp_path / "config.yaml").write_text(to_yaml(parse(["--cfg", "demo", "seed=5"]).config))
    with pytest.raises(SystemExit):
        parse(["--cfg", str(tmp_path)])
    assert f"--cfg {tmp_path / 'config.yaml'}" in capsys.readouterr().err
    assert parse(["--cfg", str(tmp_path / "config.yaml")]).config == from_yaml(tmp_path / "config.yaml")


def test_help_lists_every_key_with_its_documentation(capsys):
    with pytest.raises(SystemExit) as caught:
        parse(["--help"])
    assert caught.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    for key in keys():
        at = next(i for i, line in enumerate(lines) if line.startswith(f"{key}="))
        assert len(lines[at + 1].strip()) > 3 and lines[at + 1].startswith("    ")
    for name in recipe_names():
        assert any(name in line for line in lines)


@pytest.mark.parametrize("command", ["train", "evaluate", "search", "export", "replay", "doctor", "report.__main__", "check"])
def test_every_command_explains_itself_in_plain_words(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        importlib.import_module(f"engine.{command}").main(["--help"])
    shown = capsys.readouterr().out
    assert stop.value.code == 0
    assert f"usage: python -m engine.{command.removesuffix('.__main__')} " in shown and "``" not in shown
