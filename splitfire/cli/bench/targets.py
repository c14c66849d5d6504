"""Whom a load is given to: a fleet that runs already, or fleets of this machine, one at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

from splitfire.cli.bench.run import Target
from splitfire.cli.client import Client, ServerError
from splitfire.cli.supervisor import Fleet, FleetPlan, default_cpus, free_port
from splitfire.v1 import inference_pb2 as pb


@dataclass(frozen=True, slots=True)
class Subject:
    """What is asked now. `watch` looks after it; `plan` is None where it is not ours."""

    target: Target
    model: pb.Model
    workers: str
    watch: Callable[[], None] = lambda: None


@dataclass(frozen=True, slots=True)
class Kind:
    """A way to use so many workers."""

    has_prefill: bool
    split: str  # of the router


KINDS: Mapping[str, Kind] = {
    "split": Kind(True, "always"),
    "aggregated": Kind(False, "never"),
    "auto": Kind(True, "auto"),
}
Variants = Mapping[str, Callable[[], AbstractContextManager[Subject]]]


def own_fleets(
    names: tuple[str, ...], model: str, model_name: str, num_prefill: int, num_decode: int, say: Callable[[str], None]
) -> Variants:
    """Each with as many workers, and so the same processors: without prefill workers, all of them decode."""

    def opened(name: str) -> Callable[[], AbstractContextManager[Subject]]:
        kind = KINDS[name]
        prefill, decode = (num_prefill, num_decode) if kind.has_prefill else (0, num_prefill + num_decode)
        cpus = default_cpus(prefill, decode)
        flags = (f"--split={kind.split}",)
        return lambda: _own_fleet(
            FleetPlan(model, model_name, prefill, decode, *cpus, free_port(), router_flags=flags),
            lambda line: say(f"{name}: {line}"),
        )

    return {name: opened(name) for name in names}


@contextmanager
def _own_fleet(plan: FleetPlan, say: Callable[[str], None]) -> Iterator[Subject]:
    """Ready; nothing of it is left afterwards. After a second Ctrl-C it does not wait for anything."""
    fleet = Fleet(plan, say)
    try:
        fleet.start()
        status = fleet.wait_ready()
        with fleet.client() as client:
            model = client.model()
        yield Subject(Target(fleet.address), model, describe(status), fleet.watch)
    finally:
        try:
            fleet.stop()
        except KeyboardInterrupt:
            fleet.stop(now=True)
            raise


def running_fleet(name: str, target: Target, say: Callable[[str], None]) -> Variants:
    @contextmanager
    def opened() -> Iterator[Subject]:
        with Client(target.address, target.api_key, target.authority) as client:
            model = client.model()
            try:
                status = client.fleet()
            except ServerError:  # it does not tell everybody who is there
                yield Subject(target, model, "workers unknown")
                return
            if status.running_requests or status.queued_requests:
                say(f"{status.running_requests} requests ran and {status.queued_requests} waited there before the load began")
            yield Subject(target, model, describe(status))

    return {name: opened}


def describe(status: pb.GetFleetResponse) -> str:
    """`1 prefill and 1 decode worker (2 processors in all)`."""
    roles = [worker.role for worker in status.workers]
    num_prefill, num_decode = roles.count(pb.ROLE_PREFILL), roles.count(pb.ROLE_DECODE)
    words = [f"{count} {role}" for count, role in ((num_prefill, "prefill"), (num_decode, "decode")) if count]
    gpus = sum(worker.machine.num_cuda_devices for worker in status.workers)
    machines = len({worker.machine.machine_id for worker in status.workers})
    where = f"on {machines} machine{'s' if machines != 1 else ''}{f', {gpus} GPUs' if gpus else ''}"
    return f"{' and '.join(words) or 'no'} worker{'s' if len(roles) != 1 else ''} {where}"
