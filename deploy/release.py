"""A release: settings, and what the weights' files hold. From both follows the version of every deployment.

    AppSettings + SHA-256 of each model's weights → version of each deployment → what a change of settings must replace

Serve replaces a deployment's replicas when its version changes, and leaves them alone otherwise. By itself it gives every
deployment a new version at every ``serve.run``; ours is a digest of what the replicas are made of, so that a changed limit
loads no model again, and another file under the same path does.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from actors.fake_model import fake_sha256
from actors.settings import ActorSettings, ModelSettings
from actors.weights import hash_weights
from deploy.settings import AppSettings, ServedModel

INGRESS = "ingress"
UNKNOWN = ""  # the content of weights that are not on this node


@dataclass(frozen=True)
class Deployed:
    """A deployment of a release: its least number of replicas, what each reserves, and its version."""

    count: int
    actor: ActorSettings
    version: str


@dataclass(frozen=True)
class Release:
    """What runs, or shall run.

    Attributes:
        settings: the application.
        contents: model name → SHA-256 of its weights; ``UNKNOWN`` where they are not on the node that released them.
    """

    settings: AppSettings
    contents: Mapping[str, str]

    @classmethod
    def of(cls, settings: AppSettings) -> "Release":
        """The release of these settings with the weights as they are now."""
        return cls(settings, {model.name: _content(model.weights) for model in settings.models})

    @property
    def separate(self) -> tuple[ServedModel, ...]:
        """The models with a deployment of their own: all, or in the topology ``direct`` all but the primary one."""
        return self.settings.models[1:] if self.settings.direct else self.settings.models

    def model_version(self, model: ServedModel) -> str:
        """The version of a model's own deployment: of everything but the number of its replicas."""
        made_of = model.model_dump(mode="json", exclude={"replicas": {"min", "max", "idle_s"}})
        return _digest(made_of, self.settings.images.model_dump(), self.contents[model.name])

    @property
    def ingress_version(self) -> str:
        """The version of the ingress: of all settings and models, but not of a rollout's rules, nor of the log.

        Replicas that run are told how to log.
        """
        return _digest(self.settings.model_dump(mode="json", exclude={"rollout", "log"}), dict(self.contents))

    def deployments(self) -> dict[str, Deployed]:
        """Every deployment by name."""
        primary, settings = self.settings.models[0], self.settings
        found = {
            f"model-{model.name}": Deployed(max(model.replicas.min, 1), model.actor, self.model_version(model))
            for model in self.separate
        }
        if settings.direct:
            found[INGRESS] = Deployed(max(primary.replicas.min, 1), primary.actor, self.ingress_version)
        else:
            found[INGRESS] = Deployed(settings.ingresses, ActorSettings(num_cpus=0), self.ingress_version)
        return found

    def other_answers(self, running: "Release") -> list[ServedModel]:
        """The models that may answer otherwise than those of the same name in ``running``: other weights, another engine.

        New models are not among them, as there is nothing to compare them with.
        """
        before = {model.name: model for model in running.settings.models}
        return [
            model
            for model in self.settings.models
            if model.name in before
            and (_computation(model), self._weights(model)) != (_computation(before[model.name]), running._weights(model))
        ]

    def _weights(self, model: ServedModel) -> str:
        """What a model's weights hold; their place where that is unknown."""
        (mine,) = [one for one in self.settings.models if one.name == model.name]
        return self.contents[model.name] or mine.weights


def _computation(model: ServedModel) -> dict[str, Any]:
    """The settings that decide answers, but for the weights: those of the model itself, not of its place or number."""
    return model.model_dump(include=set(ModelSettings.model_fields) - {"name", "weights", "sha256"})


def _content(weights: str) -> str:
    if weights.startswith("fake:"):
        return fake_sha256(weights)
    return hash_weights(Path(weights)) if Path(weights).exists() else UNKNOWN


def _digest(*parts: Any) -> str:
    text = json.dumps([version("yolofleet"), *parts], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
