"""Secrets at rest: sealed entries, the master keys that open them, and the platform's own keys.

==========  ============================================================================================
``seal``    bytes to sealed bytes and back; no database, no files
``master``  where master keys come from: a file, a systemd credential or the environment
``store``   entries in the database: put, replace, reveal, re-key
``keys``    the platform's signing and recording keys: current, next, retired
==========  ============================================================================================
"""
