"""Root file systems for test hosts: one per suite, made by debootstrap, kept outside of the tree.

A cached image is never written to: each host gets an overlay on it. The folder's name carries a digest of
what went into it, so that a changed package list makes a new one. Two test runs may ask at once: the first
builds under a lock, into a scratch folder that is renamed when it is whole.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import time
import urllib.request
from pathlib import Path

CACHE = Path(os.environ.get("PAM_TEST_HOSTS", "/var/cache/pam-test-hosts"))
#: What every host has before anything of ours comes: what a small server has, and psql for its users.
#: Nothing else can be had later, since the hosts have no network but the controller's ssh.
PACKAGES = (
    "systemd,systemd-sysv,dbus,libpam-systemd,python3,python3-apt,openssh-server,sudo,iproute2,procps,"
    "ca-certificates,netbase,postgresql-client"
)
DEBIAN = ("bookworm", "trixie")
UBUNTU = ("noble",)
#: debootstrap on a slow mirror and a busy machine; it normally takes one to three minutes.
BUILD_SECONDS = 900
#: A mirror may be slow or away for a moment.
TRIES, PAUSE = 3, 10.0
#: Raise when `_prepare` changes.
EDITION = 3

UBUNTU_MIRROR = "http://archive.ubuntu.com/ubuntu"
UBUNTU_KEYRING = (
    f"{UBUNTU_MIRROR}/pool/main/u/ubuntu-keyring/ubuntu-keyring_2023.11.28.1_all.deb",
    "36de43b15853ccae0028e9a767613770c704833f82586f28eb262f0311adb8a8",
)
#: Timers that would wake up during a test, and what a container cannot do.
MASKED = (
    "apt-daily.timer",
    "apt-daily-upgrade.timer",
    "dpkg-db-backup.timer",
    "e2scrub_all.timer",
    "fstrim.timer",
    "motd-news.timer",
    "systemd-resolved.service",
    "systemd-networkd.service",
    "systemd-networkd.socket",
    "systemd-timesyncd.service",
    "networkd-dispatcher.service",
    "ssh.socket",
)


class ImageError(Exception):
    """A root file system cannot be had; the message says why."""


def image(suite: str, extra: tuple[str, ...] = ()) -> Path:
    """The cached root file system of ``suite`` with ``extra`` packages; built now if there is none.

    Raises ImageError, for instance when the mirror cannot be reached.
    """
    packages = ",".join((PACKAGES, *extra))
    digest = hashlib.sha256(f"{EDITION} {suite} {packages} {MASKED}".encode()).hexdigest()[:12]
    place = CACHE / f"{suite}-{digest}"
    CACHE.mkdir(mode=0o755, parents=True, exist_ok=True)
    with (CACHE / f"{suite}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not place.exists():
            _build(suite, packages, place)
    return place


def _build(suite: str, packages: str, place: Path) -> None:
    scratch = place.with_suffix(".part")
    if scratch.exists():
        shutil.rmtree(scratch)  # of a build that was interrupted
    command = ["debootstrap", "--variant=minbase", f"--include={packages}"]
    source: list[str] = []
    if suite in UBUNTU:
        command.append(f"--keyring={_ubuntu_keyring()}")
        # Debian's debootstrap may not know the suite's name; all of Ubuntu's use this script.
        source = [UBUNTU_MIRROR, "/usr/share/debootstrap/scripts/gutsy"]
    print(f"==> building the root file system of {suite}, once: one to three minutes", flush=True)
    deadline = time.monotonic() + BUILD_SECONDS
    for left in reversed(range(TRIES)):
        try:
            done = subprocess.run(
                [*command, suite, str(scratch), *source],
                capture_output=True,
                text=True,
                check=False,
                timeout=deadline - time.monotonic(),
            )
        except (FileNotFoundError, subprocess.TimeoutExpired) as error:
            raise ImageError(f"debootstrap {suite}: {error}") from None
        if done.returncode == 0:
            break
        shutil.rmtree(scratch, ignore_errors=True)
        if not left:
            raise ImageError(f"debootstrap {suite}: {(done.stdout + done.stderr)[-2000:]}")
        time.sleep(PAUSE)
    _prepare(scratch)
    scratch.rename(place)


def _ubuntu_keyring() -> Path:
    """Ubuntu's archive keys, from its own package, which is known by its digest."""
    keyring = CACHE / "ubuntu-archive-keyring.gpg"
    if keyring.exists():
        return keyring
    address, digest = UBUNTU_KEYRING
    for left in reversed(range(TRIES)):
        try:
            with urllib.request.urlopen(address, timeout=30) as answer:
                data = answer.read(1 << 20)
            break
        except OSError as error:
            if not left:
                raise ImageError(f"Ubuntu's archive cannot be reached: {error}") from None
            time.sleep(PAUSE)
    if hashlib.sha256(data).hexdigest() != digest:
        raise ImageError(f"{address} is not the file that is expected")
    package, folder = CACHE / "ubuntu-keyring.deb", CACHE / "ubuntu-keyring"
    package.write_bytes(data)
    subprocess.run(["dpkg-deb", "-x", str(package), str(folder)], check=True)
    shutil.copy(folder / "usr/share/keyrings/ubuntu-archive-keyring.gpg", keyring)
    shutil.rmtree(folder)
    package.unlink()
    return keyring


def _prepare(root: Path) -> None:
    """What all hosts of this image share; nothing secret, no identity."""
    (root / "etc/machine-id").write_text("")
    for key in (root / "etc/ssh").glob("ssh_host_*"):
        key.unlink()
    units = root / "etc/systemd/system"
    for unit in MASKED:
        (units / unit).unlink(missing_ok=True)
        (units / unit).symlink_to("/dev/null")
    wants = units / "multi-user.target.wants"
    wants.mkdir(exist_ok=True)
    # Ubuntu starts ssh by a socket, which is masked above: the host shall listen from the start.
    shutil.rmtree(units / "ssh.service.requires", ignore_errors=True)
    (wants / "ssh.service").unlink(missing_ok=True)
    (wants / "ssh.service").symlink_to("/lib/systemd/system/ssh.service")
    # sshd waits for no resolver and asks nothing of PAM's login records: a host answers in a second.
    (root / "etc/ssh/sshd_config.d/test.conf").write_text(
        "UseDNS no\nPermitRootLogin prohibit-password\nMaxStartups 100\nMaxSessions 100\n"
    )
    (root / "etc/systemd/journald.conf.d").mkdir(parents=True, exist_ok=True)
    (root / "etc/systemd/journald.conf.d/test.conf").write_text(
        "[Journal]\nStorage=persistent\nSystemMaxUse=64M\nRateLimitIntervalSec=0\n"
    )
    (root / "var/log/journal").mkdir(exist_ok=True)
    shutil.rmtree(root / "var/cache/apt/archives", ignore_errors=True)
    (root / "var/cache/apt/archives/partial").mkdir(parents=True)
    for user in ("alice", "ops"):
        subprocess.run(["chroot", str(root), "useradd", "-m", "-s", "/bin/bash", user], check=True)
    sudoers = root / "etc/sudoers.d/ops"
    sudoers.write_text("ops ALL=(ALL) NOPASSWD: ALL\n")
    sudoers.chmod(0o440)
