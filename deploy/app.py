"""build_app(args) → Serve application. Used by ``yolofleet serve``, by ``serve deploy`` and by KubeRay alike.

Nothing but ``.options()`` and ``.bind()``. No ``from __future__ import annotations`` here: with it Ray hands the builder
an unvalidated dict instead of AppSettings.
"""

from typing import Any

from ray import serve
from ray.serve import Application

from deploy.ingress import Ingress
from deploy.replica import ModelReplica
from deploy.settings import AppSettings, ServedModel

APP_NAME = "yolofleet"


def build_app(args: AppSettings) -> Application:
    """One deployment per model, and the ingress in front of them."""
    handles = {model.name: _deployment(model, args).bind(model, args.images) for model in args.models}
    ingress = serve.deployment(Ingress).options(
        name="ingress",
        num_replicas=1,
        max_ongoing_requests=args.http.max_ongoing_requests,
        ray_actor_options={"num_cpus": 0},
    )
    return ingress.bind(handles, args.http)


def deployment_name(model: str) -> str:
    """The Serve deployment of a model."""
    return f"model-{model}"


def _deployment(model: ServedModel, args: AppSettings) -> Any:
    return serve.deployment(ModelReplica).options(
        name=deployment_name(model.name),
        max_ongoing_requests=args.http.max_ongoing_requests,
        health_check_period_s=10,
        health_check_timeout_s=30,
        graceful_shutdown_timeout_s=30,
        max_surge_percent=100,
        max_constructor_retry_count=2,  # weights that cannot be loaded do not get better
        ray_actor_options={"num_cpus": model.actor.num_cpus, "num_gpus": model.actor.num_gpus},
        **_scale(model),
    )


def _scale(model: ServedModel) -> dict[str, Any]:
    replicas = model.replicas
    if replicas.min == replicas.max:
        return {"num_replicas": replicas.max}
    return {
        "autoscaling_config": {
            "min_replicas": replicas.min,
            "max_replicas": replicas.max,
            "target_ongoing_requests": 2 * model.max_batch,
            "upscale_delay_s": 3,
            "downscale_delay_s": 60,
        }
    }
