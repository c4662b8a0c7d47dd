"""How traffic moves, and that a deploy which changes nothing puts right what a killed one has left. No Ray."""

from typing import Any

import pytest

from deploy import rollout
from deploy.release import Release
from deploy.rollout import _move
from deploy.settings import AppSettings, ServedModel


def release(weights: str) -> Release:
    return Release.of(AppSettings(models=(ServedModel(name="m", weights=weights),)))


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What is given to Serve, in order: the ingress's release and that of its model."""
    given: list[Any] = []
    monkeypatch.setattr(rollout, "models_of", lambda of: {"m": of})
    monkeypatch.setattr(rollout, "app_of", lambda of, models: (of, models["m"]))
    monkeypatch.setattr(rollout, "run", lambda application, **_: given.append(application))
    return given


def test_models_change_before_the_ingress(runs: list[Any]) -> None:
    old, new = release("fake:"), release("fake:?serial=1")
    _move(old, new, lambda line: None)
    assert runs == [(old, new), (new, new), (new, new)]


def test_where_nothing_changes_the_same_is_released_again_for_what_a_killed_deploy_has_left(runs: list[Any]) -> None:
    said: list[str] = []
    old, same = release("fake:"), release("fake:")
    _move(old, same, said.append)
    assert runs == [(same, same)]
    assert said[0].startswith("nothing changes")
