"""The ancestor's forward pass and weights, written anew from its description (pretraining spec 4.2, 8.4 and 13)."""

import torch
from torch import Tensor

VOCAB = 300  # rows of the tables are padded to 320
# A context of 512 has short windows of 128, which a half or a third would not.
HEAD_SIZES = {"sequence_len": 512, "vocab_size": VOCAB, "n_layer": 5, "n_head": 4, "n_kv_head": 2, "n_embd": 48}
OLD_SIZES = {"sequence_len": 64, "vocab_size": VOCAB, "n_layer": 3, "n_head": 3, "n_kv_head": 3, "n_embd": 36}


def norm(x: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + torch.finfo(x.dtype).eps).sqrt()


def turned(x: Tensor, base: float) -> Tensor:
    """x: (T, H, D)"""
    half = x.size(-1) // 2
    rates = torch.tensor([base ** (-2 * i / x.size(-1)) for i in range(half)], dtype=x.dtype)
    angles = (torch.arange(x.size(0), dtype=x.dtype)[:, None] * rates)[:, None, :]
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * angles.cos() + b * angles.sin(), -a * angles.sin() + b * angles.cos()], -1)


def attend(
    w: dict[str, Tensor], sizes: dict[str, int], i: int, x: Tensor, v: Tensor, base: float, scale: float, left: int
):
    """One layer's attention, head by head and query by query. x: (T, C), v: (T, H_kv, D)"""
    heads, kv_heads = sizes["n_head"], sizes["n_kv_head"]
    q = scale * norm(turned((x @ w[f"transformer.h.{i}.attn.c_q.weight"].T).unflatten(-1, (heads, -1)), base))
    k = scale * norm(turned((x @ w[f"transformer.h.{i}.attn.c_k.weight"].T).unflatten(-1, (kv_heads, -1)), base))
    out = torch.zeros_like(q)
    for head in range(heads):
        kv = head // (heads // kv_heads)
        for t in range(x.size(0)):
            seen = slice(max(0, t - left), t + 1)
            weights = torch.softmax(k[seen, kv] @ q[t, head] / q.size(-1) ** 0.5, 0)
            out[t, head] = weights @ v[seen, kv]
    return out.flatten(1) @ w[f"transformer.h.{i}.attn.c_proj.weight"].T


def ancestor_logits(w: dict[str, Tensor], sizes: dict[str, int], pattern: str, ids: Tensor, is_head: bool) -> Tensor:
    """Logits (T, V) of the ids (T): of the last version, or of October 2025."""
    w = {name: tensor.double() for name, tensor in w.items()}
    layers, context = sizes["n_layer"], sizes["sequence_len"]
    x = norm(w["transformer.wte.weight"][ids])
    if is_head:
        gate = torch.sigmoid(x[1:, :24] @ w["smear_gate.weight"].T)
        x = torch.cat([x[:1], x[1:] + w["smear_lambda"] * gate * x[:-1]])
    x0 = x
    for i in range(layers):
        if is_head:
            x = w["resid_lambdas"][i] * x + w["x0_lambdas"][i] * x0
        h = norm(x)
        v = (h @ w[f"transformer.h.{i}.attn.c_v.weight"].T).unflatten(-1, (sizes["n_kv_head"], -1))
        if is_head and i % 2 == (layers - 1) % 2:
            gate = 3 * torch.sigmoid(h[:, :12] @ w[f"transformer.h.{i}.attn.ve_gate.weight"].T)
            v = v + gate[..., None] * w[f"value_embeds.{i}.weight"][ids].unflatten(-1, (sizes["n_kv_head"], -1))
        short = -(-context // 4 // 128) * 128
        left = short if pattern[i % len(pattern)] == "S" and i < layers - 1 else context
        x = x + attend(w, sizes, i, h, v, 1e5 if is_head else 1e4, 1.2 if is_head else 1.0, left)
        up = norm(x) @ w[f"transformer.h.{i}.mlp.c_fc.weight"].T
        x = x + up.clamp(min=0).square() @ w[f"transformer.h.{i}.mlp.c_proj.weight"].T
        if i == layers // 2:
            middle = x
    if is_head:
        x = x - w["backout_lambda"] * middle
    logits = (norm(x) @ w["lm_head.weight"].T)[:, : sizes["vocab_size"]]
    return 15 * torch.tanh(logits / 15)


def weights(sizes: dict[str, int], is_head: bool, seed: int = 0) -> dict[str, Tensor]:
    """Random weights in the ancestor's layout."""
    rng = torch.Generator().manual_seed(seed)
    layers, c = sizes["n_layer"], sizes["n_embd"]
    kv = c // sizes["n_head"] * sizes["n_kv_head"]
    rows = 320 if is_head else sizes["vocab_size"]

    def matrix(*shape: int, std: float = 0.0) -> Tensor:
        return torch.randn(*shape, generator=rng) * (std or shape[-1] ** -0.5)

    w = {"transformer.wte.weight": matrix(rows, c).bfloat16(), "lm_head.weight": matrix(rows, c, std=0.5)}
    for i in range(layers):
        for name, shape in (
            ("attn.c_q", (c, c)),
            ("attn.c_k", (kv, c)),
            ("attn.c_v", (kv, c)),
            ("attn.c_proj", (c, c)),
        ):
            w[f"transformer.h.{i}.{name}.weight"] = matrix(*shape)
        w[f"transformer.h.{i}.mlp.c_fc.weight"] = matrix(4 * c, c)
        w[f"transformer.h.{i}.mlp.c_proj.weight"] = matrix(c, 4 * c)
        if is_head and i % 2 == (layers - 1) % 2:
            w[f"value_embeds.{i}.weight"] = matrix(rows, kv, std=0.5).bfloat16()
            w[f"transformer.h.{i}.attn.ve_gate.weight"] = matrix(sizes["n_kv_head"], 12)
    if is_head:
        w |= {"resid_lambdas": 1 + matrix(layers, std=0.1), "x0_lambdas": matrix(layers, std=0.2)}
        w |= {"smear_gate.weight": matrix(1, 24), "smear_lambda": torch.tensor([0.4])}
        w |= {"backout_lambda": torch.tensor([0.3])}
    return w
