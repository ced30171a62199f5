"""Events become rows of bounded pages, whatever an agent recorded."""

import pytest

from pam_platform.web.events import MAX_ROWS, MAX_RUN, PAGE_SIZE, page, row_of


def event(number, **fields):
    return {"t": number / 10, "c": 1, "kind": "query", "sql": f"select {number}", **fields}


def test_pages_follow_each_other_without_gap():
    events = [event(n) for n in range(PAGE_SIZE + 3)]
    first = page(iter(events), 0)
    assert [row.number for row in first.rows] == list(range(PAGE_SIZE))
    second = page(iter(events), first.following)
    assert [row.text for row in second.rows] == [f"select {n}" for n in range(PAGE_SIZE, PAGE_SIZE + 3)]
    assert second.following is None


def test_a_page_of_huge_statements_stops_early():
    events = (event(n, sql="x" * 1_000_000) for n in range(100))
    first = page(events, 0)
    assert len(first.rows) < 10
    assert first.following == len(first.rows)


def test_result_rows_are_bounded():
    row = row_of(0, event(0, columns=["a", "b"], rows=[[n, None] for n in range(MAX_ROWS + 7)]))
    assert row.columns == ("a", "b")
    assert row.rows[0] == ("0", "NULL")
    assert (len(row.rows), row.more_rows) == (MAX_ROWS, 7)


@pytest.mark.parametrize(
    "odd", [{"rows": 12}, {"rows": "x"}, {"rows": [1, {"a": 2}]}, {"columns": 3}, {"error": {}}]
)
def test_any_json_is_taken(odd):
    row_of(0, event(0, **odd))


def test_other_fields_are_facts():
    row = row_of(3, event(0, tag="SELECT 1", rows=1, error={"code": "42P01"}))
    assert row.facts == (("tag", "SELECT 1"), ("rows", "1"))
    assert row.error == '{"code": "42P01"}'


def test_columns_and_errors_read_well():
    error = {"severity": "ERROR", "code": "42501", "message": "must be owner", "detail": None, "hint": "ask"}
    row = row_of(0, event(0, columns=[["id", 23], "name", []], error=error))
    assert row.columns == ("id", "name", "[]")
    assert row.error == 'ERROR: 42501: must be owner\n{"hint": "ask"}'


def test_clock():
    assert row_of(0, {"t": 3725.25, "c": 0, "kind": "end"}).clock == "1:02:05.250"


def typed(t, data, ch=1):
    return {"t": t, "c": 1, "kind": "o", "ch": ch, "data": data}


def test_a_terminals_output_is_text_in_one_row():
    events = [
        {"t": 0.5, "c": 1, "kind": "shell", "ch": 1, "cols": 80, "rows": 24},
        typed(1, "$ "),
        {"t": 1.5, "c": 1, "kind": "i", "ch": 1, "bytes": 1},
        typed(1.5, "l"),
        {"t": 1.6, "c": 1, "kind": "i", "ch": 1, "bytes": 1, "data": "s"},
        typed(1.6, "z\b\x1b[Ks\r\n\x1b[32mfile\x1b[0m\x1b]0;title\x07\r\n$ "),
        typed(2, "other", ch=2),
        {"t": 3, "c": 1, "kind": "exit", "ch": 1, "status": 0},
    ]
    rows = page(iter(events), 0).rows
    assert [(row.number, row.kind, row.text) for row in rows] == [
        (0, "shell", ""),
        (1, "screen", "$ ls\nfile\n$"),
        (6, "screen", "other"),
        (7, "exit", ""),
    ]
    assert rows[1].facts == (("ch", "1"), ("typed", "2 bytes"))


def test_a_long_run_of_output_is_several_rows():
    events = [typed(1, "x") for _ in range(2 * MAX_RUN + 1)]
    rows = page(iter(events), 0).rows
    assert [(row.number, len(row.text)) for row in rows] == [
        (0, MAX_RUN),
        (MAX_RUN, MAX_RUN),
        (2 * MAX_RUN, 1),
    ]
    assert [row.number for row in page(iter(events), MAX_RUN).rows] == [MAX_RUN, 2 * MAX_RUN]


def test_a_page_of_terminal_output_ends():
    events = [typed(1, "x" * 100_000) for _ in range(100)]
    first = page(iter(events), 0)
    assert first.following is not None
    assert sum(len(row.text) for row in first.rows) < 5_000_000
    assert page(iter(events), first.following).rows[0].number == first.following


def test_odd_events_of_a_terminal_are_shown_all_the_same():
    odd = [{"t": 1, "c": 1, "kind": "i"}, {"t": 1, "c": 1, "kind": "i", "bytes": "x", "ch": [1]}, typed(1, 5)]
    assert [row.kind for row in page(iter(odd), 0).rows] == ["screen", "screen", "o"]
