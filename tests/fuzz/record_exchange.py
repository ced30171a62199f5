"""Records what psycopg and a real PostgreSQL say to each other after login: corpus/postgres/exchange.

Run by hand when the protocol's messages change; the result is kept in the repository.
"""

from __future__ import annotations

import socket
import sys
import threading
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "support")]

import psycopg  # noqa: E402 - the helpers are found through the path above
from fuzz_postgres import CLIENT, TARGET, Step, steps_to_input  # noqa: E402
from postgres_server import PostgresServer  # noqa: E402


class Tap:
    """Carries one connection and keeps its bytes in order, each with the side it came from."""

    def __init__(self, port: int) -> None:
        self.steps: list[Step] = []
        self._lock = threading.Lock()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._target = port
        self._thread = threading.Thread(target=self._serve, name="tap", daemon=True)
        self._thread.start()

    def join(self) -> None:
        self._thread.join(10)

    def _serve(self) -> None:
        client, _ = self._listener.accept()
        target = socket.create_connection(("127.0.0.1", self._target))
        up = threading.Thread(target=self._carry, args=(CLIENT, client, target), daemon=True)
        up.start()
        self._carry(TARGET, target, client)
        up.join(10)

    def _carry(self, side: int, source: socket.socket, sink: socket.socket) -> None:
        while data := source.recv(65536):
            with self._lock:
                self.steps.append((side, data))
            sink.sendall(data)
        sink.close()


def main() -> None:
    server = PostgresServer()
    try:
        tap = Tap(server.port)
        _talk(f"host=127.0.0.1 port={tap.port} user=postgres dbname=postgres password={server.password}")
        tap.join()
    finally:
        server.stop()
    # The login ends with the target's first ReadyForQuery, which is the end of what it sent.
    ready = next(
        i for i, (side, data) in enumerate(tap.steps) if side == TARGET and data[-6:-1] == b"Z\0\0\0\5"
    )
    out = HERE / "corpus/postgres/exchange"
    out.write_bytes(steps_to_input(3, tap.steps[ready + 1 :]))
    print(f"{out}: {out.stat().st_size} bytes")


def _talk(conninfo: str) -> None:
    with psycopg.connect(conninfo, autocommit=True, sslmode="disable", gssencmode="disable") as connection:
        connection.execute("create temp table t (a int, b text, c numeric, d timestamptz, e bytea)")
        connection.execute("listen x")
        insert = "insert into t values (%s, %s, %s, now(), %b)"
        with connection.pipeline():
            for number in range(3):
                connection.execute(insert, (number, "text", 1.5, b"\0\xff"), prepare=True)
        connection.execute("select * from t", binary=True).fetchall()
        with connection.cursor() as cursor:
            with cursor.copy("copy t (a, b) from stdin") as copy:
                copy.write_row((7, "seven"))
            with cursor.copy("copy t to stdout") as copy:
                list(copy.rows())
        with connection.transaction():
            connection.execute("notify x, 'payload'")
        connection.execute("create role fuzz password 'hunter2'")
        try:
            connection.execute("select nothing from nowhere where a = %s", (1,))
        except psycopg.errors.UndefinedTable:
            connection.execute("set client_encoding to 'latin1'; select 'ä'")


if __name__ == "__main__":
    main()
