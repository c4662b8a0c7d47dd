"""Sixty-four live streams at once, each of a drawn world of its own, on the demonstration model: each as if it were alone."""

import asyncio
import json

import pytest
from websockets.asyncio.client import connect

from actors.images import decode_image, encode_jpeg
from actors.model import YoloModel
from actors.schemas import PredictParams
from actors.settings import ActorSettings, ImageLimits, TrackerSettings
from actors.tracker import TRACK_CONF, StreamTracker
from deploy.demo.scene import draw_clip
from deploy.settings import HttpLimits, Replicas, ServedModel
from deploy.weights import EMBEDDED
from tests.conftest import served

pytestmark = [pytest.mark.ray, pytest.mark.long, pytest.mark.usefixtures("local_ray")]

STREAMS = 64
FRAMES = 4
MODEL = ServedModel(**EMBEDDED.model_dump(), replicas=Replicas(min=2, max=2), actor=ActorSettings(num_cpus=1))

Frames = list[bytes]
Tracks = list[dict[int, tuple[float, ...]]]  # of each frame: track id → box


def alone(model: YoloModel, frames: Frames) -> Tracks:
    """What one model and one tracker say, frame by frame in one thread."""
    tracker = StreamTracker(TrackerSettings(kind="bytetrack"))
    images = [decode_image(frame, ImageLimits()) for frame in frames]
    found = [model.predict([model.prepare(image, PredictParams(conf=TRACK_CONF))])[0] for image in images]
    tracked = [tracker.update(result).detections for result in found]
    return [{each.track_id: each.box for each in frame if each.track_id and each.box} for frame in tracked]


async def among_others(address: str, stream: int, frames: Frames) -> Tracks:
    url = f"{address.replace('http', 'ws', 1)}/streams/world-{stream}?tracker=bytetrack"
    async with connect(url, open_timeout=60) as socket:
        for frame in frames:
            await socket.send(frame)
        answers = [json.loads(await socket.recv()) for _ in frames]
    assert not [answer["error"] for answer in answers if "error" in answer]
    results = [answer["image"]["results"] for answer in answers]
    return [{each["track_id"]: tuple(each["box"].values()) for each in frame if "track_id" in each} for frame in results]


@pytest.mark.timeout(400)
async def test_every_stream_is_followed_as_if_it_were_alone() -> None:
    worlds = [[encode_jpeg(scene.image) for scene in draw_clip(seed, FRAMES, 320, 240)] for seed in range(STREAMS)]
    with served(MODEL, topology="routed", http=HttpLimits(request_timeout_s=300)) as address:  # on a slow machine they wait
        found = await asyncio.gather(*[among_others(address, number, frames) for number, frames in enumerate(worlds)])
    model = YoloModel(EMBEDDED, 2)
    for world, tracks in zip(worlds, found, strict=True):
        expected = alone(model, world)
        assert len(expected[-1]) > 2
        for ours, theirs in zip(tracks, expected, strict=True):
            assert ours.keys() == theirs.keys()
            assert all(ours[identity] == pytest.approx(box, abs=0.5) for identity, box in theirs.items())
