"""A worker extension through which a test looks into the worker's process."""

import sys
from typing import Any


class Probe:
    """Methods that vLLM gives to the worker's class. They note what the proposer is told."""

    model_runner: Any

    @property
    def _rank(self) -> Any:
        """What of ours the runner has, V1 or V2."""
        return getattr(self.model_runner, "drafter", None) or self.model_runner.speculator

    def probe_runner(self) -> str:
        """The module of the model runner."""
        return type(self.model_runner).__module__

    def probe_proposes(self) -> bool:
        """Whether this rank is the one that proposes."""
        return self._rank._proposer is not None

    def probe_launches(self) -> bool:
        """Whether this rank starts a draft."""
        return self._rank._launch is not None

    def probe_draft_always(self) -> None:
        """Draft though it should cost more than it gives, as it may beside a target so small, or an interpreted one."""
        from vllm_double.target import guarded_proposer, step_cost

        guarded_proposer._JUDGED_ROUNDS = sys.maxsize
        step_cost.StepCost.estimate = lambda self: (1.0, 1e-6)  # type: ignore[method-assign]

    def probe_start(self) -> None:
        proposer = self._rank._proposer
        self._probe_admitted: list[tuple[str | None, bool]] = []
        self._probe_forgot = 0
        admit, forget = proposer.admit, proposer.forget_history

        def noted_admit(request_id: str, tokens: Any, params: Any) -> None:
            self._probe_admitted.append((params.tenant, params.use_drafts))
            admit(request_id, tokens, params)

        def noted_forget() -> None:
            self._probe_forgot += 1
            forget()

        proposer.admit, proposer.forget_history = noted_admit, noted_forget

    def probe_admitted(self) -> list[tuple[str | None, bool]]:
        """(tenant, use_drafts) of the requests since the last call."""
        admitted, self._probe_admitted = self._probe_admitted, []
        return admitted

    def probe_forgot(self) -> int:
        """How often history was forgotten since the last call."""
        forgot, self._probe_forgot = self._probe_forgot, 0
        return forgot

    def probe_fail(self) -> None:
        """Have the next round end in an exception."""
        inner = self._rank._proposer._proposer
        propose = inner.propose

        def fail(*_: Any) -> None:
            inner.propose = propose
            raise RuntimeError("a test's")

        inner.propose = fail

    def probe_watch_steps(self) -> None:
        """Note of every step what the scheduler wants, what V2 makes of it on the device, and what is sampled."""
        self._probe_steps: list[dict[str, Any]] = []
        runner = self.model_runner
        execute, prepare = runner.execute_model, getattr(runner, "prepare_inputs", None)

        def noted(scheduled: Any, *args: Any, **kwargs: Any) -> Any:
            drafts = scheduled.scheduled_spec_decode_tokens
            step = {
                "tokens": dict(scheduled.num_scheduled_tokens),
                "drafts": {name: list(drafts.get(name, ())) for name in scheduled.num_scheduled_tokens},
            }
            self._probe_steps.append(step)
            output = execute(scheduled, *args, **kwargs)
            step["sampled"] = [list(map(int, tokens)) for tokens in output.sampled_token_ids] if output is not None else None
            return output

        def prepared(*args: Any, **kwargs: Any) -> Any:
            batch = prepare(*args, **kwargs)  # type: ignore[misc]
            drafts = batch.num_draft_tokens_per_req
            self._probe_steps[-1]["device"] = {
                "tokens": int(batch.num_tokens),
                "padded": int(batch.num_tokens_after_padding),
                "drafts": drafts.tolist() if drafts is not None else [0] * batch.num_reqs,
            }
            return batch

        runner.execute_model = noted
        if prepare is not None:
            runner.prepare_inputs = prepared

    def probe_steps(self) -> list[dict[str, Any]]:
        """Of each step since the last call: "tokens" and "drafts" by request, "sampled" by row, on V2 "device"."""
        steps, self._probe_steps = self._probe_steps, []
        return steps

    def probe_cut_the_first(self, cut: bool) -> None:
        """Have the controller find that drafts of a batch's first row never pay; or no more."""
        inner = self._rank._proposer._proposer
        known = self.__dict__.setdefault("_probe_commit", inner._commit)

        def commit(batch: Any) -> Any:
            now = known(batch)
            num = now.summary.num_live
            now.live.limits[:num][now.live.rows[:num] == 0] = 0
            return now

        inner._commit = commit if cut else known

    def probe_masks_of_int(self) -> None:
        """Triton's interpreter stores under masks of bool alone; vLLM's kernel for grammars has one of int32, of 0 and 1."""
        from triton._C.libtriton import interpreter

        store = interpreter.store
        interpreter.store = lambda pointers, values, mask: store(pointers, values, mask.astype(bool))

    def probe_filters_in_torch(self) -> None:
        """Triton's interpreter cannot run vLLM's kernel for top_k and top_p; vLLM has the same in torch's operators."""
        from vllm.v1.sample.ops import topk_topp_sampler
        from vllm.v1.worker.gpu.sample import sampler, states

        for module in (states, sampler):
            module.apply_top_k_top_p = topk_topp_sampler.apply_top_k_top_p_pytorch  # type: ignore[attr-defined]

    def probe_epoch(self) -> int:
        """Of the draft's prefix cache: that in which the last request was admitted, unless the weights changed since."""
        return int(self._rank._proposer._proposer.link._epoch)

    def probe_load_nothing(self) -> None:
        """As trainers do that bring their own worker extension: weights go straight into the model."""
        self.model_runner.model.load_weights(iter(()))
