"""The fake engine leaves what the kernels leave of the tokens that a target draws from."""

import numpy as np
import torch
from double_kernels.support import Support, logit_floors
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from tests.fakes.engine import is_kept
from vllm_double.draft.engine.base import Row

VOCAB = 12
# Coarse ones, so that some are equal.
LOGITS = st.integers(-8, 8).map(lambda value: value / 4) | st.floats(-5, 5, width=16)


@settings(max_examples=150, deadline=None)
@given(
    arrays.arrays(np.float32, VOCAB, elements=LOGITS),
    st.integers(0, VOCAB + 2),
    st.just(1.0) | st.floats(0.03125, 1, width=32),
    st.just(0.0) | st.floats(0, 1, width=32),
)
def test_tokens_are_kept_as_the_kernels_keep_them(logits: np.ndarray, top_k: int, top_p: float, min_p: float) -> None:
    probs = np.exp(logits.astype(np.float64))
    probs /= probs.sum()
    by_prob = sorted(range(VOCAB), key=lambda token: (-probs[token], token))
    assume(np.abs(probs - min_p * probs.max()).min() > 1e-5)  # where roundings decide anything may be right
    if top_p < 1:
        kept = [token for token in by_prob if probs[token] >= min_p * probs.max()]
        kept = [token for token in kept if not top_k or probs[token] >= probs[by_prob[min(top_k, VOCAB) - 1]]]
        sums = np.cumsum(probs[kept])
        assume(np.abs(sums - top_p * sums[-1]).min() > 1e-5)
    row = Row((), 0, (), 0, 1.0, top_k=top_k, top_p=top_p, min_p=min_p)
    support = Support(torch.tensor([top_k]), torch.tensor([top_p]), torch.tensor([min_p]))
    ordered = torch.from_numpy(logits[by_prob])[None]
    (floor,) = logit_floors(ordered, torch.from_numpy(probs[by_prob].astype(np.float32))[None], VOCAB, support).tolist()
    assert is_kept(probs, row).tolist() == (logits >= floor).tolist()
