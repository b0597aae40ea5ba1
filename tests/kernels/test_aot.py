"""The ahead-of-time check: what it calls a fault, that real code passes, and that every configuration can be found."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from kernels import aot, configs
from kernels.aot import Report, exception, faults

CLEAN = Report("infonce bfloat16 D128 B128", "sm_90", 170, 0, 80_000, "HGMMA 12", 16, 1000)


def changed(**values) -> Report:
    return Report(**(CLEAN.__dict__ | values))


@pytest.mark.parametrize(
    ("report", "kind", "check"),
    [
        (changed(spill_bytes=8), "dot", "spill"),
        (changed(shared_bytes=300_000), "dot", "shared"),
        (changed(shared_bytes=200_000, arch="sm_80"), "dot", "shared"),
        (changed(tensor_core="-"), "dot", "tensor cores"),
        (changed(load_bytes=4), "stream", "loads"),
        (changed(instructions=1111), "dot", "growth"),
        (changed(name="unheard of"), "dot", "growth"),
    ],
)
def test_each_fault_is_found(report, kind, check):
    committed = {f"{arch}/{CLEAN.name}": 1000 for arch in aot.ARCHITECTURES}
    assert list(faults(report, kind, committed)) == [check]


def test_clean_code_has_no_fault():
    committed = {f"sm_90/{CLEAN.name}": 1000}
    assert faults(CLEAN, "dot", committed) == {}
    assert faults(changed(instructions=1100), "dot", committed) == {}
    assert faults(changed(tensor_core="-"), "ieee", committed) == {}


def test_exceptions_are_named_and_narrow():
    assert "interleaved" in exception(changed(name="gradcam image bf16 nhwc max"), "loads")
    assert exception(changed(name="gradcam image bf16 nchw max"), "loads") is None
    assert exception(changed(name="gradcam image bf16 nhwc max"), "spill") is None


def test_every_variant_has_a_committed_count_and_a_name_of_its_own():
    committed = json.loads(aot.COMMITTED.read_text())
    committed.pop("source")
    names = [f"{arch}/{variant.name}" for arch in aot.ARCHITECTURES for variant in aot.variants(arch)]
    assert len(names) == len(set(names))
    assert set(names) == set(committed)


def test_what_was_compiled_from_these_sources_is_compiled_again_only_when_asked_for(tmp_path, monkeypatch, capsys):
    compiled: list[list[str]] = []
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr(aot, "COMMITTED", tmp_path / "aot.json")
    monkeypatch.setattr(aot, "run", lambda archs: compiled.append(archs) or [(CLEAN, "dot")])
    aot.COMMITTED.write_text(json.dumps({"source": aot.source(), f"sm_90/{CLEAN.name}": 1000}))
    assert aot.main(["--check", "--if-changed"]) == 0 and compiled == []
    assert "1 variants of aot.json" in capsys.readouterr().out
    assert aot.main(["--check"]) == 0 and len(compiled) == 1
    monkeypatch.setattr(aot, "source", lambda: "another")
    assert aot.main(["--check", "--if-changed"]) == 0 and len(compiled) == 2


def test_an_update_with_a_fault_is_checked_again(tmp_path, monkeypatch):
    reports = [(changed(name=v.name, arch=arch), v.kind) for arch in aot.ARCHITECTURES for v in aot.variants(arch)]
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr(aot, "COMMITTED", tmp_path / "aot.json")
    monkeypatch.setattr(aot, "run", lambda archs: reports)
    assert aot.main(["--update"]) == 0 and json.loads(aot.COMMITTED.read_text())["source"] == aot.source()
    reports[0] = (changed(name=reports[0][0].name, arch=reports[0][0].arch, spill_bytes=8), reports[0][1])
    assert aot.main(["--update"]) == 0 and "source" not in json.loads(aot.COMMITTED.read_text())
    assert aot.main(["--check", "--if-changed"]) == 1


@pytest.mark.parametrize("arch", configs.ARCHITECTURES)
@pytest.mark.parametrize("operand", ["bfloat16", "float16", "ieee", "tf32"])
def test_every_infonce_shape_has_a_configuration(arch, operand):
    for dim in (1, 16, 96, 128, 200, 512):
        for batch in (1, 16, 17, 128, 4096):
            config = configs.lookup(arch, "infonce", operand, dim, batch)
            assert config.rows >= 16 and config.cols >= 16


@pytest.mark.parametrize(
    ("buckets", "size", "key"), [((16, 64), 1, "16"), ((16, 64), 16, "16"), ((16, 64), 17, "64"), ((16, 64), 99, "64")]
)
def test_bucket(buckets, size, key):
    assert configs.bucket({str(bucket): None for bucket in buckets}, size) == key


SCRIPT = """
from dataclasses import asdict
import json
from kernels import aot
by_name = {v.name: v for v in aot.variants("sm_90")}
chosen = [by_name[name] for name in ("infonce bfloat16 D64 B64", "gradcam image bf16 nchw mean")]
print(json.dumps([asdict(aot.compile_variant(v, "sm_90")) for v in chosen]))
"""


def test_compiles_without_a_gpu():
    """In a process of its own: the interpreter, once chosen, replaces the compiler."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    infonce, gradcam = json.loads(done.stdout)
    assert infonce["tensor_core"].startswith("HGMMA") and infonce["spill_bytes"] == 0
    assert gradcam["load_bytes"] == 16 and gradcam["tensor_core"] == "-"


def test_refuses_the_interpreter_and_unknown_architectures(monkeypatch, capsys):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(SystemExit):
        aot.main(["--check"])
    assert "unset it" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        aot.main(["--arch", "sm_70"])
    assert "sm_70" in capsys.readouterr().err
