"""Blocks over tokens as language models and recurrent networks have them."""

import math

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from tests.blocks._base import Shape, block
from tests.blocks._choices import Picker
from tests.networks import Net

RECURRENT = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn": nn.RNN}
CELLS = {"lstm": nn.LSTMCell, "gru": nn.GRUCell, "rnn": nn.RNNCell}


@block("tokens", lambda s: s[1] <= 16)
def recurrent(pick: Picker, s: Shape) -> nn.Module:
    kind, reads = pick.choice("cell", sorted(RECURRENT)), pick.choice("reads", ["sequence", "last", "states"])
    layers, both_ways = pick.integer("layers", 1, 3), pick.choice("bidirectional", [False, True])
    hidden, first = pick.integer("hidden", 3, 8), pick.choice("batch_first", [False, True])
    options = {"bias": pick.choice("bias", [True, False]), "bidirectional": both_ways, "batch_first": first}
    layer = RECURRENT[kind](s[2], hidden, layers, **options)
    out = hidden * (2 if both_ways else 1)

    def run(m: Net, x: Tensor) -> Tensor:
        y, state = m.layer(x if first else x.transpose(0, 1))
        y = y if first else y.transpose(0, 1)
        h = state[0] if isinstance(state, tuple) else state
        if reads == "last":
            last = torch.cat([h[-2], h[-1]], -1) if both_ways else h[-1]
            return x + m.out(last)[:, None]
        if reads == "states":
            return m.out(y) * h.mean(0)[:, None, :1].tanh()
        return x + m.out(y)

    return Net(run, layer=layer, out=nn.Linear(out, s[2]))


@block("tokens", lambda s: s[1] <= 16)
def recurrent_cell(pick: Picker, s: Shape) -> nn.Module:
    kind, hidden = pick.choice("cell", sorted(CELLS)), pick.integer("hidden", 3, 8)

    def run(m: Net, x: Tensor) -> Tensor:
        state, steps = None, []
        for step in x.unbind(1):
            state = m.cell(step, state)
            steps.append(state[0] if isinstance(state, tuple) else state)
        return m.out(torch.stack(steps, 1))

    return Net(run, cell=CELLS[kind](s[2], hidden), out=nn.Linear(hidden, s[2]))


@block("tokens")
def experts_of_their_own(pick: Picker, s: Shape) -> nn.Module:
    """Every expert sees every token, weighted by the router; each has an inner width of its own."""
    n, gated = pick.integer("experts", 2, 3), pick.choice("gated", [True, False])
    widths = [pick.integer(f"width{i}", 2, 6) for i in range(n)]

    def run(m: Net, x: Tensor) -> Tensor:
        share = m.router(x).softmax(-1)
        for i in range(n):
            inner = F.silu(m.up[i](x)) * m.gate[i](x) if gated else F.gelu(m.up[i](x))
            x = x + share[..., i : i + 1] * m.down[i](inner)
        return x

    return Net(
        run,
        router=nn.Linear(s[2], n, bias=False),
        up=nn.ModuleList(nn.Linear(s[2], w) for w in widths),
        gate=nn.ModuleList(nn.Linear(s[2], w) for w in widths if gated),
        down=nn.ModuleList(nn.Linear(w, s[2]) for w in widths),
    )


@block("tokens", is_mixing=True)
def experts_in_one_tensor(pick: Picker, s: Shape) -> nn.Module:
    """Weights of all experts in one tensor (E, d, f); which experts are left changes the router's softmax."""
    n, width = pick.integer("experts", 2, 4), pick.integer("width", 2, 6)
    how = pick.choice("how", ["einsum", "bmm", "fused"])
    up = nn.Parameter(torch.zeros(n, s[2], 2 * width if how == "fused" else width))

    def run(m: Net, x: Tensor) -> Tensor:
        share = m.router(x).softmax(-1)
        if how == "einsum":
            each = torch.einsum("btef,efd->bted", F.silu(torch.einsum("btd,edf->btef", x, m.up)), m.down)
            return x + torch.einsum("bted,bte->btd", each, share)
        tokens = x.reshape(1, -1, s[2]).expand(n, -1, -1)
        inner = torch.bmm(tokens, m.up)
        if how == "fused":
            gate, value = inner.chunk(2, -1)
            inner = F.silu(gate) * value
        each = torch.bmm(F.relu(inner), m.down).view(n, x.shape[0], -1, s[2])
        return x + (each * share.permute(2, 0, 1)[..., None]).sum(0)

    return Net(run, router=nn.Linear(s[2], n, bias=False), up=up, down=nn.Parameter(torch.zeros(n, width, s[2])))


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, pairing: str) -> Tensor:
    """Rotary positions: pairs are halves apart, or neighbours."""
    if pairing == "halves":
        first, second = x.chunk(2, -1)
        return x * torch.cat([cos, cos], -1) + torch.cat([-second, first], -1) * torch.cat([sin, sin], -1)
    first, second = x[..., 0::2], x[..., 1::2]
    return torch.stack([first * cos - second * sin, first * sin + second * cos], -1).flatten(-2)


@block("tokens")
def grouped_queries(pick: Picker, s: Shape) -> nn.Module:
    """Queries in groups that share a key head; rotary positions, a causal mask, talking heads or none of them."""
    groups, per_group = pick.integer("groups", 1, 3), pick.integer("per_group", 1, 3)
    width, heads = 2 * pick.integer("half_width", 1, 3), groups * per_group
    how = pick.choice("how", ["interleave", "expand", "sdpa", "folded"])
    pairing = pick.choice("pairing", ["none", "halves", "neighbours"])
    angles = torch.outer(torch.arange(s[1]).float(), 10.0 ** -torch.arange(width // 2).float())

    def repeated(x: Tensor) -> Tensor:
        if how == "interleave":
            return x.repeat_interleave(per_group, dim=1)
        b, h, n, d = x.shape
        return x[:, :, None].expand(b, h, per_group, n, d).reshape(b, h * per_group, n, d)

    def run(m: Net, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q = m.q(x).view(b, n, heads, width).transpose(1, 2)
        k, v = (layer(x).view(b, n, groups, width).transpose(1, 2) for layer in (m.k, m.v))
        if pairing != "none":
            q, k = (_rotated(y, m.cos, m.sin, pairing) for y in (q, k))
        if how == "folded":
            q = q.reshape(b, groups, per_group * n, width)
            y = ((q @ k.mT) * 0.5).softmax(-1) @ v
            y = y.reshape(b, heads, n, width)
        else:
            if how != "sdpa":
                k, v = repeated(k), repeated(v)
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=how == "sdpa" and per_group > 1)
        return x + m.out(y.transpose(1, 2).reshape(b, n, heads * width))

    return Net(
        run,
        q=nn.Linear(s[2], heads * width),
        k=nn.Linear(s[2], groups * width, bias=False),
        v=nn.Linear(s[2], groups * width),
        out=nn.Linear(heads * width, s[2]),
        cos=angles.cos(),
        sin=angles.sin(),
    )


@block("tokens", is_mixing=True)
def normed_attention(pick: Picker, s: Shape) -> nn.Module:
    """Queries and keys are normalised in each head; heads talk before and after the softmax, where asked."""
    heads, width = pick.integer("heads", 1, 3), pick.integer("width", 2, 4)
    norm = pick.choice("norm", ["rms", "layer", "by_hand"])
    talks = pick.choice("talks", [True, False])
    norms = {"rms": nn.RMSNorm, "layer": nn.LayerNorm, "by_hand": nn.LayerNorm}[norm]

    def normed(layer: nn.Module, y: Tensor) -> Tensor:
        return y * (y.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt() * layer.weight if norm == "by_hand" else layer(y)

    def run(m: Net, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = (layer(x).view(b, n, heads, width).transpose(1, 2) for layer in (m.q, m.k, m.v))
        scores = normed(m.q_norm, q) @ normed(m.k_norm, k).mT * width**-0.5
        if talks:
            scores = m.before(scores.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        weights = scores.softmax(-1)
        if talks:
            weights = m.after(weights.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return x + m.out((weights @ v).transpose(1, 2).flatten(2))

    layers = {name: nn.Linear(s[2], heads * width) for name in ("q", "k", "v")}
    talking = {"before": nn.Linear(heads, heads), "after": nn.Linear(heads, heads)} if talks else {}
    return Net(run, q_norm=norms(width), k_norm=norms(width), out=nn.Linear(heads * width, s[2]), **layers, **talking)


@block("tokens")
def sinks_and_class_token(pick: Picker, s: Shape) -> nn.Module:
    """A class token joins the others; each head has a score that takes part in the softmax and is thrown away."""
    heads, width, has_sink = (
        pick.integer("heads", 1, 3),
        pick.integer("width", 2, 4),
        pick.choice("sink", [True, False]),
    )

    def run(m: Net, x: Tensor) -> Tensor:
        x = torch.cat([m.token.expand(x.shape[0], -1, -1), x], 1)
        b, n, _ = x.shape
        q, k, v = m.qkv(x).view(b, n, 3, heads, width).permute(2, 0, 3, 1, 4)
        scores = q @ k.mT * 0.7
        if has_sink:
            sink = m.sink.view(1, -1, 1, 1).expand(b, -1, n, 1)
            weights = torch.cat([scores, sink], -1).softmax(-1)[..., :-1]
        else:
            weights = scores.softmax(-1)
        return (x + m.out((weights @ v).transpose(1, 2).flatten(2)))[:, 1:] * x[:, :1]

    return Net(
        run,
        token=nn.Parameter(torch.zeros(1, 1, s[2])),
        sink=nn.Parameter(torch.zeros(heads)),
        qkv=nn.Linear(s[2], 3 * heads * width),
        out=nn.Linear(heads * width, s[2]),
    )


@block("tokens", is_mixing=True)
def linear_attention(pick: Picker, s: Shape) -> nn.Module:
    """Keys and values are summed up before queries read them; no softmax over tokens."""
    heads, width, v_width = pick.integer("heads", 1, 3), pick.integer("width", 2, 4), pick.integer("v_width", 2, 4)
    by_sum = pick.choice("by_sum", [True, False])

    def run(m: Net, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k = (F.elu(layer(x).view(b, n, heads, width)) + 1 for layer in (m.q, m.k))
        v = m.v(x).view(b, n, heads, v_width)
        memory = torch.einsum("bnhd,bnhe->bhde", k, v)
        total = torch.einsum("bnhd,bhd->bnh", q, k.sum(1)) if by_sum else (q * k.sum(1, keepdim=True)).sum(-1)
        y = torch.einsum("bnhd,bhde->bnhe", q, memory) / (total[..., None] + 1e-3)
        return x + m.out(y.reshape(b, n, heads * v_width))

    layers = {"q": nn.Linear(s[2], heads * width), "k": nn.Linear(s[2], heads * width)}
    return Net(run, v=nn.Linear(s[2], heads * v_width), out=nn.Linear(heads * v_width, s[2]), **layers)


@block("tokens", lambda s: s[1] <= 16)
def shared_relative_bias(pick: Picker, s: Shape) -> nn.Module:
    """Two attentions that share one table of relative positions, one row a bucket and one column a head, as in T5."""
    heads, width, n = pick.integer("heads", 1, 4), pick.integer("width", 2, 4), s[1]
    distance = (torch.arange(n)[None] - torch.arange(n)[:, None]).clamp(-3, 3) + 3

    def attend(layers: nn.ModuleList, x: Tensor, bias: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(2, (heads, width)).transpose(1, 2) for layer in layers[:3])
        y = ((q @ k.mT) + bias).softmax(-1) @ v
        return x + layers[3](y.transpose(1, 2).flatten(2))

    def run(m: Net, x: Tensor) -> Tensor:
        bias = m.table(m.distance).permute(2, 0, 1)[None]
        return attend(m.second, attend(m.first, x, bias), bias)

    def layers() -> nn.ModuleList:
        inside = [nn.Linear(s[2], heads * width, bias=False) for _ in range(3)]
        return nn.ModuleList([*inside, nn.Linear(heads * width, s[2])])

    return Net(run, first=layers(), second=layers(), table=nn.Embedding(7, heads), distance=distance)


@block("tokens", lambda s: s[1] <= 16)
def selective_scan(pick: Picker, s: Shape) -> nn.Module:
    """The Mamba block in plain PyTorch: gate, causal depthwise convolution, scan with a state a channel."""
    inner, rank, state = pick.integer("inner", 3, 8), pick.integer("rank", 1, 3), pick.integer("state", 2, 4)

    def run(m: Net, x: Tensor) -> Tensor:
        n = x.shape[1]
        u, z = m.inside(x).chunk(2, -1)
        u = F.silu(m.conv(u.transpose(1, 2))[..., :n].transpose(1, 2))
        dt, b, c = m.select(u).split([rank, state, state], -1)
        dt = F.softplus(m.dt(dt))
        decay = torch.exp(dt[..., None] * -m.a_log.exp())
        drive = dt[..., None] * b[:, :, None] * u[..., None]
        h = torch.zeros(x.shape[0], inner, state, dtype=x.dtype, device=x.device)
        steps = []
        for t in range(n):
            h = decay[:, t] * h + drive[:, t]
            steps.append((h * c[:, t, None]).sum(-1))
        return x + m.out((torch.stack(steps, 1) + u * m.d) * F.silu(z))

    return Net(
        run,
        inside=nn.Linear(s[2], 2 * inner, bias=False),
        conv=nn.Conv1d(inner, inner, 3, padding=2, groups=inner),
        select=nn.Linear(inner, rank + 2 * state, bias=False),
        dt=nn.Linear(rank, inner),
        a_log=nn.Parameter(torch.zeros(inner, state)),
        d=nn.Parameter(torch.zeros(inner)),
        out=nn.Linear(inner, s[2], bias=False),
    )


@block("tokens")
def alibi_attention(pick: Picker, s: Shape) -> nn.Module:
    """One key head for all query heads; the further a token, the less it counts, in each head at another slope."""
    heads, width = pick.integer("heads", 2, 4), pick.integer("width", 2, 4)
    slopes = torch.tensor([2.0 ** -(8 * (i + 1) / heads) for i in range(heads)])

    def run(m: Net, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q = m.q(x).view(b, n, heads, width).transpose(1, 2)
        k, v = m.kv(x).split(width, -1)
        place = torch.arange(n, device=x.device)
        bias = m.slopes.view(-1, 1, 1) * (place[None] - place[:, None])
        scores = torch.einsum("bhqd,bkd->bhqk", q, k) / math.sqrt(width) + bias
        return x + m.out(torch.einsum("bhqk,bkd->bqhd", scores.softmax(-1), v).reshape(b, n, heads * width))

    layers = {"q": nn.Linear(s[2], heads * width), "kv": nn.Linear(s[2], 2 * width)}
    return Net(run, slopes=slopes, out=nn.Linear(heads * width, s[2]), **layers)
