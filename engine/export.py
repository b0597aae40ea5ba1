"""``python -m engine.export RUN --to FORMAT``: a run's network in the files that other programs read, with a model card."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from engine.console import say
from engine.errors import ConfigError, command
from engine.pretrained import FORMATS, SHORT, export, say_which


@command(ConfigError, RuntimeError)
def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code: 0 done, 1 failure, 2 usage, 130 interrupted."""
    parser = argparse.ArgumentParser("python -m engine.export", description="a run's network in the files other programs read")
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder")
    parser.add_argument(
        "--to", required=True, choices=FORMATS, type=lambda to: SHORT.get(to, to), help="format; hf is short for huggingface"
    )
    parser.add_argument(
        "--out", type=Path, metavar="DIR/FILE", help="where to; with huggingface the model's own folder (default: RUN/export)"
    )
    parser.add_argument(
        "--normalize", action="store_true", help="the graph normalizes: it takes RGB in [0, 1] (onnx and torch-export)"
    )
    parser.add_argument(
        "--map", action="store_true", help="a second output, the map [B, C, h, w] that is pooled (onnx and torch-export)"
    )
    parser.add_argument("--opset", type=int, metavar="N", help="ONNX operator set (default: the installed torch's own)")
    parser.add_argument("--minmax", choices=("batch", "image"), help="range over which the mask is scaled (default: the run's own)")
    parser.add_argument("--best", action="store_true", help="the weights of the best evaluation, not the last (eval.keep_best)")
    args = parser.parse_args(argv)
    say_which(args.run, args.best)
    path = export(
        args.run, args.to, args.out,
        minmax=args.minmax, normalize=args.normalize, with_map=args.map, opset=args.opset, best=args.best,
    )  # fmt: skip
    if path.is_dir():
        size = sum(file.stat().st_size for file in path.iterdir() if file.is_file())
        say(f"written: {path} ({size / 1e6:.1f} MB): model.safetensors, config.json, README.md")
    else:
        say(f"written: {path} ({path.stat().st_size / 1e6:.1f} MB), {path.name}.json, {path.name}.md")
    return 0


if __name__ == "__main__":
    sys.exit(main())
