import click
import pytest

from pam_common import cli
from pam_common.errors import ConfigError, PamError, UnavailableError


def command(error: BaseException | None) -> click.Command:
    @click.command()
    def run() -> None:
        if error is not None:
            raise error

    return run


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (None, 0, ""),
        (PamError("no such session", hint="pam-client sessions ls"), 1, "error: no such session\nHINT: pam-"),
        (UnavailableError("the platform does not answer"), 69, "error: the platform does not answer\n"),
        (ConfigError(["a.yml:1: x", "a.yml:2: y"]), 78, "error: a.yml:1: x\nerror: a.yml:2: y\n"),
        (click.UsageError("bad"), 2, "bad"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_an_end_has_its_exit_code_and_words(
    error: BaseException | None, code: int, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(command(error), []) == code
    shown = capsys.readouterr()
    assert words in shown.err
    assert shown.out == ""


def test_a_bug_is_not_hidden() -> None:
    with pytest.raises(ZeroDivisionError):
        cli.run(command(ZeroDivisionError()), [])
