"""What cannot be started says so at once, in a sentence with its mend."""

from pathlib import Path

import pytest

from actors.settings import ActorSettings
from deploy.app import build_app
from deploy.launch import LaunchError
from deploy.settings import AppSettings, ServedModel
from tests.conftest import served

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("local_ray")]

SMALL = ActorSettings(num_cpus=0.1)
FAKE = ServedModel(name="fake", weights="fake:", actor=SMALL)


def test_the_builder_takes_validated_settings_only() -> None:
    with pytest.raises(ValueError, match="extra"):
        AppSettings.model_validate({"models": [{"name": "a", "weights": "fake:", "replica": 2}]})
    assert build_app(AppSettings(models=(FAKE,)))


def test_reservations_that_can_never_fit_are_refused_at_once() -> None:
    greedy = FAKE.model_copy(update={"actor": ActorSettings(num_cpus=1000)})
    with pytest.raises(LaunchError, match="lower --replicas or --cpus-per-replica"), served(greedy):
        pass


def test_missing_weights_are_one_sentence(tmp_path: Path) -> None:
    absent = ServedModel(name="absent", weights=str(tmp_path / "absent.pt"), actor=SMALL)
    with pytest.raises(LaunchError, match="No weights at"), served(absent):
        pass
