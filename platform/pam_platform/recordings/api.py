"""All recording endpoints."""

from ninja import Router

from pam_platform.recordings import agent_api, people_api

router = Router()
router.add_router("", agent_api.router)
router.add_router("", people_api.router)
