"""The real PostgreSQL behind tests and demo starts for everybody."""

from __future__ import annotations

import os

import pytest
from postgres_server import PostgresServer


@pytest.mark.slow
def test_it_starts_under_a_private_umask() -> None:
    os.umask(0o077)  # put back by the fixture that watches over it
    server = PostgresServer()
    try:
        assert server.sql("select 1") == "1"
    finally:
        server.stop()
