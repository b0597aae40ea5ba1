"""``run.compile``: the whole step is one graph in which no pass is wasted, and every mode computes what eager computes.

No GPU is needed: a counting backend sees the graph that Inductor would get.
"""

import collections
import copy
import shutil

import pytest
import torch
import torch.nn.functional as F
from functorch.compile import make_boxed_func
from small_methods import DIM, QUEUE, batch, build_by_name, build_moco, build_ppssl, step_of
from torch._dynamo.backends.common import aot_autograd

from engine.training import precision
from engine.training.step import Step, choose
from ppssl import METHODS, PPSSL
from ppssl.encoder import BaseTrunk, FeatureNet, MaskBranch, Trunk, projection_head
from ppssl.method import Method
from ppssl.settings import Sections, method_settings, replace_keys, variant
from ppssl.teacher import Teacher


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def count_convolutions(method: Method, amp: str | None = None) -> collections.Counter:
    """Convolution passes of one step by kind: forward, or the (data, weight) gradients that a backward computes."""
    graphs = []

    def counting(graph: torch.fx.GraphModule, _inputs):
        graphs.append(graph)
        return make_boxed_func(graph.forward)

    backend = aot_autograd(fw_compiler=counting, bw_compiler=counting, inference_compiler=counting)
    step_of(method, compile="step", backend=backend, amp=amp)(batch(2))
    assert len(graphs) == 1 and not torch._dynamo.utils.counters["graph_break"]
    counts = collections.Counter()
    for node in graphs[0].graph.nodes:
        if node.target is torch.ops.aten.convolution.default:
            counts["forward"] += 1
        elif node.target is torch.ops.aten.convolution_backward.default:
            counts[tuple(node.args[-1][:2])] += 1
    return counts


ARCH = "resnet10_w8"
DATA, BOTH, WEIGHT = (True, False), (True, True), (False, True)


@pytest.mark.parametrize(
    ("build", "expected"),
    [
        # query and key forward; CAM: data gradients down to the image; loss: both, but no data gradient of the first layer
        (lambda: build_ppssl(ARCH, "published"), {"forward": 24, DATA: 12, BOTH: 11, WEIGHT: 1}),
        (lambda: build_ppssl(ARCH, "guided"), {"forward": 24, DATA: 12, BOTH: 11, WEIGHT: 1}),
        (lambda: build_moco(ARCH), {"forward": 24, BOTH: 11, WEIGHT: 1}),
        # CAM at layer4: its gradient passes the head alone
        (lambda: build_ppssl(ARCH, "guided", {"iadm.sources": ("layer4",)}), {"forward": 24, BOTH: 11, WEIGHT: 1}),
        # the original as a third image: its CAM pass and its loss pass (through the mask that is fitted)
        (lambda: build_ppssl(ARCH, "guided", {"iadm.image": "clean"}), {"forward": 36, DATA: 12, BOTH: 22, WEIGHT: 2}),
        # LCR's gradient passes the head alone
        (lambda: build_by_name("lcr", Trunk(ARCH)), {"forward": 24, BOTH: 11, WEIGHT: 1}),
        # trunk (12) and decoder (4 x 3 + 1, and one transposed convolution): twice each and forward; the drawn key, and the
        # altered image, need no gradient, and nothing goes back from the encoder into the image that it was given
        (lambda: build_by_name("ldfs", Trunk(ARCH)), {"forward": 48 + 28, BOTH: 2 * 11 + 14, WEIGHT: 2}),
    ],
    ids=["ppssl published", "ppssl guided", "moco", "cam at layer4", "cam of the original", "lcr", "ldfs"],
)
def test_the_step_is_one_graph_without_a_wasted_pass(build, expected: dict) -> None:
    assert count_convolutions(build()) == expected


def test_bf16_changes_no_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "cpu_has_bf16", lambda: True)  # emulated, where it is not
    assert count_convolutions(build_ppssl(ARCH, "published"), amp="bf16") == {"forward": 24, DATA: 12, BOTH: 11, WEIGHT: 1}


def test_the_teacher_that_looks_at_the_view_is_part_of_the_graph() -> None:
    visual = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(3, 5))
    teacher = Teacher(visual, torch.randn(8, 5), logit_scale=10.0, image_size=32, mean=(0.0,) * 3, std=(1.0,) * 3)
    counts = count_convolutions(build_ppssl(ARCH, "published", embed=teacher.embed))
    assert counts == {"forward": 24, DATA: 12, BOTH: 11, WEIGHT: 1}


class ShallowTrunk(Trunk):
    """A trunk that traces quickly: one convolution with batch-norm."""

    def __init__(self) -> None:
        torch.nn.Module.__init__(self)
        self.arch, self.channels, self.stride = "shallow", 8, 8
        self.conv, self.bn = torch.nn.Conv2d(3, 8, 8, stride=8), torch.nn.BatchNorm2d(8)

    def maps(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"layer4": F.relu(self.bn(self.conv(images)))}


def run(method: Method, steps: int, **options) -> tuple[list[float], dict[str, torch.Tensor], Step]:
    step = step_of(copy.deepcopy(method), **options)
    torch.manual_seed(1)  # of the noise that a method may draw
    totals = [float(step(batch(side=32, seed=s)).total) for s in range(steps)]
    return totals, step.method.state_dict(), step


@pytest.mark.parametrize("mode", ["encoder", "step"])
@pytest.mark.parametrize("name", ["moco", "published", "guided", "lcr", "ldfs", "simclr", "byol"])
def test_every_mode_computes_the_eager_step(mode: str, name: str) -> None:
    if name in ("moco", "published", "guided"):
        arch = "resnet10_w8_s16"
        method = build_moco(arch) if name == "moco" else build_ppssl(arch, name)
    else:
        torch.manual_seed(0)
        method = build_by_name(name, ShallowTrunk(), side=32)
    eager, compiled = (step_of(copy.deepcopy(method), **how) for how in ({}, {"compile": mode, "backend": "aot_eager"}))
    for number in range(3):
        # from the same state: whether a ReLU or a maximum is on one side or the other depends on rounding, and a step amplifies it
        compiled.method.load_state_dict(eager.method.state_dict())
        compiled.load_state_dict(copy.deepcopy(eager.state_dict()))
        totals = []
        for step in (eager, compiled):
            torch.manual_seed(number)  # of the noise that a method may draw
            totals.append(float(step(batch(side=32, seed=number)).total))
        assert totals[1] == pytest.approx(totals[0], rel=1e-5)
        state, compiled_state = eager.method.state_dict(), compiled.method.state_dict()
        assert compiled_state.keys() == state.keys()  # no compile prefix in the names
        for key, value in state.items():
            if value.is_floating_point():
                error = (compiled_state[key] - value).abs().max()
                assert error <= 2e-4 * value.abs().max() + 1e-7, f"{key}: {float(error):.2e}"
    assert "queue.pointer" not in state or int(compiled_state["queue.pointer"]) == 12
    assert compiled.state_dict()["step"] == 3


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("moco", {"contrast.negatives": "both", "contrast.symmetric": True, "queue.start": "empty"}),
        ("moco", {"contrast.negatives": "batch", "contrast.gradient": "both"}),
        (
            "lcr",
            {"contrast.negatives": "both", "contrast.symmetric": True, "contrast.gradient": "both", "method.variant": "guided"},
        ),
        ("ppssl", {"contrast.symmetric": True, "contrast.gradient": "both", "ais.target": "relations", "method.variant": "guided"}),
        ("ppssl", {"contrast.negatives": "batch", "ais.target": "image", "teacher.view": "clean"}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(map(str, value.values())),
)
def test_the_step_of_every_switch_is_one_graph_that_computes_the_eager_step(name: str, values: dict) -> None:
    """In one graph whatever the queue holds: a break is an error (``fullgraph``), and so is a second graph."""
    torch.manual_seed(0)
    sections = replace_keys(
        Sections(), {"method.name": name, "encoder.dim": DIM, "queue.size": 10, "queue.dtype": "float32"} | values
    )
    settings, kind = method_settings(sections, 32), METHODS[name]
    teacher = Teacher(torch.nn.Identity(), None, image_size=32, mean=(0.0,) * 3, std=(1.0,) * 3, dim=5)
    method = kind.from_settings(settings, kind.build_network(settings, ShallowTrunk()), teacher if settings.uses_teacher else None)
    totals, state, _ = run(method, 4)
    with torch._dynamo.config.patch(error_on_recompile=True):
        compiled_totals, compiled_state, _ = run(method, 4, compile="step", backend="aot_eager")
    assert compiled_totals == pytest.approx(totals, rel=1e-4)
    assert state.keys() == compiled_state.keys() and ("queue.rows" in state) == (values.get("contrast.negatives") != "batch")
    if "queue.filled" in state:
        assert int(state["queue.filled"]) == int(compiled_state["queue.filled"]) == 10


class OneConvolution(BaseTrunk):
    """The smallest trunk, for the compiler that takes seconds per layer."""

    channels, stride = 8, 8

    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 8, 8, stride=8)

    def maps(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"layer4": F.relu(self.conv(images))}


@pytest.mark.skipif(shutil.which("c++") is None and shutil.which("g++") is None, reason="Inductor needs a C++ compiler")
def test_inductor_computes_the_eager_step() -> None:
    torch.manual_seed(0)
    network = FeatureNet(OneConvolution(), MaskBranch(8, 4, minmax="image"))
    head = projection_head("mlp2", 8, DIM)
    method = PPSSL(network, head, torch.randn(8, 5), settings=variant("ppssl", "guided"), dim=DIM, queue_size=QUEUE)
    totals, _, _ = run(method, 2)
    compiled_totals, _, _ = run(method, 2, compile="step")
    assert compiled_totals == pytest.approx(totals, rel=1e-4)


def test_a_run_may_change_its_mode_at_a_checkpoint() -> None:
    """Eager's momentum is what the compiled step continues, and the reverse."""
    method = build_moco("resnet10_w8_s16")
    totals, _, _ = run(method, 4)
    for first, second in (("off", "step"), ("step", "off")):
        a = step_of(copy.deepcopy(method), compile=first, backend="aot_eager")
        mixed = [float(a(batch(side=32, seed=s)).total) for s in range(2)]
        other = copy.deepcopy(method)
        b = step_of(other, compile=second, backend="aot_eager")
        other.load_state_dict(copy.deepcopy(a.method.state_dict()))
        b.load_state_dict(copy.deepcopy(a.state_dict()))
        mixed += [float(b(batch(side=32, seed=s)).total) for s in range(2, 4)]
        assert mixed == pytest.approx(totals, rel=1e-5)


def test_unknown_modes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"run\.compile: 'fast'"):
        step_of(build_moco(ARCH), compile="fast")


def test_auto_picks_by_device_and_says_why() -> None:
    cpu = precision.Precision(torch.device("cpu"), torch.bfloat16, False, "")
    gpu = precision.Precision(torch.device("cuda"), torch.bfloat16, False, "")
    scaled = precision.Precision(torch.device("cuda"), torch.float16, True, "")
    assert choose("auto", "auto", cpu)[:2] == ("off", False) and "CPU" in choose("auto", "auto", cpu).note
    assert choose("auto", "auto", gpu)[:2] == ("step", False)
    assert choose("auto", "auto", scaled)[:2] == ("encoder", False)
    assert choose("off", "on", gpu)[:2] == ("off", True)
    for compile, graph, where in (("step", "off", scaled), ("off", "on", cpu), ("encoder", "on", gpu), ("auto", "on", scaled)):
        with pytest.raises(ValueError, match=r"run\.(compile|cuda_graph)"):
            choose(compile, graph, where)


def test_the_update_that_a_graph_replays_is_the_optimisers() -> None:
    """A CUDA graph reads the learning rate from the device; run as it is, that update equals the optimizer's own."""
    method = build_moco("resnet10_w8_s16")
    totals, state, _ = run(method, 3)
    step = step_of(copy.deepcopy(method))
    step.run = step._whole
    assert [float(step(batch(side=32, seed=s)).total) for s in range(3)] == pytest.approx(totals, rel=1e-6)
    name = "encoder_q.trunk.conv1.weight"  # weights up to 0.3, of which some are next to 0
    torch.testing.assert_close(step.method.state_dict()[name], state[name], rtol=1e-5, atol=1e-7)


def test_one_graph_serves_every_learning_rate() -> None:
    graphs: list[int] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]):
        graphs.append(len(inputs))
        return graph.forward

    step = step_of(build_moco(ARCH), compile="step", backend=backend)
    rates = set()
    for _ in range(4):
        step(batch(2))
        rates.add(float(step.rate))
    assert len(rates) == 4 and len(graphs) == 1


def test_inductor_meets_no_op_of_ours_unprepared() -> None:
    """An op that it does not know is logged with everything that its arguments were made from, for hours behind a deep trunk."""
    from torch._inductor.lowering import lowerings, needs_realized_inputs
    from torch._library.custom_ops import OPDEFS

    step_of(build_moco(ARCH), compile="step", backend="inductor")  # nothing is compiled before the first step
    ours = [definition._opoverload for name, definition in OPDEFS.items() if name.startswith("ppssl::")]
    assert torch.ops.ppssl.batch_norm.default in ours and torch.ops.ppssl.batch_norm_backward.default in ours
    assert all(op in lowerings and op in needs_realized_inputs for op in ours)
