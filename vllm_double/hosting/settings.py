"""The one record of settings on the draft's side: the target's worker writes it; host, actor and draft worker read it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any

from vllm_double.config import DoubleConfig
from vllm_double.draft.engine.config import EngineConfig

__all__ = ["DraftSettings"]


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftSettings:
    """Crosses the process boundaries as JSON."""

    double: DoubleConfig = field(default_factory=DoubleConfig)
    """What the user set."""
    engine: EngineConfig | None = None
    """The draft model and its device. Rank, number of ranks and rendezvous are filled in when a rank starts."""
    num_speculative_tokens: int = 16
    datastores: tuple[tuple[str, str], ...] = ()
    """Files, each with the fingerprint of its tokenizer: see Sources."""
    prefix_caching: bool = True
    """Whether prompts share pages. As the target's: the time of an answer would show what other requests asked."""
    draft_cores: tuple[int, ...] | None = None
    """Cores of everything of ours outside the target; None leaves the inherited binding alone."""
    target_cores: str = ""
    """For the log only."""
    visible_devices: str | None = None
    """The draft's CUDA_VISIBLE_DEVICES, one for each of several ranks; None keeps the target's."""
    num_ranks: int = 1
    """Devices that share the draft model, or equal parts of ``draft_cores``; an actor to each."""
    engine_pids: tuple[int, ...] = ()
    """Processes of the target's engine; what they leave in shared memory is removed when they have ended."""
    factory: str = "vllm_double.draft.build:build"
    """``module:function`` that the actor calls: (settings, address, rank, meeting) to an object with ``run(should_stop)``."""
    start_timeout_s: float = 120.0
    """An actor that has not answered after so many seconds is given up."""

    def cores_of(self, rank: int) -> tuple[int, ...] | None:
        """The rank's part of ``draft_cores``."""
        if self.draft_cores is None:
            return None
        each = len(self.draft_cores) // self.num_ranks
        return self.draft_cores[rank * each : (rank + 1) * each]

    def devices_of(self, rank: int) -> str | None:
        """The rank's CUDA_VISIBLE_DEVICES."""
        if not self.visible_devices or self.num_ranks == 1:
            return self.visible_devices
        return self.visible_devices.split(",")[rank]

    def to_json(self) -> str:
        return json.dumps({**asdict(self), "double": self.double.model_dump()})

    @classmethod
    def from_json(cls, text: str) -> DraftSettings:
        values: dict[str, Any] = json.loads(text)
        values["double"] = DoubleConfig.model_validate(values["double"])
        if values["engine"] is not None:
            values["engine"] = EngineConfig(**values["engine"])
        if values["draft_cores"] is not None:
            values["draft_cores"] = tuple(values["draft_cores"])
        values["engine_pids"] = tuple(values["engine_pids"])
        values["datastores"] = tuple((path, tokenizer) for path, tokenizer in values["datastores"])
        return cls(**values)
