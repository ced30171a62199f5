"""Addresses of the pages; included at the root."""

from django.urls import path, register_converter

from pam_platform.web import views


class SessionId:
    """A session id in a path; anything else is no page of ours."""

    regex = "s-[a-z2-7]{26}"

    def to_python(self, value: str) -> str:
        return value

    def to_url(self, value: str) -> str:
        return value


register_converter(SessionId, "session")

urlpatterns = [
    path("", views.home, name="home"),
    path("sessions", views.sessions, name="sessions"),
    path("sessions/<session:session_id>", views.session, name="session"),
    path("sessions/<session:session_id>/kill", views.kill, name="session-kill"),
    path("sessions/<session:session_id>/verify", views.verify, name="session-verify"),
    path("sessions/<session:session_id>/parts/<int:number>", views.recording, name="recording"),
]
