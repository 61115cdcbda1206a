"""Schemathesis: whatever fits the OpenAPI document, or nearly does, is answered as the document says."""

import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from loopback import serving
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import content_type_conformance, response_schema_conformance

from lorakit.server.access import Access

ADMIN = "an-administrators-key"


@pytest.fixture(scope="module")
def app(base, tenants, tokenizer):
    with serving(base, tenants, tokenizer, access=Access(admin_key=ADMIN)) as app:
        yield app


@pytest.fixture
def api_schema(app):
    return schemathesis.openapi.from_url(f"{app.url}/openapi.json")


schema = schemathesis.pytest.from_fixture("api_schema")


@schema.parametrize()
@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
def test_every_route(case):
    case.call_and_validate(
        headers={"Authorization": f"Bearer {ADMIN}"},
        checks=[not_a_server_error, content_type_conformance, response_schema_conformance],
        timeout=30,
    )
