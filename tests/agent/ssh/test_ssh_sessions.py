"""Shells and commands through the interceptor, with the stock OpenSSH client and server."""

from __future__ import annotations

import codecs
import contextlib
import fcntl
import hashlib
import json
import os
import pty
import select
import struct
import subprocess
import termios
import time

import pytest
from processes import wait_for as _wait_for
from ssh_server import SshServer

pytestmark = pytest.mark.slow


def wait_for(condition, what: str) -> None:
    _wait_for(lambda: bool(condition()), what)


def test_a_command_has_its_streams_and_status(gate) -> None:
    done = gate.ssh("cat; echo to-stderr >&2; exit 7", input=b"hello\n")
    assert (done.stdout, done.returncode) == (b"hello\n", 7)
    assert b"to-stderr" in done.stderr
    gate.ended()
    assert [event["command"] for event in gate.kinds("exec")] == ["cat; echo to-stderr >&2; exit 7"]
    assert gate.kinds("exit")[0]["status"] == 7


@pytest.mark.parametrize("status", [0, 1, 130, 255])
def test_the_exit_status_is_the_commands(gate, status) -> None:
    assert gate.ssh(f"exit {status}").returncode == status


def test_a_shell_without_a_terminal(gate) -> None:
    done = gate.ssh(input=b"echo one; echo two\nexit 3\n")
    assert done.stdout.endswith(b"one\ntwo\n")
    assert done.returncode == 3


def test_a_signal_that_ends_a_command_is_told(gate) -> None:
    done = gate.ssh("kill -TERM $$")
    assert done.returncode == 255  # as OpenSSH's client has it for every signal
    gate.ended()
    assert gate.kinds("exit")[0]["signal"] == "TERM"


def test_half_close_reaches_the_command_and_it_still_answers(gate) -> None:
    done = gate.ssh("wc -c; echo after", input=b"x" * 100_000)
    assert done.stdout.split() == [b"100000", b"after"]


def test_the_environment_passes_as_far_as_it_is_allowed(sshd, make_gate) -> None:
    gate = make_gate(sshd, account={"env": ["DEMO_*"]})
    options = ["-o", "SendEnv=LC_DEMO DEMO_WORD"]
    done = gate.ssh(
        "echo $DEMO_WORD-$LC_DEMO", options=options, env={**os.environ, "DEMO_WORD": "w", "LC_DEMO": "x"}
    )
    assert done.stdout == b"w-\n"
    gate.ended()
    assert gate.kinds("exec")[0]["env"] == {"DEMO_WORD": "w"}


def test_what_is_not_allowed_is_refused_and_recorded(sshd, make_gate) -> None:
    gate = make_gate(sshd, account={"allow": ["sftp"]})
    for words in (["true"], []):
        done = gate.ssh(*words)
        assert done.returncode == 255
    gate.ended()
    assert {event["what"] for event in gate.kinds("refused")} == {"exec", "shell"}
    assert not gate.kinds("exec")


def test_agent_and_x11_forwarding_are_refused(gate) -> None:
    done = gate.ssh("echo -$SSH_AUTH_SOCK-", options=["-A"])
    assert done.stdout == b"--\n"


class Screen:
    """An ``ssh -tt`` on a real terminal."""

    def __init__(self, gate, *words: str) -> None:
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            os.environ["TERM"] = "xterm-256color"
            command = gate.ssh_command(*words)
            os.execvp("ssh", [command[0], "-tt", *command[1:]])
        self.text = ""
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")  # a read may end within a character

    def resize(self, columns: int, rows: int) -> None:
        fcntl.ioctl(self.fd, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def type(self, text: str) -> None:
        os.write(self.fd, text.encode())

    def expect(self, word: str, timeout: float = 60, *, last: bool = False) -> None:
        """``last``: nothing may come after it."""
        end = time.monotonic() + timeout
        while not (self.text.endswith(word) if last else word in self.text):
            ready, _, _ = select.select([self.fd], [], [], max(0.0, end - time.monotonic()))
            assert ready, f"{word!r} is not in {self.text!r}"
            try:
                data = os.read(self.fd, 65536)
            except OSError:
                data = b""
            assert data, f"{word!r} is not in {self.text!r}"
            self.text += self._decoder.decode(data)

    def say(self, text: str, answer: str) -> None:
        self.text = ""
        self.type(text)
        self.expect(answer)

    def ask_size(self, answer: str, prompt: str) -> None:
        """``stty size`` until that is it: a SIGWINCH that comes just before ssh waits is seen with what is
        typed next only."""
        for _ in range(20):
            self.text = ""
            self.type("stty size\r")
            # As a person does: what is typed before the prompt is typed ahead.
            self.expect(prompt, last=True)
            if answer in self.text:
                return
        raise AssertionError(f"{answer!r} is not in {self.text!r}")

    def interrupt(self, prompt: str) -> None:
        """Ctrl-C until the prompt is back: one that a shell gets while it starts its command is lost."""
        self.text = ""
        for _ in range(20):
            self.type("\x03")
            with contextlib.suppress(AssertionError):
                self.expect(prompt, timeout=1.5)
                break
        assert "^C" in self.text

    def close(self) -> int:
        """The status that ssh ended with."""
        with contextlib.suppress(OSError):
            while os.read(self.fd, 65536):
                pass
        _, status = os.waitpid(self.pid, 0)
        os.close(self.fd)
        return os.waitstatus_to_exitcode(status)


def test_a_terminal_is_faithful_and_recorded(gate) -> None:
    screen = Screen(gate, "env PS1='$ ' bash --norc")
    screen.expect("$ ")
    screen.say("echo gr\u00fc\u00df-$((40+2))\r", "gr\u00fc\u00df-42")
    screen.resize(132, 43)
    screen.ask_size("43 132", "$ ")
    screen.say("echo $TERM\r", "xterm-256color")
    screen.expect("$ ", last=True)
    screen.say("sh -c 'echo sta''rted; sleep 100'\r", "started")
    screen.interrupt("$ ")
    screen.say("echo $?\r", "130")
    # Not by read -s -p, which turns the echo off after its prompt.
    screen.say("stty -echo; printf 'Pass''word: '; read x; stty echo\r", "Password: ")
    screen.say("hunter2-secret\r", "$ ")
    screen.type("exit 5\r")
    assert screen.close() == 5
    gate.ended()
    output = "".join(event["data"] for event in gate.kinds("o"))
    assert "gr\u00fc\u00df-42" in output
    assert {"cols": 132, "rows": 43}.items() <= gate.kinds("resize")[-1].items()
    echoed = [event["data"] for event in gate.kinds("i") if "data" in event]
    # Before the resize: later on the shell may draw its prompt anew in the middle of a word.
    assert "echo gr\u00fc\u00df-$((40+2))" in echoed
    assert "hunter2-secret" not in json.dumps(gate.events)
    assert sum(event.get("bytes", 0) for event in gate.kinds("i")) >= len("hunter2-secret")


@pytest.mark.parametrize("side", ["user", "target"])
def test_keys_are_exchanged_anew_under_load_both_ways(tmp_path, make_gate, side) -> None:
    server = SshServer(tmp_path / "rekeying", *(["RekeyLimit 4M"] if side == "target" else []))
    try:
        gate = make_gate(server)
        options = ["-o", "RekeyLimit=4M"] if side == "user" else []
        data = os.urandom(1 << 20) * 48
        done = gate.ssh("cat", input=data, options=options)
        assert done.returncode == 0, done.stderr
        assert done.stdout == data
    finally:
        server.stop()


def test_many_parallel_channels_on_one_connection(gate, tmp_path) -> None:
    control = tmp_path / "control"
    master = subprocess.Popen(
        ["ssh", "-M", "-S", str(control), "-N", *gate.ssh_command()[1:]], stderr=subprocess.DEVNULL
    )
    try:
        wait_for(control.exists, "the master's socket")
        commands = [
            subprocess.Popen(
                [
                    "ssh",
                    "-S",
                    str(control),
                    *gate.ssh_command(f"head -c 300000 /dev/zero; echo {number}")[1:],
                ],
                stdout=subprocess.PIPE,
                stdin=subprocess.DEVNULL,
            )
            for number in range(20)
        ]
        for number, command in enumerate(commands):
            assert command.communicate(timeout=60)[0] == bytes(300_000) + f"{number}\n".encode()
            assert command.returncode == 0
    finally:
        # Not by a signal: between looking for one and its poll(), OpenSSH 9.2 misses it and stays.
        try:
            gate.ssh(options=["-S", str(control), "-O", "exit"])
            master.wait(60)
        finally:
            master.kill()
            master.wait()
    gate.ended()
    assert len(gate.conversations) == 1
    assert len(gate.kinds("exec")) == 20


def test_a_large_transfer_both_ways_keeps_its_bytes(gate) -> None:
    data = os.urandom(1 << 20) * 64
    done = gate.ssh("cat", input=data)
    assert done.stdout == data
    gate.ended()
    close = gate.kinds("close")[0]
    assert (close["up"], close["down"]) == (len(data), len(data))
    assert close["sha256"]["stdin"] == hashlib.sha256(data).hexdigest() == close["sha256"]["stdout"]
    recorded = [event for event in gate.kinds("data") if event["dir"] == "down"]
    assert sum(len(event["data"].encode()) for event in recorded) < 200_000
