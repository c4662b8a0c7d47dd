"""The part of KubeRay's and Kubernetes' schemas that deploy/kuberay uses. Every other field is refused.

No package ships these schemas. They are written from docs/reference/api.md in ray-project/kuberay (1.5.1 for ``authOptions``)
and from Kubernetes' API reference.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, model_validator
from pydantic.alias_generators import to_camel

Quantity = Annotated[str, Field(pattern=r"^[0-9]+(m|Ki|Mi|Gi|Ti)?$")]
Port = Annotated[int, Field(ge=1, le=65535)]
Count = Annotated[int, Field(ge=0)]
Name = Annotated[str, Field(pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$")]
Strings = dict[str, str]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, alias_generator=to_camel)


class Metadata(Strict):
    name: Name | None = None
    generate_name: str | None = None
    labels: Strings = {}


class LabelSelector(Strict):
    match_labels: Annotated[Strings, Field(min_length=1)]


class KeySelector(Strict):
    name: Name
    key: str


class ValueFrom(Strict):
    secret_key_ref: KeySelector


class Variable(Strict):
    name: str
    value: str | None = None
    value_from: ValueFrom | None = None


class HttpGet(Strict):
    path: Annotated[str, Field(pattern="^/")]
    port: Port


class TcpSocket(Strict):
    port: Port


class Probe(Strict):
    http_get: HttpGet | None = None
    tcp_socket: TcpSocket | None = None
    initial_delay_seconds: Count = 0
    period_seconds: Count = 10
    timeout_seconds: Count = 1
    failure_threshold: Count = 3


class Exec(Strict):
    command: Annotated[list[str], Field(min_length=1)]


class Handler(Strict):
    exec: Exec


class Lifecycle(Strict):
    pre_stop: Handler


class Capabilities(Strict):
    drop: list[str]


class ContainerSecurity(Strict):
    allow_privilege_escalation: Literal[False]
    capabilities: Capabilities


class ContainerPort(Strict):
    name: Annotated[str, Field(max_length=15)]
    container_port: Port


class Resources(Strict):
    requests: dict[str, Quantity]
    limits: dict[str, Quantity] = {}


class VolumeMount(Strict):
    name: Name
    mount_path: Annotated[str, Field(pattern="^/")]
    read_only: bool = False


class Container(Strict):
    name: Name
    image: Annotated[str, Field(pattern=r"^[^:]+:[^:]+$")]
    args: list[str] = []
    env: list[Variable] = []
    ports: list[ContainerPort]
    readiness_probe: Probe
    liveness_probe: Probe | None = None
    lifecycle: Lifecycle | None = None
    resources: Resources
    security_context: ContainerSecurity
    volume_mounts: list[VolumeMount]


class Claim(Strict):
    claim_name: Name
    read_only: bool = False


class EmptyDir(Strict):
    medium: Literal["Memory"]
    size_limit: Quantity


class Volume(Strict):
    name: Name
    persistent_volume_claim: Claim | None = None
    empty_dir: EmptyDir | None = None


class PodSecurity(Strict):
    run_as_non_root: Literal[True]
    run_as_user: Annotated[int, Field(gt=0)]
    fs_group: Annotated[int, Field(gt=0)]


class Toleration(Strict):
    key: str
    operator: Literal["Exists", "Equal"]
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"]


class Spread(Strict):
    max_skew: Annotated[int, Field(ge=1)]
    topology_key: str
    when_unsatisfiable: Literal["ScheduleAnyway", "DoNotSchedule"]
    label_selector: LabelSelector


class PodSpec(Strict):
    containers: Annotated[list[Container], Field(min_length=1, max_length=1)]
    volumes: list[Volume] = []
    security_context: PodSecurity
    tolerations: list[Toleration] = []
    node_selector: Strings = {}
    topology_spread_constraints: list[Spread] = []
    termination_grace_period_seconds: Count = 30


class PodTemplate(Strict):
    metadata: Metadata
    spec: PodSpec


class AuthOptions(Strict):
    mode: Literal["token"]


class AutoscalerOptions(Strict):
    version: Literal["v1", "v2"]
    idle_timeout_seconds: Count


class RedisCredential(Strict):
    value_from: ValueFrom


class GcsFaultTolerance(Strict):
    redis_address: str
    redis_password: RedisCredential


class HeadGroup(Strict):
    ray_start_params: Strings
    template: PodTemplate


class WorkerGroup(HeadGroup):
    group_name: Name
    min_replicas: Count  # KubeRay has defaults for both, of which one is 2147483647
    max_replicas: Count

    @model_validator(mode="after")
    def _ordered(self) -> "WorkerGroup":
        assert self.min_replicas <= self.max_replicas
        return self


class ClusterSpec(Strict):
    ray_version: str
    auth_options: AuthOptions
    enable_in_tree_autoscaling: bool
    autoscaler_options: AutoscalerOptions
    gcs_fault_tolerance_options: GcsFaultTolerance | None = None
    head_group_spec: HeadGroup
    worker_group_specs: Annotated[list[WorkerGroup], Field(min_length=1)]


class UpgradeStrategy(Strict):
    type: Literal["NewCluster", "None"]


class ServiceSpec(Strict):
    upgrade_strategy: UpgradeStrategy
    serve_config: Annotated[str, Field(alias="serveConfigV2")]
    ray_cluster_config: ClusterSpec


class JobSpec(Strict):
    entrypoint: str
    backoff_limit: Count
    shutdown_after_job_finishes: bool
    ttl_seconds_after_finished: Count
    ray_cluster_spec: ClusterSpec


class Object(Strict):
    metadata: Metadata


class RayCluster(Object):
    api_version: Literal["ray.io/v1"]
    kind: Literal["RayCluster"]
    spec: ClusterSpec


class RayService(Object):
    api_version: Literal["ray.io/v1"]
    kind: Literal["RayService"]
    spec: ServiceSpec


class RayJob(Object):
    api_version: Literal["ray.io/v1"]
    kind: Literal["RayJob"]
    spec: JobSpec


class Budget(Strict):
    max_unavailable: Annotated[int, Field(ge=1)]
    selector: LabelSelector


class PodDisruptionBudget(Object):
    api_version: Literal["policy/v1"]
    kind: Literal["PodDisruptionBudget"]
    spec: Budget


class ServicePort(Strict):
    name: str
    port: Port


class ServiceBody(Strict):
    selector: Strings
    ports: list[ServicePort]


class Service(Object):
    api_version: Literal["v1"]
    kind: Literal["Service"]
    spec: ServiceBody


class ClaimBody(Strict):
    access_modes: list[Literal["ReadWriteOnce"]]
    resources: Resources


class ClaimTemplate(Strict):
    metadata: Metadata
    spec: ClaimBody


class SetBody(Strict):
    service_name: Name
    replicas: Count
    selector: LabelSelector
    template: PodTemplate
    volume_claim_templates: list[ClaimTemplate]


class StatefulSet(Object):
    api_version: Literal["apps/v1"]
    kind: Literal["StatefulSet"]
    spec: SetBody


class Expression(Strict):
    key: str
    operator: Literal["Exists"]


class ExpressionSelector(Strict):
    match_expressions: Annotated[list[Expression], Field(min_length=1)]


class Endpoint(Strict):
    port: str
    interval: Annotated[str, Field(pattern="^[0-9]+s$")]


class Monitor(Strict):
    selector: ExpressionSelector
    pod_metrics_endpoints: list[Endpoint]


class PodMonitor(Object):
    api_version: Literal["monitoring.coreos.com/v1"]
    kind: Literal["PodMonitor"]
    spec: Monitor


AnyObject = Annotated[
    RayCluster | RayService | RayJob | PodDisruptionBudget | Service | StatefulSet | PodMonitor, Field(discriminator="kind")
]
PARSER: TypeAdapter[Any] = TypeAdapter(AnyObject)
