"""Real clients against a real PostgreSQL through the interceptor."""

from __future__ import annotations

import asyncio
import os
import socket
import struct
import subprocess
import threading

import psycopg
import pytest

pytestmark = pytest.mark.slow


def _quiet(gate):
    gate.wait_done()
    assert gate.errors == []
    assert gate.of("unmatched") == []
    assert gate.of("correction") == []


def _failing_pipeline(connection):
    with connection.pipeline():
        connection.execute("select 1")
        connection.execute("select * from missing")
        connection.execute("select 2")


def test_postgres_psql_simple(pg15, make_gate, psql):
    gate = make_gate(pg15)
    done = psql(gate, "select 1, 'x'; select 2")
    assert (done.returncode, done.stdout) == (0, "1|x\n2\n"), done.stderr
    _quiet(gate)
    kinds = [event["kind"] for event in gate.events]
    assert kinds == ["start", "query", "rows", "result", "rows", "result", "end"]
    assert gate.of("rows")[0]["rows"] == [["1", "x"]]
    assert [result["tag"] for result in gate.of("result")] == ["SELECT 1", "SELECT 1"]
    start = gate.of("start")[0]
    assert (start["login"], start["application"], start["database"]) == ("SCRAM-SHA-256", "psql", "app")
    assert gate.of("end")[0]["bytes_down"] > 0


def test_postgres_account_user_whatever_the_client_says(pg15, make_gate, psql):
    gate = make_gate(pg15)
    done = psql(gate, "select session_user", url=gate.url(user="super", options="'-c role=scram_user'"))
    assert done.stdout == "scram_user\n"


def test_postgres_default_database_is_the_first_allowed(pg15, make_gate, psql):
    gate = make_gate(pg15, databases=("app",))
    url = f"host=127.0.0.1 port={gate.port} user=someone"
    assert psql(gate, "select current_database()", url=url).stdout == "app\n"
    refused = psql(gate, "select 1", url=gate.url("postgres"))
    assert refused.returncode == 2
    assert "database 'postgres' is not open to prod-db/readonly" in refused.stderr
    assert "allowed: app" in refused.stderr


def test_postgres_psycopg_extended_binary_and_pipeline(pg15, make_gate):
    gate = make_gate(pg15)
    with psycopg.connect(gate.url(), autocommit=True) as connection:
        with connection.cursor(binary=True) as cursor:
            row = cursor.execute(
                "select %s::int4, %s::text, %s::numeric, %b::int8, null", (7, "é", 12.5, 2**40)
            ).fetchone()
            assert row[0] == 7
        with connection.pipeline():
            cursors = [connection.execute("select %s::int", (i,)) for i in range(50)]
            assert [cursor.fetchone()[0] for cursor in cursors] == list(range(50))
        with pytest.raises(psycopg.errors.UndefinedTable):
            _failing_pipeline(connection)
        assert connection.execute("select 3").fetchone() == (3,)
    _quiet(gate)
    queries = {query["id"]: query for query in gate.of("query")}
    first = next(query for query in queries.values() if "numeric" in query["sql"])
    assert first["params"][1:] == ["é", "12.5", str(2**40)]
    rows = next(event for event in gate.of("rows") if event["id"] == first["id"])
    assert rows["rows"] == [["7", "é", "12.5", str(2**40), None]]
    results = [result for result in gate.of("result") if result.get("id") in queries]
    for result in results:
        if "error" not in result:
            expected = queries[result["id"]]
            shown = [event["rows"] for event in gate.of("rows") if event["id"] == result["id"]]
            if expected["sql"] == "select $1::int":
                assert shown[0][0][0] == expected["params"][0]
    assert [result["error"]["code"] for result in gate.of("result") if "error" in result] == ["42P01"]


def test_postgres_asyncpg(pg15, make_gate):
    gate = make_gate(pg15)

    async def use() -> list[int]:
        import asyncpg

        connection = await asyncpg.connect(
            host="127.0.0.1", port=gate.port, user="x", database="app", ssl=False
        )
        statement = await connection.prepare("select $1::int + g from generate_series(1, 10) g")
        numbers = [record[0] for record in await statement.fetch(1)]
        async with connection.transaction():
            async for record in connection.cursor("select generate_series(1, 120)", prefetch=50):
                numbers.append(record[0])
        await connection.executemany("select $1::text", [("a",), ("b",)])
        await connection.close()
        return numbers

    assert asyncio.run(use()) == [*range(2, 12), *range(1, 121)]
    _quiet(gate)
    assert any(result.get("suspended") for result in gate.of("result"))
    assert any(event["rows"][0] == ["2"] for event in gate.of("rows"))


@pytest.mark.parametrize("mode", ["simple", "extended", "prepared"])
def test_postgres_pgbench(pg15, make_gate, mode):
    gate = make_gate(pg15, keep_events=False)
    env = {"PATH": os.environ["PATH"], "PGHOST": "127.0.0.1", "PGPORT": str(gate.port), "PGUSER": "x"}
    command = [pg15.bin / "pgbench", "app"]
    subprocess.run([*command, "-i", "-q", "-s1"], check=True, env=env, capture_output=True, timeout=60)
    done = subprocess.run(
        [*command, "-n", "-c8", "-j2", "-T2", "-M", mode], env=env, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert "number of failed transactions: 0" in done.stdout
    _quiet(gate)


def test_postgres_dump_and_restore_are_identical(pg15, make_gate, tmp_path):
    gate = make_gate(pg15, keep_events=False)
    pg15.sql("create database copy_of_app owner scram_user")
    pg15.sql(
        "create table if not exists things(id serial primary key, body bytea, note text);"
        "insert into things(body, note) select decode(md5(g::text), 'hex'), repeat('ü', g % 50) "
        "from generate_series(1, 3000) g; alter table things owner to scram_user",
        "app",
    )
    env = {"PATH": os.environ["PATH"]}

    def dump(database: str) -> str:
        url = gate.url(database)
        done = subprocess.run([pg15.bin / "pg_dump", "-w", url], capture_output=True, text=True, env=env)
        assert done.returncode == 0, done.stderr
        # The newer pg_dump's random key, against psql meta-commands in a dump.
        return "\n".join(line for line in done.stdout.splitlines() if "restrict " not in line)

    archive = tmp_path / "archive"
    for command in (
        [pg15.bin / "pg_dump", "-w", "-Fc", "-f", archive, gate.url("app")],
        [pg15.bin / "pg_restore", "-w", "-d", gate.url("copy_of_app"), archive],
    ):
        done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=120)
        assert done.returncode == 0, done.stderr
    try:
        assert dump("app") == dump("copy_of_app")
    finally:
        _quiet(gate)
        pg15.sql("drop database copy_of_app")


def test_postgres_copy_both_ways(pg15, make_gate):
    gate = make_gate(pg15)
    lines = b"".join(b"%d\tline %d\n" % (i, i) for i in range(200_000))
    with psycopg.connect(gate.url()) as connection:
        connection.execute("create temp table copied(i int, t text)")
        with connection.cursor() as cursor:
            with cursor.copy("copy copied from stdin") as copy:
                copy.write(lines)
            with cursor.copy("copy copied to stdout") as copy:
                assert b"".join(bytes(part) for part in copy) == lines
            cursor.execute("select count(*) from copied")
            assert cursor.fetchone() == (200_000,)
    _quiet(gate)
    copies = [result for result in gate.of("result") if "copy" in result]
    assert [(copy["copy"], copy["bytes"]) for copy in copies] == [("in", len(lines)), ("out", len(lines))]
    # What is not recorded is counted as on the wire, with five bytes of header for each message.
    headers = [copy["unrecorded_bytes"] - (len(lines) - 16384) for copy in copies]
    assert all(0 <= size <= 5 * copy["messages"] for size, copy in zip(headers, copies, strict=True))
    sample = next(event for event in gate.of("rows") if event.get("copy") == "in")
    assert sample["data"].startswith("0\tline 0\n")


def test_postgres_copy_in_extended_protocol_that_fails(pg15, make_gate):
    gate = make_gate(pg15)
    with psycopg.connect(gate.url(), autocommit=True) as connection:
        connection.execute("create temp table numbers(i int)")
        for _ in range(3):
            with (
                pytest.raises(psycopg.errors.InvalidTextRepresentation),
                connection.cursor().copy("copy numbers from stdin") as copy,
            ):
                copy.write(b"1\nx\n")
        with connection.cursor().copy("copy numbers from stdin where i > %s", (1,)) as copy:
            copy.write(b"1\n2\n")
        assert connection.execute("select i from numbers where i > %s", (0,)).fetchall() == [(2,)]
    _quiet(gate)


class Plain:
    """A client that sends what it is told to, without waiting."""

    def __init__(self, gate):
        self._sock = socket.create_connection(("127.0.0.1", gate.port), timeout=120)
        body = struct.pack("!I", 3 << 16) + b"user\0x\0database\0app\0\0"
        self._sock.sendall(struct.pack("!I", len(body) + 4) + body)
        self.until(b"Z\0\0\0\5I")

    def send(self, *messages):
        parts = [kind + struct.pack("!I", len(body) + 4) + body for kind, body in messages]
        self._sock.sendall(b"".join(parts))

    def until(self, end):
        data = b""
        while end not in data:
            part = self._sock.recv(65536)
            assert part, data
            data += part

    def close(self):
        self.send((b"X", b""))
        self._sock.close()


READY = b"Z\0\0\0\5I"


def test_postgres_copy_data_sent_along_with_the_query(pg15, make_gate):
    gate = make_gate(pg15)
    client = Plain(gate)
    client.send((b"Q", b"create temp table sent(i int)\0"))
    client.until(READY)
    client.send((b"Q", b"copy sent from stdin\0"), *[(b"d", b"%d\n" % i) for i in range(5)], (b"c", b""))
    client.until(READY)
    client.close()
    _quiet(gate)
    (result,) = [result for result in gate.of("result") if "copy" in result]
    assert (result["tag"], result["messages"], result["bytes"]) == ("COPY 5", 5, 10)
    assert [event["data"] for event in gate.of("rows")] == ["0\n1\n2\n3\n4\n"]


def test_postgres_what_runs_after_bad_copy_data_and_a_sync_is_recorded_so(pg15, make_gate):
    gate = make_gate(pg15)
    client = Plain(gate)
    client.send((b"Q", b"create temp table checked(i int)\0"))
    client.until(READY)
    copy = [(b"P", b"\0copy checked from stdin\0\0\0"), (b"B", bytes(8)), (b"E", bytes(5)), (b"H", b"")]
    client.send(*copy)
    client.until(b"G\0\0\0")
    client.send((b"d", b"not a number\n"), (b"S", b""))
    client.until(READY)
    client.send((b"Q", b"drop table checked\0"))
    client.until(READY)
    client.close()
    _quiet(gate)
    assert not [query for query in gate.of("query") if "skipped" in query]
    assert [(result["id"], result.get("tag")) for result in gate.of("result")][1:] == [
        (2, None),
        (3, "DROP TABLE"),
    ]


def test_postgres_more_statements_than_are_remembered(pg15, make_gate, monkeypatch):
    """psycopg on a libpq before 17, which cannot close them: it drops them by SQL."""
    monkeypatch.setattr("psycopg._connection_base._HAS_SEND_CLOSE", False)
    gate = make_gate(pg15)
    with psycopg.connect(gate.url(), autocommit=True) as connection:
        connection.prepare_threshold = 0
        connection.prepared_max = 10
        for number in range(4200):
            connection.execute(f"select %s -- {number}", (1,))
    _quiet(gate)
    dropped = [query for query in gate.of("query") if query["sql"].startswith("DEALLOCATE _pg3_")]
    assert len(dropped) == 4190


def test_postgres_listen_notify(pg15, make_gate):
    gate = make_gate(pg15)
    with psycopg.connect(gate.url(), autocommit=True) as listener:
        listener.execute("listen news")
        with psycopg.connect(gate.url(), autocommit=True) as sender:
            sender.execute("select pg_notify('news', 'hello')")
        note = next(listener.notifies(timeout=60, stop_after=1))
        assert (note.channel, note.payload) == ("news", "hello")
        # The real process id is what notifications and pg_backend_pid() speak of.
        assert listener.info.backend_pid == listener.execute("select pg_backend_pid()").fetchone()[0]
    _quiet(gate)
    assert gate.of("notification")[0]["payload"] == "hello"


def test_postgres_large_objects_through_function_calls(pg15, make_gate, psql, tmp_path):
    gate = make_gate(pg15)
    source = tmp_path / "source"
    source.write_bytes(os.urandom(300_000))
    copy = tmp_path / "copy"
    done = psql(gate, f"\\lo_import {source}", f"\\lo_export :LASTOID {copy}", "select 1")
    assert done.returncode == 0, done.stderr
    assert copy.read_bytes() == source.read_bytes()
    _quiet(gate)
    assert any(query["mode"] == "function" for query in gate.of("query"))


def test_postgres_fifty_connections(pg15, make_gate):
    gate = make_gate(pg15)
    barrier = threading.Barrier(50)
    seen: list[int] = []

    def use(number: int) -> None:
        with psycopg.connect(gate.url()) as connection:
            barrier.wait(60)
            seen.append(connection.execute("select %s::int", (number,)).fetchone()[0])

    threads = [threading.Thread(target=use, args=(number,)) for number in range(50)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(seen) == list(range(50))
    _quiet(gate)


def test_postgres_secrets_are_not_recorded(pg15, make_gate, psql):
    gate = make_gate(pg15, user="super")
    psql(gate, "create role temporary_role password 'hunter2secret'", "drop role temporary_role")
    psql(gate, "alter role nobody_here passwor 'hunter2secret'")
    psql(gate, "create role x password 'hunter2secret' nonsense")
    psql(gate, "select dblink_connect('host=h password=hunter2secret')")
    gate.wait_done()
    assert "hunter2secret" not in repr([event for event in gate.events if "passwor " not in str(event)])
    assert any("password '***'" in event["sql"] for event in gate.of("query"))
    verifier = psql(gate, "select rolpassword from pg_authid where rolname = 'scram_user'")
    assert "SCRAM-SHA-256$" in verifier.stdout
    assert "SCRAM-SHA-256$" not in repr(gate.events)


def test_postgres_long_statement_is_told_in_parts(pg15, make_gate):
    gate = make_gate(pg15)
    text = "select length('" + "é" * 300_000 + "')"
    huge = "select length('" + "y" * 3_000_000 + "')"
    with psycopg.connect(gate.url(), autocommit=True, cursor_factory=psycopg.ClientCursor) as connection:
        assert connection.execute(text).fetchone() == (300_000,)
        assert connection.execute(huge).fetchone() == (3_000_000,)
    _quiet(gate)
    sql = [event for event in gate.events if event["kind"] in ("query", "more")]
    second = sql.index(gate.of("query")[1])
    assert "".join(event["sql"] for event in sql[:second]) == text
    assert sql[second]["truncated"]
    assert sql[second]["message_bytes"] == len(huge) + 1


def test_postgres_replication_only_where_allowed(pg15, make_gate, tmp_path):
    closed = make_gate(pg15)
    opened = make_gate(pg15, allow_replication=True, keep_events=True)
    for gate, code in ((closed, 1), (opened, 0)):
        folder = tmp_path / str(code)
        command = [pg15.bin / "pg_basebackup", "-w", "-D", folder, "-X", "stream", "-c", "fast"]
        done = subprocess.run(
            [*command, "-d", f"host=127.0.0.1 port={gate.port} user=x"],
            capture_output=True,
            text=True,
            timeout=100,
        )
        assert done.returncode == code, done.stderr
    assert (tmp_path / "0" / "PG_VERSION").exists()
    assert "replication is not allowed for prod-db/readonly" in str(closed.errors[0])
    opened.wait_done()
    assert any(result.get("copy") == "both" for result in opened.of("result"))
