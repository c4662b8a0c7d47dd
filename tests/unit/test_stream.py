"""Stream: which sightings are followed, and which get an answer that was given before."""

import pickle

import pytest

from actors.errors import StreamConflict
from actors.schemas import Detection, ImageResult, Sighting
from actors.settings import ImageLimits, StreamSettings, TrackerSettings
from actors.stream import Stream


def sighting(x: float, connection: str, number: int) -> Sighting:
    found = Detection(0, "person", 0.9, (x, 40, x + 40, 100))
    return Sighting(ImageResult(320, 240, "detect", (found,)), None, 0, connection, number)


@pytest.fixture
def stream() -> Stream:
    return Stream(StreamSettings(stream="door", model="people", tracker=TrackerSettings(kind="bytetrack")))


def test_a_posted_frame_is_not_taken_for_a_connections_frame_of_its_number(stream: Stream) -> None:
    stream.take_over("c")
    posted = stream.follow(sighting(10, "", 1), ImageLimits())
    first = stream.follow(sighting(20, "c", 1), ImageLimits())
    assert stream.frames == 2 and first != posted
    stream.follow(sighting(30, "", 1), ImageLimits())
    assert stream.follow(sighting(20, "c", 1), ImageLimits()) is first and stream.frames == 3


def test_a_frame_that_a_snapshot_knows_is_followed_once_in_the_trackers_next_life(stream: Stream) -> None:
    stream.take_over("c")
    first = stream.follow(sighting(10, "c", 1), ImageLimits())
    restarted: Stream = pickle.loads(pickle.dumps(stream))
    restarted.take_over("")
    assert restarted.follow(sighting(10, "c", 1), ImageLimits()) == first and restarted.frames == 1
    with pytest.raises(StreamConflict):
        restarted.follow(sighting(10, "older", 1), ImageLimits())


def test_the_next_connections_first_frame_is_new(stream: Stream) -> None:
    for connection in ("a", "b"):
        stream.take_over(connection)
        stream.follow(sighting(10, connection, 1), ImageLimits())
    assert stream.frames == 2
