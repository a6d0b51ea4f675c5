"""Networks: what a rotation keeps, what a pool weighs, what an encoder may see, and what it refuses."""

import copy
import shutil

import pytest
import torch

from model import Attention, AttentionPool, Block, Encoder, Normalizer, RoPE, Trunk, TwinQ, dropout_mask_bits


def test_rope_keeps_lengths_and_sees_only_distances():
    rope = RoPE(8, 10)
    before = set(rope.state_dict())
    x = torch.randn(2, 10, 8)
    torch.testing.assert_close(rope(x).norm(dim=-1), x.norm(dim=-1))
    assert torch.equal(rope(x)[:, 0], x[:, 0])  # position 0 is not turned
    same = x[:, :1].expand(-1, 10, -1)
    turned = rope(same)
    torch.testing.assert_close((turned[:, 1] * turned[:, 4]).sum(-1), (turned[:, 3] * turned[:, 6]).sum(-1))
    assert set(rope.state_dict()) == before == set()


def test_rope_formula():
    t, i, dim = 3, 1, 6
    x = torch.zeros(1, 4, dim)
    x[0, t, 2 * i] = 1.0
    angle = torch.tensor(t * 10_000 ** (-2 * i / dim))
    torch.testing.assert_close(RoPE(dim, 4)(x)[0, t, 2 * i : 2 * i + 2], torch.stack([angle.cos(), angle.sin()]))


def test_odd_d_model_is_refused_with_its_neighbours():
    with pytest.raises(ValueError, match="take 32 or 34"):
        RoPE(33, 5)


def test_pool_is_a_weighted_mean():
    pool, x = AttentionPool(8), torch.randn(3, 5, 8)
    weights = pool.score(x).softmax(1)
    torch.testing.assert_close(pool(x), torch.einsum("bkd,bk->bd", x, weights.squeeze(-1)))
    same = x[:, :1].expand(-1, 5, -1)
    torch.testing.assert_close(pool(same), x[:, 0])


def test_normaliser_travels_and_survives_a_constant():
    normal = Normalizer(2)
    normal.fit(torch.tensor([[0.0, 5.0], [2.0, 5.0]]))
    assert set(normal.state_dict()) == {"mean", "std"} and torch.isfinite(normal(torch.ones(3, 2))).all()


@pytest.mark.parametrize(
    "change, words",
    [
        ({"context_length": 0}, "take at least 1"),
        ({"n_layers": 0}, "from 1 to 1000"),
        ({"drop_p": 1.0}, "less than 1"),
        ({"headdim": 7}, "headdim"),
        ({"d_model": 15}, "15"),
    ],
)
def test_impossible_encoders_are_refused_in_words(tiny, change, words):
    with pytest.raises(ValueError, match=words):
        Encoder(tiny(**change), 4, 3)


def test_encoder_shapes_dropout_and_state_dict(tiny):
    encoder = Encoder(tiny(drop_p=0.5), 4, 3)
    states, keys = torch.randn(6, 3, 4), set(encoder.state_dict())
    assert encoder(states).shape == (6, 16)
    one, other = encoder.draw_mask_bits(states), encoder.draw_mask_bits(states)
    assert not torch.equal(encoder(states, one), encoder(states, other))
    assert torch.equal(encoder(states, one), encoder(states, one))
    assert torch.equal(encoder(states), encoder(states))
    assert encoder.eval().draw_mask_bits(states) is None
    assert set(encoder.state_dict()) == keys
    shuffled = encoder(states.flip(1))
    assert not torch.allclose(shuffled, encoder(states))  # order matters


def test_critics_are_two():
    q = TwinQ(4, 2, 8)
    values = q(torch.randn(5, 4), torch.randn(5, 2))
    assert values.shape == (2, 5) and not torch.allclose(values[0], values[1])


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_dropout_drops_its_share_and_keeps_the_mean(p):
    block, x = Block(torch.nn.Identity(), 101, p), torch.randn(50, 7, 101)
    bits = dropout_mask_bits(3, x)
    y, kept = block.norm(x), block(x, bits[0]) - x
    dropped = kept == 0
    assert bits.shape == (3, *x.shape) and not torch.equal(bits[0], bits[1])
    assert dropped.float().mean().item() == pytest.approx(p, abs=0.01)
    torch.testing.assert_close(kept, torch.where(dropped, 0.0, y / (1 - p)), atol=1e-5, rtol=1e-4)
    torch.manual_seed(0)
    again = dropout_mask_bits(3, x)
    torch.manual_seed(0)
    assert torch.equal(again, dropout_mask_bits(3, x))


def test_attention_is_pytorchs_and_its_dropout_only_trains():
    layer, x = Attention(16, 2, drop_p=0.5), torch.randn(3, 7, 16)
    theirs = torch.nn.MultiheadAttention(16, 2, batch_first=True)
    theirs.in_proj_weight.data, theirs.in_proj_bias.data = layer.qkv.weight.data, layer.qkv.bias.data
    theirs.out_proj.weight.data, theirs.out_proj.bias.data = layer.out.weight.data, layer.out.bias.data
    future = torch.ones(7, 7, dtype=torch.bool).triu(1)
    expected = theirs(x, x, x, attn_mask=future)[0]
    torch.testing.assert_close(layer.eval()(x), expected)
    assert not torch.allclose(layer.train()(x), layer(x))
    layer.drop_p = 1e-12  # the training path without losing anything
    torch.testing.assert_close(layer(x), expected)
    with pytest.raises(ValueError, match="multiple of n_heads"):
        Attention(16, 3)


def test_trunk_refuses_and_drops_only_in_training():
    trunk, x = Trunk([Attention(8, 1), torch.nn.Linear(8, 8)], 8, torch.nn.RMSNorm, 0.5), torch.randn(2, 5, 8)
    assert not torch.equal(trunk(x), trunk(x)) and torch.equal(trunk.eval()(x), trunk(x))
    assert trunk.init_state(2) == ((), ())
    with pytest.raises(ValueError, match="at least 1"):
        Trunk([], 8, torch.nn.RMSNorm, 0.1)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile on a CPU needs a C++ compiler")
def test_a_copy_of_a_compiled_encoder_computes_with_its_own_weights(tiny):
    encoder = Encoder(tiny(compile=True, n_layers=1), 4, 3).eval()
    states = torch.randn(6, 3, 4)
    with torch.no_grad():
        before = encoder(states)
        twin = copy.deepcopy(encoder)
        for p in twin.parameters():
            p.zero_()
        assert not twin(states).any() and torch.equal(encoder(states), before)
