import io
import logging

import pytest

from pam_common.logging import LineFormatter, get_logger, kv


@pytest.fixture
def lines() -> io.StringIO:
    return io.StringIO()


@pytest.fixture
def log(lines: io.StringIO) -> logging.Logger:
    handler = logging.StreamHandler(lines)
    handler.setFormatter(LineFormatter())
    logger = get_logger("test.lines")
    logger.handlers = [handler]
    logger.propagate = False
    logger.setLevel("INFO")
    return logger


def test_an_event_is_one_line_of_pairs(log: logging.Logger, lines: io.StringIO) -> None:
    log.info("tunnel up", extra=kv(relay="r1", slot=1, note="two words"))
    line = lines.getvalue()
    assert line.endswith(
        'level=info component=test.lines event="tunnel up" relay=r1 slot=1 note="two words"\n'
    )
    assert line.startswith("ts=2")


def test_a_value_cannot_forge_a_line_or_a_field(log: logging.Logger, lines: io.StringIO) -> None:
    log.info("refused", extra=kv(name='x" level=error\nts=1 event=\x1b[2J', size="y" * 5000))
    text = lines.getvalue()
    assert text.count("\n") == 1
    assert "\x1b" not in text
    assert r"name=\"" not in text
    assert 'name="x\\" level=error\\nts=1 event=\\u001b[2J"' in text
    assert len(text) < 1500


def test_an_exception_stays_in_its_line(log: logging.Logger, lines: io.StringIO) -> None:
    try:
        raise ValueError("two\nlines")
    except ValueError:
        log.exception("failed")
    assert lines.getvalue().count("\n") == 1
    assert "ValueError" in lines.getvalue()
