"""Sealed entries, master keys, re-keying, and the platform's own keys."""

import time
from dataclasses import replace
from datetime import timedelta
from threading import Thread
from types import SimpleNamespace

import pytest
from django.utils import timezone
from hypothesis import given
from hypothesis import strategies as st

from pam_common.errors import AuthenticationError, ConfigError, PamError, RefusedError, UnavailableError
from pam_common.keys import SigningKey, b64decode, b64encode, key_id
from pam_common.recording import Recipient
from pam_common.secure_channel import x25519_public
from pam_platform.access.models import Account
from pam_platform.config import current
from pam_platform.vault import keys, master, store
from pam_platform.vault.models import PlatformKey, VaultEntry
from pam_platform.vault.seal import MasterKey, Sealed, rewrap, seal, unseal

MASTER, OTHER = MasterKey(b"m" * 32), MasterKey(b"o" * 32)


# --- sealing -------------------------------------------------------------------------------------------


@given(
    secret=st.binary(max_size=200), entry=st.from_regex(r"\A[a-z2-7-]{1,30}\Z"), version=st.integers(1, 99)
)
def test_what_is_sealed_opens_again_here_and_nowhere_else(secret, entry, version):
    sealed = seal(secret, MASTER, entry, version)
    assert unseal(sealed, MASTER, entry, version) == secret
    for master_key, where, number in (
        (OTHER, entry, version),
        (MASTER, entry + "x", version),
        (MASTER, entry, version + 1),
    ):
        with pytest.raises(AuthenticationError):
            unseal(sealed, master_key, where, number)
    moved = rewrap(sealed, MASTER, OTHER, entry, version)
    assert unseal(moved, OTHER, entry, version) == secret
    with pytest.raises(AuthenticationError):
        unseal(moved, MASTER, entry, version)


@given(st.data())
def test_no_bit_can_change(data):
    sealed = seal(b"secret", MASTER, "v-a", 1)
    field = data.draw(st.sampled_from(["wrapped_key", "ciphertext"]))
    value = bytearray(getattr(sealed, field))
    value[data.draw(st.integers(0, len(value) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    parts = {"wrapped_key": sealed.wrapped_key, "ciphertext": sealed.ciphertext, field: bytes(value)}
    with pytest.raises(AuthenticationError):
        unseal(Sealed(MASTER.kid, **parts), MASTER, "v-a", 1)


@pytest.mark.parametrize("size", [0, 1, 23, 24, 39])
def test_a_short_row_is_damage_not_a_crash(size):
    with pytest.raises(AuthenticationError):
        unseal(Sealed(MASTER.kid, b"x" * size, b"y" * size), MASTER, "v-a", 1)


def test_a_master_key_shows_nothing_of_itself():
    assert "mmm" not in repr(MASTER)
    assert MASTER.kid != OTHER.kid


# --- entries -------------------------------------------------------------------------------------------


def test_entries_are_put_replaced_and_revealed(platform):
    entry = store.put(b"one")
    store.replace(entry, b"two")
    fresh = VaultEntry.objects.get(pk=entry.pk)
    assert (store.reveal(fresh), fresh.version) == (b"two", 2)


def test_a_row_put_back_or_swapped_does_not_open(platform):
    first, second = store.put(b"one"), store.put(b"two")
    old = VaultEntry.objects.get(pk=first.pk)
    store.replace(first, b"newer")
    VaultEntry.objects.filter(pk=first.pk).update(wrapped_key=old.wrapped_key, ciphertext=old.ciphertext)
    with pytest.raises(AuthenticationError):
        store.reveal(VaultEntry.objects.get(pk=first.pk))
    VaultEntry.objects.filter(pk=second.pk).update(wrapped_key=old.wrapped_key, ciphertext=old.ciphertext)
    with pytest.raises(AuthenticationError):
        store.reveal(VaultEntry.objects.get(pk=second.pk))


def test_nothing_in_the_database_is_the_secret(platform):
    entry = store.put(b"correct horse")
    assert b"horse" not in bytes(entry.ciphertext) + bytes(entry.wrapped_key)
    assert master.read(master.source())[0].secret not in bytes(entry.ciphertext)


def test_rekeying_moves_every_entry_and_drops_the_old_key(platform):
    entries = [store.put(b"%d" % number) for number in range(3)]
    (old,) = master.read(master.source())
    kid, moved = store.rekey()
    assert moved == VaultEntry.objects.count()
    assert [key.kid for key in master.read(master.source())] == [kid]
    assert kid != old.kid
    for number, entry in enumerate(entries):
        fresh = VaultEntry.objects.get(pk=entry.pk)
        assert (store.reveal(fresh), fresh.master_kid) == (b"%d" % number, kid)
    assert keys.signing_key(keys.GRANT)


def test_a_rekeying_that_broke_off_goes_on(platform):
    entry = store.put(b"secret")
    where = master.source()
    master.write(where, [master.generate(), *master.read(where)])  # and then the power failed
    assert store.reveal(entry) == b"secret"
    store.rekey()
    assert store.reveal(VaultEntry.objects.get(pk=entry.pk)) == b"secret"
    assert len(master.read(where)) == 1


def test_a_process_learns_of_keys_another_one_made(platform):
    """The server goes on through a re-keying: it reads the key file again when an entry asks for it."""
    entry = store.put(b"secret")
    loaded = master.load()
    store.rekey()
    master._loaded = (master.source(), loaded)
    assert store.reveal(VaultEntry.objects.get(pk=entry.pk)) == b"secret"


def test_a_rekeying_waits_for_an_apply_that_has_sealed_and_not_committed(apply, monkeypatch):
    """It could not see, and so not move, what is sealed under the key that it then drops."""
    (old,) = master.read(master.source())
    told, real = [], store.put

    def rekey():
        with pytest.raises(UnavailableError, match="another pam-platform apply, init, keys") as caught:
            store.rekey()
        told.append(caught.value.hint)

    def put(secret):
        entry = real(secret)
        if not told:
            thread = Thread(target=rekey)  # as another process, on a connection of its own
            thread.start()
            thread.join()
        return entry

    monkeypatch.setattr(store, "put", put)
    monkeypatch.setattr(master, "LOCK_TIMEOUT", 0.2)
    apply()
    assert told == ["try again when it is done."]
    assert master.read(master.source()) == [old]
    store.rekey()
    store.check()
    assert store.reveal(Account.objects.get(name="owner").password) == b"password-of-rw"


def test_whoever_has_waited_seals_under_the_key_that_was_made_meanwhile(apply, monkeypatch):
    loaded = master.load()
    kid, _ = store.rekey()
    for seals in (apply, lambda: keys.rotate(keys.GRANT)):
        master._loaded = (master.source(), loaded)
        seals()
        assert set(VaultEntry.objects.values_list("master_kid", flat=True)) == {kid}


def test_the_lock_is_waited_for(platform, monkeypatch):
    first = master.locked()
    first.__enter__()
    clock = SimpleNamespace(monotonic=time.monotonic, sleep=lambda _: first.__exit__(None, None, None))
    monkeypatch.setattr(master, "time", clock)
    with master.locked():
        pass


def test_entries_of_a_lost_master_key_are_named(platform):
    entry = store.put(b"secret")
    master.write(master.source(), [master.generate()])
    with pytest.raises(ConfigError, match="not in the key file"):
        store.reveal(entry)
    with pytest.raises(ConfigError, match="vault"):
        store.check()


# --- where master keys come from -----------------------------------------------------------------------


@pytest.mark.parametrize("content", [b"", b"\n", b"short\n", b"=" * 44, b"A" * 43 + b"\xff", b"A" * 5000])
def test_a_master_key_file_is_strict_and_not_quoted(tmp_path, content):
    path = tmp_path / "key"
    path.touch(mode=0o600)
    path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        master.read(master.Source(path, ours=True))
    assert "AAAA" not in str(caught.value)


def test_others_may_not_read_the_master_key(tmp_path):
    path = tmp_path / "key"
    path.write_text("A" * 43)
    path.chmod(0o640)
    with pytest.raises(PamError, match="may be read by others"):
        master.read(master.Source(path, ours=True))


def test_the_order_of_sources(platform, tmp_path, monkeypatch):
    assert master.source() == master.Source(current().keys_dir / "vault.key", ours=True)
    monkeypatch.setenv(master.FILE_VARIABLE, str(tmp_path / "named"))
    assert master.source() == master.Source(tmp_path / "named", ours=True)
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    (tmp_path / "vault-key").write_text("x")
    assert master.source() == master.Source(tmp_path / "vault-key", ours=False)


# --- the platform's keys -------------------------------------------------------------------------------


def test_every_purpose_has_a_key_of_its_own(platform):
    publics = [keys.public_entries(purpose)[0]["key"] for purpose in keys.PURPOSES]
    assert len(set(publics)) == len(keys.PURPOSES)
    private = keys.recording_private_keys()[0]
    assert x25519_public(private) == b64decode(keys.recording_recipients()[0]["key"])


def test_recordings_are_sealed_to_the_configured_auditors(platform, settings):
    auditor = Recipient(key_id(b"k" * 32), b"k" * 32)
    named = {"kid": auditor.kid, "key": b64encode(auditor.key)}
    (own,) = keys.recording_recipients()
    settings.PAM_CONFIG = replace(current(), recording_recipients=(auditor,))
    assert keys.recording_recipients() == [own, named]
    following = keys.rotate(keys.RECORDING)
    assert [entry["kid"] for entry in keys.trusted_recording_keys()] == [
        own["kid"],
        following.kid,
        auditor.kid,
    ]
    settings.PAM_CONFIG = replace(current(), recording_platform_key=False)
    assert keys.recording_recipients() == keys.trusted_recording_keys() == [named]


def test_a_rotation_publishes_before_it_signs_and_trusts_what_was_signed(platform):
    old = keys.signing_key(keys.GRANT)
    following = keys.rotate(keys.GRANT)
    assert keys.signing_key(keys.GRANT).kid == old.kid
    assert [entry["kid"] for entry in keys.public_entries(keys.GRANT)] == [old.kid, following.kid]
    with pytest.raises(RefusedError, match="not yet everywhere"):
        keys.rotate(keys.GRANT)
    PlatformKey.objects.filter(pk=following.pk).update(created=timezone.now() - keys.PUBLICATION)
    keys.rotate(keys.GRANT)
    assert keys.signing_key(keys.GRANT).kid == following.kid
    assert [entry["kid"] for entry in keys.public_entries(keys.GRANT)] == [following.kid, old.kid]
    PlatformKey.objects.filter(kid=old.kid).update(retired=timezone.now() - keys.RETIREMENT)
    assert [entry["kid"] for entry in keys.public_entries(keys.GRANT)] == [following.kid]


def test_recordings_stay_readable_however_often_the_key_was_rotated(platform):
    for _ in range(4):
        keys.rotate(keys.RECORDING, at_once=True)
    PlatformKey.objects.filter(state="retired").update(retired=timezone.now() - timedelta(days=400))
    assert len(keys.recording_private_keys()) == 3
    assert len(keys.public_entries(keys.RECORDING)) == 1


def test_keys_are_rotated_by_purpose(platform):
    with pytest.raises(PamError, match="no key has the purpose"):
        keys.rotate("typo")
    grant = keys.signing_key(keys.GRANT)
    keys.rotate(keys.RELAY_USER_CA, at_once=True)
    assert keys.signing_key(keys.GRANT).kid == grant.kid
    assert isinstance(grant, SigningKey)


def test_without_init_there_is_no_key(db):
    with pytest.raises(PamError, match="no grant key") as caught:
        keys.signing_key(keys.GRANT)
    assert "init" in caught.value.hint


def test_a_lock_of_somebody_else_is_said(platform, monkeypatch):
    def shut(*_arguments, **_more):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(master.os, "open", shut)
    with pytest.raises(ConfigError, match=r"cannot lock .*/lock: Permission denied"), master.locked():
        pass
