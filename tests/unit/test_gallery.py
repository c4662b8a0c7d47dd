"""A gallery shows committed results as they are, spread over the job, and says what it cannot show."""

from pathlib import Path

import numpy as np
import pytest

from actors.clips import frame_uri
from actors.dataset import Shard
from actors.fake_model import fake_result
from actors.gallery import LONGEST_SIDE, sample
from actors.images import decode_image
from actors.ledger import DeadLetter, Ledger, Manifest
from actors.schemas import PredictParams
from actors.settings import ImageLimits
from actors.writers import Place, result_of, row
from tests.conftest import picture, video

LIMITS = ImageLimits()
SHARDS, EACH = 3, 8


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """A job of three shards, each of which has lost an input."""
    ledger = Ledger.open(tmp_path / "out", {})
    for shard in range(SHARDS):
        rows = []
        for number in range(EACH):
            path = tmp_path / f"{shard}-{number}.png"
            path.write_bytes(picture(700 + shard, 48, blue=number))
            rows.append(row(str(path), None, "fake", fake_result(decode_image(path.read_bytes(), LIMITS), PredictParams())))
        lost = DeadLetter(f"{shard}-lost.png", "decode", "The image is truncated: send the whole file")
        ledger.commit(Shard((*(each["uri"] for each in rows), lost.uri)), rows, Manifest(EACH, (lost,)))
    return tmp_path / "out"


def test_it_is_spread_over_the_shards_with_results_and_small_pictures(out: Path) -> None:
    gallery = sample(str(out), 6, LIMITS)
    names = [sampled.name for sampled in gallery.samples]
    assert len(set(names)) == 6 and {name[0] for name in names} == {"0", "1", "2"}
    assert sample(str(out), 6, LIMITS) == gallery
    for sampled in gallery.samples:
        original = decode_image((out.parent / sampled.name).read_bytes(), LIMITS)
        assert sampled.picture is not None
        shown = decode_image(sampled.picture, LIMITS)
        assert max(shown.shape) == LONGEST_SIDE
        assert np.abs(shown.mean((0, 1)) - original.mean((0, 1))).max() < 2
        (found,), (expected,) = sampled.result.detections, fake_result(original, PredictParams()).detections
        assert (found.name, found.box) == (expected.name, expected.box)
    assert {letter["uri"] for letter in gallery.dead_letters} == {f"{shard}-lost.png" for shard in range(SHARDS)}


def test_there_are_no_more_than_there_are_and_what_is_gone_has_no_picture(out: Path, tmp_path: Path) -> None:
    (tmp_path / "0-3.png").unlink()
    gallery = sample(str(out), 100, LIMITS)
    assert len(gallery.samples) == SHARDS * EACH
    assert [sampled.name for sampled in gallery.samples if sampled.picture is None] == ["0-3.png"]


def test_a_frame_of_a_video_is_shown(tmp_path: Path) -> None:
    clip = tmp_path / "clip.mp4"
    video(clip)
    ledger, uri = Ledger.open(tmp_path / "out", {}), frame_uri(str(clip), 3)
    result = fake_result(np.zeros((48, 64, 3), np.uint8), PredictParams(conf=0))
    frame = row(uri, None, "fake", result, place=Place(str(clip), 3, 0.2))
    ledger.commit(Shard((uri,)), [frame], Manifest(1))
    (sampled,) = sample(str(tmp_path / "out"), 5, LIMITS).samples
    assert sampled.picture is not None and decode_image(sampled.picture, LIMITS).shape == (48, 64, 3)
    assert sampled.result == result_of(frame | {"video": None})


def test_a_job_that_has_committed_nothing_has_none(tmp_path: Path) -> None:
    Ledger.open(tmp_path, {})
    gallery = sample(str(tmp_path), 5, LIMITS)
    assert (gallery.samples, gallery.dead_letters) == ((), ())
