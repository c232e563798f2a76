"""Sends units of work to a Ray cluster; scheduling, retries and resources are Ray's.

A unit is a small tuple of plain values that names what to read on a file system that all
machines share. What a unit gives comes back as it is finished, and is handed on in the
order of the units, so that whatever is written from it does not depend on who was first.

Source: https://docs.ray.io/en/latest/ray-core/fault_tolerance/tasks.html for retries.
"""

from __future__ import annotations

import os
import platform
import socket
import warnings
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from typing import Any, TypeVar
from urllib.parse import urlsplit

from mofq import __version__
from mofq.exceptions import ClusterError, MofqError, first_line, how_to_install, option
from mofq.files.progress import Tell, silent
from mofq.numbers.numerics import NUMERICS

_Unit = TypeVar("_Unit")
_Result = TypeVar("_Result")

#: How often a unit is begun again where its worker or its machine died.
MAX_RETRIES = 3
#: A cluster that does not take a connection in this time is not there [s].
_REACH_SECONDS = 10.0
#: Units that are under way or waiting, for each that can run at once.
_QUEUED = 4
#: What Ray says where a worker lacks a package.
_NO_IMPORT = "failed to import on the worker"

_QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_DEDUP_LOGS": "0",
}


@contextmanager
def cluster(address: str, *, tell: Tell = silent) -> Iterator[None]:
    """Connect to a cluster; leave it, or end it if it was begun here, at the end.

    Args:
        address: ``ray``: the cluster that ``RAY_ADDRESS`` names, else one on this machine, for
            as long as this process needs it. ``ray://HOST:PORT`` or ``HOST:PORT``: that one.
        tell: Gets a line where a cluster is begun a second time.

    Raises:
        ClusterError: Ray is not installed, or there is no such cluster.
    """
    ray = _import_ray()
    known = os.environ.get("RAY_ADDRESS") if address == "ray" else address
    where = {"address": known} if known else _own_cluster()
    problem = (known and _unreached(known)) or _connect(ray, where)
    if problem is not None and not known:
        # Ray gives a node 30 seconds to start, which on a busy machine are not enough.
        tell(f"Ray did not start: {first_line(problem)}. It is tried once more.")
        problem = _connect(ray, where)
    if problem is not None:
        remedy = (
            "Give 'ray' for one on this machine, or the ray://HOST:PORT of one that runs. Where "
            "`ray start` says that it asks for a token, set RAY_AUTH_MODE=token here too."
            if known
            else "It was tried twice: run the command when the machine is less busy, or give the "
            "ray://HOST:PORT of a cluster that runs."
        )
        raise ClusterError(
            f"{option('cluster', address)}: {first_line(problem)}. {remedy}"
        ) from problem
    try:
        yield
    finally:
        ray.shutdown()


def _unreached(address: str) -> Exception | None:
    """What is wrong with an address where nothing answers; Ray would try for many minutes."""
    at = urlsplit(address if "://" in address else f"//{address}")
    try:
        if at.hostname is not None and at.port is not None:
            socket.create_connection((at.hostname, at.port), _REACH_SECONDS).close()
    except (OSError, ValueError) as error:
        return error
    return None


def _connect(ray: Any, where: Mapping[str, Any]) -> Exception | None:
    """What Ray says where the cluster cannot be had."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a connection that timed out, which it raises too
            ray.init(**where, log_to_driver=False, logging_level="ERROR")
    except Exception as error:
        ray.shutdown()
        return error
    return None


def _own_cluster() -> dict[str, Any]:
    return {"address": "local", "include_dashboard": False, "_node_ip_address": "127.0.0.1"}


def run_units(
    function: Callable[[_Unit], _Result],
    units: Iterable[_Unit],
    *,
    device: str = "cpu",
    cpus: float = 1,
) -> Generator[_Result, None, None]:
    """Run a function on every unit, on the cluster that is connected.

    Units that were sent and are not finished when this ends early end with the connection: Ray
    ends the workers of whoever leaves. They are not cancelled, because Ray aborts the process
    that cancels a unit at the moment in which its result comes in ("Tried to complete task that
    was not pending", up to Ray 2.60 at least).

    Args:
        function: Of a module, so that workers can import it.
        units: Are sent a few at a time.
        device: Where a unit's arithmetic runs; other than the CPU, it has a GPU of its own.
        cpus: Of one unit; also how many threads its libraries use.

    Yields:
        The results, in the order of the units.

    Raises:
        MofqError: The first that a unit raises.
        ClusterError: A unit's workers died again and again, nothing can run it, or a worker has
            no mofq or another one.
    """
    ray = _import_ray()
    waiting = _QUEUED * count_workers(device, cpus=cpus)
    run = _remote(ray, device, cpus)
    left = iter(units)
    sent = deque(run.remote(function, _this_mofq(), unit) for unit in islice(left, waiting))
    while sent:
        result = _get(ray, sent[0])
        sent.popleft()
        sent.extend(run.remote(function, _this_mofq(), unit) for unit in islice(left, 1))
        yield result


def _this_mofq() -> str:
    return f"mofq {__version__} with numerics {NUMERICS}"


def _run_on_worker(function: Callable[[_Unit], _Result], sender: str, unit: _Unit) -> _Result:
    """Run a function where its numbers are those that the sender would get."""
    if sender != _this_mofq():
        raise ClusterError(
            f"a worker ({platform.node()}) has {_this_mofq()}, and this run is of {sender}. "
            f"Install the same version on every machine of the cluster."
        )
    return function(unit)


def count_workers(device: str, *, cpus: float) -> int:
    """How many units run at once on the cluster that is connected.

    Raises:
        ClusterError: None does.
    """
    found = _import_ray().cluster_resources()
    workers = _workers(found, device, cpus)
    if workers < 1:
        raise ClusterError(
            f"a unit needs {cpus:g} CPUs and {_gpus(device)} GPUs, and the cluster has "
            f"{found.get('CPU', 0):g} and {found.get('GPU', 0):g}. Ask for less, or start a worker "
            f"that has them."
        )
    return workers


def ask_machines(
    function: Callable[[str], _Result], device: str, *, cpus: float
) -> list[tuple[_Result, int]]:
    """Run a function of a device once on each machine of the cluster that takes units.

    Returns:
        Of each, the result, and how many units run there at once.

    Raises:
        MofqError: As `run_units`.
    """
    ray = _import_ray()
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    run = _remote(ray, device, cpus)
    asked = []
    for node in ray.nodes():
        workers = _workers(node["Resources"], device, cpus) if node["Alive"] else 0
        if workers:
            there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            options = run.options(scheduling_strategy=there)
            asked.append((options.remote(function, _this_mofq(), device), workers))
    return [(_get(ray, result), workers) for result, workers in asked]


def _remote(ray: Any, device: str, cpus: float) -> Any:
    options = {"num_cpus": cpus, "num_gpus": _gpus(device), "max_retries": MAX_RETRIES}
    return ray.remote(**options)(_run_on_worker)


def _gpus(device: str) -> int:
    """Of one unit."""
    return 0 if device == "cpu" else 1


def _workers(resources: Mapping[str, float], device: str, cpus: float) -> int:
    """How many units these resources are enough for."""
    asked = (("CPU", cpus), ("GPU", _gpus(device)))
    return int(min(resources.get(name, 0) // need for name, need in asked if need))


def _get(ray: Any, reference: Any) -> Any:
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, MofqError):
            raise error.cause from None
        if _NO_IMPORT in str(error):
            raise ClusterError(
                f"a worker cannot import what it is to run: {str(error).strip().splitlines()[-1]}. "
                f"Install {_this_mofq()} on every machine of the cluster."
            ) from error
        raise
    except (ConnectionError, ray.exceptions.LocalRayletDiedError) as error:
        raise ClusterError(
            f"the cluster went away: {first_line(error)}. What is finished is kept; run the same "
            f"command again, without {option('cluster')} or on one that runs."
        ) from error
    except ray.exceptions.RayError as error:
        raise ClusterError(
            f"a unit was begun {MAX_RETRIES + 1} times and its worker died each time: "
            f"{first_line(error)}. What is finished is kept; look at the memory of the workers, "
            f"and run the same command again."
        ) from error


def _import_ray() -> Any:
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    try:
        import ray
    except ImportError as error:
        raise ClusterError(
            f"{option('cluster')} needs Ray, which is not installed. {how_to_install('ray')}"
        ) from error
    return ray
