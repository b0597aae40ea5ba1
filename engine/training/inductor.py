"""What Inductor is told about the project's own ops, into which it cannot see: how to call them, and two rewrites of a step.

A sum of two gradients that only the backward pass of a batch-norm reads is made by that op itself (a residual network has one at
every block): the sum is never written. A gradient that was cast to its parameter's type enters the gradient norm as it was before
the cast, which the optimizer's kernels then make as they read it. Neither changes a number.
"""

from __future__ import annotations

from typing import Any

import torch

COMBINED = {"combo_kernels": True}
"""Options for a whole step on a GPU: many of its kernels move less than a launch costs (weight casts, sums of small vectors)."""


def options() -> dict[str, Any]:
    """Options of ``torch.compile`` with the backend ``inductor`` for what contains the project's ops."""
    from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files  # only where something is compiled

    class Rewrites(CustomGraphPass):
        def __call__(self, graph: torch.fx.Graph) -> None:
            rewrite(graph)

        def uuid(self) -> bytes:
            return get_hash_for_files((__file__,))

    _introduce_own_ops()
    return {"post_grad_custom_pre_pass": Rewrites()}


def rewrite(graph: torch.fx.Graph) -> None:
    """Both rewrites, in place; ``graph`` is of ATen's and the project's ops."""
    norm, backward = torch.ops.ppssl.gradient_norm.default, torch.ops.ppssl.batch_norm_backward.default
    for node in graph.nodes:
        if node.target is norm:
            _set(node, (0,), [_before_cast(gradient) for gradient in node.args[0]])
        elif node.target is backward and len(node.args) < len(backward._schema.arguments):
            total = node.args[0]
            if isinstance(total, torch.fx.Node) and _is_sum(total) and len(total.users) == 1:
                first, second = total.args
                _set(node, (0, len(node.args)), first, second)
    graph.eliminate_dead_code()
    graph.lint()


def _is_sum(node: torch.fx.Node) -> bool:
    """Whether it adds two tensors of its own shape and type."""
    if node.target is not torch.ops.aten.add.Tensor or node.kwargs or not all(isinstance(a, torch.fx.Node) for a in node.args):
        return False
    made = node.meta["val"]
    return all(a.meta["val"].shape == made.shape and a.meta["val"].dtype == made.dtype for a in node.args)


def _before_cast(gradient: torch.fx.Node) -> torch.fx.Node:
    """What a cast of a floating tensor to more digits was made from; any other node is given back."""
    casts = (torch.ops.aten._to_copy.default, torch.ops.prims.convert_element_type.default)
    if gradient.target in casts and not {*gradient.kwargs} - {"dtype", "layout", "device"}:
        source = gradient.args[0]
        narrow, wide = source.meta["val"], gradient.meta["val"]
        wider = narrow.dtype.is_floating_point and torch.promote_types(narrow.dtype, wide.dtype) == wide.dtype
        if wider and narrow.device == wide.device and narrow.layout == wide.layout:
            return source
    return gradient


def _set(node: torch.fx.Node, places: tuple[int, ...], *values: Any) -> None:
    """Arguments of ``node``, and the values of them that Inductor takes the strides from, which the op is then given."""
    args = list(node.args)
    for place, value in zip(places, values, strict=True):
        args[place : place + 1] = [value]
    node.args = tuple(args)
    if "eager_input_vals" in node.meta:
        meta = lambda a: a.meta["val"] if isinstance(a, torch.fx.Node) else a  # noqa: E731
        node.meta["eager_input_vals"] = torch.fx.node.map_aggregate((node.args, node.kwargs), meta)


def _introduce_own_ops() -> None:
    """Registers the project's ops with Inductor as it would itself when it first meets one. It would then also write out, for a
    line of its log, all that the arguments were made from, twice over at every sum in a trunk: hours with the fused batch-norm."""
    from torch._inductor.lowering import lowerings, make_fallback, tag_to_layout_constraint  # only where something is compiled
    from torch._library.custom_ops import OPDEFS
    from torch._library.utils import get_layout_constraint_tag

    for name, definition in OPDEFS.items():
        op = definition._opoverload
        if name.startswith("ppssl::") and op not in lowerings:
            constraint = tag_to_layout_constraint(get_layout_constraint_tag(op, with_default=True))
            make_fallback(op, layout_constraint=constraint, warn=False)
