"""Rows about what the run will need, as `tidal plan` reckons it, against what the hosts have."""

from collections.abc import Iterator
from dataclasses import replace

from tidal_dist.cluster.hostfile import Host
from tidal_dist.cluster.preflight.rows import EVERYWHERE, Facts, Row, gigabytes, usual
from tidal_dist.config import Config
from tidal_dist.errors import UserError
from tidal_dist.gpus import Gpu, recognised
from tidal_dist.plan import ELEMENT_BYTES, Plan, plan
from tidal_dist.planning.cluster import Assumptions, Cluster

_MIB = 1 << 20
_TIGHT = 0.9  # of what is there: what is reckoned may be wrong by so much
_ADAM_BYTES = 12  # of a parameter in a checkpoint: float32 weight and two moments
_CPU_CONTEXT_GB = 0.5  # Python, PyTorch and DeepSpeed in a rank
_REMEDY = "`tidal plan` says what would make it fit"


def planned(config: Config, hosts: list[Host], facts: Facts) -> Plan:
    """The run on these hosts, on paper.

    Raises:
        UserError: it cannot be laid out on so many ranks.
    """
    ranks, sizes = sum(host.slots for host in hosts), {host.slots for host in hosts}
    nodes = len(hosts) if len(sizes) == 1 else 1
    names = {host: gpus[0]["name"] for host, fact in facts.items() if (gpus := fact["gpus"].get("gpus"))}
    assumed = Assumptions()
    if names:
        gpu = recognised(usual(names)) or replace(_UNKNOWN, name=usual(names))
    else:
        gpu, assumed = _UNKNOWN, replace(assumed, context_gb=_CPU_CONTEXT_GB)
        if config.training.precision == "auto":
            config = config.model_copy(update={"training": config.training.model_copy(update={"precision": "fp32"})})
    return plan(config, Cluster(nodes, ranks // nodes, gpu), assumed)


# Only memory is asked for, which does not depend on how fast a device is.
_UNKNOWN = Gpu("cpu", 1.0, 1.0, 1.0, 0.0, 1.0, 1.0)


def checkpoint_bytes(made: Plan) -> float:
    """Of a checkpoint, about."""
    return made.parameters.total * (_ADAM_BYTES + ELEMENT_BYTES[made.precision])


def layout_row(error: UserError) -> Row:
    """The run cannot be laid out on these hosts."""
    return Row(EVERYWHERE, "layout", "fail", str(error), "change the configuration, or the slots of the hostfile")


def memory_rows(made: Plan, hosts: list[Host], facts: Facts) -> Iterator[Row]:
    """What each GPU, or on CPUs each host, has for what it will need at most."""
    for host in hosts:
        if host.name not in facts:
            continue
        fact = facts[host.name]
        gpus = fact["gpus"].get("gpus") or []
        on_host = made.states.host * host.slots if gpus else made.memory_bytes * host.slots
        for gpu in gpus[: host.slots]:
            free = (int(gpu["memory.total"]) - int(gpu["memory.used"])) * _MIB
            yield _row(host.name, f"GPU {gpu['index']}", made.memory_bytes, free)
        if on_host and fact["memory_available"] is not None:
            yield _row(
                host.name, f"ranks: {host.slots}" if not gpus else "host memory", on_host, fact["memory_available"]
            )


def _row(host: str, what: str, needed: float, free: float) -> Row:
    text = f"{gigabytes(free)} free, {gigabytes(needed)} predicted ({what})"
    if needed > free:
        return Row(host, "memory", "fail", text, _REMEDY)
    if needed > _TIGHT * free:
        return Row(host, "memory", "warn", text, f"{_REMEDY} better")
    return Row(host, "memory", "ok", text)
