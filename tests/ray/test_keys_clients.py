"""The unmodified clients with an API key, against an endpoint that wants one; what they detect is tested elsewhere."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tritonclient.http import InferenceServerClient
from tritonclient.utils import InferenceServerException
from ultralytics_platform import APIError, Platform

from deploy.keys import fresh_key
from deploy.settings import AuthSettings, ServedModel
from tests.conftest import picture, served
from tests.real.test_roboflow_client import Step, talk

pytestmark = [
    pytest.mark.real,
    pytest.mark.ray,
    pytest.mark.client,
    pytest.mark.usefixtures("local_ray"),
    pytest.mark.timeout(300),
]

KEY, LINE = fresh_key("client")
WRONG = fresh_key("nobody")[0]


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    keys = tmp_path_factory.mktemp("keys") / "keys"
    keys.write_text(LINE)
    with served(ServedModel(name="fake", weights="fake:"), auth=AuthSettings(keys_file=str(keys))) as made:
        yield made


def test_roboflows_client_by_query_body_and_header(address: str, tmp_path: Path) -> None:
    image = tmp_path / "image.png"
    image.write_bytes(picture(blue=3))
    ask: Step = ("infer", {"inference_input": str(image), "model_id": "fake/1"})
    unlisted: Step = ("infer", {"inference_input": str(image), "model_id": "fake/7"})  # asks for /model/add first
    conversations: list[list[Step]] = [
        [ask, unlisted],
        [("configure", {"max_batch_size": 2}), ("infer", ask[1] | {"inference_input": [str(image)] * 3})],
        [("select_api_v0", {}), ask],
        [("configure", {"api_key_transport": "header"}), ask, ("select_api_v0", {}), ask],
    ]
    for conversation, steps in zip(talk(address, *conversations, api_key=KEY), conversations, strict=True):
        for result, (method, _) in zip(conversation, steps, strict=True):
            for answer in [] if method != "infer" else result if isinstance(result, list) else [result]:
                assert [found["class"] for found in answer["predictions"]] == ["three"], answer
    for conversation, steps in zip(talk(address, *conversations, api_key=WRONG), conversations, strict=True):
        for result, (method, _) in zip(conversation, steps, strict=True):
            assert method != "infer" or (result["raised"].startswith("HTTP") and "401" in result["message"])


def test_ultralytics_platforms_client(address: str) -> None:
    def ask(key: str) -> Any:
        with Platform(base_url=address, api_key=key) as platform:
            return platform.models.predict("me", "project", "fake", body={"file": picture(blue=3)})

    assert ask(KEY)["images"][0]["results"][0]["name"] == "three"
    for key in (WRONG, ""):
        with pytest.raises(APIError, match="API key"):
            ask(key)


def test_tritons_client(address: str) -> None:
    client = InferenceServerClient(address.removeprefix("http://"))
    assert client.is_server_live() and client.is_server_ready()
    assert client.get_model_metadata("fake", headers={"Authorization": f"Bearer {KEY}"})["name"] == "fake"
    with pytest.raises(InferenceServerException, match="This needs an API key"):
        client.get_model_metadata("fake")
