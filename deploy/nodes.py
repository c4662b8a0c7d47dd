"""Where a fleet may run: this machine, and node types of public clouds with what their makers declare.

Cores are what the cloud calls vCPUs. ``device`` is the name under which the driver (a GPU) or /proc/cpuinfo (a CPU) knows what
computes: a measurement is carried over to a node only if the device is the same. Sources: https://aws.amazon.com/ec2/instance-types
and https://cloud.google.com/compute/docs/machine-resource, as of 2026.
"""

from dataclasses import dataclass

from actors.errors import BadRequest
from actors.hardware import available_cpus, cuda_devices, node_memory
from deploy.bench.machine import circumstances


@dataclass(frozen=True, slots=True)
class Node:
    """One machine.

    Attributes:
        name: of its type.
        device: part of the name of what computes.
        cores: for everything.
        gpus: how many, all alike; 0 where the CPU computes.
        memory_gb: of the machine.
    """

    name: str
    device: str
    cores: int
    gpus: int
    memory_gb: float


NODE_TYPES = {
    node.name: node
    for node in (
        Node("g4dn.xlarge", "Tesla T4", 4, 1, 16),
        Node("g4dn.12xlarge", "Tesla T4", 48, 4, 192),
        Node("g5.xlarge", "NVIDIA A10G", 4, 1, 16),
        Node("g5.12xlarge", "NVIDIA A10G", 48, 4, 192),
        Node("g6.xlarge", "NVIDIA L4", 4, 1, 16),
        Node("g6.12xlarge", "NVIDIA L4", 48, 4, 192),
        Node("p4d.24xlarge", "NVIDIA A100-SXM4-40GB", 96, 8, 1152),
        Node("p5.48xlarge", "NVIDIA H100 80GB HBM3", 192, 8, 2048),
        Node("g2-standard-4", "NVIDIA L4", 4, 1, 16),
        Node("g2-standard-48", "NVIDIA L4", 48, 4, 192),
        Node("c6i.xlarge", "Platinum 8375C", 4, 0, 8),
        Node("c6i.4xlarge", "Platinum 8375C", 16, 0, 32),
        Node("m6i.xlarge", "Platinum 8375C", 4, 0, 16),
        Node("c7i.xlarge", "Platinum 8488C", 4, 0, 8),
        Node("c7i.4xlarge", "Platinum 8488C", 16, 0, 32),
    )
}


def this_machine(gpus: int | None = None) -> Node:
    """The machine that this runs on.

    Args:
        gpus: how many of its GPUs count, as far as it has them; all if None, and 0 has the CPU compute.

    Raises:
        BadRequest: GPUs are asked for, and there is none to measure.
    """
    devices = [] if gpus == 0 else cuda_devices()
    if gpus and not devices:
        raise BadRequest(
            f"--gpu {gpus}: torch sees no CUDA GPU here, and what is not here cannot be measured. Leave --gpu out"
        )
    device = devices[0].name if devices else str(circumstances()["cpu"])
    return Node("this machine", device, available_cpus(), len(devices[:gpus]), node_memory()[0] / 1e9)


def node_type(name: str, measured: Node) -> Node:
    """A node type to which what was ``measured`` may be carried over.

    Raises:
        BadRequest: it is not known, or has another device.
    """
    node = NODE_TYPES.get(name)
    if node is None:
        raise BadRequest(f"--node '{name}' is not known: one of {', '.join(NODE_TYPES)}")
    if node.device not in measured.device:
        raise BadRequest(
            f"{name} computes on {node.device} and this machine on {measured.device}: figures of the one say nothing of the"
            f" other. Run 'yolofleet plan' on a {name}"
        )
    return node
