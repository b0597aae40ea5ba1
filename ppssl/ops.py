"""The one place where ``kernels`` is imported, after checking that it is ours: the name is generic, and another installed
distribution provides a package ``kernels`` too, which wins over an editable install outside the clone."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

import kernels

if Path(kernels.__file__).resolve().parent.parent != Path(__file__).resolve().parent.parent:
    _owners = importlib.metadata.packages_distributions().get("kernels", [])
    _other = next((name for name in _owners if name != "ppssl-engine"), "another distribution")
    raise ImportError(
        f"'import kernels' gave {kernels.__file__}, which belongs to {_other}, not to ppssl-engine: "
        f"run 'pip uninstall {_other}', or start from the folder that holds ppssl-engine's kernels/"
    )

from kernels import augment, batch_norm, enqueue, gradcam, maxout, maxout_image, queue_infonce, recolour  # noqa: E402  (after the check)
from kernels.group import all_reduce_mean, all_to_all, gather, group_name, local_shard, rank, world_size  # noqa: E402
from kernels.reference import ViewValues  # noqa: E402
from kernels.selection import can_run  # noqa: E402

__all__ = [
    "ViewValues", "all_reduce_mean", "all_to_all", "augment", "batch_norm", "can_run", "enqueue", "gather", "gradcam", "group_name",
    "local_shard", "maxout", "maxout_image", "queue_infonce", "rank", "recolour", "world_size",
]  # fmt: skip
