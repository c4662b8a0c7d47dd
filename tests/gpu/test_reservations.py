"""Reservations on a real GPU: caps hold, who wants more fails alone, memory that runs out costs no answer."""

import gc
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import ray
import torch

from actors import hardware
from actors.errors import ModelError
from actors.images import encode_jpeg
from actors.schemas import ImageResult, PredictParams
from actors.settings import ActorSettings, ImageLimits, ModelSettings
from actors.startup import settled_detector
from deploy.agreement import agreement, total
from deploy.demo.scene import draw_scene
from deploy.launch import local_ray
from deploy.weights import EMBEDDED

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]

IMAGES = [encode_jpeg(draw_scene(seed).image) for seed in range(64)]
PARAMS = PredictParams(imgsz=(640, 640))


@pytest.fixture(scope="module")
def gpu_ray() -> Iterator[None]:
    """A Ray of this machine's own GPUs and as many CPUs as small actors want."""
    with local_ray(num_cpus=8):
        yield


class Tenant:
    """One private model on its share of the GPU, in a process of its own."""

    def load(self, num_gpus: float, max_batch: int = 8, **model: Any) -> dict[str, Any]:
        given = {"engine": "torch", "precision": "fp32", "max_batch": max_batch} | model
        settings = ModelSettings.model_validate(EMBEDDED.model_dump() | given)
        self._detector = settled_detector(settings, ActorSettings(num_gpus=num_gpus), ImageLimits())
        info = self._detector.info
        return {"device": info.device, "precision": info.precision, "peak": hardware.gpu_peak_bytes()}

    def detect(self, images: list[bytes]) -> list[ImageResult]:
        return [answer.result() for answer in [self._detector.submit(image, PARAMS) for image in images]]

    def allocate(self, size: int) -> str:
        """Take GPU memory beside the model, as a leak would."""
        try:
            self._kept = torch.empty(size, dtype=torch.uint8, device="cuda")
        except torch.cuda.OutOfMemoryError:
            return "refused"
        return "granted"

    def squeeze(self, images: list[bytes], room: int) -> tuple[list[ImageResult], int]:
        """Answer with ``room`` bytes beyond what the model has now; also the largest batch that there was."""
        gc.collect()
        torch.cuda.empty_cache()
        hardware.cap_gpu_memory((hardware.gpu_memory_bytes() or 0) + room)
        sizes: list[int] = []
        self._detector.on_batch = sizes.append
        return self.detect(images), max(sizes)


def tenant(num_gpus: float, **load: Any) -> Any:
    actor = ray.remote(Tenant).options(num_cpus=1, num_gpus=num_gpus).remote()
    return actor, ray.get(actor.load.remote(num_gpus, **load))


def boxes(results: list[ImageResult]) -> list[list[tuple[int, tuple[float, ...]]]]:
    return [[(found.class_id, found.box or ()) for found in result.detections] for result in results]


def agree(ones: list[ImageResult], others: list[ImageResult]) -> bool:
    """The same objects within half a pixel."""
    for one, other in zip(boxes(ones), boxes(others), strict=True):
        if [class_id for class_id, _ in one] != [class_id for class_id, _ in other]:
            return False
        if not all(np.allclose(a, b, atol=0.5) for (_, a), (_, b) in zip(one, other, strict=True)):
            return False
    return True


def test_an_actor_gets_its_share_and_no_more(gpu_ray: None) -> None:
    total = hardware.cuda_devices()[0].total_memory
    actor, loaded = tenant(0.25)
    assert loaded["device"] == "cuda:0" and 0 < loaded["peak"] < total / 4
    assert ray.get(actor.allocate.remote(total // 8)) == "granted"
    assert ray.get(actor.allocate.remote(total // 4)) == "refused"
    assert len(ray.get(actor.detect.remote(IMAGES[:4]))) == 4
    ray.kill(actor)


def test_who_wants_more_than_its_share_fails_alone_and_with_the_numbers(gpu_ray: None) -> None:
    neighbour, _ = tenant(0.5)
    before = ray.get(neighbour.detect.remote(IMAGES))
    greedy = ray.remote(Tenant).options(num_cpus=1, num_gpus=0.01).remote()
    with pytest.raises(ModelError, match=r"its share of the GPU, \d+\.\d\d GB \(num_gpus 0\.01\)"):
        ray.get(greedy.load.remote(0.01, max_batch=256))
    assert agree(ray.get(neighbour.detect.remote(IMAGES)), before)
    ray.kill(greedy)
    ray.kill(neighbour)


def test_memory_that_runs_out_halves_the_batch_and_costs_no_answer(gpu_ray: None) -> None:
    actor, _ = tenant(1.0, max_batch=64)
    alone = [ray.get(actor.detect.remote([image]))[0] for image in IMAGES]
    answered, largest = ray.get(actor.squeeze.remote(IMAGES * 4, 128 * 2**20))
    assert agree(answered, alone * 4)
    assert largest < 64
    ray.kill(actor)


def test_fractional_actors_share_the_gpu_and_answer_like_one(gpu_ray: None) -> None:
    one, _ = tenant(1.0)
    expected = ray.get(one.detect.remote(IMAGES))
    ray.kill(one)
    several = [tenant(0.25)[0] for _ in range(4)]
    for answered in ray.get([each.detect.remote(IMAGES) for each in several]):
        assert agree(answered, expected)
    for each in several:
        ray.kill(each)


def test_an_actor_without_a_reservation_sees_no_gpu(gpu_ray: None) -> None:
    actor, loaded = tenant(0)
    assert (loaded["device"], loaded["peak"]) == ("cpu", None)
    ray.kill(actor)


def test_half_precision_finds_what_single_precision_does(gpu_ray: None) -> None:
    single, loaded = tenant(0.5)
    expected = ray.get(single.detect.remote(IMAGES))
    half, halved = tenant(0.5, precision="fp16")
    assert (loaded["precision"], halved["precision"]) == ("fp32", "fp16")
    found = ray.get(half.detect.remote(IMAGES))
    assert total(agreement(*pair) for pair in zip(expected, found, strict=True)).share > 0.98
    ray.kill(single)
    ray.kill(half)
