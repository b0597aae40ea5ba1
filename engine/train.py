"""``python -m engine.train --cfg cub.yaml --amp``: from a recipe to a trained, evaluated network in a run folder."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path

from engine import build, run
from engine.config import parse, to_yaml
from engine.console import console, say
from engine.errors import FAILURES, exit_code
from engine.training import ALONE, Stopped, World, distributed, signals


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code: 0 done, 1 failure, 2 usage or config, 75 saved on a signal, 130 interrupted."""
    started = time.perf_counter()
    args = parse(argv)
    if args.print_config:
        print(to_yaml(args.config), end="")
        return 0
    world, code = ALONE, 0
    try:
        build.check_environment(writes=not args.dry_run)
        world = distributed.join(device=args.config.run.device)
        with signals.stop_at_once():
            if args.dry_run:
                run.dry_run(args.config, world)
            else:
                out = Path(args.config.out or f"runs/{args.cfg_path.stem}")
                run.train(args.config, out, started, profile=args.profile, world=world)
    except Stopped as stopped:
        say(str(stopped))
        code = stopped.code
    except KeyboardInterrupt:
        say("interrupted outside of training: there was nothing to save")
        return 130
    except FAILURES as error:
        say_error(error, world)
        return exit_code(error)
    world.leave()
    return code


def say_error(error: Exception, world: World) -> None:
    """An error is shown by the process that has it, which may not be the one that talks."""
    console.quiet = False
    say(f"error: {error}" if world.first else f"error in process {world.rank}: {error}")


if __name__ == "__main__":
    sys.exit(main())
