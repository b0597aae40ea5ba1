"""The CUDA path on fake tensors: every method in every precision, eager and compiled, up to the first kernel, without a GPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from bench.gpu import budget, fake_cuda

SCRIPT = Path(__file__).resolve().parents[1] / "fake_steps.py"
pytestmark = pytest.mark.skipif(fake_cuda.missing() is not None, reason=str(fake_cuda.missing()))


def steps(*arguments: str) -> dict[str, str | None]:
    """{case: what went wrong, or None}."""
    done = subprocess.run([sys.executable, str(SCRIPT), *arguments], env=fake_cuda.environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return {line["case"]: line["error"] for line in map(json.loads, done.stdout.splitlines())}


def test_every_method_steps_eagerly_in_every_precision() -> None:
    """No host sync, no tensor on another device, one layout for a parameter and its gradient, a loss scale on the device."""
    found = steps("off")
    assert len(found) == 24
    assert not {case: error for case, error in found.items() if error}


def test_the_encoders_are_compiled_for_a_gpu() -> None:
    found = steps("encoder", "moco", "ppssl guided")
    assert len(found) == 4
    assert not {case: error for case, error in found.items() if error}


SWITCHES = (
    "moco+contrast.negatives=both+contrast.symmetric=true+queue.start=empty",
    "lcr guided+contrast.negatives=batch+contrast.gradient=both",
    "ppssl guided+ais.target=relations+contrast.symmetric=true+contrast.gradient=both",
    "ppssl guided+ais.target=image+queue.start=empty",
)
OPTIMIZERS = (
    "moco+optim.name=adamw+optim.clip=0.5+optim.decay_norms=false+encoder.freeze=stem,layer1",
    "simclr+optim.name=lars+optim.clip=0.5+optim.layer_decay=0.5+encoder.freeze=bn",
)


def test_the_whole_step_is_one_graph_for_a_gpu() -> None:
    """Every method but lcr and PP-SSL published, which ``bench.gpu.budget --check`` compiles. That every switch is one graph is
    tested on the CPU."""
    chosen = ("ppssl guided", "ldfs", "byol", SWITCHES[0], *OPTIMIZERS)
    found = steps("step", *chosen)
    assert len(found) == len(chosen)
    assert not {case: error for case, error in found.items() if error}


@pytest.mark.parametrize("chosen", [SWITCHES, OPTIMIZERS], ids=["switches", "optimizers and frozen parts"])
def test_options_step_eagerly_without_waiting_for_the_gpu(chosen: tuple[str, ...]) -> None:
    found = steps("off", *chosen)
    assert len(found) == 3 * len(chosen)
    assert not {case: error for case, error in found.items() if error}


def test_trunks_of_timm_step_eagerly_in_every_precision() -> None:
    found = steps("off", "ppssl guided@timm/convnext_atto_s16", "ppssl guided@timm/vit_tiny_patch16_224")
    assert len(found) == 6
    assert not {case: error for case, error in found.items() if error}


def test_the_tests_that_need_a_gpu_run_up_to_the_first_number_they_read() -> None:
    found = steps("graph", "ppssl published", "ppssl guided", "moco", "fp16")
    assert len(found) == 4 and not any(found.values()), found


def test_the_kernels_of_the_step_are_those_compiled_ahead_of_time() -> None:
    """Pointer types, constants, unit strides and warps of every launch at the size of the benchmark, for D 128 and 256."""
    found = steps("forms")
    assert len(found) == 6 and not any(found.values()), found


def test_a_process_without_the_stub_driver_is_told() -> None:
    with pytest.raises(RuntimeError, match="restart"), fake_cuda.gpu():
        pass


def test_the_budget_names_what_grew() -> None:
    kept = {"launches": 100, "gigabytes": 1.0, "cpu_tensors": 0, "float32_images": 1, "copies": 2, "source": "a"}
    record = {"small": {"moco": kept}, "full": {"moco": kept}}
    assert budget.problems(record, "small", "moco", kept) == []
    assert budget.problems(record, "small", "moco", kept | {"launches": 102}) == []
    (line,) = budget.problems(record, "small", "moco", kept | {"launches": 103})
    assert "103 launches" in line and "100" in line
    (line,) = budget.problems(record, "small", "moco", kept | {"copies": 3})
    assert "3 copies" in line
    (line,) = budget.problems(record, "small", "moco", kept | {"source": "b"})
    assert "--full --update" in line
    assert "no small record" in budget.problems({}, "small", "moco", kept)[0]


def test_a_record_of_another_step_or_torch_is_measured_again() -> None:
    record = {"source": budget.source(), "torch": budget.TORCH}
    kept = {form: dict.fromkeys(budget.METHODS, record) for form in ("small", "full")}
    assert budget.unchanged(kept)
    for other in ({"source": "another"}, {"torch": "2.0.0"}, {}):
        changed = record | other if other else {}
        assert not budget.unchanged(kept | {"full": kept["full"] | {"moco": changed}})
    assert not budget.unchanged({})


def test_the_seconds_of_a_kernel_are_its_bytes_or_its_products() -> None:
    stream = budget.Cost("other", 1, 3_000_000_000, 0)
    assert stream.seconds("H100") == pytest.approx(1e-3)
    assert stream.seconds("H100", copy_share=0.5) == pytest.approx(2e-3)
    small = budget.Cost("other", 2, 8, 8)
    assert small.seconds("H100", launch=2e-6) == pytest.approx(4e-6)
    product = budget.Cost("convolution", 1, 8, 8, 798e9)
    assert product.seconds("H100", matrix_share=0.5) == pytest.approx(2e-3)


def test_an_own_op_costs_what_its_eager_calls_do() -> None:
    own = [budget.Cost("own op norm", 2, 100, 0), budget.Cost("own op norm", 2, 300, 0)]
    seen = [budget.Cost("own op norm", 1, 7, 7)] * 2
    other = budget.Cost("other", 1, 5, 5)
    assert budget.with_own_ops([other, *seen], own) == [other, budget.Cost("own op norm", 4, 400, 0)]
    assert budget.with_own_ops([other, seen[0]], own) == [other, budget.Cost("own op norm", 2, 200, 0)]


def test_the_source_hash_ignores_prose(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in ("ppssl", "kernels", "engine/training"):
        (tmp_path / folder).mkdir(parents=True)
    for name in ("step", "guard", "inductor", "optim", "precision"):
        (tmp_path / f"engine/training/{name}.py").write_text("x = 1\n")
    monkeypatch.setattr(budget, "ROOT", tmp_path)
    module = tmp_path / "ppssl/moco.py"
    module.write_text('"""One."""\n\ndef f(x):\n    """Two."""\n    return x + 1  # three\n')
    before = budget.source()
    module.write_text('"""Other."""\ndef f(x):\n    return x + 1\n')
    assert budget.source() == before
    module.write_text('"""Other."""\ndef f(x):\n    return x + 2\n')
    assert budget.source() != before
