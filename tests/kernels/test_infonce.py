"""Queue InfoNCE and the ring buffer: every path against float64, and the edges of the contract."""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from error_budget import assert_within_budget, upstream
from torch.utils._python_dispatch import TorchDispatchMode

import kernels
from kernels import infonce as module

INTERPRETED = not torch.cuda.is_available()


class Case(NamedTuple):
    batch: int
    size: int
    dim: int
    temperature: float
    why: str


CASES = [
    Case(5, 100, 32, 0.2, "ragged last block and split"),
    Case(16, 96, 64, 0.2, "whole blocks"),
    Case(1, 1, 7, 0.07, "one query, one negative, odd width"),
    Case(20, 70, 24, 0.01, "two tiles of queries, low temperature"),
    Case(3, 40, 300, 0.1, "wider than one accumulator"),
]
PATHS = [("chunked", torch.float32), ("chunked", torch.bfloat16), ("triton", torch.float32), ("triton", torch.float16)]
if not INTERPRETED:  # the interpreter truncates to bfloat16 where a GPU rounds
    PATHS.append(("triton", torch.bfloat16))


def inputs(case: Case, dtype: torch.dtype, device: torch.device, seed: int = 0) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)

    def rows(count):
        return torch.randn(count, case.dim, generator=generator)

    q = F.normalize(rows(case.batch), dim=1)
    k = F.normalize(q + 0.3 * rows(case.batch), dim=1)
    queue = F.normalize(rows(case.size), dim=1)
    return tuple(tensor.to(device, dtype) for tensor in (q, k, queue))


def run(function, q, k, queue, grad, **options):
    """[loss, rank, dq, dk] for a random upstream gradient."""
    q, k = q.detach().requires_grad_(), k.detach().requires_grad_()
    loss, rank = function(q, k, queue, return_rank=True, reduction="none", **options)
    return [loss, rank, *torch.autograd.grad((loss * grad.to(loss)).sum(), (q, k))]


@pytest.mark.parametrize(("impl", "dtype"), PATHS, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.why)
def test_matches_float64(case, impl, dtype, kernel_device, poisoned_empty):
    device = kernel_device if impl == "triton" else torch.device("cpu")
    tensors = inputs(case, dtype, device)
    grad = upstream(tensors[0][:, 0], 1)
    options = {"temperature": case.temperature}
    truth = run(kernels.reference.infonce, *(t.double() for t in tensors), grad, **options)
    eager = run(kernels.reference.infonce, *tensors, grad, **options)
    ours = run(kernels.queue_infonce, *tensors, grad, impl=impl, **options)
    for name, mine, theirs, true in zip(("loss", "rank", "dq", "dk"), ours, eager, truth, strict=True):
        if name == "rank":
            assert torch.equal(mine, true)
        else:
            # Scores up to 1/T carry a float32 rounding of 1/T units, eager code's no less than ours.
            assert_within_budget(name, mine, theirs, true, units=4 + 1 / case.temperature)


@pytest.mark.parametrize("impl", ["chunked", "triton"])
def test_stacked_queries_equal_two_calls(impl, kernel_device):
    q, k, queue = inputs(CASES[0], torch.float32, kernel_device)
    other = F.normalize(q.roll(1, 0), dim=1)
    stacked = torch.stack([q, other]).requires_grad_()
    loss, rank = kernels.queue_infonce(stacked, k, queue, temperature=0.2, return_rank=True, impl=impl)
    assert loss.shape == (2,) and rank.shape == (2, 5)
    gradient = torch.autograd.grad((loss * torch.tensor([0.3, -1.7], device=loss.device)).sum(), stacked)[0]
    for position, (one, weight) in enumerate(((q, 0.3), (other, -1.7))):
        one = one.detach().requires_grad_()
        single = kernels.queue_infonce(one, k, queue, temperature=0.2, impl=impl)
        torch.testing.assert_close(loss[position], single)
        torch.testing.assert_close(gradient[position], weight * torch.autograd.grad(single, one)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.why)
def test_own_rows_are_left_out_as_if_the_queue_did_not_hold_them(case, dtype, poisoned_empty):
    q, k, queue = inputs(case, dtype, torch.device("cpu"))
    index, queue_index = torch.arange(case.batch), torch.arange(case.size) % (case.batch + 2)
    queue = torch.where((queue_index < case.batch)[:, None], q[queue_index.clamp(max=case.batch - 1)], queue)  # stale twins win
    grad = upstream(q[:, 0], 1)
    options = {"temperature": case.temperature, "exclude": (index, queue_index)}
    ours = run(kernels.queue_infonce, q, k, queue, grad, impl="chunked", **options)
    eager = run(kernels.reference.infonce, q, k, queue, grad, **options)
    truths = []
    for i in range(case.batch):
        one, kept = slice(i, i + 1), queue[queue_index != i]
        row = [t.double() for t in (q[one], k[one], kept)]
        if len(kept):
            truths.append(run(kernels.reference.infonce, *row, grad[one], temperature=case.temperature))
        else:  # every row is excluded: no negative is left
            truths.append([torch.zeros(1).double(), torch.zeros(1).long(), torch.zeros_like(row[0]), torch.zeros_like(row[0])])
    truth = [torch.cat(parts) for parts in zip(*truths, strict=True)]
    assert torch.equal(ours[1], truth[1])
    for name, mine, theirs, true in zip(("loss", "rank", "dq", "dk"), ours, eager, truth, strict=True):
        if name != "rank":
            assert_within_budget(name, mine, theirs, true, units=4 + 1 / case.temperature)


def test_own_rows_of_stacked_queries_in_a_graph_and_their_contract():
    q, k, queue = inputs(CASES[0], torch.float32, torch.device("cpu"))
    exclude = torch.arange(5), torch.arange(100) % 7
    loss = kernels.queue_infonce(torch.stack([q, q]), k, queue, temperature=0.2, exclude=exclude)
    expected = kernels.queue_infonce(q, k, queue, temperature=0.2, exclude=exclude, impl="reference")
    torch.testing.assert_close(loss, torch.stack([expected, expected]))
    compiled = torch.compile(kernels.queue_infonce, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, k, queue, temperature=0.2, exclude=exclude), expected)
    with pytest.raises(TypeError, match="exclude must be int64"):
        kernels.queue_infonce(q, k, queue, temperature=0.2, exclude=(exclude[0], exclude[1].int()))
    with pytest.raises(ValueError, match="exclude must be"):
        kernels.queue_infonce(q, k, queue, temperature=0.2, exclude=(exclude[0], exclude[1][1:]))
    with pytest.raises(ValueError, match="does not exclude rows"):
        kernels.queue_infonce(q, k, queue, temperature=0.2, exclude=exclude, impl="triton")


@pytest.mark.parametrize(("impl", "dtype"), PATHS, ids=str)
@pytest.mark.parametrize("count", [0, 1, 41, 96, 100])
@pytest.mark.parametrize("case", [CASES[0], CASES[4]], ids=lambda case: case.why)
def test_a_count_is_a_shorter_queue(case, count, impl, dtype, kernel_device, poisoned_empty):
    device = kernel_device if impl == "triton" else torch.device("cpu")
    count = min(count, case.size)
    q, k, queue = inputs(case, dtype, device)
    queue[count:] = q[0]  # rows that would win
    grad = upstream(q[:, 0], 1)
    options = {"temperature": case.temperature}
    if count:
        truth = run(kernels.reference.infonce, q.double(), k.double(), queue[:count].double(), grad, **options)
    else:  # no negative
        truth = [torch.zeros(case.batch), torch.zeros(case.batch).long(), torch.zeros_like(q), torch.zeros_like(q)]
    options["count"] = torch.tensor(count, device=device)
    eager = run(kernels.reference.infonce, q, k, queue, grad, **options)
    ours = run(kernels.queue_infonce, q, k, queue, grad, impl=impl, **options)
    for name, mine, theirs, true in zip(("loss", "rank", "dq", "dk"), ours, eager, truth, strict=True):
        if name == "rank":
            assert torch.equal(mine, true.to(mine.device)) and torch.equal(theirs, mine)
        else:
            assert_within_budget(name, mine, theirs, true.double().to(mine.device), units=4 + 1 / case.temperature)


def test_a_count_is_exact_in_float64_with_excluded_rows_and_read_in_one_graph():
    q, k, queue = inputs(CASES[0], torch.float64, torch.device("cpu"))
    exclude = torch.arange(5), torch.arange(100) % 7
    graphs = []

    def backend(graph, _inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(kernels.queue_infonce, fullgraph=True, backend=backend)
    for count in (3, 50, 100):
        loss = compiled(q, k, queue, temperature=0.2, reduction="none", exclude=exclude, count=torch.tensor(count))
        for i in range(5):
            rows = [j for j in range(count) if j % 7 != i]
            logits = torch.cat([(q[i] * k[i]).sum()[None], queue[rows] @ q[i]]) / 0.2
            torch.testing.assert_close(loss[i], torch.logsumexp(logits, 0) - logits[0], rtol=1e-12, atol=1e-12)
    assert len(graphs) == 1
    with pytest.raises(TypeError, match="count must be an int64 tensor, got int"):
        kernels.queue_infonce(q, k, queue, temperature=0.2, count=3)
    with pytest.raises(TypeError, match=r"count must be an int64 tensor, got torch\.int32"):
        kernels.queue_infonce(q, k, queue, temperature=0.2, count=torch.tensor(3, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"count must be 0-d on cpu, got \[1\]"):
        kernels.queue_infonce(q, k, queue, temperature=0.2, count=torch.tensor([3]))


@pytest.mark.parametrize("impl", ["chunked", "triton"])
def test_strided_inputs(impl, kernel_device):
    q, k, queue = inputs(CASES[0], torch.float32, kernel_device)
    wide = torch.randn(5, 64, device=kernel_device)
    wide[:, ::2] = q
    expected = kernels.queue_infonce(q, k, queue, temperature=0.2, impl=impl)
    got = kernels.queue_infonce(wide[:, ::2], k, queue.T.contiguous().T, temperature=0.2, impl=impl)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("impl", ["chunked", "triton", "reference"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_reductions_without_gradient(impl, reduction, kernel_device):
    q, k, queue = inputs(CASES[0], torch.float32, kernel_device)
    rows = kernels.reference.infonce(q, k, queue, temperature=0.2, reduction="none")
    expected = {"mean": rows.mean(), "sum": rows.sum(), "none": rows}[reduction]
    with torch.no_grad():
        got = kernels.queue_infonce(q, k, queue, temperature=0.2, reduction=reduction, impl=impl)
    torch.testing.assert_close(got, expected)
    assert not got.requires_grad


@pytest.mark.parametrize("impl", ["chunked", "triton"])
def test_all_equal_rows_give_the_closed_form(impl, kernel_device):
    row = F.normalize(torch.ones(1, 16, device=kernel_device), dim=1)
    q = row.expand(4, -1).clone().requires_grad_()
    loss = kernels.queue_infonce(q, row.expand(4, -1), row.expand(33, -1), temperature=0.01, impl=impl)
    assert loss.item() == pytest.approx(math.log(34), rel=1e-5)
    assert torch.autograd.grad(loss, q)[0].abs().max() < 1e-4


@pytest.mark.parametrize("impl", ["chunked", "triton"])
@pytest.mark.parametrize("where", ["q", "k", "queue"])
def test_nan_in_nan_out(impl, where, kernel_device):
    tensors = dict(zip(("q", "k", "queue"), inputs(CASES[0], torch.float32, kernel_device), strict=True))
    tensors[where][2, 3] = float("nan")
    tensors["q"].requires_grad_()
    loss = kernels.queue_infonce(**tensors, temperature=0.2, reduction="none", impl=impl)
    hit = slice(None) if where == "queue" else slice(2, 3)
    assert loss[hit].isnan().all()
    assert torch.autograd.grad(loss.sum(), tensors["q"])[0][hit].isnan().any(1).all()


@pytest.mark.parametrize("impl", ["chunked", "triton"])
def test_large_rows_do_not_overflow(impl, kernel_device):
    q, k, queue = (100 * tensor for tensor in inputs(CASES[0], torch.float32, kernel_device))
    loss = kernels.queue_infonce(q, k, queue, temperature=0.01, reduction="none", impl=impl)
    truth = kernels.reference.infonce(q.double(), k.double(), queue.double(), temperature=0.01, reduction="none")
    # The scores are 1e6: their float32 rounding is all that the difference may be.
    torch.testing.assert_close(loss.double(), truth, rtol=1e-5, atol=0.5)


@pytest.mark.parametrize("impl", ["chunked", "triton"])
def test_equal_bits_every_time_and_the_queue_may_change_before_backward(impl, kernel_device):
    q, k, queue = inputs(CASES[3], torch.float32, kernel_device)
    q.requires_grad_()
    gradients = []
    for overwrite in (False, True):
        rows = queue.clone()
        loss = kernels.queue_infonce(q, k, rows, temperature=0.2, impl=impl)
        if overwrite:
            rows.zero_()
        gradients.append(torch.autograd.grad(loss, q)[0])
    assert torch.equal(*gradients)


def test_chunked_memory_does_not_grow_with_the_queue():
    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            self.elements = max(self.elements, out.numel())
            return out

    for size in (4096, 32768):
        q, k, queue = inputs(Case(64, size, 16, 0.2, ""), torch.bfloat16, torch.device("cpu"))
        with Largest() as largest:
            module.partial(q.float(), k.float(), queue, 0.2, True, True)
        assert largest.elements <= module.CHUNK_ELEMENTS


@pytest.mark.parametrize("impl", ["chunked", "triton"])
def test_autocast_changes_nothing(impl, kernel_device):
    q, k, queue = inputs(CASES[0], torch.float32, kernel_device)
    plain = kernels.queue_infonce(q, k, queue, temperature=0.2, impl=impl)
    with torch.autocast(kernel_device.type, dtype=torch.bfloat16):
        assert torch.equal(kernels.queue_infonce(q, k, queue, temperature=0.2, impl=impl), plain)


@pytest.mark.parametrize("impl", ["chunked", "triton"])
def test_one_graph_under_compile(impl, kernel_device):
    q, k, queue = inputs(CASES[0], torch.float32, kernel_device)

    def step(q):
        loss, rank = kernels.queue_infonce(2 * q, k, queue, temperature=0.2, return_rank=True, impl=impl)
        return loss.square(), rank

    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        leaf = q.clone().requires_grad_()
        loss, rank = function(leaf)
        results.append((loss, rank, torch.autograd.grad(loss, leaf)[0]))
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("impl", ["chunked", "triton"])
def test_opcheck(impl, kernel_device):
    q, k, queue = inputs(CASES[2], torch.float32, kernel_device)
    arguments = (q.requires_grad_(), k.requires_grad_(), queue, 0.2, True, True, impl, "ieee", "")
    torch.library.opcheck(torch.ops.ppssl.infonce.default, arguments)


def test_chunked_passes_gradcheck_in_float64():
    q, k, queue = inputs(CASES[0], torch.float64, torch.device("cpu"))

    def loss(q, k):
        return kernels.queue_infonce(q, k, queue, temperature=0.2, reduction="none")

    assert torch.autograd.gradcheck(loss, (q.requires_grad_(), k.requires_grad_()))


def test_second_derivative_is_refused():
    q, k, queue = inputs(CASES[0], torch.float32, torch.device("cpu"))
    loss = kernels.queue_infonce(q.requires_grad_(), k, queue, temperature=0.2)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(loss, q, create_graph=True)


GOOD = {"q": torch.ones(2, 4), "k": torch.ones(2, 4), "queue": torch.ones(3, 4), "temperature": 0.2}
BAD = [
    ({"q": torch.ones(4)}, ValueError, r"\[4\]"),
    ({"q": torch.ones(0, 4), "k": torch.ones(0, 4)}, ValueError, r"\[0, 4\]"),
    ({"k": torch.ones(3, 4)}, ValueError, r"\[3, 4\]"),
    ({"queue": torch.ones(3, 5)}, ValueError, r"\[3, 5\]"),
    ({"queue": torch.ones(0, 4)}, ValueError, r"\[0, 4\]"),
    ({"q": torch.ones(2, 4, dtype=torch.int64)}, TypeError, "int64"),
    ({"q": [[1.0]]}, TypeError, "list"),
    ({"queue": torch.ones(3, 4, device="meta")}, ValueError, "meta"),
    ({"temperature": 0.0}, ValueError, "0.0"),
    ({"temperature": -1}, ValueError, "-1"),
    ({"temperature": float("nan")}, ValueError, "nan"),
    ({"temperature": "0.2"}, TypeError, "str"),
    ({"reduction": "max"}, ValueError, "max"),
    ({"impl": "fast"}, ValueError, "fast"),
    ({"precision": "bf16"}, ValueError, "bf16"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD, ids=lambda value: str(value)[:40])
def test_bad_input_is_named(change, error, message):
    with pytest.raises(error, match=message):
        kernels.queue_infonce(**(GOOD | change))


def test_explicit_triton_is_never_replaced(monkeypatch):
    wide = torch.ones(2, 520)
    with pytest.raises(ValueError, match="at most 512, got 520"):
        kernels.queue_infonce(wide, wide, wide, temperature=0.2, impl="triton")
    with pytest.raises(ValueError, match="float64"):
        kernels.queue_infonce(**(GOOD | {"q": torch.ones(2, 4, dtype=torch.float64)}), impl="triton")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(ValueError, match="needs CUDA tensors, got cpu"):
        kernels.queue_infonce(**GOOD, impl="triton")


@pytest.mark.parametrize(("size", "batch", "start"), [(8, 3, 0), (8, 3, 7), (8, 8, 5), (5, 12, 3), (1, 4, 0)])
def test_enqueue_is_a_ring_buffer(size, batch, start):
    queue, pointer = torch.zeros(size, 2), torch.tensor(start)
    keys = torch.arange(2.0 * batch).view(batch, 2)
    expected = queue.clone()
    for position, key in enumerate(keys):
        expected[(start + position) % size] = key
    kernels.enqueue(queue, pointer, keys)
    assert torch.equal(queue, expected)
    assert pointer.item() == (start + batch) % size


def test_enqueue_compiles_casts_and_keeps_no_graph():
    queue, pointer = torch.zeros(8, 2, dtype=torch.bfloat16), torch.tensor(6)
    keys = torch.ones(3, 2, requires_grad=True)
    torch.compile(kernels.enqueue, fullgraph=True, backend="aot_eager")(queue, pointer, keys)
    assert queue.sum() == 6 and pointer.item() == 1 and not queue.requires_grad


@pytest.mark.parametrize(
    ("queue", "pointer", "keys", "error", "message"),
    [
        (torch.ones(4, 2), torch.tensor(0), torch.ones(2, 3), ValueError, r"\[2, 3\]"),
        (torch.ones(4, 2), torch.tensor([0]), torch.ones(2, 2), ValueError, r"\[1\]"),
        (torch.ones(4, 2), torch.tensor(0.0), torch.ones(2, 2), TypeError, "float32"),
        (torch.ones(4, 2), torch.tensor(0), torch.ones(2, 2, dtype=torch.int32), TypeError, "int32"),
    ],
)
def test_enqueue_names_bad_input(queue, pointer, keys, error, message):
    with pytest.raises(error, match=message):
        kernels.enqueue(queue, pointer, keys)
