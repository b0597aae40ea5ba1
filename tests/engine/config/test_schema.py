"""The configuration: its frozen list of keys, YAML both ways, one clear error for whatever cannot be used."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.config import Config, IadmConfig, MethodConfig, flatten, from_yaml, keys, nearest, to_yaml, validate
from engine.errors import ConfigError
from ppssl.settings import SETTINGS, resolve_variant, title

# The whole configuration and its defaults, the paper's settings. A key is added here on purpose or not at all.
FROZEN = {
    "seed": 0,
    "epochs": 100,
    "batch_size": 128,
    "amp": None,
    "out": None,
    "resume": "auto",
    "method.name": "ppssl",
    "method.variant": "published",
    "method.minmax": None,
    "method.maxout_width": 32,
    "method.contrast_mask": None,
    "method.mask_reach": None,
    "encoder.arch": "resnet50",
    "encoder.weights": "IMAGENET1K_V1",
    "encoder.head": "mlp2",
    "encoder.dim": 256,
    "encoder.partial": False,
    "encoder.freeze": (),
    "queue.size": 65536,
    "queue.dtype": "auto",
    "queue.sharded": False,
    "queue.exclude_same_image": False,
    "queue.start": "random",
    "ema.decay": 0.999,
    "ema.schedule": "constant",
    "contrast.temperature": 0.2,
    "contrast.negatives": "queue",
    "contrast.symmetric": False,
    "contrast.gradient": "query",
    "bn.groups": 1,
    "bn.sync": False,
    "bn.impl": "auto",
    "ais.weight": 1.2,
    "ais.temperature": 1.0,
    "ais.scale": 100.0,
    "ais.warmup": 0.0,
    "ais.prompts": "birds",
    "ais.count": None,
    "ais.target": "text",
    "iadm.weight": None,
    "iadm.sources": ("image",),
    "iadm.image": "query",
    "iadm.sign": None,
    "iadm.temperature": None,
    "iadm.softmax": None,
    "iadm.cam_scale": None,
    "iadm.cam_loss": None,
    "iadm.pool": None,
    "iadm.mask": None,
    "iadm.image_bn": None,
    "iadm.reduction": None,
    "iadm.cam_temperature": None,
    "lcr.detach": None,
    "lcr.updates": None,
    "ldfs.reconstruction": 0.05,
    "ldfs.pair": 0.5,
    "ldfs.share": 0.2,
    "ldfs.noise": 1.0,
    "ldfs.warmup": 0.2,
    "teacher.model": "ViT-B-32-quickgelu",
    "teacher.weights": "openai",
    "teacher.view": None,
    "teacher.image_size": None,
    "optim.lr": 0.03,
    "optim.momentum": 0.9,
    "optim.weight_decay": 1e-4,
    "optim.schedule": "cosine",
    "optim.backend": "auto",
    "optim.name": "sgd",
    "optim.betas": (0.9, 0.999),
    "optim.eps": 1e-8,
    "optim.warmup": 0.0,
    "optim.decay_norms": True,
    "optim.layer_decay": 1.0,
    "optim.clip": None,
    "data.name": "cub",
    "data.root": None,
    "data.train": None,
    "data.test": None,
    "data.loader": "auto",
    "data.resident": "auto",
    "data.aug": "parity",
    "data.image_size": 224,
    "data.crop_banner": False,
    "data.workers": None,
    "data.allow_change": False,
    "data.classes": (),
    "data.fraction": 1.0,
    "data.extra_roots": (),
    "run.compile": "auto",
    "run.cuda_graph": "auto",
    "run.log_every": 10,
    "run.save_every_steps": None,
    "run.keep": 2,
    "run.max_bad_steps": 10,
    "run.loggers": ("tensorboard",),
    "run.device": "auto",
    "eval.every": 0,
    "eval.batch_size": 128,
    "eval.protocols": ("retrieval",),
    "eval.keep_best": None,
    "eval.validation": None,
    "eval.patience": None,
}


def test_keys_and_defaults_are_frozen():
    assert flatten(Config()) == FROZEN
    assert list(keys()) == list(FROZEN)


def test_reading_a_config_needs_no_torch():
    code = "import sys, engine.config.command_line; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[3])


def test_yaml_round_trip():
    assert from_yaml(to_yaml(Config())) == Config()
    assert from_yaml("") == Config()
    # Words that YAML 1.1 reads as booleans or numbers, numbers that it reads as words.
    odd = replace(
        Config(),
        out="1e5",
        resume="none",
        data=replace(Config().data, root="2024", resident="off"),
        encoder=replace(Config().encoder, weights="null"),
        optim=replace(Config().optim, lr=1e-7, weight_decay=0.0),
        run=replace(Config().run, compile="off", cuda_graph="on"),
        iadm=replace(Config().iadm, sources=("layer4", "image"), cam_scale="none"),
    )
    assert from_yaml(to_yaml(odd)) == odd


@pytest.mark.parametrize("text", ["~", "null", "Null", "true", "1e3", "[1]"])
def test_text_that_looks_like_something_else_stays_text(text: str):
    config = replace(Config(), out=text)
    assert from_yaml(to_yaml(config)) == config


@settings(max_examples=30, deadline=None)
@given(text=st.text(min_size=1).filter(str.strip), lr=st.floats(0, 1e6), seed=st.integers(0, 2**63 - 1))
def test_yaml_round_trip_of_any_value(text: str, lr: float, seed: int):
    config = replace(Config(), seed=seed, out=text, optim=replace(Config().optim, lr=lr))
    assert from_yaml(to_yaml(config)) == config


def test_yaml_is_the_core_schema():
    config = from_yaml("run: {compile: off, cuda_graph: on}\noptim: {lr: 3e-2}\niadm.sources: [layer4]\nais:\n")
    assert (config.run.compile, config.run.cuda_graph) == ("off", "on")
    assert config.optim.lr == 0.03
    assert config.iadm.sources == ("layer4",)


def test_types_become_the_declared_ones():
    config = from_yaml("optim: {lr: 1}\niadm: {weight: 2}")
    assert isinstance(config.optim.lr, float) and isinstance(config.iadm.weight, float)
    assert isinstance(config.iadm.sources, tuple)


def test_a_queue_is_compared_with_the_keys_that_the_method_puts_in():
    switches = "batch_size: 4\nqueue: {size: %d}\ncontrast: {symmetric: %s, negatives: %s}\nmethod: {name: %s}"
    for fits in (
        (4, "true", "queue", "ldfs"),
        (2, "false", "batch", "moco"),
        (2, "true", "queue", "simclr"),
        (8, "true", "both", "lcr"),
    ):
        from_yaml(switches % fits)
    for short in ((2, "false", "batch", "ldfs"), (4, "true", "both", "lcr"), (7, "true", "queue", "ppssl")):
        with pytest.raises(ConfigError, match=r"queue.size: got \d, must be at least batch_size \(4\)"):
            from_yaml(switches % short)
    for unused in ("method: {name: moco}", "method: {name: ppssl}\nais: {weight: 0.0, target: relations}"):
        from_yaml(f"batch_size: 2\n{unused}" + ("\nais: {target: relations}" if "ais" not in unused else ""))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("optim: {lrr: 1}", ["optim.lrr", "did you mean optim.lr?"]),
        ("epoch: 3", ["epoch", "did you mean epochs?"]),
        ("lr: 0.1", ["did you mean optim.lr?"]),
        ("zzzzzz: 1", ["zzzzzz", "--help"]),
        ("optim: 3", ["optim", "section", "optim.lr"]),
        ("seed: {a: 1}", ["seed", "whole number"]),
        ("queue: {size: all}", ["queue.size", "'all'", "a whole number or auto"]),
        ("contrast: {negatives: keys}", ["contrast.negatives", "'keys'", "queue, batch or both"]),
        ("ais: {target: logits}", ["ais.target", "'logits'", "text, image or relations"]),
        ("batch_size: 2\nais: {target: relations}", ["batch_size", "2", "at least 3 with ais.target=relations"]),
        ("epochs: many", ["epochs", "'many'", "str", "a whole number"]),
        ("epochs: 2.5", ["epochs", "2.5", "float", "a whole number"]),
        ("epochs: true", ["epochs", "True", "a whole number"]),
        ("epochs: null", ["epochs", "null", "a whole number"]),
        ("optim: {lr: fast}", ["optim.lr", "'fast'", "a number"]),
        ("data: {root: 3}", ["data.root", "3", "int", "text or null"]),
        ("queue: {exclude_same_image: 1}", ["queue.exclude_same_image", "true or false"]),
        ("amp: fp32", ["amp", "'fp32'", "bf16, fp16 or null"]),
        ("data: {name: cubs}", ["data.name", "'cubs'", "nabirds"]),
        ("iadm: {sources: [layer5]}", ["iadm.sources", "layer5", "a list of image, layer1"]),
        ("iadm: {sources: image}", ["iadm.sources", "'image'", "a list of"]),
        ("epochs: 1\nepochs: 2", ["epochs", "twice", "line 2"]),
        ("optim.lr: 1\noptim: {lr: 2}", ["optim.lr", "twice"]),
        ("- 1", ["mapping", "list"]),
        ("a: [", ["YAML"]),
        ("seed: !!python/object/apply:os.getcwd []", ["YAML", "python/object"]),
        ("? [1, 2]\n: 3", ["YAML"]),
    ],
)
def test_unusable_yaml_names_file_key_value_and_remedy(tmp_path: Path, text: str, words: list[str]):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        from_yaml(path)
    for word in [str(path), *words]:
        assert word in str(caught.value)


def test_bytes_that_are_no_text(tmp_path: Path):
    path = tmp_path / "mine.yaml"
    path.write_bytes(b"\xff\xfe\x00\xd8")
    with pytest.raises(ConfigError, match="mine.yaml"):
        from_yaml(path)


def test_missing_file(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="nothing.yaml"):
        from_yaml(tmp_path / "nothing.yaml")


@pytest.mark.parametrize(
    "text",
    [
        "epochs: 0",
        "batch_size: -1",
        "seed: -1",
        "seed: 9223372036854775808",
        "out: ''",
        "method: {maxout_width: 0}",
        "encoder: {dim: 0}",
        "queue: {size: 0}",
        "queue: {size: 127}",
        "queue: {size: 255}\ncontrast: {symmetric: true}",
        "ema: {decay: 1.0}",
        "ema: {decay: -0.1}",
        "contrast: {temperature: 0}",
        "bn: {groups: 3}",
        "bn: {groups: 2, sync: true}",
        "ais: {weight: -1}",
        "ais: {temperature: 0}",
        "ais: {warmup: 1.5}",
        "ais: {count: 1}",
        "iadm: {weight: -0.5}",
        "iadm: {temperature: 0}",
        "iadm: {cam_temperature: 0}",
        "teacher: {image_size: 0}",
        "iadm: {sources: []}",
        "iadm: {sources: [image, image]}",
        "ldfs: {share: 1.5}",
        "ldfs: {noise: -1}",
        "optim: {lr: -1}",
        "optim: {lr: .nan}",
        "optim: {lr: .inf}",
        "optim: {momentum: 1}",
        "data: {image_size: 0}",
        "data: {image_size: 100}",
        "data: {workers: -1}",
        "run: {keep: 0}",
        "run: {log_every: 0}",
        "run: {save_every_steps: 0}",
        "eval: {every: -1}",
        "eval: {protocols: []}",
        "eval: {protocols: [knn, knn]}",
        "run: {loggers: [csv, csv]}",
    ],
)
def test_values_out_of_range_name_their_key(text: str):
    section, _, rest = text.partition(": {")
    key = f"{section}.{rest.split(':')[0]}" if rest else text.split(":")[0]
    with pytest.raises(ConfigError, match=rf"\b{key}: got .*(must|at least)"):
        from_yaml(text)


def test_image_size_is_a_multiple_of_the_map_stride_where_maps_are_compared():
    from_yaml("data: {image_size: 96}\nencoder: {arch: resnet18_w32_s16}")
    from_yaml("data: {image_size: 80}\nencoder: {arch: resnet18_w32_s16}")
    from_yaml("data: {image_size: 100}\nmethod: {name: moco}")
    with pytest.raises(ConfigError, match="data.image_size: got 80, must be a multiple of 32"):
        from_yaml("data: {image_size: 80}")


def test_the_keys_of_a_step_must_fit_where_there_is_a_queue():
    from_yaml("queue: {size: 256}\ncontrast: {symmetric: true}")
    from_yaml("queue: {size: auto}\ncontrast: {symmetric: true}")
    from_yaml("queue: {size: 1}\ncontrast: {negatives: batch}")
    with pytest.raises(
        ConfigError, match=r"queue\.size: got 200, must be at least batch_size \(128\) x 2 with contrast\.symmetric"
    ):
        from_yaml("queue: {size: 200}\ncontrast: {symmetric: true}")


def test_null_stands_for_a_later_choice():
    config = from_yaml("iadm: {weight: null, temperature: null}\ndata: {workers: null}\nrun: {save_every_steps: null}")
    validate(config)
    values = flatten(config)
    assert [values[key] for key in ("iadm.weight", "iadm.temperature", "data.workers", "run.save_every_steps")] == [None] * 4


FREE = {"encoder.partial", "out", "resume", "queue.sharded", "data.root", "data.train", "data.test", "data.loader", "data.resident",
        "data.workers", "data.allow_change", "data.classes", "data.fraction", "data.extra_roots"}  # fmt: skip
"""What a resumed run may change, beside run.* and eval.*: where things are and how they are executed, not what is computed."""
SAID = {"epochs", "amp", "optim.lr", "optim.weight_decay", "optim.schedule", "optim.backend", "optim.clip", "queue.dtype",
        "bn.impl"}  # fmt: skip
"""What it may change with a line in the log: its length, the remedies of a run that diverges, and what only rounds differently."""


def test_what_a_resumed_run_may_change_is_frozen():
    free = FREE | {key for key in keys() if key.startswith(("run.", "eval."))} - {
        "eval.validation"
    }  # which takes images out of training
    assert {key for key, kind in keys().items() if kind.resume == "free"} == free
    assert {key for key, kind in keys().items() if kind.resume == "said"} == SAID
    assert {key for key, kind in keys().items() if kind.resume == "refused"} == keys().keys() - free - SAID


@pytest.mark.parametrize("text", ["out: runs/${USER}", "data: {root: '${oc.env:HOME}/cub'}", "encoder: {weights: '${a.b}'}"])
def test_interpolation_is_refused(text: str):
    with pytest.raises(ConfigError, match=r"interpolation.*\$\{.*refused; write the value out"):
        from_yaml(text)


def test_interpolation_is_refused_in_code_too():
    with pytest.raises(ConfigError, match=r"^out: the interpolation in '\$\{HOME\}/x' is refused"):
        validate(Config(out="${HOME}/x"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "got [], must name at least one of image, layer1"),
        ("[layer5]", "got ['layer5'] (list), expected a list of image, layer1"),
        ("[[1]]", "got [[1]] (list), expected a list of image, layer1"),
        ("[image, image]", "got ['image', 'image'], must name image, layer1"),
    ],
)
def test_a_list_is_told_what_is_wrong_with_it(text: str, message: str):
    with pytest.raises(ConfigError) as caught:
        from_yaml(f"iadm: {{sources: {text}}}")
    assert f"iadm.sources: {message}" in str(caught.value)


def test_a_suggestion_is_of_the_same_kind():
    assert nearest("data.csv") == "--help lists every key"
    assert nearest("data.image_sise") == "did you mean data.image_size?"
    assert nearest("loader") == "did you mean data.loader?"


@pytest.mark.parametrize("name", ["ppssl", "lcr"])
@pytest.mark.parametrize("variant", ["published", "guided"])
def test_every_switch_of_a_variant_is_decided_before_a_run(name: str, variant: str):
    config = resolve_variant(Config(method=MethodConfig(name=name, variant=variant)))
    values = flatten(config)
    assert {key: values[key] for key in SETTINGS[name].variants[variant]} == dict(SETTINGS[name].variants[variant])
    assert from_yaml(to_yaml(config)) == config
    mine = resolve_variant(Config(method=MethodConfig(name=name, variant=variant), iadm=IadmConfig(temperature=7.0)))
    assert mine.iadm.temperature == 7.0


def test_nearest_prefers_the_same_last_part():
    assert nearest("optimizer.weight_decay") == "did you mean optim.weight_decay?"
    assert nearest("crop_baner") == "did you mean data.crop_banner?"
    assert nearest("image_size") == "did you mean teacher.image_size or data.image_size?"


def test_a_method_without_variants_is_called_by_its_name_alone() -> None:
    titles = {
        name: title(Config(method=MethodConfig(name=name, variant="guided")))
        for name in ("ppssl", "lcr", "moco", "simclr", "byol", "ldfs")
    }
    assert titles.pop("ppssl") == "ppssl (guided)" and titles.pop("lcr") == "lcr (guided)"
    assert all(title == name for name, title in titles.items())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{betas: [0.9, 0.95]}", "optim.betas: got (0.9, 0.95), does nothing with optim.name=sgd; it is a key of adamw"),
        ("{name: lars, eps: 1e-6}", "optim.eps: got 1e-06, does nothing with optim.name=lars"),
        (
            "{name: adamw, momentum: 0.8}",
            "optim.momentum: got 0.8, does nothing with optim.name=adamw; it is a key of sgd and lars",
        ),
        ("{name: adamw, backend: apex}", "optim.backend: got 'apex', apex is used for sgd only"),
        ("{name: adamw, betas: [0.9, 1.0]}", "optim.betas: got (0.9, 1.0), both must be in [0, 1)"),
        ("{name: adamw, betas: [0.9]}", "optim.betas: got [0.9] (list), expected a list of two numbers"),
        ("{warmup: 100}", "optim.warmup: got 100.0, must be below epochs (100), of which it is a part"),
        ("{layer_decay: 1.1}", "optim.layer_decay: got 1.1, must be"),
        ("{clip: 0}", "optim.clip: got 0, must be above 0"),
    ],
)
def test_a_key_of_another_optimizer_is_refused(text: str, message: str):
    with pytest.raises(ConfigError) as caught:
        from_yaml(f"optim: {text}")
    assert message in str(caught.value)
