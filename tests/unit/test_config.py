"""CONFIG of ``yolofleet deploy``: both forms, and every mistake a sentence that names it. And what a change replaces."""

from pathlib import Path

import pytest
from ray.serve.schema import ServeDeploySchema
from yaml import safe_load

from actors.errors import BadRequest
from actors.settings import ActorSettings, ImageLimits
from deploy.config import HttpOptions, read_config
from deploy.release import Release
from deploy.settings import AppSettings, HttpLimits, Replicas, RolloutRules, ServedModel
from tests.conftest import REPOSITORY

EXAMPLE = REPOSITORY / "deploy" / "serve.yaml"
FAKE = ServedModel(name="fake", weights="fake:")
OTHER = ServedModel(name="other", weights="fake:?other=1")


def written(folder: Path, text: str) -> Path:
    file = folder / "config.yaml"
    file.write_text(text)
    return file


def test_the_documented_example_is_taken_by_us_and_by_serve() -> None:
    settings, http = read_config(EXAMPLE)
    assert settings.models[0].name == "yolo26n" and settings.rollout.max_slowdown == 1.5
    assert http == HttpOptions(host="127.0.0.1", port=8000)
    (application,) = ServeDeploySchema.model_validate(safe_load(EXAMPLE.read_text())).applications
    assert AppSettings.model_validate(application.args) == settings


def test_plain_settings_are_taken_and_weights_get_their_whole_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("here.pt").touch()
    models = "models: [{name: a, weights: here.pt}, {name: b, weights: elsewhere.pt}, {name: c, weights: 'fake:'}]"
    settings, http = read_config(written(tmp_path, models))
    assert [model.weights for model in settings.models] == [str(tmp_path / "here.pt"), "elsewhere.pt", "fake:"]
    assert http.port == 8000


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("models: [{name: a, weights: 'fake:', replica: 2}]\ntopologi: direct", "unknown keys models.0.replica, topologi"),
        ("application: []", "unknown key application"),
        ("applications: [{import_path: 'deploy.app:build_app', args: {models: [], modles: 1}}]", "applications.0.args.modles"),
        ("applications: [{import_path: 'other:app', args: {models: [{name: a, weights: 'fake:'}]}}]", "deploy.app:build_app"),
        ("applications: []", "applications: "),
        ("models: [{name: a}]", "models.0.weights: Field required"),
        ("models: [{name: a, weights: 'fake:'}, {name: a, weights: 'fake:'}]", "each needs a name of its own"),
        ("models: [{name: a, weights: 'fake:'}]\nrollout: {min_agreement: 2}", "rollout.min_agreement"),
        ("models: [", "is not YAML"),
        ("just words", "holds no settings"),
        ("", "holds no settings"),
    ],
)
def test_a_mistake_is_one_sentence_that_names_it(text: str, sentence: str, tmp_path: Path) -> None:
    with pytest.raises(BadRequest) as caught:
        read_config(written(tmp_path, text))
    assert sentence in caught.value.message and "\n" not in caught.value.message


def test_a_file_that_is_not_there_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(BadRequest, match="cannot be read: No such file"):
        read_config(tmp_path / "none.yaml")


def changed(before: AppSettings, after: AppSettings) -> set[str]:
    """Deployments that Serve replaces, adds or removes."""
    old, new = Release.of(before).deployments(), Release.of(after).deployments()
    return {
        name
        for name in old.keys() | new.keys()
        if name not in old or name not in new or old[name].version != new[name].version
    }


def test_a_change_replaces_what_it_is_about_and_nothing_else() -> None:
    before = AppSettings(models=(FAKE, OTHER))
    quicker = before.model_copy(update={"http": HttpLimits(request_timeout_s=5)})
    assert changed(before, before) == set()
    assert changed(before, before.model_copy(update={"rollout": RolloutRules(min_agreement=0.1)})) == set()
    assert changed(before, quicker) == {"ingress"}
    more = FAKE.model_copy(update={"replicas": Replicas(min=2, max=3)})
    assert changed(before, before.model_copy(update={"models": (more, OTHER)})) == {"ingress"}
    larger = FAKE.model_copy(update={"actor": ActorSettings(num_cpus=2)})
    assert changed(before, before.model_copy(update={"models": (larger, OTHER)})) == {"ingress", "model-fake"}
    smaller_images = before.model_copy(update={"images": ImageLimits(max_megapixels=1)})
    assert changed(before, smaller_images) == {"ingress", "model-fake", "model-other"}
    assert changed(AppSettings(models=(FAKE,)), before) == {"ingress", "model-fake", "model-other"}  # from direct to routed


def test_other_weights_or_another_engine_are_compared_and_nothing_else() -> None:
    def gated(*after: ServedModel) -> list[str]:
        running = Release.of(AppSettings(models=(FAKE, OTHER)))
        return [model.name for model in Release.of(AppSettings(models=after)).other_answers(running)]

    assert gated(FAKE, OTHER) == []
    assert gated(OTHER, FAKE) == []
    assert gated(FAKE.model_copy(update={"weights": "fake:?shift=1"}), OTHER) == ["fake"]
    assert gated(FAKE, OTHER.model_copy(update={"max_batch": 2})) == ["other"]
    assert gated(FAKE.model_copy(update={"replicas": Replicas(min=0, max=3), "actor": ActorSettings(num_cpus=3)})) == []
    assert gated(FAKE, OTHER, ServedModel(name="third", weights="fake:?shift=2")) == []


def test_another_file_under_the_same_path_is_other_weights_and_the_same_file_elsewhere_is_not(tmp_path: Path) -> None:
    first, second = tmp_path / "a.pt", tmp_path / "b.pt"
    first.write_bytes(b"one")
    second.write_bytes(b"one")
    here, there = (AppSettings(models=(ServedModel(name="a", weights=str(file)),)) for file in (first, second))
    before = Release.of(here)
    assert Release.of(there).other_answers(before) == []
    assert Release.of(there).ingress_version != before.ingress_version
    first.write_bytes(b"two")
    assert [model.name for model in Release.of(here).other_answers(before)] == ["a"]
    assert Release.of(here).ingress_version != before.ingress_version


def test_weights_that_are_not_on_this_node_are_told_apart_by_their_path(tmp_path: Path) -> None:
    far, further = (AppSettings(models=(ServedModel(name="a", weights=str(tmp_path / name)),)) for name in ("a", "b"))
    assert Release.of(far).other_answers(Release.of(far)) == []
    assert [model.name for model in Release.of(further).other_answers(Release.of(far))] == ["a"]
