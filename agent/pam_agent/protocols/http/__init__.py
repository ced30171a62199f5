"""HTTP/1.1 and WebSocket, for browsers and programs, towards web applications.

Phases of a connection::

    client                    interceptor                          app
      | preamble (one line)       |                                 |
      |-------------------------->| 1. browser or program, origin   |
      | request                   |                                 |
      |-------------------------->| 2. admitted? rules? (each one)  |
      |                           | 3. dial, TLS; login by form     |
      |                           |-------------------------------->|
      |                           | 4. rewritten, the credential    |
      |                           |    put in, recorded, sent on    |
      |                           |-------------------------------->|
      |                           |<--------------------------------|
      |<--------------------------| 5. recorded, rewritten, sent on |
      |   ... the next request, or after "101" frames both ways ... |

The preamble is the client's own, before the program's bytes:
``{"v":1,"mode":"browser","origin":"http://viewer.grafana.localhost:41234","key":"…"}`` or
``{"v":1,"mode":"program","origin":"http://127.0.0.1:41235"}``. ``door`` says what it is for.

Specifications: RFC 9110 (HTTP), 9112 (HTTP/1.1), 6265 (cookies), 6455 (WebSocket), W3C Fetch Metadata.

Refused, and why:

* a message with two readings (two lengths, a length beside chunks, folded lines, bare CR or LF, a space
  before a colon): who checks it and who acts on it would see different requests. What goes on is written
  anew from what was understood;
* CONNECT and TRACE, addresses that are not a path, protocols other than WebSocket: ways past this place;
* extensions of WebSocket: what is compressed cannot be recorded in bounded memory. They are not offered on;
* under an account's rules, paths that an app might read otherwise;
* requests that another page caused, see ``door``.

Trailers are dropped: what stands behind a body comes too late for every check.

HTTP/2 is not spoken: to a browser on the same machine and an app in the same network it would gain little.
Requests that come too early (pipelining) are served one after another.

Links: what the app says of itself in its header fields, and in its pages where they come uncompressed (which
is asked for), becomes the local origin; see ``rewrite`` and ``links``. Compressed answers other than gzip are
not asked for, since their text could not be recorded.

Events, each inside the frame that ``docs/recording-format.md`` describes. ``id`` counts the requests of a
connection.

============  ===========================================================================================
``start``     mode (browser, program), origin, app (its own origin), login, user
``login``     by form: ok, how, user; status, or reason
``request``   id, method, url, version, headers ([name, value], as the app gets them); body_bytes (null: it
              follows in ``body`` events), body (its text, up to the budget), body_sha256 (if some is missing)
``response``  id, status, reason, version, headers (as the app sent them), ms; body… as above
``body``      id, dir (up, down), bytes so far; data (text of this piece, within the budget); at its end done,
              sha256 of all of it, ms; cut, if it was
``ws``        id, dir, opcode (text, binary, close), bytes of the message so far; data or base64 up to the
              budget; more (the message goes on); sha256 (if some is missing); code of a close
``refused``   id, rule, method, url, status: not sent to the app
``failed``    id, reason, method, url, status: the app could not be asked, or gave no answer
``end``       reason
============  ===========================================================================================

Modules: ``wire`` (heads and bodies), ``options``, ``door``, ``paths`` and ``rules``, ``rewrite``, ``links``
and ``cookies``, ``forms``, ``redact``, ``bodies`` and ``frames`` (what is recorded) and ``pages`` do no I/O.
``client_side``, ``target_side``, ``account``, ``upload``, ``exchange``, ``sockets`` and ``interceptor`` do
the talking.
"""

from pam_agent.protocols.http.interceptor import HttpInterceptor

__all__ = ["HttpInterceptor"]
