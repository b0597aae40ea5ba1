"""How a command ends: one line and a code for what a person can put right, a traceback for a fault of ours."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest

from engine.errors import FAILURES, ConfigError, command


def raising(error: BaseException) -> Callable[[Sequence[str] | None], int]:
    def main(argv: Sequence[str] | None = None) -> int:
        raise error

    return main


def test_the_code_of_a_command_that_ends_well_is_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    @command()
    def main(argv: Sequence[str] | None = None) -> int:
        """What it does."""
        return len(argv or ())

    assert main() == 0 and main(["a", "b", "c"]) == 3
    assert main.__doc__ == "What it does." and capsys.readouterr().err == ""


@pytest.mark.parametrize("kind", FAILURES)
def test_a_failure_is_one_line_and_1(kind: type[Exception], capsys: pytest.CaptureFixture[str]) -> None:
    assert command()(raising(kind("birds.txt: line 3 [b]is empty")))() == 1
    assert capsys.readouterr().err == "error: birds.txt: line 3 [b]is empty\n"


@pytest.mark.parametrize(("failures", "code"), [((), 2), ((RuntimeError,), 2), ((ConfigError, RuntimeError), 1)])
def test_a_config_is_2_but_where_it_is_a_file_of_the_run(failures: tuple, code: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(*failures)(raising(ConfigError("epochs: got 0")))() == code
    assert capsys.readouterr().err == "error: epochs: got 0\n"


def test_what_is_not_listed_stays_a_traceback() -> None:
    for error in (RuntimeError("CUDA error"), KeyError("loss"), SystemExit(2)):
        with pytest.raises(type(error)):
            command()(raising(error))()
    assert command(RuntimeError)(raising(RuntimeError("not a checkpoint")))() == 1


def test_ctrl_c_is_130_and_silent(capsys: pytest.CaptureFixture[str]) -> None:
    assert command()(raising(KeyboardInterrupt()))() == 130
    assert capsys.readouterr().err == ""
