"""build_app(args) → Serve application. Used by ``yolofleet serve``, by ``serve deploy`` and by KubeRay alike.

    routed   ingress (on the head node) ──handle──→ model-NAME, model-OTHER, …
    direct   ingress + primary model    ──handle──→ model-OTHER, …

Nothing but ``.options()`` and ``.bind()``. No ``from __future__ import annotations`` here: with it Ray hands the builder
an unvalidated dict instead of AppSettings.
"""

from typing import Any

from ray import serve
from ray.serve import Application

from deploy.ingress import Ingress
from deploy.logs import for_serve
from deploy.release import INGRESS, Release
from deploy.replica import ModelReplica
from deploy.settings import AppSettings, ServedModel

ON_THE_HEAD_NODE = {"node:__internal_head__": 0.001}
DRAIN_CHECK_S = 0.5  # how often a replica that goes looks whether it has answered all
SHUTDOWN_GRACE_S = 5.0  # beyond the longest request: a replica that goes answers what it has
SPARE_CALLS = 4  # beyond a replica's images: it must be asked what it is while it is busy


def build_app(args: AppSettings) -> Application:
    """One deployment per model, and the ingress in front of them, or around the primary one."""
    release = Release.of(args)
    return app_of(release, models_of(release))


def models_of(release: Release) -> dict[str, Application]:
    """The models of a release that have deployments of their own, by name."""
    return {model.name: model_app(release, model) for model in release.separate}


def app_of(release: Release, models: dict[str, Application]) -> Application:
    """The ingress of a release before ``models``, which may be more, or of another release, while traffic moves."""
    settings = release.settings
    primary = settings.models[0]
    place = _actor(primary) | _scale(primary) if settings.direct else _on_the_head_node(settings)
    ingress = serve.deployment(Ingress).options(
        name=INGRESS, max_ongoing_requests=settings.http.max_connections, **(_life(release) | place)
    )
    return _versioned(ingress, release.ingress_version).bind(models, release)


def model_app(release: Release, model: ServedModel, **options: Any) -> Application:
    """One of the models of a release in a deployment of its own, with further ``options``."""
    deployment = serve.deployment(ModelReplica).options(
        name=f"model-{model.name}",
        max_ongoing_requests=model.in_flight + SPARE_CALLS,
        **(_life(release) | _actor(model) | _scale(model) | options),
    )
    return _versioned(deployment, release.model_version(model)).bind(model, release.settings.images)


def _versioned(deployment: Any, version: str) -> Any:
    """Serve makes versions of its own, unless the caller says that it is internal too; Ray is pinned."""
    return deployment.options(version=version, _internal=True)


def _life(release: Release) -> dict[str, Any]:
    return {
        "health_check_period_s": release.settings.health_check_s,
        "health_check_timeout_s": 30,
        "graceful_shutdown_wait_loop_s": DRAIN_CHECK_S,
        "graceful_shutdown_timeout_s": release.settings.http.request_timeout_s + SHUTDOWN_GRACE_S,
        "max_surge_percent": 100,  # a new version is up before the old one goes, with one replica too
        "logging_config": for_serve(release.settings.log),
        "max_constructor_retry_count": 2,  # weights that cannot be loaded do not get better
    }


def _actor(model: ServedModel) -> dict[str, Any]:
    return {"ray_actor_options": {"num_cpus": model.actor.num_cpus, "num_gpus": model.actor.num_gpus}}


def _on_the_head_node(args: AppSettings) -> dict[str, Any]:
    """One ingress lives where the clients connect, so that the loss of a node with models costs no connection."""
    if args.ingresses == 1:
        return {"num_replicas": 1, "ray_actor_options": {"num_cpus": 0, "resources": ON_THE_HEAD_NODE}}
    one_a_node = {"max_replicas_per_node": 1, "max_surge_percent": 0}  # no second one beside it: they are replaced in turn
    return {"num_replicas": args.ingresses, "ray_actor_options": {"num_cpus": 0}, **one_a_node}


def _scale(model: ServedModel) -> dict[str, Any]:
    replicas = model.replicas
    if replicas.min == replicas.max:
        return {"num_replicas": replicas.max}
    return {
        "autoscaling_config": {
            "min_replicas": replicas.min,
            "initial_replicas": max(replicas.min, 1),  # so that weights that do not load are seen at once
            "max_replicas": replicas.max,
            "target_ongoing_requests": model.in_flight,
            "metrics_interval_s": 1,  # by default Serve looks every 10 s at the mean of 30 s
            "look_back_period_s": 3,
            "upscale_delay_s": 3,  # but from zero to one at once
            "downscale_delay_s": replicas.idle_s,
        }
    }
