"""Holds conversations through the unmodified inference-sdk, in an environment of its own that knows nothing of this project.

    stdin: {"address", "api_key", "conversations": [[[method, arguments], …], …]} → stdout: each step's result

A step calls a method of one InferenceHTTPClient a conversation; ``configure`` takes the fields of InferenceConfiguration,
``infer`` and ``infer_async`` take paths. What a step raised is ``{"raised": its type, "message": its text}``.
"""

import asyncio
import base64
import dataclasses
import json
import sys
from typing import Any

import supervision
from inference_sdk import InferenceConfiguration, InferenceHTTPClient


def step(client: InferenceHTTPClient, method: str, arguments: dict[str, Any]) -> Any:
    if method == "configure":
        client.configure(InferenceConfiguration(**arguments))
        return None
    result = getattr(client, method)(**arguments)
    if asyncio.iscoroutine(result):
        result = asyncio.run(result)
    if isinstance(result, InferenceHTTPClient):
        return None
    return dataclasses.asdict(result) if dataclasses.is_dataclass(result) else result  # type: ignore[arg-type]


def as_json(value: Any) -> Any:
    return base64.b64encode(value).decode() if isinstance(value, bytes) else str(value)


def supervised(answer: Any) -> Any:
    """What Roboflow's supervision makes of an answer with boxes: how many detections, with masks or not."""
    if isinstance(answer, dict) and answer.get("predictions") and "x" in answer["predictions"][0]:
        detections = supervision.Detections.from_inference(answer)
        answer["supervision"] = {"count": len(detections), "masks": detections.mask is not None}
    return answer


def talk(address: str, api_key: str, conversation: list[tuple[str, dict[str, Any]]]) -> list[Any]:
    client = InferenceHTTPClient(api_url=address, api_key=api_key)
    results = []
    for method, arguments in conversation:
        try:
            result = step(client, method, arguments)
            results.append([supervised(item) for item in result] if isinstance(result, list) else supervised(result))
        except Exception as error:
            results.append({"raised": type(error).__name__, "message": str(error)})
    return results


if __name__ == "__main__":
    work = json.load(sys.stdin)
    answers = [talk(work["address"], work["api_key"], conversation) for conversation in work["conversations"]]
    json.dump(answers, sys.stdout, default=as_json)
