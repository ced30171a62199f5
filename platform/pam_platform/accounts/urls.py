"""Login pages and OAuth endpoints; included at the root.

Of allauth's account pages only those that fit: users come from access.yml, so there is no sign-up
(its page says closed), no e-mail confirmation and no password reset by e-mail.
"""

from allauth.account import views as account_views
from django.urls import include, path

from pam_platform.accounts import views

urlpatterns = [
    path("accounts/login/", account_views.login, name="account_login"),
    path("accounts/logout/", account_views.logout, name="account_logout"),
    path("accounts/inactive/", account_views.account_inactive, name="account_inactive"),
    path("accounts/signup/", account_views.signup, name="account_signup"),
    path("accounts/reauthenticate/", account_views.reauthenticate, name="account_reauthenticate"),
    path("accounts/password/change/", account_views.password_change, name="account_change_password"),
    path("accounts/password/set/", account_views.password_set, name="account_set_password"),
    path("accounts/2fa/", include("allauth.mfa.urls")),
    # Ours come first and shadow allauth's of the same path.
    path("identity/o/device", views.approve_device),
    path("identity/o/api/device/code", views.device_code),
    path("identity/o/api/token", views.token),
    path("", include("allauth.idp.urls", namespace="idp")),
]
