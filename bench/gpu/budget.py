"""What one training step costs on a GPU, by arithmetic: launches, bytes and operations of the compiled step, without a GPU.

    python -m bench.gpu.budget                            the small form of every method (two minutes)
    python -m bench.gpu.budget --full --method ppssl      ResNet-50, 224 px, B 128, K 65536, D 256 (a minute or two each)
    python -m bench.gpu.budget --bn torch --combo off     another batch-norm, and without combined kernels; shown, not recorded
    python -m bench.gpu.budget --check                    the small form against budget.json, for CI
    python -m bench.gpu.budget [--full] --update          writes budget.json

The step runs on fake CUDA tensors (bench/gpu/fake_cuda): eagerly, where a host sync, a tensor on another device and the launches of
the project's own Triton kernels are seen; and through Inductor to generated code, of which every kernel is counted. This is a
model and no measurement: bench/README.md explains it.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import hashlib
import importlib.metadata
import json
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

from bench.gpu import fake_cuda
from bench.gpu.cards import CARDS
from engine.console import console, say
from engine.files import write_text

RECORD = Path(__file__).with_name("budget.json")
METHODS = ("ppssl", "moco", "lcr")
RUNGS = {"ppssl": "compiled", "moco": "moco compiled", "lcr": "lcr compiled"}
SLACK = 1.02
"""How far ``--check`` lets launches and bytes exceed the record."""
TORCH = importlib.metadata.version("torch").partition("+")[0]
COPY_SHARE, MATRIX_SHARE, LAUNCH = 0.8, 0.65, 2e-6
"""What is expected of a kernel: the share of the bandwidth it reaches, the share of the roofline of a matrix product, and the
seconds that the smallest kernel takes."""
ROOT = Path(__file__).resolve().parents[2]


class Cost(NamedTuple):
    """One kernel, or a sum of kernels of one kind."""

    kind: str
    launches: int
    read: int
    """Bytes."""
    written: int
    """Bytes."""
    flop: float = 0.0
    """Operations of matrix products; a multiplication and an addition are two."""

    def seconds(self, card: str, copy_share: float = 1.0, matrix_share: float = 1.0, launch: float = 0.0) -> float:
        """The roofline of ``card``, or what is expected with shares of it."""
        bandwidth, rate = 1e9 * CARDS[card].gb_s, 1e12 * CARDS[card].tflop_s
        if self.flop:
            return max((self.read + self.written) / bandwidth, self.flop / rate) / matrix_share
        return max((self.read + self.written) / bandwidth / copy_share, self.launches * launch)


class Seen(NamedTuple):
    """What the eager step shows."""

    own: list[Cost]
    """The project's own ops."""
    cpu_tensors: int
    """Tensors of more than one number that are not on the device."""
    float32_images: int
    """Float32 results as large as a batch of images."""
    copies: int
    """Casts and copies of tensors as large as a batch of images."""


class _Generated(Exception):
    """Raised where the generated code would be loaded."""


def measure(method: str, size: Any, *, bn: str = "fused", combo: bool = True) -> tuple[list[Cost], Seen]:
    """(every kernel of the compiled step, what the eager step shows) of ``method`` at ``size`` (bench_step.Size). bn: ``bn.impl``,
    fused or torch. combo: whether Inductor may put small kernels into one launch, which the step lets it.

    Raises ``DataDependentOutputException`` for a step that reads a value on the host. Call within ``fake_cuda.gpu()``.
    """
    with fake_cuda.benchmark() as bench_step:
        rung = bench_step.RUNGS[RUNGS[method]]._replace(fused_bn=bn == "fused", combo=combo)
        seen = _eager(bench_step.build_step(size, rung._replace(compile="off")), size)
        kernels = _compiled(bench_step.build_step(size, rung))
    return with_own_ops(kernels, seen.own), seen


def with_own_ops(kernels: list[Cost], own: list[Cost]) -> list[Cost]:
    """``kernels`` with what the eager step's calls of each own op cost in place of Inductor's figures, which know the tensors of an
    op that it cannot see into and not its launches; by the number of calls where a compiled step makes fewer."""
    calls = {kind: sum(cost.kind == kind for cost in kernels) for kind in dict.fromkeys(cost.kind for cost in own)}
    found = [cost for cost in kernels if cost.kind not in calls]
    for kind, count in calls.items():
        eager = [cost for cost in own if cost.kind == kind]
        share = count / len(eager)
        total = by_kind(eager)[kind]
        found.append(total._replace(launches=round(share * total.launches), read=round(share * total.read)))
    return found


def _eager(step: Callable[[], Any], size: Any) -> Seen:
    from torch import Tensor, float32
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    image = size.batch * 3 * size.side**2
    found: dict[str, int] = defaultdict(int)
    own: list[Cost] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
            result = func(*args, **(kwargs or {}))
            given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
            made = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
            found["cpu"] += sum(t.device.type == "cpu" and t.numel() > 1 for t in given)
            large = [t for t in made if t.numel() >= image]
            if func.namespace == "ppssl":
                own.append(_own_op(func, args, kwargs))
            elif large and func._schema.name in ("aten::_to_copy", "aten::clone", "aten::copy_"):
                found["copies"] += 1
            found["float32"] += sum(t.dtype == float32 for t in large if func._schema.name != "aten::detach")
            return result

    with Watch():
        step()
    return Seen(own, found["cpu"], found["float32"], found["copies"])


def _own_op(func: Any, args: tuple, kwargs: dict | None) -> Cost:
    """The launches of a custom op of this project, by running its implementation with Triton's launcher replaced."""
    from torch.utils._python_dispatch import TorchDispatchMode

    moved: list[int] = []  # bytes of every launch: each tensor once, whatever a kernel reads twice

    def launch(self: Any, *given: Any, grid: Any, warmup: bool, **options: Any) -> None:
        moved.append(_bytes((given, options)))

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
            result = func(*args, **(kwargs or {}))
            cast = func._schema.name == "aten::to" and result.dtype != args[0].dtype
            free = func.is_view or func._schema.name.startswith(("aten::empty", "aten::new_empty", "aten::detach", "prim::"))
            if cast or not free:
                moved.append(_bytes((args, kwargs, result)))
            return result

    with Watch():
        fake_cuda.run_op(func, args, kwargs, launch)
    return Cost(f"own op {func._schema.name.removeprefix('ppssl::')}", len(moved), sum(moved), 0)


def _bytes(tree: Any) -> int:
    from torch import Tensor
    from torch.utils._pytree import tree_leaves

    tensors = {id(leaf): leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)}
    return sum(t.numel() * t.element_size() for t in tensors.values())


def _compiled(step: Callable[[], Any]) -> list[Cost]:
    from torch._inductor.codegen.wrapper import PythonWrapperCodegen
    from torch._inductor.graph import GraphLowering

    launches: dict[str, int] = defaultdict(int)
    found: list[Cost] = []
    call = PythonWrapperCodegen.generate_kernel_call

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        from torch._inductor.virtualized import V

        launches[V.graph.scheduler.current_node.get_name()] += 1
        return call(self, *args, **kwargs)

    def generate(self: Any) -> None:
        self.codegen()
        for node in self.scheduler.nodes:
            found.extend(_cost(node, launches[node.get_name()]))
        raise _Generated

    with (
        patch.object(PythonWrapperCodegen, "generate_kernel_call", counted),
        patch.object(GraphLowering, "compile_to_module", generate),
        contextlib.suppress(_Generated),
    ):
        try:
            step()
        except Exception as error:  # Dynamo wraps what is raised below it
            if "_Generated" not in repr(error):
                raise
    if not found:
        raise RuntimeError("budget: the step was not compiled as one graph")
    return found


def _cost(node: Any, triton_launches: int) -> Iterator[Cost]:
    from torch._inductor import ir
    from torch._inductor.dependencies import WeakDep

    def moved(part: Any) -> tuple[int, int]:
        accesses = part.get_read_write_buffer_accesses(include_reads=True, include_writes=True)
        reads = part.read_writes.reads
        order = {d.name for d in reads if isinstance(d, WeakDep)} - {d.name for d in reads if not isinstance(d, WeakDep)}
        accesses = {name: size for name, size in accesses.items() if name not in order}  # only waited for, before a write in place
        made = {dependency.name for dependency in part.read_writes.writes}
        written = int(sum(size for name, size in accesses.items() if name in made))
        return int(sum(accesses.values())) - written, written

    inner = node.get_nodes()[0].node
    if isinstance(inner, ir.MultiOutput) or type(node).__name__ == "NopKernelSchedulerNode":
        return
    if node.is_foreach():  # one launch for many small kernels, which need not be of one kind
        parts = by_kind([Cost(_kind(part), 0, *moved(part)) for part in node.get_subkernel_nodes()])
        largest = next(iter(parts))
        yield from (part._replace(launches=triton_launches * (part.kind == largest)) for part in parts.values())
        return
    read, written = moved(node)
    if not node.is_extern():
        yield Cost(_kind(node), triton_launches, read, written)
        return
    name = str(getattr(inner, "python_kernel_name", None) or getattr(inner, "op_overload", inner))
    flop = _flop(node)
    if "ppssl." in name:
        yield Cost(f"own op {name.split('ppssl.')[1].split('.')[0]}", 1, read, written)
    elif "convolution" in name:
        gradients = sum(isinstance(user.node.node, ir.MultiOutput) for out in node.get_outputs() for user in out.users)
        yield Cost("convolution", max(1, gradients), read, written, flop)
    else:
        yield Cost("linear" if flop else f"library {name.rsplit('.', 2)[-2] if '.' in name else name}", 1, read, written, flop)


def _flop(node: Any) -> float:
    """Operations of a library's product. Inductor's own estimate knows nothing of a kernel with several results, which the backward
    pass of a convolution is."""
    from torch._inductor.fx_utils import count_flops_fx

    if found := node.estimate_flops():
        return float(found)
    inner = node.get_nodes()[0].node
    return max((float(count_flops_fx(o) or 0) for o in inner.get_origins() if "convolution_backward" in str(o.target)), default=0.0)


def _kind(node: Any) -> str:
    """What a generated kernel is there for, by the operations of the eager step that it came from."""
    origins = set()
    for part in node.get_nodes():
        for origin in part.node.get_origins() if part.node is not None else ():
            origins.add(str(origin.meta.get("original_aten", origin.target)).removeprefix("aten."))
    has = lambda *names: any(origin.startswith(names) for origin in origins)  # noqa: E731
    if has("_foreach_add", "_foreach_mul", "_foreach_sub") and not node.is_reduction():
        return "EMA and optimizer"
    if has("native_batch_norm_backward"):
        return "batch-norm backward"
    if has("_native_batch_norm", "native_batch_norm", "cudnn_batch_norm"):
        return "batch-norm forward"
    if origins == {"_to_copy.default"}:
        return "casts"
    return "other"


def by_kind(costs: list[Cost]) -> dict[str, Cost]:
    """Sums, the most bytes first."""
    kinds: dict[str, Cost] = {}
    for cost in costs:
        before = kinds.get(cost.kind, Cost(cost.kind, 0, 0, 0))
        kinds[cost.kind] = Cost(cost.kind, *(a + b for a, b in zip(before[1:], cost[1:], strict=True)))
    return dict(sorted(kinds.items(), key=lambda item: -item[1].read - item[1].written))


def source() -> str:
    """A hash over the code that the step consists of, the defaults of the settings among it; comments, docstrings and layout do not
    count."""
    digest = hashlib.sha256()
    training = [ROOT / "engine/training" / f"{name}.py" for name in ("step", "guard", "inductor", "optim", "precision")]
    kernels = sorted(set((ROOT / "kernels").glob("*.py")) - {ROOT / "kernels/aot.py"})
    for path in [*sorted((ROOT / "ppssl").rglob("*.py")), *kernels, *training]:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            body = getattr(node, "body", None)
            if isinstance(body, list):
                node.body = [part for part in body if not (isinstance(part, ast.Expr) and isinstance(part.value, ast.Constant))]
        digest.update(f"{path.name}\n{ast.dump(tree)}\n".encode())
    return digest.hexdigest()[:16]


def record_of(costs: list[Cost], seen: Seen) -> dict[str, Any]:
    """What is kept of a measurement."""
    kinds = by_kind(costs)
    triton = [cost for cost in costs if not cost.flop]
    return {
        "source": source(),
        "torch": TORCH,
        "launches": sum(cost.launches for cost in triton),
        "gigabytes": round(sum(cost.read + cost.written for cost in triton) / 1e9, 4),
        "cpu_tensors": seen.cpu_tensors,
        "float32_images": seen.float32_images,
        "copies": seen.copies,
        "kinds": {kind: [c.launches, c.read, c.written, round(c.flop)] for kind, c in kinds.items()},
        "ms": {
            card: {
                "floor": round(1e3 * sum(c.seconds(card) for c in costs), 2),
                "expected": round(1e3 * sum(c.seconds(card, COPY_SHARE, MATRIX_SHARE, LAUNCH) for c in costs), 2),
            }
            for card in CARDS
        },
    }


def show(method: str, form: str, size: Any, record: dict[str, Any]) -> None:
    """Prints one record."""
    from rich.table import Table

    table = Table("kind", "launches", "GB read", "GB written", "TFLOP", title=f"{method}, {form}: {size}", title_justify="left")
    for kind, (launches, read, written, flop) in record["kinds"].items():
        table.add_row(kind, f"{launches}", f"{read / 1e9:.3f}", f"{written / 1e9:.3f}", f"{flop / 1e12:.3f}" if flop else "")
    console.print(table)
    say(
        f"{record['launches']} launches and {record['gigabytes']} GB outside of convolutions and matrix products; "
        f"{record['cpu_tensors']} tensors on another device; of the size of the images {record['float32_images']} float32 results "
        f"and {record['copies']} copies"
    )
    for card, ms in record["ms"].items():
        rate = f"{1e3 * size.batch / ms['floor']:,.0f} and {1e3 * size.batch / ms['expected']:,.0f} img/s"
        say(f"{card}: floor {ms['floor']} ms, expected {ms['expected']} ms ({rate})")


def problems(kept: dict[str, Any], form: str, method: str, record: dict[str, Any]) -> list[str]:
    """Why ``--check`` fails: what exceeds the record, and a record of the full form that is of another source."""
    found = []
    before = kept.get(form, {}).get(method)
    if before is None:
        return [f"{method}: budget.json has no {form} record; run python -m bench.gpu.budget --update"]
    for name in ("launches", "gigabytes"):
        if record[name] > SLACK * before[name]:
            found.append(f"{method}: {record[name]} {name}, the record has {before[name]}; take them out, or --update and say why")
    for name in ("cpu_tensors", "float32_images", "copies"):
        if record[name] > before[name]:
            found.append(f"{method}: {record[name]} {name}, the record has {before[name]}")
    full = kept.get("full", {}).get(method, {}).get("source")
    if full != record["source"]:
        found.append(f"{method}: the full record is of another source of the step; run python -m bench.gpu.budget --full --update")
    return found


def unchanged(kept: dict[str, Any]) -> bool:
    """Whether every record is of the step as it is, compiled by this torch."""
    now = {"source": source(), "torch": TORCH}.items()
    return all(now <= kept.get(form, {}).get(method, {}).items() for form in ("small", "full") for method in METHODS)


def main() -> int:
    """Returns the exit code: 0 done, 1 the check failed."""
    parser = argparse.ArgumentParser("python -m bench.gpu.budget", description=__doc__.split("\n\n")[0])
    parser.add_argument("--method", choices=METHODS, help="one of them (default: all)")
    parser.add_argument("--full", action="store_true", help="ResNet-50 at 224 pixels, B 128")
    parser.add_argument("--bn", choices=("fused", "torch"), default="fused", help="bn.impl (default: fused, as auto is)")
    parser.add_argument("--combo", choices=("on", "off"), default="on", help="small kernels combined (default: on, as the step)")
    parser.add_argument("--update", action="store_true", help="write the record")
    parser.add_argument("--check", action="store_true", help="fail where the small form exceeds the record")
    parser.add_argument("--if-changed", action="store_true", help="with --check: nothing, where all records are of this very step")
    args = parser.parse_args()
    if (args.bn, args.combo) != ("fused", "on") and (args.update or args.check):
        parser.error("--bn and --combo are only shown: the record is that of the defaults")
    kept = json.loads(RECORD.read_text()) if RECORD.is_file() else {}
    if args.check and args.if_changed and unchanged(kept):
        say(f"budget.json is of this very step, with torch {TORCH}: nothing to check")
        return 0
    if why := fake_cuda.missing():
        say(f"no budget here: {why}")
        return 0
    fake_cuda.restart()
    form = "full" if args.full else "small"
    wrong: list[str] = []
    with fake_cuda.gpu():
        from bench.bench_step import size_of

        size = size_of(form)
        for method in [args.method] if args.method else METHODS:
            record = record_of(*measure(method, size, bn=args.bn, combo=args.combo == "on"))
            show(method, form, size, record)
            if args.update:
                kept = json.loads(RECORD.read_text()) if RECORD.is_file() else {}  # another method may have been written meanwhile
                kept.setdefault(form, {})[method] = record
                write_text(RECORD, json.dumps(kept, indent=1) + "\n")
            elif args.check:
                wrong += problems(kept, form, method, record)
    for line in wrong:
        say(line)
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
