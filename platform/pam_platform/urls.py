"""All addresses: the API, the login pages and the pages for people."""

from django.urls import include, path

from pam_platform.api import api

urlpatterns = [
    path("api/v1/", api.urls),
    path("", include("pam_platform.accounts.urls")),
    path("", include("pam_platform.web.urls")),
]
