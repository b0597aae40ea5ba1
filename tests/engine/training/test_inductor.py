"""The rewrites of a step's graph: what they fold, and that no number changes. Without Inductor, which is only told to make them."""

from __future__ import annotations

import copy

import pytest
import torch
from functorch.compile import make_boxed_func
from small_methods import batch, build_moco, step_of
from torch._dynamo.backends.common import aot_autograd
from torch.fx.experimental.proxy_tensor import make_fx

from engine.training import inductor, precision

NORM, BACKWARD = torch.ops.ppssl.gradient_norm.default, torch.ops.ppssl.batch_norm_backward.default


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize(("fused", "amp"), [(True, None), (False, "bf16")])
def test_a_rewritten_step_keeps_its_numbers(fused: bool, amp: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fused in float32: Triton's interpreter truncates to bfloat16 where a GPU, and torch, round."""
    monkeypatch.setattr(precision, "cpu_has_bf16", lambda: True)  # emulated, where it is not
    method = build_moco("resnet10_w8_s16")
    for encoder in (method.encoder_q, method.encoder_k) if fused else ():
        encoder.trunk.fuse_batch_norm()
    found: dict[bool, tuple] = {}
    for rewrites in (False, True):
        graphs = []

        def compiler(graph: torch.fx.GraphModule, _inputs, rewrites=rewrites, graphs=graphs):
            if rewrites:
                inductor.rewrite(graph.graph)
                graph.recompile()
            graphs.append(graph)
            return make_boxed_func(graph.forward)

        torch._dynamo.reset()
        backend = aot_autograd(fw_compiler=compiler, bw_compiler=compiler, inference_compiler=compiler)
        step = step_of(copy.deepcopy(method), compile="step", backend=backend, amp=amp)
        output = step(batch(2, side=32))
        nodes = list(graphs[0].graph.nodes)
        folded = sum(node.target is BACKWARD and len(node.args) == len(BACKWARD._schema.arguments) for node in nodes)
        (norm,) = (node for node in nodes if node.target is NORM)
        kinds = {gradient.meta["val"].dtype for gradient in norm.args[0]}
        found[rewrites] = (folded, kinds, output, step.method.state_dict())
    (none, wide, before, weights), (folded, kinds, after, same) = found[False], found[True]
    assert (none, folded) == (0, 3 if fused else 0)  # the inputs of all blocks but the first, which the max pooling made
    assert wide == {torch.float32} and kinds == {torch.float32} | ({torch.bfloat16} if amp else set())
    assert torch.equal(before.total, after.total)
    torch.testing.assert_close(before.stats["grad_norm"], after.stats["grad_norm"], rtol=1e-6, atol=0)
    assert all(torch.equal(weights[name], same[name]) for name in weights)


def traced(function, *inputs) -> torch.fx.Graph:
    return make_fx(function, tracing_mode="fake")(*inputs).graph


def last(graph: torch.fx.Graph, target) -> torch.fx.Node:
    return [node for node in graph.nodes if node.target is target][-1]


def batch_norm_backward(g, x):
    """An op's backward pass with a ReLU and no residual."""
    vector = x.new_ones(x.shape[1])
    bits = torch.empty(0, dtype=torch.uint8)
    return BACKWARD(g, x, vector, vector, vector[None], vector[None], bits, True, 1e-5, "torch")[0]


def test_a_sum_that_others_read_or_that_is_of_two_types_stays() -> None:
    x = torch.randn(2, 4, 3, 3)

    def shared(a, b, x):
        total = a + b
        return batch_norm_backward(total, x), total

    def widened(a, b, x):
        return batch_norm_backward(a.bfloat16() + b, x)

    def broadcast(a, b, x):
        return batch_norm_backward(a + b[:, :1], x)

    def scaled(a, b, x):
        return batch_norm_backward(torch.add(a, b, alpha=2), x)

    for function in (shared, widened, broadcast, scaled):
        graph = traced(function, x, x.clone(), x.clone())
        inductor.rewrite(graph)
        assert len(last(graph, BACKWARD).args) == 10, function.__name__
    graph = traced(lambda a, b, x: batch_norm_backward(a + b, x), x, x.clone(), x.clone())
    inductor.rewrite(graph)
    assert len(last(graph, BACKWARD).args) == 11 and not [n for n in graph.nodes if n.target is torch.ops.aten.add.Tensor]


def test_the_norm_is_taken_before_a_cast_to_more_digits_alone() -> None:
    def norm(half, single):
        return NORM([half.float(), single.half().float(), single.bfloat16()])

    graph = traced(norm, torch.randn(3).bfloat16(), torch.randn(4))
    inductor.rewrite(graph)
    dtypes = [gradient.meta["val"].dtype for gradient in last(graph, NORM).args[0]]
    assert dtypes == [torch.bfloat16, torch.float16, torch.bfloat16]


def test_the_values_that_strides_are_taken_from_follow() -> None:
    x = torch.randn(2, 4, 3, 3).to(memory_format=torch.channels_last)
    graph = traced(lambda a, b, x: batch_norm_backward(a + b, x), x, x.clone(), x.clone())
    node = last(graph, BACKWARD)
    node.meta["eager_input_vals"] = (tuple(a.meta["val"] if isinstance(a, torch.fx.Node) else a for a in node.args), {})
    inductor.rewrite(graph)
    args, kwargs = node.meta["eager_input_vals"]
    assert len(args) == 11 and not kwargs and args[10].is_contiguous(memory_format=torch.channels_last)
