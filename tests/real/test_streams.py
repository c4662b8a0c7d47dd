"""A live stream over a websocket, on real weights and a real video: the ids and boxes of ``YOLO.track``."""

import json
from itertools import islice
from pathlib import Path

import cv2
import numpy as np
import pytest
from ultralytics import YOLO
from websockets.sync.client import connect

from actors.clips import read_source
from tests.conftest import ASSETS

pytestmark = [pytest.mark.ray, pytest.mark.real]

FRAMES = 20


@pytest.mark.parametrize("kind", ["bytetrack", "botsort"])
def test_ids_and_boxes_are_those_of_yolo_track(kind: str, address: str, weights: Path) -> None:
    frames = [frame.image for frame in islice(read_source(str(ASSETS / "data" / "traffic.mp4")), FRAMES)]
    with connect(f"{address.replace('http', 'ws', 1)}/streams/real-{kind}?model=yolo26n&tracker={kind}") as socket:
        for image in frames:
            socket.send(cv2.imencode(".png", image)[1].tobytes())
        answers = [json.loads(socket.recv(timeout=120)) for _ in frames]
    assert [answer["frame"] for answer in answers] == list(range(1, FRAMES + 1))
    model, seen = YOLO(weights / "yolo26n.pt"), set[int | None]()
    for answer, image in zip(answers, frames, strict=True):
        boxes = model.track(image, persist=True, tracker=f"{kind}.yaml", verbose=False)[0].boxes
        results = answer["image"]["results"]
        ids = [None] * len(boxes) if boxes.id is None else boxes.id.int().tolist()
        assert [found.get("track_id") for found in results] == ids
        ours = np.array([list(found["box"].values()) for found in results]).reshape(-1, 4)
        assert np.abs(ours - boxes.xyxy.numpy()).max(initial=0) < 0.5
        seen.update(ids)
    assert len(seen) > 2
