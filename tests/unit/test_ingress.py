"""What an ingress adds to an answer."""

import pytest

from actors.schemas import Answer, ImageResult, TensorAnswer, Timing
from deploy.ingress import _with_queue

TIMING = Timing(decode=1, batch_wait=20, preprocess=1, inference=10, postprocess=4, batch_size=1, engine=95)


@pytest.mark.parametrize(("total_ms", "queue"), [(200, 80), (100, 0)])
def test_what_an_image_waited_for_is_what_is_left_of_it_beside_its_stay_in_the_engine(total_ms: float, queue: float) -> None:
    image = _with_queue(Answer(ImageResult(4, 4, "detect", (), TIMING), "a"), total_ms)
    tensor = _with_queue(TensorAnswer((), "a", TIMING), total_ms)
    assert image.result.timing.queue == tensor.timing.queue == queue
