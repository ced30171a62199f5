"""How libpq's programs are told where the listener is."""

from __future__ import annotations

from urllib.parse import quote

from pam_client.launch.base import Launch, Place
from pam_client.refusal import HEAD, PostgresRefusal, starts_postgres
from pam_common.errors import PamError

#: libpq connects to this name, and a port, in the folder that it is given as host.
_SOCKET_PREFIX = ".s.PGSQL."


def _postgres_variables(place: Place) -> dict[str, str]:
    variables = {
        "PGHOST": place.host,
        "PGPORT": str(place.port),
        "PGUSER": place.user,
        # The channel is encrypted end to end already; a second layer would end in this process.
        "PGSSLMODE": "disable",
        "PGGSSENCMODE": "disable",
    }
    if place.database:
        variables["PGDATABASE"] = _database(place.database)
    return variables


def _database(name: str) -> str:
    """``name``, which must be one: libpq's programs take one with "=" or "://" for a whole connection string,
    that could lead them elsewhere. Raises PamError."""
    if "=" in name or "://" in name:
        raise PamError(
            f'the database "{name}" cannot be named to a program: it would be taken for a connection string'
        )
    return name


def _postgres_usage(place: Place) -> str:
    # psql would take the user's name for it, which is hardly ever one.
    database = place.database or "DATABASE"
    if place.host.startswith("/"):
        words = [f"-h {_shell(place.host)}", f"-p {place.port}", f"-U {_shell(place.user)}"]
        return " ".join(["psql", *words, _shell(_database(database))])
    # No password is in it, so it may stand in a history file.
    url = f"postgresql://{quote(place.user, safe='')}@{place.host}:{place.port}/{quote(database, safe='')}"
    return f"psql {url}"


def _postgres_socket_port(name: str) -> int | None:
    number = name.removeprefix(_SOCKET_PREFIX)
    return int(number) if number != name and number.isdecimal() and 0 < int(number) < 65536 else None


def _shell(word: str) -> str:
    plain = word.replace("/", "").replace(".", "").replace("-", "").replace("_", "")
    return word if plain.isalnum() and plain.isascii() else "'" + word.replace("'", "'\\''") + "'"


POSTGRES = Launch(
    program="psql",
    variables=_postgres_variables,
    # libpq's own list (https://www.postgresql.org/docs/current/libpq-envars.html): what names another
    # place or login, or demands of the server what only a direct connection has.
    removed=frozenset(
        (
            *("PGHOSTADDR", "PGDATABASE", "PGSERVICE", "PGSERVICEFILE", "PGPASSWORD", "PGPASSFILE"),
            *("PGREQUIREAUTH", "PGCHANNELBINDING", "PGREQUIREPEER", "PGKRBSRVNAME", "PGGSSLIB"),
            *("PGGSSDELEGATION", "PGREQUIRESSL", "PGSSLNEGOTIATION", "PGSSLCERT", "PGSSLKEY"),
            *("PGSSLCERTMODE", "PGSSLROOTCERT", "PGSSLCRL", "PGSSLCRLDIR"),
            *("PGTARGETSESSIONATTRS", "PGLOADBALANCEHOSTS"),
        )
    ),
    usage=_postgres_usage,
    socket_name=lambda port: f"{_SOCKET_PREFIX}{port}",
    socket_port=_postgres_socket_port,
    default_port=5432,
    head=HEAD,
    accepts=starts_postgres,
    refusal=PostgresRefusal,
)
