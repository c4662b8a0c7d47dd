"""The limit on FakeModel, in real processes: every stream computes every image, and the stages are all of the time."""

from functools import partial
from itertools import count
from types import SimpleNamespace

import pytest

from actors.schemas import PredictParams
from actors.settings import ModelSettings
from deploy.bench import BenchError, limit
from deploy.bench.limit import STAGES, Limit, _again, mean_limit, measure_limit
from tests.conftest import picture

IMAGES = [picture(blue=number) for number in range(20)]


def test_the_limit_is_what_all_streams_compute_together() -> None:
    model = ModelSettings(name="fake", weights="fake:?slow_ms=20", max_batch=4)
    measured = measure_limit(model, IMAGES, PredictParams(), streams=2, seconds=0.5)
    assert (measured.streams, measured.batch, set(measured.stage_ms)) == (2, 4, set(STAGES))
    assert measured.stage_ms["engine"] >= 20 / 4  # a batch of four takes 20 ms
    assert measured.images_per_s <= 2 * 1000 / (20 / 4)


@pytest.mark.parametrize(("seconds", "computed"), [(0, "abc"), (2, "abca"), (5, "abcabca")])
def test_images_are_taken_again_until_the_time_is_over(seconds: int, computed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limit, "time", SimpleNamespace(perf_counter=partial(next, count())))  # a second each time it is asked
    assert b"".join(_again([b"a", b"b", b"c"], seconds)) == computed.encode()


def test_the_mean_of_two_limits_is_in_all_that_was_measured() -> None:
    before, after = Limit(2, 8, 30.0, {"engine": 50.0}, 60.0), Limit(2, 8, 34.0, {"engine": 54.0}, 56.0)
    assert mean_limit([before, after]) == Limit(2, 8, 32.0, {"engine": 52.0}, 58.0)


def test_a_stream_that_fails_is_told() -> None:
    with pytest.raises(BenchError, match="stream"):
        measure_limit(ModelSettings(name="none", weights="none.pt"), IMAGES, PredictParams(), streams=1)
