"""/openapi.json names the fields that are taken, and no others."""

from __future__ import annotations

from typing import Any

import pytest

from pipeinfer.serve import fields
from tests.unit.scripted_engine import Scripted, asked, served, told


@pytest.fixture(scope="module")
def document() -> Any:
    with served(Scripted()) as server:
        status, found = told(asked(server, "/openapi.json"))
    assert status == 200
    return found


@pytest.mark.parametrize(
    ("path", "own"),
    [("/v1/completions", {"prompt", "echo"}), ("/v1/chat/completions", {"messages", "top_logprobs"})],
)
def test_fields(document: Any, path: str, own: set[str]) -> None:
    schema = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert set(schema["properties"]) == fields._SUPPORTED | own | {"user"}
    assert schema["properties"]["model"]["enum"] == ["mine", "default", None]


def test_every_path_is_served(document: Any) -> None:
    with served(Scripted()) as server:
        for path, methods in document["paths"].items():
            response = asked(server, path, {} if "post" in methods else None)
            assert response.status not in (404, 405, 500), path
            response.close()
