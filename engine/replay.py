"""``python -m engine.replay RUN/replay/step_N.pt``: runs a step that was not finite again, and says where the first such number
came from."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from engine import build, files
from engine.build import assemble
from engine.config import from_run
from engine.console import say
from engine.data import teacher_cache
from engine.errors import ConfigError, command
from engine.evaluation import hold_out
from engine.pretrained import other_kind
from engine.training import Trainer, add_device_option, checkpoint, option_device
from ppssl.method import Batch
from ppssl.ops import can_run


class Replay(NamedTuple):
    """What a step did when it ran again."""

    step: int
    images: list[str]
    then: dict[str, float]
    """Terms, total and grad_norm as the bundle recorded them."""
    now: dict[str, float]
    first: str | None
    """The first place, in the order of the computation, whose numbers are not finite."""

    @property
    def reproduced(self) -> bool:
        """True when the step is bad again."""
        return not (math.isfinite(self.now["total"]) and math.isfinite(self.now["grad_norm"]))


def replay(bundle: Path, *, root: str | None = None, device: torch.device | str = "cpu") -> Replay:
    """Rebuilds run, weights and batch of ``bundle`` and runs its step, eagerly.

    root: where the data set lies now, if it has moved. On a CPU the numbers are those of a run on a CPU to the bit, unless that run
    compiled its step; a run with ``bn.impl: fused`` is replayed with torch's batch-norm there.
    Nothing is written but caches, wherever the bundle comes from.
    Raises ``FileNotFoundError``, or ``ValueError`` naming the bundle when it is not one, or was made by a library call without a
    config, or when the data set is not there or another one now.
    """
    try:
        state = checkpoint.load(bundle)
    except ValueError as error:
        kind = other_kind(bundle) or "another file, or was cut short or damaged"
        raise ValueError(
            f"{bundle} cannot be read as a replay bundle: it is {kind}; those of engine.train lie in RUN/replay"
        ) from error
    if not isinstance(state.get("replay"), dict) or "config" not in state.get("info", {}):
        raise ValueError(f"{bundle} is no replay bundle of a run of engine.train; they lie in RUN/replay")
    device = torch.device(device)
    cfg = from_run(state["info"]["config"])
    # the bundle holds the weights: where they once began is neither read nor downloaded
    cfg = replace(cfg, run=replace(cfg.run, compile="off", cuda_graph="off"), encoder=replace(cfg.encoder, weights="none"))
    if root is not None:
        cfg = replace(cfg, data=replace(cfg.data, root=root))
    if cfg.bn.impl == "fused" and not can_run(device):
        say("bn.impl: fused needs a GPU and triton; torch's batch-norm here, whose numbers differ in their last digits")
        cfg = replace(cfg, bn=replace(cfg.bn, impl="torch"))
    cfg = build.resolve(cfg, device)
    cache = files.cache_folder()
    images = hold_out(build.data(cfg, cache_dir=cache), cfg)
    trainer = assemble(
        cfg, images, device, teacher=build.teacher(cfg, device), out=None, cache=cache,
        embed=lambda teacher: teacher_cache.embeddings(
            teacher, images.train, device=device, cache_dir=cache, workers=cfg.data.workers
        ),
    )  # fmt: skip
    try:
        trainer.resume(bundle, state)
        step = trainer.step.steps_done
        batch = trainer.with_teacher(next(iter(trainer.loader.batches(step, step + 1))))
    finally:
        trainer.loader.close()
    if batch.index.tolist() != state["replay"]["index"].tolist():
        raise ValueError(f"{bundle}: step {step} now draws other images than it did; data.root={cfg.data.root} has changed since")
    now, first = run_again(trainer, batch)
    names = [images.train.names[i] for i in batch.index.tolist()]
    return Replay(step, names, state["replay"]["terms"], now, first)


def run_again(trainer: Trainer, batch: Batch) -> tuple[dict[str, float], str | None]:
    """Terms and gradient norm of one step on ``batch``, and the first place that is not finite."""
    step, found = trainer.step, []
    step.set_schedule()
    batch = step.prepare(batch)

    def look(where: str, tensors: Iterable[Any]) -> None:
        for tensor in tensors:
            if not found and isinstance(tensor, Tensor) and tensor.is_floating_point() and not torch.isfinite(tensor).all():
                count = int((~torch.isfinite(tensor)).sum())
                found.append(f"{where} ({count} of {tensor.numel()} numbers, shape {list(tensor.shape)})")

    def watch(name: str) -> Any:
        def hook(module: nn.Module, inputs: tuple, output: Any) -> None:
            where = f"the output of {name} ({type(module).__name__})"
            look(where, output if isinstance(output, tuple) else [output])

        return hook

    for name, tensor in trainer.method.state_dict().items():
        look(f"the weights: {name}", [tensor])
    for name, tensor in batch._asdict().items():
        look(f"the batch: {name}", [tensor])
    # leaves only: a container is as bad as what it holds
    leaves = [(name, m) for name, m in trainer.method.named_modules() if name and next(m.children(), None) is None]
    handles = [module.register_forward_hook(watch(name)) for name, module in leaves]
    try:
        output, gradients = step.gradients(batch)
    finally:
        for handle in handles:
            handle.remove()
    for name, value in output.terms.items():
        look(f"the loss: {name}", [value])
    look("the loss: total", [output.total])
    names = {id(parameter): name for name, parameter in trainer.method.named_parameters()}
    for parameter, gradient in zip(step.parameters, gradients, strict=True):
        look(f"the gradient of {names[id(parameter)]}", [gradient])
    terms = output.terms | {"total": output.total, "grad_norm": output.stats["grad_norm"]}
    return {name: float(value) for name, value in terms.items()}, found[0] if found else None


@command(ConfigError, RuntimeError)
def main(argv: Sequence[str] | None = None) -> int:
    """Prints the terms then and now and the first bad place; returns 0 when the step was not finite again, 1 when it was finite or
    on a failure, 2 on usage, 130 when interrupted."""
    parser = argparse.ArgumentParser(
        "python -m engine.replay", description="runs a step that was not finite again and names the first place that is not"
    )
    parser.add_argument("bundle", type=Path, metavar="BUNDLE", help="RUN/replay/step_N.pt")
    parser.add_argument("--root", metavar="DIR", help="the data set's folder, if it has moved")
    add_device_option(parser)
    args = parser.parse_args(argv)
    result = replay(args.bundle, root=args.root, device=option_device(args.device))
    say(f"step {result.step} on {len(result.images)} images, {result.images[0]} ... {result.images[-1]}")
    for name, value in result.now.items():
        say(f"  {name:<10} then {result.then.get(name, math.nan):>12.6g}   now {value:>12.6g}")
    say(f"first place that is not finite: {result.first or 'none'}")
    say("reproduced" if result.reproduced else "not reproduced: the step is finite here (another device, library or data set?)")
    return 0 if result.reproduced else 1


if __name__ == "__main__":
    sys.exit(main())
