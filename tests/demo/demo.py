"""`make demo`: the whole product once, on this machine; `make demo-up` leaves it running.

Everything lives in a fresh folder `.demo` of the clone and is removed at the end; nothing is installed
and only loopback addresses are used. The PostgreSQL is a real one (as root it runs as `nobody`, from a
temporary folder that is removed too).
"""

from __future__ import annotations

import argparse
import json
import shlex
import signal
import sys
import time
from pathlib import Path

SUPPORT = Path(__file__).resolve().parents[1] / "support"
sys.path.insert(0, str(SUPPORT))

from postgres_server import PostgresServer  # noqa: E402 - found in the folder named above
from processes import ProcessFailedError  # noqa: E402
from stack import BIN, Person, Stack, remove  # noqa: E402

FOLDER = Path(__file__).resolve().parents[2] / ".demo"
QUERY = "select name, price from product order by price desc limit 3"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--up", action="store_true", help="leave everything running until Ctrl-C")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    began = time.monotonic()
    remove(FOLDER)
    try:
        step("a real PostgreSQL, with a table and two accounts whose passwords only the vault will know")
        server = PostgresServer()
        try:
            with Stack(FOLDER) as stack:
                prepare(server, stack)
                alice = stack.person("alice")
                if options.up:
                    stay_up(stack, alice, server)
                else:
                    run_once(alice, server)
        finally:
            server.stop()
    except (RuntimeError, TimeoutError, ProcessFailedError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    finally:
        remove(FOLDER)
    if not options.up:
        step(f"stopped and removed everything; {time.monotonic() - began:.0f} s in all")
    return 0


def prepare(server: PostgresServer, stack: Stack) -> None:
    stack.add_database(server)
    server.sql(
        "create table product (name text primary key, price numeric(8,2))",
        "insert into product values ('lantern', 39.90), ('rope', 12.50), ('compass', 24.00), ('tent', 189)",
        "grant select on product to demo_db_ro",
        database="app",
    )
    step("platform, relay and agent: one process each, the agent with outbound connections only")
    stack.start()


def run_once(alice: Person, server: PostgresServer) -> None:
    step("alice logs in: OAuth device flow, approved by posting the real web form")
    show("pam-client login", alice.login())
    step("what alice may reach")
    show("pam-client ls", alice.run("ls").stdout)
    psql = str(server.bin / "psql")
    step("a query through client, relay and agent; alice has no database password")
    words = ["connect", "demo-db/readonly", "--", psql, "-X", "-c", QUERY]
    show(f'pam-client connect demo-db/readonly -- psql -c "{QUERY}"', alice.run(*words).stdout)
    step("the session as the platform stored it, decrypted for its owner and verified")
    session = newest_session(alice)
    show(f"pam-client replay {session}", alice.run("replay", session, "--verify").stdout)


def newest_session(alice: Person) -> str:
    """The id of alice's last session, once its recording is complete on the platform."""
    deadline = time.monotonic() + 120
    while True:
        newest = json.loads(alice.run("sessions", "ls", "--json").stdout)[0]
        if newest["recording"] == "complete":
            return str(newest["id"])
        if time.monotonic() > deadline:
            raise TimeoutError(f"the recording of {newest['id']} did not arrive\n{alice.stack.logs()}")
        time.sleep(0.1)


def stay_up(stack: Stack, alice: Person, server: PostgresServer) -> None:
    step("everything runs; Ctrl-C stops it and removes it")
    home = " ".join(f"{name}={shlex.quote(value)}" for name, value in demo_environment(alice).items())
    client = f"{BIN / 'pam-client'}"
    print(
        f"""
  web pages   {stack.url}
  logins      alice   {stack.passwords["alice"]}     (user)
              auditor {stack.passwords["auditor"]}     (auditor)
              root    {stack.passwords["root"]}     (admin)

  In another terminal:

    export {home} PATH={shlex.quote(str(server.bin))}:$PATH
    {client} login
    {client} ls
    {client} connect demo-db/readonly                 # a local port; then psql as it says
    {client} connect demo-db/readonly -- psql -c 'select * from product'
    {client} sessions ls
    {client} replay SESSION
"""
    )
    sys.stdout.flush()
    try:
        while True:
            time.sleep(1)
            for process in stack.processes.values():
                if not process.running():
                    raise RuntimeError(f"{process.name} ended\n{process.tail()}")
    except KeyboardInterrupt:
        print()


def demo_environment(alice: Person) -> dict[str, str]:
    wanted = ("PAM_CLIENT_HOME", "PAM_PLATFORM", "PYTHON_KEYRING_BACKEND")
    return {name: value for name, value in alice.environment().items() if name in wanted}


def step(text: str) -> None:
    print(f"\n==> {text}", flush=True)


def show(command: str, output: str) -> None:
    print(f"$ {command}")
    print("".join(f"    {line}\n" for line in output.rstrip().splitlines()), end="", flush=True)


if __name__ == "__main__":
    sys.exit(main())
