"""Ends that wait to be reported, while the platform is away."""

from __future__ import annotations

from pam_agent import reports as reports_module
from pam_agent.reports import Reports
from pam_common.keys import new_session_id


def test_an_alarm_goes_the_same_way_cut_and_printable() -> None:
    sent: list[tuple[str, str]] = []

    class Api:
        def alarm(self, session: str, reason: str) -> None:
            sent.append((session, reason))

    reports = Reports(Api())  # type: ignore[arg-type]  # all that is used of it
    reports.alarm("s-1", "another host key\n" + "x" * 1000)
    reports.start()
    reports.stop(60)
    assert sent == [("s-1", "another host key?" + "x" * (reports_module.MAX_REASON - 17))]


def test_more_ends_than_fit_are_logged_and_dropped(monkeypatch, caplog) -> None:
    monkeypatch.setattr(reports_module, "MAX_WAITING", 2)
    reports = Reports(api=None)  # type: ignore[arg-type]  # not started, so it is not asked
    for _ in range(3):
        reports.add(new_session_id(), {"reason": "ended"})
    assert reports.waiting == 2
    ours = [record.message for record in caplog.records if record.name == "pam.agent.session"]
    assert ours == ["end not reported"]
