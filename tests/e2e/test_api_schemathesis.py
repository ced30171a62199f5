"""The API's own document, turned into requests: no answer is a 5xx, and each is what the document says.

schemathesis makes the requests, valid and invalid ones, from a fixed seed, for a user, an admin and an
agent, each over the operations of the document that are theirs.
"""

from __future__ import annotations

from typing import Any

import hypothesis
import pytest
import schemathesis
from principals import World
from schemathesis import GenerationMode
from schemathesis.checks import CHECKS, load_all_checks

#: Operation × principal × database × this many: about half a minute.
EXAMPLES = 12
#: Who asks what, by the document's tags.
TAGS = {"owner": {"people", "open"}, "admin": {"people", "admin"}, "agent": {"agents", "relays"}}
load_all_checks()
CHECKED = CHECKS.get_by_names(
    [
        "not_a_server_error",
        "content_type_conformance",
        "response_schema_conformance",
        "response_headers_conformance",
        "ignored_auth",
    ]
)


@pytest.mark.parametrize("name", TAGS)
def test_generated_requests(world: World, name: str) -> None:
    document = schemathesis.openapi.from_url(f"{world.url}/api/v1/openapi.json", timeout=90)
    statuses: set[int] = set()
    for found in document.get_all_operations():
        operation: Any = found.ok()
        if TAGS[name].intersection(operation.tags):
            _try(world, name, operation, statuses)
    # Requests that mean something were among them, and such that do not.
    assert 200 in statuses
    assert 422 in statuses


def _try(world: World, name: str, operation: Any, statuses: set[int]) -> None:
    modes = (GenerationMode.POSITIVE, GenerationMode.NEGATIVE)
    strategy = hypothesis.strategies.one_of([operation.as_strategy(generation_mode=mode) for mode in modes])

    @hypothesis.settings(
        max_examples=EXAMPLES,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(hypothesis.HealthCheck),
        phases=[hypothesis.Phase.generate],
    )
    @hypothesis.given(case=strategy)
    def check(case: Any) -> None:
        if "wait" in case.query:
            case.query["wait"] = 0  # a poll that waits is what tests of the inbox are for
        headers = {"Authorization": world[name].authorization()}
        answer = case.call_and_validate(headers=headers, checks=CHECKED, timeout=90)
        statuses.add(answer.status_code)

    check()
