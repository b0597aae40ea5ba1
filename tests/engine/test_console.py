"""What reaches the terminal."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.config import parse
from engine.console import printable, say
from engine.errors import command

OUTSIDE = "\x1b[2Jred\x07 \u202egnp.exe \x9b31m \udce9 [b]"


def test_nothing_that_is_said_drives_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    say(f"first {OUTSIDE}\nsecond C:\\x")
    assert capsys.readouterr().err == r"first \x1b[2Jred\x07 \u202egnp.exe \x9b31m \udce9 [b]" + "\nsecond C:\\x\n"
    say(printable(OUTSIDE))
    assert capsys.readouterr().err.rstrip("\n") == printable(OUTSIDE)


def test_neither_does_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    @command()
    def main(argv: object = None) -> int:
        raise ValueError(OUTSIDE)

    assert main() == 1 and r"error: \x1b[2Jred" in capsys.readouterr().err


def test_nor_does_a_recipe_that_cannot_be_used(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x.yaml").write_text('{"\\e[2Jkey": 1}')
    with pytest.raises(SystemExit):
        parse(["--cfg", str(tmp_path / "x.yaml")])
    assert "\x1b" not in (told := capsys.readouterr().err) and "x1b[2Jkey" in told
