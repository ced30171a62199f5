"""An Ansible callback: one JSON line (host, task, outcome, message) per result, into PAM_TEST_RECORD."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from ansible.plugins.callback import CallbackBase

DOCUMENTATION = """
name: record
type: notification
short_description: what each task did, for tests
description: One JSON line per result.
"""


class CallbackModule(CallbackBase):
    CALLBACK_VERSION = 2.0
    CALLBACK_TYPE = "notification"
    CALLBACK_NAME = "record"
    CALLBACK_NEEDS_ENABLED = True

    def v2_runner_on_ok(self, result: Any) -> None:
        self._write(result, "changed" if result.is_changed() else "ok")

    def v2_runner_on_failed(self, result: Any, ignore_errors: bool = False) -> None:
        self._write(result, "ignored" if ignore_errors else "failed")

    def v2_runner_on_unreachable(self, result: Any) -> None:
        self._write(result, "unreachable")

    def v2_runner_on_skipped(self, result: Any) -> None:
        self._write(result, "skipped")

    def _write(self, result: Any, outcome: str) -> None:
        message = str(result.result.get("msg", "")) if outcome in ("failed", "unreachable") else ""
        line = [result.host.get_name(), result.task.get_name(), outcome, message]
        with Path(os.environ["PAM_TEST_RECORD"]).open("a") as record:
            record.write(json.dumps(line) + "\n")
