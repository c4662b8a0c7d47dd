"""The limit on FakeModel, in real processes: every stream computes every image, and the stages are all of the time."""

import pytest

from actors.schemas import PredictParams
from actors.settings import ModelSettings
from deploy.bench import BenchError
from deploy.bench.limit import STAGES, measure_limit
from tests.conftest import picture

IMAGES = [picture(blue=number) for number in range(20)]


def test_the_limit_is_what_all_streams_compute_together() -> None:
    model = ModelSettings(name="fake", weights="fake:?slow_ms=20", max_batch=4)
    limit = measure_limit(model, IMAGES, PredictParams(), streams=2)
    assert (limit.streams, limit.batch, set(limit.stage_ms)) == (2, 4, set(STAGES))
    assert limit.stage_ms["engine"] >= 20 / 4  # a batch of four takes 20 ms
    assert limit.images_per_s <= 2 * 1000 / (20 / 4)


def test_a_stream_that_fails_is_told() -> None:
    with pytest.raises(BenchError, match="stream"):
        measure_limit(ModelSettings(name="none", weights="none.pt"), IMAGES, PredictParams(), streams=1)
