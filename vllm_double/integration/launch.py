"""What the output rank of a target starts: transport, draft worker, retrieval sources, proposer, control socket."""

import logging
import os
import time
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.model_executor.model_loader.utils import get_draft_load_config

from vllm_double.config import DoubleConfig
from vllm_double.draft.engine.config import EngineConfig
from vllm_double.draft.forward_budget import MAX_NODES
from vllm_double.hosting.process_care import children, end_with
from vllm_double.hosting.settings import DraftSettings
from vllm_double.hosting.supervisor import DraftSupervisor
from vllm_double.operations.circuit_breaker import CircuitBreaker
from vllm_double.operations.control_socket import Address, Endpoint
from vllm_double.operations.metrics import snapshot
from vllm_double.retrieval import known_noise
from vllm_double.retrieval.base import index_figures
from vllm_double.retrieval.sources import Sources
from vllm_double.target.guarded_proposer import GuardedProposer
from vllm_double.target.indexer import Indexer
from vllm_double.target.proposer import Proposer
from vllm_double.transport.shared import SharedTargetChannel

__all__ = ["Launch", "draft_settings"]

_STALE_HEARTBEAT_S = 2.0
_NAP_S = 50e-6  # between two looks for what the target waits for


class Launch:
    """Everything that lives as long as the target's worker process."""

    def __init__(self, vllm_config: VllmConfig) -> None:
        # Our modules log under their own names; the server's log has vLLM's handlers.
        ours, theirs = logging.getLogger("vllm_double"), logging.getLogger("vllm")
        ours.handlers, ours.propagate = theirs.handlers, False
        ours.setLevel(theirs.level)
        config = vllm_config.speculative_config
        double: DoubleConfig = config.double
        self._channel: SharedTargetChannel | None = None
        self._supervisor: DraftSupervisor | None = None
        self._settings: DraftSettings | None = None
        self._beat = (0, 0.0)
        processes = end_with(config.launcher)
        if config.draft:
            self._channel = SharedTargetChannel()
            # The engine core's children are its ranks, and vLLM starts all of them before any loads its model.
            ranks = children(processes[1]) if len(processes) > 2 else []
            self._settings = draft_settings(vllm_config, sorted({*processes, *ranks}))
            if vllm_config.device_config.device_type == "cpu":
                self.start_draft()
        sources = Sources.of(double, config.datastores)
        retrievers = sources.open() if double.target_retrieval else []
        known_noise.warm_up()
        vocab_size = vllm_config.model_config.get_vocab_size()
        proposer = Proposer(
            config.num_speculative_tokens, self._channel, retrievers, time.perf_counter, vocab_size, double.wait_for_draft,
            sources.open_again,
        )  # fmt: skip
        self.proposer = GuardedProposer(proposer, CircuitBreaker(time.monotonic), _nap)
        self._indexer = Indexer(self.proposer.index, self.proposer.turnstile)
        # Not its rank: engines of a dense model count themselves as the only one.
        engine = vllm_config.parallel_config.data_parallel_index
        self._generation = max(len(processes) - 1, 0)  # how far this process is below the launcher
        self._endpoint = Endpoint(Address(config.metrics_key, engine), self._answer)

    def start_draft(self) -> None:
        """Start the draft worker, if the settings name a draft model and none has been started.

        On GPUs the target has taken its memory before: it measures how much is free, and a draft model that is being loaded
        would disturb that.
        """
        if self._settings is not None and self._channel is not None and self._supervisor is None:
            self._supervisor = DraftSupervisor(self._settings, self._channel.address)

    def _answer(self, command: dict[str, Any], who: str) -> dict[str, Any]:
        """The state after the command {"enabled": bool, "why": str}, if there is one."""
        if command:
            self.proposer.switch(command["enabled"], who, command["why"])
        state = {"paused_why": self.proposer.breaker.why, "calibration": self.proposer.calibration.table()}
        return self._snapshot() | state | {"generation": self._generation}

    def _snapshot(self) -> dict[str, Any]:
        supervisor = self._supervisor
        return snapshot(
            self.proposer.counters,
            self.proposer.step_cost.estimate(),
            worker_up=self._worker_answers(),
            worker_restarts=supervisor.restarts if supervisor is not None else 0,
            draft_failed=supervisor is not None and supervisor.state == "failed",
            draft_useless=self.proposer.draft_health.is_useless,
            enabled=self.proposer.enabled,
            paused_s=self.proposer.breaker.paused_s,
            **index_figures(self.proposer.lookups.sources),
        )

    def _worker_answers(self) -> bool:
        """Whether a draft worker is attached and its heartbeat advances. A stopped process stays attached."""
        if self._channel is None or self._channel.session == 0:
            return False
        now, beat = time.monotonic(), self._channel.heartbeat
        if beat != self._beat[0]:
            self._beat = (beat, now)
        return now - self._beat[1] < _STALE_HEARTBEAT_S


def _nap() -> None:
    time.sleep(_NAP_S)


def draft_settings(vllm_config: VllmConfig, engine_pids: list[int]) -> DraftSettings:
    """The draft worker's settings, from the user's keys and the target's configuration."""
    config = vllm_config.speculative_config
    double: DoubleConfig = config.double
    draft: dict[str, Any] = config.draft
    target = vllm_config.model_config
    device = double.draft_device
    if device == "auto":
        device = vllm_config.device_config.device_type
    visible: str | None = None
    num_ranks: int = draft["draft_tensor_parallel_size"]
    # With data parallelism: which of this machine's engines this is.
    engine = (vllm_config.parallel_config.data_parallel_rank_local or 0) % config.num_engines
    if device.startswith("cuda"):
        _, _, index = device.partition(":")
        first = int(index) + engine * num_ranks if index else torch.cuda.current_device()  # the target's own
        visible, device = ",".join(map(_physical_device, range(first, first + num_ranks))), "cuda:0"
    cores = config.cores.of_engine(engine, config.num_engines) if config.cores is not None else None
    # Every running request may have a row, and some more than one.
    max_num_seqs = vllm_config.scheduler_config.max_num_seqs + (double.nodes_per_iteration or MAX_NODES)
    folder = Path(draft["model"]).expanduser()
    engine_config = EngineConfig(
        model=str(folder.absolute()) if folder.is_dir() else draft["model"],  # the actor may work elsewhere
        revision=draft.get("revision"),
        quantization=draft.get("quantization"),
        code_revision=draft.get("code_revision"),
        dtype=double.draft_dtype,
        max_model_len=draft.get("max_model_len"),
        longest_text=target.max_model_len,
        vocab_size=target.get_vocab_size(),
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max(2048, double.prefill_tokens + max_num_seqs),
        device=device,
        num_threads=len(cores.draft) // num_ranks if cores is not None else 1,
        page_size=double.draft_page_size,
        kv_cache_bytes=int(double.draft_kv_cache_gib * 2**30),
        trust_remote_code=target.trust_remote_code,
        loading=_loading(vllm_config),
        seed=target.seed,
        num_children=double.children_per_node,
        enforce_eager=draft["enforce_eager"],
    )
    return DraftSettings(
        double=double,
        engine=engine_config,
        num_speculative_tokens=config.num_speculative_tokens,
        datastores=config.datastores,
        prefix_caching=vllm_config.cache_config.enable_prefix_caching,
        draft_cores=cores.draft if cores is not None else None,
        target_cores=cores.bind if cores is not None else "",
        visible_devices=visible,
        num_ranks=num_ranks,
        engine_pids=tuple(engine_pids),
    )


def _loading(vllm_config: VllmConfig) -> dict[str, Any]:
    """EngineConfig.loading: as the target's, but for what "draft_load_config" says."""
    config, target = get_draft_load_config(vllm_config), vllm_config.model_config
    values = {entry.name: getattr(config, entry.name) for entry in fields(config) if entry.name != "device"}
    if values["download_dir"] is not None:
        values["download_dir"] = str(Path(values["download_dir"]).expanduser().absolute())  # the actor may work elsewhere
    return values | {"config_format": target.config_format, "hf_token": target.hf_token}


def _physical_device(index: int) -> str:
    """What CUDA_VISIBLE_DEVICES calls the device that this process counts as ``index``."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible.split(",")[index].strip() if visible else str(index)
