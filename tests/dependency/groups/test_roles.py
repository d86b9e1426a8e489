"""Roles of channel groups: what a person who reads the network would call each width."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

import torchshear
from tests.networks import FusedAttention, Grouped, Net, Residual, image
from torchshear.dependency import ROLES, operator_rule, unregister
from torchshear.dependency.rules._role_evidence import FAMILIES


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def roles_of(model: nn.Module, *args: Tensor) -> dict[int, str]:
    """Width -> role; the networks here have a width of its own for each group."""
    groups = torchshear.analyze(torchshear.trace(model, args))
    assert len({group.width for group in groups}) == len(groups), "widths tell groups apart here"
    assert all(group.role in ROLES for group in groups)
    return {group.width: group.role for group in groups}


def test_a_residual_network_has_a_stream_and_channels() -> None:
    assert roles_of(Residual(), image()) == {8: "residual", 16: "channels"}


def test_a_chain_of_convolutions_has_channels() -> None:
    groups = torchshear.analyze(torchshear.trace(Grouped(), (image(),)))
    assert [group.role for group in groups] == ["channels", "channels"]


def test_hidden_layers_of_a_perceptron() -> None:
    layers = [nn.Linear(4, 12), nn.ReLU(), nn.Linear(12, 9), nn.ReLU(), nn.Linear(9, 3)]
    assert roles_of(nn.Sequential(*layers), noise(2, 4)) == {12: "ffn", 9: "ffn"}


def test_tanh_written_out_is_no_sum_of_branches() -> None:
    def run(m, x):
        x = m.up(x)
        return m.down(0.5 * x * (1 + torch.tanh(0.79 * (x + 0.044 * x.pow(3)))))

    assert roles_of(Net(run, up=nn.Linear(4, 12), down=nn.Linear(12, 3)), noise(2, 4)) == {12: "ffn"}


def test_two_gates_of_one_map_are_no_stream() -> None:
    """A gated unit multiplies two branches; only sums make a stream."""

    def run(m, x):
        return m.down(F.silu(m.gate(x)) * m.up(x))

    layers = {"gate": nn.Linear(4, 12), "up": nn.Linear(4, 12), "down": nn.Linear(12, 3)}
    assert roles_of(Net(run, **layers), noise(2, 4)) == {12: "ffn"}


def test_a_low_rank_map_is_a_rank() -> None:
    def run(m, x):
        return m.last(torch.relu(m.b(m.a(m.first(x).relu()))))

    layers = {"first": nn.Linear(4, 12), "a": nn.Linear(12, 3), "b": nn.Linear(3, 10), "last": nn.Linear(10, 5)}
    assert roles_of(Net(run, **layers), noise(2, 4)) == {12: "ffn", 3: "rank", 10: "ffn"}


def test_a_table_read_by_a_layer_is_an_embedding() -> None:
    def run(m, tokens):
        return m.down(m.up(m.table(tokens)).relu())

    layers = {"table": nn.Embedding(20, 6), "up": nn.Linear(6, 12), "down": nn.Linear(12, 3)}
    assert roles_of(Net(run, **layers), torch.randint(0, 20, (2, 5))) == {6: "embedding", 12: "ffn"}


def test_summed_tables_are_an_embedding_until_a_branch_adds_to_them() -> None:
    def tables(m, tokens):
        return m.words(tokens) + m.kinds(tokens % 2)

    layers = {
        "words": nn.Embedding(20, 6),
        "kinds": nn.Embedding(2, 6),
        "up": nn.Linear(6, 12),
        "down": nn.Linear(12, 3),
    }
    tokens = torch.randint(0, 20, (2, 5))
    projected = Net(lambda m, x: m.down(m.up(tables(m, x)).relu()), **layers)
    assert roles_of(projected, tokens) == {6: "embedding", 12: "ffn"}
    branch = {"up": nn.Linear(6, 12), "down": nn.Linear(12, 6), "head": nn.Linear(6, 3)}

    def run(m, tokens):
        x = tables(m, tokens)
        return m.head(x + m.down(m.up(x).relu()))

    assert roles_of(Net(run, **(layers | branch)), tokens) == {6: "residual", 12: "ffn"}


def _split_heads(x: Tensor, heads: int) -> Tensor:
    return x.view(*x.shape[:2], heads, -1).transpose(1, 2)


def _merged(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)


def _sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return _merged(F.scaled_dot_product_attention(_split_heads(q, 4), _split_heads(k, 4), _split_heads(v, 4)))


def _explicit(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (_split_heads(x, 4) for x in (q, k, v))
    scores = q.matmul(k.transpose(-2, -1)) * 0.5
    return _merged(scores.softmax(-1).matmul(v))


def _einsum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.view(*x.shape[:2], 4, -1) for x in (q, k, v))
    weights = torch.einsum("bnhd,bmhd->bhnm", q, k).softmax(-1)
    return torch.einsum("bhnm,bmhd->bnhd", weights, v).flatten(2)


def _batched(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    b, n, _ = q.shape
    q, k, v = (_split_heads(x, 4).reshape(b * 4, n, -1) for x in (q, k, v))
    return _merged(torch.bmm(torch.bmm(q, k.transpose(1, 2)).softmax(-1), v).view(b, 4, n, -1))


def _linear(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Katharopoulos et al., ICML 2020, arXiv:2006.16236: keys meet values first."""
    q, k, v = (_split_heads(x, 4) for x in (F.elu(q) + 1, F.elu(k) + 1, v))
    return _merged(q @ (k.transpose(-2, -1) @ v) / (q @ k.sum(2).unsqueeze(-1)))


def _linear_einsum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (_split_heads(x, 4) for x in (q, k, v))
    state = torch.einsum("bhnd,bhne->bhde", k.softmax(-2), v)
    return _merged(torch.einsum("bhde,bhnd->bhne", state, q))


@pytest.mark.parametrize("attend", [_sdpa, _explicit, _einsum, _batched, _linear, _linear_einsum])
def test_attention_in_every_spelling(attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
    def run(m, x):
        x = m.stem(x)
        x = x + m.out(attend(m.q(x), m.k(x), m.v(x)))
        return m.head(x)

    layers = {"q": nn.Linear(17, 20), "k": nn.Linear(17, 20), "v": nn.Linear(17, 24), "out": nn.Linear(24, 17)}
    net = Net(run, stem=nn.Linear(3, 17), **layers, head=nn.Linear(17, 2))
    assert roles_of(net, noise(2, 7, 3)) == {17: "residual", 4: "heads", 5: "qk_dim", 6: "v_dim"}


@pytest.mark.parametrize("taking", ["unbind", "index"])
def test_one_reshape_for_queries_keys_and_values_gives_them_one_width(taking: str) -> None:
    def run(m, x):
        x = m.stem(x)
        return m.head(x + m.attention(x))

    net = Net(run, stem=nn.Linear(3, 24), attention=FusedAttention(24, 4, taking), head=nn.Linear(24, 2))
    assert roles_of(net, noise(2, 7, 3)) == {24: "residual", 4: "heads", 6: "head_dim"}


def test_attention_without_heads_over_maps() -> None:
    """The non-local block (Wang et al., CVPR 2018, arXiv:1711.07971): its widths are those of attention."""

    def run(m, x):
        x = m.stem(x)
        q, k, v = (layer(x).flatten(2) for layer in (m.theta, m.phi, m.g))
        y = v @ (q.transpose(1, 2) @ k).softmax(-1).transpose(1, 2)
        return m.head((x + m.out(y.unflatten(2, (4, 4)))).mean((2, 3)))

    layers = {
        "theta": nn.Conv2d(8, 5, 1),
        "phi": nn.Conv2d(8, 5, 1),
        "g": nn.Conv2d(8, 6, 1),
        "out": nn.Conv2d(6, 8, 1),
    }
    net = Net(run, stem=nn.Conv2d(3, 8, 3, padding=1), **layers, head=nn.Linear(8, 2))
    assert roles_of(net, noise(2, 3, 4, 4)) == {8: "residual", 5: "qk_dim", 6: "v_dim"}


def test_attention_of_a_stream_to_itself_leaves_it_what_it_is() -> None:
    """Fu et al., CVPR 2019, arXiv:1809.02983: channels attend to channels, with no layers for queries and keys."""

    def run(m, x):
        x = m.stem(x)
        flat = x.flatten(2)
        y = (flat @ flat.transpose(1, 2)).softmax(-1) @ flat
        return m.head(m.last(x + y.view_as(x)).relu().mean((2, 3)))

    net = Net(run, stem=nn.Conv2d(3, 8, 3, padding=1), last=nn.Conv2d(8, 10, 1), head=nn.Linear(10, 2))
    assert roles_of(net, noise(2, 3, 4, 4)) == {8: "residual", 10: "channels"}


def test_attention_among_features() -> None:
    """Cross-covariance attention (El-Nouby et al., NeurIPS 2021, arXiv:2106.09681), one reshape for q, k and v."""

    def run(m, x):
        x = m.stem(x)
        q, k, v = m.qkv(x).view(*x.shape[:2], 3, 4, 6).permute(2, 0, 3, 4, 1).unbind(0)
        y = (F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)).softmax(-1) @ v
        return m.head(x + m.out(y.permute(0, 3, 1, 2).flatten(2)))

    layers = {"qkv": nn.Linear(17, 72), "out": nn.Linear(24, 17), "head": nn.Linear(17, 2)}
    net = Net(run, stem=nn.Linear(3, 17), **layers)
    assert roles_of(net, noise(2, 7, 3)) == {17: "residual", 4: "heads", 6: "head_dim"}


def test_talking_heads() -> None:
    """Shazeer et al., 2020, arXiv:2003.02436: scores are mixed across heads before the softmax, weights after it."""

    def run(m, x):
        x = m.stem(x)
        q, k, v = (_split_heads(layer(x), heads) for layer, heads in ((m.q, 4), (m.k, 4), (m.v, 3)))
        scores = m.before((q @ k.transpose(-2, -1)).permute(0, 2, 3, 1)).softmax(-2)
        return m.head(x + m.out(_merged(m.after(scores).permute(0, 3, 1, 2) @ v)))

    layers = {"q": nn.Linear(17, 20), "k": nn.Linear(17, 20), "v": nn.Linear(17, 21), "out": nn.Linear(21, 17)}
    talk = {"before": nn.Linear(4, 6), "after": nn.Linear(6, 3)}
    net = Net(run, stem=nn.Linear(3, 17), **layers, **talk, head=nn.Linear(17, 2))
    expected = {17: "residual", 4: "heads", 6: "heads", 3: "heads", 5: "qk_dim", 7: "v_dim"}
    assert roles_of(net, noise(2, 9, 3)) == expected


def test_activations_that_torch_does_not_tag_and_norms_are_in_between() -> None:
    layers = [nn.Linear(4, 12), nn.Hardswish(), nn.Linear(12, 9), nn.BatchNorm1d(9), nn.Linear(9, 3)]
    assert roles_of(nn.Sequential(*layers), noise(2, 4)) == {12: "ffn", 9: "ffn"}


def _interleaved(x: Tensor) -> Tensor:
    return x.repeat_interleave(3, dim=1)


def _expanded(x: Tensor) -> Tensor:
    b, h, n, d = x.shape
    return x[:, :, None].expand(b, h, 3, n, d).reshape(b, h * 3, n, d)


@pytest.mark.parametrize("repeat", [_interleaved, _expanded, None], ids=["interleave", "expand", "enable_gqa"])
def test_grouped_queries(repeat: Callable[[Tensor], Tensor] | None) -> None:
    def run(m, x):
        x = m.stem(x)
        q, k, v = _split_heads(m.q(x), 6), _split_heads(m.k(x), 2), _split_heads(m.v(x), 2)
        if repeat is None:
            y = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        else:
            y = F.scaled_dot_product_attention(q, repeat(k), repeat(v))
        return m.head(x + m.out(_merged(y)))

    layers = {"q": nn.Linear(17, 30), "k": nn.Linear(17, 10), "v": nn.Linear(17, 14), "out": nn.Linear(42, 17)}
    net = Net(run, stem=nn.Linear(3, 17), **layers, head=nn.Linear(17, 2))
    expected = {17: "residual", 2: "kv_heads", 3: "q_heads", 5: "qk_dim", 7: "v_dim"}
    assert roles_of(net, noise(2, 7, 3)) == expected


def test_one_key_and_value_head_for_all_queries() -> None:
    def run(m, x):
        q = _split_heads(m.q(x), 6)
        scores = torch.einsum("bhnd,bmd->bhnm", q, m.k(x)).softmax(-1)
        return m.out(_merged(torch.einsum("bhnm,bmd->bhnd", scores, m.v(x))))

    layers = {"q": nn.Linear(3, 30), "k": nn.Linear(3, 5), "v": nn.Linear(3, 7), "out": nn.Linear(42, 2)}
    assert roles_of(Net(run, **layers), noise(2, 9, 3)) == {6: "heads", 5: "qk_dim", 7: "v_dim"}


def test_experts_in_one_tensor() -> None:
    """Every expert sees every token here; the router weighs them. The experts' axis of the weights is their number."""

    def run(m, x):
        x = m.stem(x)
        weights = m.router(x).softmax(-1)
        hidden = torch.einsum("bnd,edf->benf", x, m.up).relu()
        y = torch.einsum("benf,efd->bend", hidden, m.down)
        return m.head(x + torch.einsum("bend,bne->bnd", y, weights))

    layers = {"up": nn.Parameter(noise(4, 8, 12)), "down": nn.Parameter(noise(4, 12, 8))}
    net = Net(run, stem=nn.Linear(3, 8), router=nn.Linear(8, 4), **layers, head=nn.Linear(8, 2))
    assert roles_of(net, noise(2, 7, 3)) == {8: "residual", 4: "experts", 12: "expert_ffn"}


class StateSpace(nn.Module):
    """A selective state space step by step, as in Mamba (Gu and Dao, arXiv:2312.00752), 6 channels, state size 5."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.into, self.out, self.head = nn.Linear(3, 8), nn.Linear(8, 6), nn.Linear(6, 8), nn.Linear(8, 2)
        self.select, self.step = nn.Linear(6, 4 + 2 * 5), nn.Linear(4, 6)
        self.decay, self.skip = nn.Parameter(-torch.rand(6, 5)), nn.Parameter(torch.ones(6))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        u = F.silu(self.into(x))
        rank, b, c = self.select(u).split([4, 5, 5], -1)
        dt = F.softplus(self.step(rank))
        state, ys = torch.zeros(x.shape[0], 6, 5), []
        for t in range(x.shape[1]):
            state = torch.exp(dt[:, t, :, None] * self.decay) * state + (dt[:, t] * u[:, t])[..., None] * b[:, t, None]
            ys.append((state @ c[:, t, :, None]).squeeze(-1))
        y = torch.stack(ys, 1) + u * self.skip
        out: Tensor = self.head(x + self.out(y))
        return out


def test_a_state_space_layer() -> None:
    assert roles_of(StateSpace(), noise(2, 4, 3)) == {8: "residual", 6: "inner", 5: "state", 4: "rank"}


def test_state_spaces_in_heads_are_linear_attention() -> None:
    """Chunks of the second Mamba (Dao and Gu, ICML 2024, arXiv:2405.21060): states pass on from chunk to chunk."""

    def run(m, x):
        x = m.stem(x)
        b, c, v, dt = m.into(x).unflatten(1, (3, 2)).split([5, 5, 24, 4], -1)
        v, decay = v.unflatten(-1, (4, 6)), torch.exp(-F.softplus(dt))
        states = torch.einsum("bcln,bclhp->bchpn", b, v * decay[..., None])
        mixing = torch.einsum("bclh,bzlh->bhzc", dt, decay).tril()
        passed = torch.einsum("bhzc,bchpn->bzhpn", mixing, states)
        y = torch.einsum("bcln,bchpn->bclhp", c, passed)
        return m.head(x + m.out(y.flatten(3).flatten(1, 2)))

    net = Net(run, stem=nn.Linear(3, 17), into=nn.Linear(17, 38), out=nn.Linear(24, 17), head=nn.Linear(17, 2))
    assert roles_of(net, noise(2, 6, 3)) == {17: "residual", 5: "qk_dim", 4: "heads", 6: "v_dim"}


class Unrolled(nn.Module):
    """An Elman cell applied to each of four steps."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.again, self.head = nn.Linear(3, 9), nn.Linear(9, 9), nn.Linear(9, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.into(x[:, 0]))
        for t in range(1, 4):
            h = torch.tanh(self.into(x[:, t]) + self.again(h))
        out: Tensor = self.head(h)
        return out


def test_a_recurrence_written_out_has_a_hidden_size() -> None:
    assert roles_of(Unrolled(), noise(2, 4, 3)) == {9: "hidden"}


def test_layers_that_share_their_weights_are_no_recurrence() -> None:
    """As in ALBERT (arXiv:1909.11942): one block three times over, on a stream."""

    def run(m, x):
        x = m.stem(x)
        for _ in range(3):
            x = x + m.down(m.up(x).relu())
        return m.head(x)

    layers = {"stem": nn.Linear(3, 8), "up": nn.Linear(8, 12), "down": nn.Linear(12, 8), "head": nn.Linear(8, 2)}
    assert roles_of(Net(run, **layers), noise(2, 3)) == {8: "residual", 12: "ffn"}


@torch.library.custom_op("torchshear_tests::memory", mutates_args=())
def memory(x: Tensor) -> Tensor:
    """An operator whose rule says what it is for."""
    return x.cumsum(1)


@memory.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def test_a_rule_can_say_the_role_outright() -> None:
    @operator_rule("torchshear_tests.memory")
    def _memory(call):
        x = call.axes("x")
        call.declare_role("hidden", x[-1])
        return x

    try:
        net = Net(lambda m, x: m.two(memory(m.one(x))), one=nn.Linear(3, 6), two=nn.Linear(6, 2))
        assert roles_of(net, noise(2, 5, 3)) == {6: "hidden"}
    finally:
        unregister("torchshear_tests.memory")


def test_roles_do_not_follow_names() -> None:
    """The same network under names of other things."""

    def run(m, x):
        return m.attn_qkv(F.silu(m.conv_heads(x)) * m.residual_stream(x))

    layers = {"conv_heads": nn.Linear(4, 12), "residual_stream": nn.Linear(4, 12), "attn_qkv": nn.Linear(12, 3)}
    assert roles_of(Net(run, **layers), noise(2, 4)) == {12: "ffn"}


def test_families_are_of_known_roles() -> None:
    assert all(name in narrower and set(narrower) <= set(ROLES) for name, narrower in FAMILIES.items())
