"""The draft worker as a Ray actor, and the Ray that it lives in. The only module that imports Ray.

Ray gives placement, start-up, health and restart. Per-step traffic goes through the transport, never through here.
"""

from __future__ import annotations

import importlib
import inspect
import logging
import math
import os
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from vllm_double.hosting import process_care
from vllm_double.hosting.cores import bind_all_threads
from vllm_double.hosting.process_care import ProcessWatch, children, unlink_shared_memory
from vllm_double.hosting.settings import DraftSettings

__all__ = ["BuildError", "Cluster", "ClusterLostError", "DraftActor", "UnreachableError"]

_NAMESPACE = "vllm-double"
_OBJECT_STORE_BYTES = 75 << 20  # Ray's minimum; nothing of ours goes through it.
_LOOK_EVERY_S = 0.25
_PING_EVERY_S = 10.0
_PING_TIMEOUT_S = 60.0
# Of the server's environment: what vLLM's own Ray executor passes on, and how models are found and reached.
_PASSED_ON = (
    "HF_", "HUGGING_FACE_", "NCCL_", "TRANSFORMERS_", "VLLM_", "MODELSCOPE_", "RUNAI_", "AWS_", "GOOGLE_", "AZURE_",
    "XDG_CACHE_HOME", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "ALL_PROXY", "SSL_CERT_", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE",
)  # fmt: skip
# Errors of a build that another one will have, too.
_FINAL = (
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    NotImplementedError,
    ImportError,
    AssertionError,
    FileNotFoundError,
)
_PASSING = ("Memory", "Connect", "Timeout", "HTTP")  # in the name of an error that may be another one's, or nobody's, tomorrow


class UnreachableError(Exception):
    """The Ray cluster at ``ray_address`` does not take us; the message is one sentence."""


class ClusterLostError(Exception):
    """The Ray under the actor is gone; only a new one helps."""


class BuildError(Exception):
    """The draft worker cannot be built. is_final: nor will it be; None: unknown."""

    def __init__(self, reason: str, is_final: bool | None) -> None:
        super().__init__(reason, is_final)
        self.is_final = is_final

    def __str__(self) -> str:
        return str(self.args[0])

    @classmethod
    def of(cls, error: Exception) -> BuildError:
        name = type(error).__name__
        entries: Any = getattr(error, "errors", None)  # pydantic's
        text = str(entries()[0]["msg"]).removeprefix("Value error, ") if callable(entries) else str(error)
        reason = " ".join(text.split()).rstrip(".")
        if not reason or not isinstance(error, ValueError):
            reason = f"{name}: {reason}"
        if any(word in name for word in _PASSING):
            return cls(reason, is_final=False)
        return cls(reason, is_final=True if isinstance(error, _FINAL) else None)


@ray.remote(num_gpus=0, max_restarts=0, max_task_retries=0, concurrency_groups={"loop": 1, "control": 1})
class DraftActor:
    """Runs one draft worker. ``run`` blocks in a concurrency group of its own, so that ``ping`` is always answered."""

    def __init__(
        self, settings_json: str, address: str, target_pid: int, runtime_dir: str, log_path: str, rank: int, meeting: str,
        host_directory: str, host_environment: dict[str, str],
    ) -> None:  # fmt: skip
        # Ray puts these first. Folders there may be called vllm or torch, and ours holds modules with names as plain.
        for folder in (host_directory, str(Path(__file__).parent)):
            if folder in sys.path[:2]:
                sys.path.remove(folder)
        self._settings = DraftSettings.from_json(settings_json)
        self._address = address
        self._rank = rank
        self._meeting = meeting
        self._cores = self._settings.cores_of(rank)
        self._target = ProcessWatch(target_pid)
        self._state = "building"
        self._last_turn = math.inf
        _join_log(log_path)
        # A cluster's workers have its raylet's environment, not our host's.
        os.environ.update(host_environment)
        devices = self._settings.devices_of(rank)
        if devices is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = devices
        if self._settings.num_ranks > 1 and os.access(runtime_dir, os.W_OK):
            os.environ["VLLM_RPC_BASE_PATH"] = runtime_dir  # vLLM's ranks leave sockets there
        if self._cores is not None:
            bind_all_threads(self._cores)  # those that Ray has started, too
            os.environ["OMP_NUM_THREADS"] = str(len(self._cores))

    @ray.method(concurrency_group="control")
    def ping(self) -> str:
        """The state: "building", "up", "ended", or "still": the loop has not turned for long."""
        is_still = self._state == "up" and time.monotonic() - self._last_turn > process_care.LONGEST_TURN_S
        return "still" if is_still else self._state

    @ray.method(concurrency_group="control")
    def info(self) -> dict[str, Any]:
        """Where the actor runs: pid, cores, Ray's node, state."""
        return {
            "pid": os.getpid(),
            "cores": sorted(os.sched_getaffinity(0)),
            "node": ray.get_runtime_context().get_node_id(),
            "state": self._state,
        }

    @ray.method(concurrency_group="loop")
    def run(self) -> str:
        """Builds the worker and drafts until the target has ended or the worker returns; the result tells which."""
        try:
            try:
                worker = self._build()
            except Exception as error:
                raise BuildError.of(error) from error
            unlink_shared_memory()
            self._last_turn = time.monotonic()
            self._state = "up"
            worker.run(self._should_stop)
        finally:
            self._state = "ended"
        return "the worker returned" if self._target.alive() else "the target is gone"

    def _should_stop(self) -> bool:
        self._last_turn = time.monotonic()
        return not self._target.alive()

    def _build(self) -> Any:
        module, _, name = self._settings.factory.partition(":")
        build = getattr(importlib.import_module(module), name)
        if self._cores is not None and (torch := sys.modules.get("torch")) is not None:
            # In this thread: OpenMP keeps the number of threads per thread.
            torch.set_num_threads(len(self._cores))
        return build(self._settings, self._address, self._rank, self._meeting)


class Cluster:
    """The driver's side: an embedded Ray, or a connection to one that is there."""

    def __init__(self, settings: DraftSettings, node: dict[str, Any], daemons: list[ProcessWatch]) -> None:
        """node: of this machine, as Ray describes it ("node_id", "node_ip_address")."""
        self._settings = settings
        self._node = node
        self._daemons = daemons
        self._num_starts = 0

    @classmethod
    def connect(cls, settings: DraftSettings, runtime_dir: str) -> Cluster:
        """Raises UnreachableError, or ValueError for settings that Ray refuses."""
        context = _join(settings.double.ray_address) if settings.double.ray_address else _embed(settings, runtime_dir)
        # The gcs server and the raylet: Ray's driver may take minutes to notice that one is gone.
        daemons = [ProcessWatch(pid) for pid in children(os.getpid())] if settings.double.ray_address is None else []
        return cls(settings, context.address_info, daemons)

    def run_actor(self, address: str, target_pid: int, runtime_dir: str, on_state: Callable[[str, int], None]) -> str:
        """Starts the draft's actor, one for each of its ranks, and stays with them until the first ends; returns why it ended.
        The others are ended then, too. Raises ClusterLostError, and BuildError if the worker cannot be built.
        """
        settings = self._settings
        self._num_starts += 1
        meeting = str(Path(runtime_dir, f"ranks-{self._num_starts}"))
        log_path = f"/proc/{os.getpid()}/fd/1"
        environment = {name: value for name, value in os.environ.items() if name.startswith(_PASSED_ON)}
        actor_class: Any = DraftActor
        group, handles = None, []
        try:
            strategies: list[Any] = [NodeAffinitySchedulingStrategy(self._node["node_id"], soft=False)]
            if settings.num_ranks > 1:
                here = {"CPU": settings.double.ray_num_cpus, f"node:{self._node['node_ip_address']}": 0.001}
                group = placement_group([here] * settings.num_ranks, strategy="STRICT_PACK")
                if not group.wait(settings.start_timeout_s):
                    raise GetTimeoutError
                strategies = [PlacementGroupSchedulingStrategy(group, rank) for rank in range(settings.num_ranks)]
            handles = [
                actor_class.options(num_cpus=settings.double.ray_num_cpus, scheduling_strategy=strategy).remote(
                    settings.to_json(), address, target_pid, runtime_dir, log_path, rank, meeting, str(Path.cwd()), environment
                )
                for rank, strategy in enumerate(strategies)
            ]
            leader, *_ = [self._await(handle.info.remote(), settings.start_timeout_s) for handle in handles]
            return self._stay(handles, leader["pid"], on_state)
        except GetTimeoutError:
            return "it does not answer"
        except RayTaskError as error:
            cause = error.cause
            if isinstance(cause, BuildError):
                raise cause from error
            return f"{type(cause).__name__}: {cause}".rstrip(".") if cause is not None else str(error)
        except RayActorError as error:
            return _first_sentence(error)
        except RayError as error:
            raise ClusterLostError(f"Ray is lost: {_first_sentence(error)}.") from error
        finally:
            if all(daemon.alive() for daemon in self._daemons):
                for handle in handles:
                    ray.kill(handle)
                if group is not None:
                    remove_placement_group(group)

    def close(self) -> None:
        """Gives back what is held in somebody else's cluster; an embedded Ray is killed with the host's session."""
        if self._settings.double.ray_address is not None:
            ray.shutdown()

    def _stay(self, handles: list[Any], pid: int, on_state: Callable[[str, int], None]) -> str:
        runs = [handle.run.remote() for handle in handles]
        state = ""
        next_ping = 0.0
        while not (ended := ray.wait(runs, timeout=_LOOK_EVERY_S)[0]):
            self._check_daemons()
            if time.monotonic() >= next_ping:
                # The first is up when all others are.
                seen, *_ = [self._await(handle.ping.remote(), _PING_TIMEOUT_S) for handle in handles]
                if seen == "still" == state:  # twice: a machine that was suspended goes on
                    return f"its loop has stood still for {process_care.LONGEST_TURN_S:.0f} s"
                if seen != state:
                    state = seen
                    on_state(state, pid)
                if state == "up":
                    next_ping = time.monotonic() + _PING_EVERY_S
        return str(ray.get(ended[0]))

    def _await(self, reference: Any, timeout_s: float) -> Any:
        deadline = time.monotonic() + timeout_s
        while not ray.wait([reference], timeout=_LOOK_EVERY_S)[0]:
            self._check_daemons()
            if time.monotonic() > deadline:
                raise GetTimeoutError
        return ray.get(reference)

    def _check_daemons(self) -> None:
        if not all(daemon.alive() for daemon in self._daemons):
            raise ClusterLostError("One of Ray's daemons is gone; Ray is started again.")


def _embed(settings: DraftSettings, runtime_dir: str) -> Any:
    _leave_out_unused_daemons()
    return ray.init(
        num_cpus=max(1, math.ceil(settings.double.ray_num_cpus * settings.num_ranks)),
        num_gpus=0,
        include_dashboard=False,
        object_store_memory=_OBJECT_STORE_BYTES,
        log_to_driver=False,
        logging_level=logging.WARNING,
        namespace=_NAMESPACE,
        _node_ip_address="127.0.0.1",
        # Not the folder itself: Ray opens its own to everybody.
        _temp_dir=str(Path(runtime_dir, "ray")),
    )


def _join(address: str) -> Any:
    host, _, port = address.rpartition(":")
    try:
        # Ray itself tries for long and then aborts the process.
        socket.create_connection((host, int(port)), timeout=5).close()
        return ray.init(address=address, log_to_driver=False, logging_level=logging.WARNING, namespace=_NAMESPACE)
    except (OSError, ValueError, RuntimeError, RayError) as error:
        raise UnreachableError(f"The Ray cluster at {address} cannot be used: {_first_sentence(error)}.") from error


def _leave_out_unused_daemons() -> None:
    """Starts Ray without dashboard, autoscaler and log monitor, for which it has no public setting.

    They are of no use to one actor and cost 270 MB, half of the start-up time and 1 % of a core. Where Ray's internals look
    different from what this expects, Ray is left as it is.
    """
    from ray._private import parameter, services

    plain: type[Any] = parameter.RayParams
    wanted = {"include_log_monitor": False, "no_monitor": True}
    if not wanted.keys() <= inspect.signature(plain).parameters.keys() or not hasattr(services, "start_api_server"):
        return

    class LeanParams(plain):
        def __init__(self, *args: Any, **values: Any) -> None:
            super().__init__(*args, **{**values, **wanted})

    parameter.RayParams = LeanParams
    services.start_api_server = lambda *args, **values: (None, None)


def _join_log(path: str) -> None:
    """Sends what this process prints to the host's output, and so to the server's log, instead of Ray's files."""
    try:
        log = os.open(path, os.O_WRONLY | os.O_APPEND)
    except OSError:
        return  # A cluster of another user: the output stays in Ray's own logs.
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)


def _first_sentence(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__).split(". ")[0].rstrip(".")
