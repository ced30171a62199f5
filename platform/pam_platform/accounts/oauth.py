"""OAuth clients, and which user a token stands for.

Two kinds of client exist, and no other is ever made:

- the public client ``pam-client``: people on workstations, by device authorization (RFC 8628);
- one confidential client per service user, by client credentials (RFC 6749 section 4.4).

allauth stores hashes of tokens and secrets only.
"""

from __future__ import annotations

from allauth.idp.oidc.models import Client, Token
from django.contrib.sessions.backends.db import SessionStore
from django.db import transaction
from django.utils import timezone

from pam_common.errors import ConfigError
from pam_platform.accounts.models import User

PAM_CLIENT_ID = "pam-client"
# Shorter secrets could be guessed at the token endpoint; 128 bits are 22 characters of base64.
MIN_SECRET_LENGTH = 22
# One a line, as allauth stores them. Who asks for none gets "pam", and no ID token nobody reads.
SCOPES = "pam\nopenid\nprofile"
# A token is 86 characters; longer input is not hashed at all.
_MAX_TOKEN_LENGTH = 512


def ensure_clients() -> None:
    """Create the client that workstations use, or set it right again. Safe to repeat."""
    grants = (Client.GrantType.DEVICE_CODE, Client.GrantType.REFRESH_TOKEN)
    Client.objects.update_or_create(
        id=PAM_CLIENT_ID,
        defaults={
            "name": PAM_CLIENT_ID,
            "type": Client.Type.PUBLIC,
            "grant_types": "\n".join(grants),
            "scopes": SCOPES,
            "default_scopes": "pam",
            "redirect_uris": "",
            "response_types": "",
            "owner": None,
        },
    )


def ensure_service_client(user: User, secret: str) -> bool:
    """Let the service user log in with its name as client id and ``secret``; True if that changed.

    Safe to repeat. A new secret ends every token issued under the old one.
    Raises ConfigError when the user is no service user or the secret is too short.
    """
    if not user.is_service or user.username == PAM_CLIENT_ID:
        raise ConfigError([f"user {user.username}: only a service user has a client secret"])
    if len(secret) < MIN_SECRET_LENGTH:
        raise ConfigError(
            [f"user {user.username}: client_secret: expected at least {MIN_SECRET_LENGTH} characters"],
            hint="make one with: openssl rand -base64 32",
        )
    with transaction.atomic():
        client = Client.objects.filter(id=user.username).first()
        if client is not None and client.owner_id == user.pk and client.check_secret(secret):
            return False
        client = client or Client(id=user.username)
        client.name = user.username
        client.owner = user
        client.type = Client.Type.CONFIDENTIAL
        client.grant_types = Client.GrantType.CLIENT_CREDENTIALS
        client.scopes, client.default_scopes = SCOPES, "pam"
        client.redirect_uris = client.response_types = ""
        client.set_secret(secret)
        client.save()
        Token.objects.filter(client=client).delete()
    return True


def user_of_token(value: str) -> User | None:
    """The active user an access token stands for, or None.

    A device-flow token names its user. A client-credentials token names none and stands for the
    service user that owns the client; every other token without a user is refused, and so is one
    that was narrowed to some resource (RFC 8707), since this API is not one it could name.
    """
    if not 0 < len(value) <= _MAX_TOKEN_LENGTH:
        return None
    token = Token.objects.select_related("client__owner", "user").lookup(Token.Type.ACCESS_TOKEN, value)
    if token is None or token.client is None or token.get_resources():
        return None
    user = _holder(token)
    return user if user is not None and user.is_active else None


def _holder(token: Token) -> User | None:
    client: Client = token.client
    if client.id == PAM_CLIENT_ID and client.type == Client.Type.PUBLIC:
        person: User | None = token.user
        return person if person is not None and not person.is_service else None
    owner: User | None = client.owner
    if token.user is not None or owner is None or not owner.is_service:
        return None
    if client.type != Client.Type.CONFIDENTIAL or client.id != owner.username:
        return None
    return owner


def revoke_tokens(user: User) -> None:
    """End every token of a user, those of a service user's client included."""
    Token.objects.filter(user=user).delete()
    Token.objects.filter(client__owner=user).delete()


def delete_expired() -> int:
    """Drop expired tokens and web sessions; how many tokens. Called where new ones are made, so that
    neither table outgrows what is in use, without a timer."""
    SessionStore.clear_expired()
    return int(Token.objects.filter(expires_at__lte=timezone.now()).delete()[0])
