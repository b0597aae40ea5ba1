"""``--profile N``: which steps are recorded, what is written, how kernels are sorted into classes."""

import gzip
import json
import os
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType

import ppssl.span
from engine.training import profiling
from engine.training.profiling import Profile, kernel_kind, kernels, report
from ppssl.span import span


def work(x: torch.Tensor) -> torch.Tensor:
    with span("query_fwd"):
        y = torch.relu(x @ x)
    with span("losses"):
        return torch.softmax(y, 1).sum()


def test_the_steps_after_the_warm_up_are_recorded(tmp_path: Path) -> None:
    steps = 0
    with Profile(tmp_path / "profile", steps=3, warm_up=2, device="cpu") as profile:
        while not profile.done:
            with span("data"):
                x = torch.randn(32, 32)
            work(x)
            steps += 1
            profile.step()
        profile.step()  # the run goes on
    assert steps == 5
    trace = json.loads(gzip.decompress((tmp_path / "profile" / "trace.json.gz").read_bytes()))["traceEvents"]
    for name in ("data", "query_fwd", "losses"):
        assert sum(e.get("name") == name and e["ph"] == "X" for e in trace) == 3
    assert sum(e.get("name") == "aten::mm" for e in trace) == 3
    table = (tmp_path / "profile" / "table.txt").read_text()
    assert table.startswith("3 steps")
    for line in ("matmul  ", "reduction  ", "query_fwd  "):
        found = next(text for text in table.splitlines() if text.startswith(line))
        assert found.endswith("%")
    assert next(text for text in table.splitlines() if text.startswith("matmul: aten::mm")).split()[2] == "1"


def test_no_step_to_record_costs_nothing(tmp_path: Path) -> None:
    with Profile(tmp_path / "profile", steps=0) as profile:
        profile.step()
    assert profile.done and not (tmp_path / "profile").exists()
    with pytest.raises(ValueError, match="--profile: -1"):
        Profile(tmp_path, steps=-1)


def test_a_run_that_ends_early(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Profile(tmp_path / "short", steps=5, warm_up=1, device="cpu") as profile:
        for _ in range(3):
            work(torch.randn(8, 8))
            profile.step()
    assert (tmp_path / "short" / "table.txt").read_text().startswith("2 steps")
    with Profile(tmp_path / "none", steps=5, warm_up=4, device="cpu") as profile:
        profile.step()
    assert not (tmp_path / "none").exists()
    assert "ended after 1 steps" in capsys.readouterr().err
    failing = Profile(tmp_path / "failed", steps=5, warm_up=1, device="cpu")
    with pytest.raises(FloatingPointError), failing as profile:  # noqa: PT012  (the error comes from inside)
        profile.step()
        profile.step()
        raise FloatingPointError("not finite")
    with Profile(tmp_path / "again", steps=1, warm_up=1, device="cpu") as profile:  # the profiler is free again
        profile.step()
        work(torch.randn(8, 8))
        profile.step()
    assert not (tmp_path / "failed").exists() and (tmp_path / "again" / "table.txt").is_file()


def test_under_nsight_the_same_steps_are_marked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setenv("NSYS_PROFILING_SESSION_ID", "1")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda.profiler, "start", lambda: calls.append(("start", profile.seen)))
    monkeypatch.setattr(torch.cuda.profiler, "stop", lambda: calls.append(("stop", profile.seen)))
    with Profile(tmp_path / "profile", steps=2, warm_up=3, device="cuda") as profile:
        for _ in range(7):
            profile.step()
    assert calls == [("start", 3), ("stop", 5)]
    assert not (tmp_path / "profile").exists()


def test_spans_are_nvtx_ranges_where_there_is_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(ppssl.span, "_has_gpu", lambda: True)
    monkeypatch.setattr(torch.cuda.nvtx, "range_push", calls.append)
    monkeypatch.setattr(torch.cuda.nvtx, "range_pop", lambda: calls.append("pop"))
    with span("backward"), pytest.raises(RuntimeError), span("cam"):
        raise RuntimeError("in the middle")
    assert calls == ["backward", "cam", "pop", "pop"]


def test_spans_leave_no_trace_in_a_graph(caplog: pytest.LogCaptureFixture) -> None:
    graphs = []

    def backend(graph: torch.fx.GraphModule, _inputs):
        graphs.append(graph)
        return graph.forward

    x = torch.randn(4, 4)
    assert torch.equal(torch.compile(work, fullgraph=True, backend=backend)(x), work(x))
    assert len(graphs) == 1 and not [node for node in graphs[0].graph.nodes if "record" in str(node.target)]
    assert "ignored" not in caplog.text
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("aten::convolution_backward", "conv"),
        ("sm90_xmma_dgrad_implicit_gemm_bf16bf16_bf16f32_f32_nhwckrsc_nhwc_tilesize128x64x64", "conv"),
        ("_bn_grad_sums_kernel", "bn"),
        ("void cudnn::bn_fw_tr_1C11_kernel_NCHW<float, float>", "bn"),
        ("triton_red_fused__native_batch_norm_legit_functional_add_relu_12", "bn"),
        ("void cudnn::ops::nchwToNhwcKernel<__nv_bfloat16>", "layout"),
        ("nvjet_hsh_128x64_64x5_1x2_h_bz_TNT", "matmul"),
        ("_split_kernel", "infonce"),
        ("_search_kernel", "maxout_image"),
        ("_grad_feature_kernel", "maxout"),
        ("_image_kernel", "gradcam"),
        ("void at::native::multi_tensor_apply_kernel<FusedSgdMathFunctor>", "optimizer"),
        ("void at::native::vectorized_elementwise_kernel<4, threshold>", "elementwise"),
        ("triton_poi_fused_add_relu_3", "elementwise"),
        ("void at::native::reduce_kernel<512, 1, MeanOps>", "reduction"),
        ("Memcpy HtoD (Pinned -> Device)", "copy"),
        ("something_new", "other"),
    ],
)
def test_kernel_classes(name: str, kind: str) -> None:
    assert kernel_kind(name) == kind


def test_what_an_op_of_ours_launches_is_its_own() -> None:
    assert kernel_kind("aten::addmm", ["ppssl::maxout_image", "step"]) == "maxout_image"
    assert kernel_kind("aten::lerp_", ["aten::_foreach_lerp_"]) == "optimizer"
    assert kernel_kind("aten::addmm", ["aten::linear"]) == "matmul"


def gpu_events() -> list[SimpleNamespace]:
    """What torch.profiler gives on a GPU for a convolution (60 us), our op (30 us) and a replayed kernel (10 us)."""
    kernel = namedtuple("kernel", ["name", "device", "duration"])

    def cpu(name: str, launched: list, annotation: bool = False, spent: float = 5.0) -> SimpleNamespace:
        return SimpleNamespace(
            name=name, device_type=DeviceType.CPU, is_user_annotation=annotation, cpu_parent=None,
            kernels=[kernel(n, 0, d) for n, d in launched], self_cpu_time_total=spent, cpu_time_total=spent,
        )  # fmt: skip

    def gpu(name: str, spent: float, annotation: bool = False) -> SimpleNamespace:
        return SimpleNamespace(
            name=name, device_type=DeviceType.CUDA, is_user_annotation=annotation, kernels=[],
            self_device_time_total=spent, time_range=SimpleNamespace(start=100.0, end=100.0 + spent),
        )  # fmt: skip

    return [
        cpu("aten::cudnn_convolution", [("sm90_xmma_fprop", 60.0)]),
        cpu("ppssl::gradcam", [("_scale_kernel", 30.0)]),
        cpu("cudaGraphLaunch", []),
        cpu("cam", [], annotation=True, spent=40.0),
        gpu("sm90_xmma_fprop", 60.0),
        gpu("_scale_kernel", 30.0),
        gpu("triton_poi_fused_add_1", 10.0),
        gpu("cam", 99.0, annotation=True),
    ]


def test_gpu_time_is_the_kernels() -> None:
    assert [(r.kind, r.calls, r.microseconds) for r in kernels(gpu_events())] == [
        ("conv", 1, 60.0),
        ("gradcam", 1, 30.0),
        ("elementwise", 1, 10.0),
    ]
    text = report(gpu_events(), steps=1, seconds=2e-4)
    assert "GPU kernels 0.10 ms" in text
    assert "conv" in text and "60.0 %" in text
    part = next(line for line in text.splitlines() if line.startswith("cam"))
    assert part.split() == ["cam", "1", "0.040", "20.0", "%"]


def test_only_one_listener_on_a_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("NSYS_PROFILING_SESSION_ID", "1")
    assert not Profile(tmp_path, steps=1, device="cpu").under_nsight
    assert Profile(tmp_path, steps=1, device="cuda").under_nsight
    for name in [name for name in os.environ if name.startswith(profiling._NSIGHT)]:
        monkeypatch.delenv(name)
    assert not Profile(tmp_path, steps=1, device="cuda").under_nsight
