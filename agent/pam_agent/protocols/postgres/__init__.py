"""PostgreSQL: protocol 3.0 and 3.2, for any client.

Phases of a connection::

    client                    interceptor                      target
      | SSLRequest, GSSENCRequest |                               |
      |-------------------------->|   "N": the stream is already  |
      |<-------- N ---------------|   encrypted end to end        |
      | StartupMessage            |                               |
      |-------------------------->|  1. narrow: user replaced,    |
      |                           |     database checked          |
      |                           |  2. dial, SSLRequest, TLS     |
      |                           |------------------------------>|
      |                           |  3. StartupMessage, SCRAM...  |
      |                           |<----------------------------->|
      |                           |     settings, key, ready      |
      |                           |<------------------------------|
      |  AuthenticationOk,        |  4. "start" is recorded       |
      |  settings, our own key,   |                               |
      |  ReadyForQuery            |                               |
      |<--------------------------|                               |
      |       any messages        |  5. looked at, recorded, then |
      |<=========================>|     sent on by whole buffers  |
      | Terminate                 |------------------------------>|

    another connection: CancelRequest with our key -> the target's key -> target

Specification: https://www.postgresql.org/docs/current/protocol.html (chapters "Message Flow", "SASL
Authentication", "Streaming Replication Protocol", "Message Formats").

Refused, and why:

* a second request for encryption, bytes behind one, bytes before TLS with the target: they would be taken
  as if they had come encrypted (CVE-2021-23214, CVE-2021-23222);
* a parameter given twice, an account's database list not met: who is checked must be who logs in;
* replication, unless the account allows it: it reads everything, past the rights on tables;
* protocol options (``_pq_.``): they may change what messages look like; the client is told to do without;
* passwords and SASL messages after the login: there is no second authentication in this protocol;
* message kinds that are not known, lengths that are impossible: both sides would read different things;
* authentication methods of the target other than trust, certificate, SCRAM, MD5, and password over TLS.

``SET ROLE``, ``SET SESSION AUTHORIZATION`` and start-up ``options`` pass: what they can do is bound by the
rights that the target gives the account's user, and they are recorded like everything else.

Events, each inside the frame that ``docs/recording-format.md`` describes. ``id`` counts the queries of a
connection, ``statement`` its Parse messages.

=================  ======================================================================================
``start``          logged in: protocol, database, user, application, server_version, encoding, pid, tls,
                   login, options, replication
``refused``        not logged in, or not started: reason
``query``          id, mode (simple, extended, function), sql (redacted; null where only SQL's PREPARE or
                   DECLARE knows it, or the name is the oldest of too many); name, portal, params, max_rows;
                   continues (an earlier id, for the next rows of a portal); function (oid); skipped (the
                   server ignores it, after an error); uncertain (SQL's PREPARE or DEALLOCATE may have
                   changed what the name denotes, or names were too many to be remembered);
                   truncated with message_bytes and message_sha256
``parse, bind``    a preparation whose execution did not come along with it, or that is long
``more``           sql: the rest of the statement in the event before
``rows``           id, columns ([name, type oid], once per result), rows (text, hexadecimal or null),
                   or copy (in, out, both) and data: up to the budget. early: sent before the target asked
                   for it; copied only if a result of this id says copy in, ignored by the target otherwise
``progress``       id, messages and bytes so far of a long transfer; early, as for rows
``result``         id, tag or error (severity, code, message, detail, hint, position, where), ms, notices;
                   rows or messages, bytes, copy; suspended; unrecorded_bytes and unrecorded_sha256
``skipped``        ids that do not run, because of an error before them
``correction``     id, name, statement, sql: what a name really denoted, where it was not what was recorded
``unmatched``      said once: from here on results may not belong to the ids they name
``notification``   pid, channel, payload
``setting``        name, value: the server reports a change
``cancel``         pid, known
``end``            reason, bytes_up, bytes_down
=================  ======================================================================================

Modules: ``codec`` and ``values`` (bytes and what they mean), ``framing`` (where messages begin),
``pipeline`` (which answer belongs to what), ``client_side``, ``target_side``, ``bulk`` and ``redact`` (what
is recorded) do no I/O and have no clock. ``startup``, ``login``, ``cancel``, ``pump``,
``upward`` and ``interceptor`` do the talking; ``failures`` says how things end.
"""

from pam_agent.protocols.postgres.interceptor import PostgresInterceptor

__all__ = ["PostgresInterceptor"]
