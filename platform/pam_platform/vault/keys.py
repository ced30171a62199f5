"""The platform's own keys, and how each is rotated without a break.

    next ──────▶ current ──────▶ retired ──▶ gone
    published     signs           still verifies for RETIREMENT

A key is in every published list before it signs, and stays there as long as anything it signed is valid.
Signing keys and SSH CAs are Ed25519, the recording key is X25519.
"""

from __future__ import annotations

import secrets
from datetime import datetime, timedelta

from django.db import transaction
from django.db.models import Q
from django.utils import timezone

from pam_common.errors import PamError, RefusedError
from pam_common.keys import KEY_SIZE, KeyEntry, SigningKey, VerifyKeys, b64decode, b64encode, key_id
from pam_common.secure_channel import x25519_public
from pam_platform import config
from pam_platform.vault import master, store
from pam_platform.vault.models import PlatformKey

GRANT = "grant"
RELAY_USER_CA = "relay-user-ca"
RELAY_HOST_CA = "relay-host-ca"
INTERCEPTOR_HOST_CA = "interceptor-host-ca"
RECORDING = "recording"
#: What ``init`` makes; besides, there is one target-user CA per gateway.
PURPOSES = (GRANT, RELAY_USER_CA, RELAY_HOST_CA, INTERCEPTOR_HOST_CA, RECORDING)
_TARGET_USER_CA = "target-user-ca:"

#: A retired key is trusted as long as the longest-lived thing it signed, the trust list.
RETIREMENT = timedelta(days=30)
#: Agents and relays renew what they trust within a day; a client keeps, for as long as its session lasts (7
#: days at most), the keys that its connect named. So after eight days everyone knows a published key.
PUBLICATION = timedelta(days=8)


def target_user_ca(gateway: str) -> str:
    """The purpose of the CA that signs logins to a gateway's SSH targets."""
    return _TARGET_USER_CA + gateway


def create(purpose: str, state: str = PlatformKey.State.CURRENT) -> PlatformKey:
    """Make and store a key."""
    private = secrets.token_bytes(KEY_SIZE)
    public = x25519_public(private) if purpose == RECORDING else SigningKey(private).public
    now = timezone.now()
    return PlatformKey.objects.create(
        purpose=purpose,
        kid=key_id(public),
        public=b64encode(public),
        private=store.put(private),
        state=state,
        activated=now if state == PlatformKey.State.CURRENT else None,
    )


def ensure(purpose: str) -> None:
    """Make the purpose's first key if there is none."""
    if not PlatformKey.objects.filter(purpose=purpose, state=PlatformKey.State.CURRENT).exists():
        create(purpose)


def signing_key(purpose: str) -> SigningKey:
    """The key that signs now. Raises PamError before ``init``."""
    return SigningKey(store.reveal(_current(purpose).private))


def public_entries(purpose: str) -> list[dict[str, str]]:
    """The published list, newest use first: current, next, and retired keys that may still verify."""
    return [{"kid": row.kid, "key": row.public} for row in _published(purpose)]


def verify_keys(purpose: str) -> VerifyKeys:
    """The published list as VerifyKeys."""
    return VerifyKeys(KeyEntry(row.kid, b64decode(row.public, KEY_SIZE)) for row in _published(purpose))


def recording_recipients() -> list[dict[str, str]]:
    """To whom new recordings are sealed: the platform, unless its key is left out, and the auditors."""
    own = [_current(RECORDING)] if config.current().recording_platform_key else []
    return [{"kid": row.kid, "key": row.public} for row in own] + _auditors()


def trusted_recording_keys() -> list[dict[str, str]]:
    """To whom agents without a list of their own may seal recordings: nobody beyond those, and the keys
    before and after the platform's own."""
    own = public_entries(RECORDING) if config.current().recording_platform_key else []
    return own + _auditors()


def _auditors() -> list[dict[str, str]]:
    recipients = config.current().recording_recipients
    return [{"kid": recipient.kid, "key": b64encode(recipient.key)} for recipient in recipients]


def recording_private_keys() -> list[bytes]:
    """Every recording key there ever was: recordings are kept longer than keys are used."""
    rows = PlatformKey.objects.filter(purpose=RECORDING).select_related("private").order_by("-id")
    return [store.reveal(row.private) for row in rows]


@master.locked()
def rotate(purpose: str, *, at_once: bool = False) -> PlatformKey:
    """One step of a rotation: publish a next key, or let the published one take over.

    Returns the key that was made or took over. Raises RefusedError while the next key is too young for
    everyone to know it (unless ``at_once``).
    """
    with transaction.atomic():
        current = PlatformKey.objects.select_for_update().filter(purpose=purpose, state="current").first()
        if current is None:
            raise PamError(f'no key has the purpose "{purpose}"', hint="pam-platform keys list shows them.")
        following = PlatformKey.objects.filter(purpose=purpose, state="next").first()
        if following is None:
            return create(purpose, PlatformKey.State.NEXT)
        now = timezone.now()
        ready = following.created + PUBLICATION
        if now < ready and not at_once:
            raise RefusedError(
                f"key {following.kid} is published since {following.created:%Y-%m-%d %H:%M} UTC, "
                f"not yet everywhere; it may sign from {ready:%Y-%m-%d %H:%M} UTC on",
                hint="--now forces it: agents and relays that have not renewed since must be enrolled anew.",
            )
        current.state, current.retired = PlatformKey.State.RETIRED, now
        current.save(update_fields=["state", "retired"])
        following.state, following.activated = PlatformKey.State.CURRENT, now
        following.save(update_fields=["state", "activated"])
        return following


def distrust(kid: str) -> PlatformKey:
    """Take a retired key out of the published lists before its time, since it has leaked.

    What it signed is not believed any more by whoever renews from now on. Raises RefusedError for a key
    that is still in use.
    """
    with transaction.atomic():
        row = PlatformKey.objects.select_for_update().filter(kid=kid).first()
        if row is None:
            raise PamError(f"there is no key {kid}", hint="pam-platform keys list shows them.")
        if row.state != PlatformKey.State.RETIRED:
            raise RefusedError(
                f"key {kid} is the {row.state} {row.purpose} key",
                hint=f"let another one take its place first: pam-platform keys rotate {row.purpose}.",
            )
        row.retired = timezone.now() - RETIREMENT
        row.save(update_fields=["retired"])
        return row


def is_published(row: PlatformKey, now: datetime) -> bool:
    """Whether the key is in the lists that others trust."""
    return row.retired is None or now < row.retired + RETIREMENT


def _current(purpose: str) -> PlatformKey:
    row = PlatformKey.objects.filter(purpose=purpose, state="current").select_related("private").first()
    if row is None:
        raise PamError(f"the platform has no {purpose} key", hint="run pam-platform init.")
    return row


def _published(purpose: str) -> list[PlatformKey]:
    oldest = timezone.now() - RETIREMENT
    rows = PlatformKey.objects.filter(Q(retired=None) | Q(retired__gt=oldest), purpose=purpose)
    order = {"current": 0, "next": 1, "retired": 2}
    return sorted(rows, key=lambda row: (order[row.state], -row.pk))
