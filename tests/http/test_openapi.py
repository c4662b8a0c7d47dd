"""The OpenAPI schema: as it was agreed on, and kept by every route when schemathesis asks by it.

uv run pytest tests/http/test_openapi.py --update-openapi     writes the schema into openapi.json after a wanted change
"""

import base64
import json
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import pytest
import schemathesis
from fastapi import FastAPI
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.errors import Unsatisfiable
from schemathesis import Case, GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.core.result import Ok
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from tests.conftest import picture

GOLDEN = Path(__file__).parent / "openapi.json"
UPDATE = "uv run pytest tests/http/test_openapi.py --update-openapi"
CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]

GOOD = [picture(64, 48, blue=1), picture(48, 64, blue=2), picture(640, 100)]
BAD = [picture()[:-20], picture(1000, 200), b"", b"GIF89a"]


async def test_the_schema_is_the_committed_one(client: httpx.AsyncClient, pytestconfig: pytest.Config) -> None:
    found = (await client.get("/openapi.json")).json()
    if pytestconfig.getoption("--update-openapi"):
        GOLDEN.write_text(json.dumps(found, indent=1, ensure_ascii=False, sort_keys=True) + "\n")
    assert found == json.loads(GOLDEN.read_text()), f"the interface has changed; if that is wanted: {UPDATE}"


@pytest.mark.parametrize("mode", list(GenerationMode))
def test_every_route_keeps_to_the_schema_whatever_it_is_asked(api: FastAPI, mode: GenerationMode) -> None:
    """Not by schemathesis' own pytest plugin: that of 4.32 does not run under pytest 9.2."""
    schema = schemathesis.openapi.from_asgi("/openapi.json", api)
    answers: Counter[tuple[str, int]] = Counter()
    for found in schema.get_all_operations():
        assert isinstance(found, Ok), found
        operation = found.ok()

        @given(operation.as_strategy(generation_mode=mode), st.sampled_from(GOOD + BAD), st.booleans())
        @settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
        def ask(case: Case[Any], image: bytes, sensibly: bool) -> None:
            if sensibly:
                make_sensible(case, image)
            response = case.call_and_validate(checks=CHECKS)
            assert response.headers["x-request-id"] and "total;dur=" in response.headers["server-timing"][0]
            answers[case.operation.path, response.status_code] += 1

        try:
            ask()
        except Unsatisfiable:
            assert mode is GenerationMode.NEGATIVE  # a route without parameters cannot be asked wrongly
    assert answers["/predict", 422] > 0  # so it was asked in earnest
    assert mode is GenerationMode.NEGATIVE or min(answers["/predict", 200], answers["/predict", 400]) > 0


def make_sensible(case: Case[Any], image: bytes) -> None:
    """Put a model that there is and a real image where the schema only knows texts and bytes."""
    case.path_parameters = dict.fromkeys(case.path_parameters or {}, "fake")
    if isinstance(case.body, dict):
        encoded = base64.b64encode(image).decode()
        fitting: dict[str, Any] = {"model": "fake", "model_id": "fake/1", "imgsz": 64, "max_det": 10}
        fitting["image"] = {"type": "base64", "value": encoded}
        body: dict[str, Any] = {name: fitting.get(name, value) for name, value in case.body.items() if value is not None}
        if case.media_type == "multipart/form-data":
            body["file"] = [image]
            body.pop("source", None)
        case.body = body
