"""Initial weights that already copy: a previous-token head and induction heads, put in by hand.

A model of this size needs most of a short training run to find induction heads by itself.  Here layer 0
starts with one head that looks at the previous position, and layer 1 with heads that look for "what
came before here is the token I am at" and copy what stands there.  Training starts from
this, and changes all of it freely.

The hidden state is divided, at the start, into ``content`` dimensions (the token), ``size`` = head_dim
dimensions that hold a projection of the previous token, and a last one that is constant.
"""

from __future__ import annotations

import torch
from model import THETA, Attention, Layer, Llama

SPREAD = 0.04  # standard deviation of the embeddings' content dimensions
PEAK = 3.5  # nats by which the previous position beats its neighbours
MATCH = 18.0  # nats by which the matching position beats an average one
COPY = 4.0  # weight of a copied token against the current one, in the hidden state


@torch.no_grad()
def install(model: Llama) -> None:
    """Sets the initial weights of ``model`` (two layers or more); its other outputs start at zero."""
    hidden, heads = model.shape.hidden, model.shape.heads
    size = hidden // heads
    half, content, constant = size // 2, hidden - size - 1, (size + 1) ** 0.5
    layers = [layer for layer in model.model.layers if isinstance(layer, Layer)]
    for layer in layers:
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()

    # With these sizes the root mean square of a row is SPREAD, so normed contents have variance 1.
    embedding = model.model.embed_tokens.weight
    embedding.zero_()
    embedding[:, :content].normal_(std=SPREAD)
    embedding[:, -1] = SPREAD * constant

    angles = THETA ** -(torch.arange(half, dtype=torch.float32) / half)  # radians per position
    fast = (angles > 0.1).nonzero().flatten()
    slow = (angles < 0.0025).nonzero().flatten()
    projection = torch.linalg.qr(torch.randn(content, size))[0].T  # [size, content], orthonormal rows

    first: Attention = layers[0].self_attn
    rows = slice(0, size)
    for weight in (first.q_proj.weight, first.k_proj.weight, first.v_proj.weight):
        weight[rows] = 0
    deficit = float((1 - angles[fast].cos()).sum())
    strength = (PEAK * size**0.5 / deficit) ** 0.5 / constant
    first.q_proj.weight[fast, -1] = strength * angles[fast].cos()
    first.q_proj.weight[fast + half, -1] = -strength * angles[fast].sin()
    first.k_proj.weight[fast, -1] = strength
    first.v_proj.weight[rows, :content] = projection
    first.o_proj.weight[content:-1, rows] = SPREAD * torch.eye(size)

    second: Attention = layers[1].self_attn
    used = torch.cat([slow, slow + half])
    factor = 1 + size / hidden  # variance of the hidden state after layer 0, over that before
    strength = (MATCH * factor * size**0.5 / len(used)) ** 0.5
    for head in range(heads - 1):
        rows = slice(head * size, (head + 1) * size)
        for weight in (second.q_proj.weight, second.k_proj.weight, second.v_proj.weight):
            weight[rows] = 0
        parts = (torch.arange(len(used)) + head * len(used)) % size
        second.q_proj.weight[used + head * size, :content] = strength * projection[parts]
        second.k_proj.weight[used + head * size, content + parts] = strength
        for unit in range(min(size, content - head * size)):
            at = head * size + unit
            second.v_proj.weight[at, at] = 1
            second.o_proj.weight[at, at] = COPY * SPREAD
