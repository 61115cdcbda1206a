"""Schemathesis: whatever fits the OpenAPI document, or nearly does, is answered as the document says."""

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from loopback import BASE, serving
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import content_type_conformance, response_schema_conformance

from lorakit.server.access import Access

ADMIN = {"Authorization": "Bearer an-administrators-key"}
POSITIVE, NEGATIVE = schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE
CHECKS = [not_a_server_error, content_type_conformance, response_schema_conformance]
ROUTES = [
    ("GET", "/health"),
    ("GET", "/metrics"),
    ("GET", "/v1/models"),
    ("GET", "/v1/models/{name}"),
    ("POST", "/v1/chat/completions"),
    ("POST", "/v1/completions"),
    ("POST", "/v1/load_lora_adapter"),
    ("POST", "/v1/unload_lora_adapter"),
    ("POST", "/load_lora_adapter"),
    ("POST", "/unload_lora_adapter"),
]


@pytest.fixture(scope="module")
def schema(base, tenants, tokenizer):
    with serving(base, tenants, tokenizer, access=Access(admin_key="an-administrators-key")) as app:
        yield schemathesis.openapi.from_url(f"{app.url}/openapi.json")


def test_the_document_has_these_routes(schema):
    found = {(one.ok().method.upper(), one.ok().path) for one in schema.get_all_operations()}
    assert found == set(ROUTES)


@pytest.mark.parametrize(
    ("method", "path", "mode"),
    [(*route, POSITIVE) for route in ROUTES] + [(*route, NEGATIVE) for route in ROUTES if route[0] == "POST"],
    ids=lambda part: getattr(part, "value", part),
)
def test_every_route(schema, method, path, mode):
    operation = schema[path][method]

    @settings(
        max_examples=10,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(generation_mode=mode))
    def answered(case):
        if isinstance(case.body, dict):
            if "model" in case.body and mode == POSITIVE:
                case.body["model"] = BASE  # else nothing would be asked of anybody
            if isinstance(case.body.get("max_tokens"), int):
                case.body["max_tokens"] = min(case.body["max_tokens"], 8)
            if isinstance(case.body.get("max_completion_tokens"), int):
                case.body["max_completion_tokens"] = min(case.body["max_completion_tokens"], 8)
        case.call_and_validate(headers=ADMIN, checks=CHECKS, timeout=30)

    answered()
