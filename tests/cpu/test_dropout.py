"""The dropout mask: its exact bits, its statistics, and that all who recompute it agree."""

import math

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from hf_flashattn import flash_attn_func
from hf_flashattn.reference import (
    attention_reference,
    drop_threshold,
    dropout_mask,
    dropout_scale,
    philox_4x32,
)

ALL_ONES = 0xFFFFFFFF
# The cube roots of the first primes, 32 bits behind the point (as SHA-256 has them), made odd.
PRIMES = (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41, 43, 47, 53)
MULTIPLIERS = [int(prime ** (1 / 3) % 1 * 2**32) | 1 for prime in PRIMES]


# Random123's known answers for philox4x32 with 7 rounds.
@pytest.mark.parametrize(
    "word, expected",
    [
        (0, (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48)),
        (ALL_ONES, (0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662)),
    ],
)
def test_philox_known_answers(word, expected):
    counter = tuple(torch.tensor([word]) for _ in range(4))
    got = philox_4x32(counter, (word, word))
    assert tuple(int(x) for x in got) == expected


def scalar_philox(counter, key):
    """Philox 4x32-7 in Python's integers, from the paper's definition."""
    x, y, z, w = counter
    k0, k1 = key
    for _ in range(7):
        p0, p1 = 0xD2511F53 * x, 0xCD9E8D57 * z
        x, y, z, w = (
            (p1 >> 32) ^ y ^ k0,
            p1 & ALL_ONES,
            (p0 >> 32) ^ w ^ k1,
            p0 & ALL_ONES,
        )
        k0, k1 = (k0 + 0x9E3779B9) & ALL_ONES, (k1 + 0xBB67AE85) & ALL_ONES
    return x, y, z, w


def scalar_byte(seed, offset, head_index, r, c):
    """The random byte of one score, by the layout that the kernels are written to."""
    gamma, alpha, b8 = r % 8 // 2, r % 2, r % 16 // 8
    t, e, d8 = c % 8 // 2, c % 2, c % 16 // 8
    start = (offset & ALL_ONES, offset >> 32 & ALL_ONES, 0, 0)
    row, column, *_ = scalar_philox(start, (seed & ALL_ONES, seed >> 32 & ALL_ONES))
    counter = (gamma * 4 + t, row ^ r // 64, head_index, column ^ c // 64)
    word = scalar_philox(counter, (0, 0))[alpha * 2 + e]
    return score_byte(word * MULTIPLIERS[r // 16 % 4 * 4 + c // 16 % 4], b8, d8)


def score_byte(product, b8, d8):
    """One of a product's four random bytes; the product an integer or an int64 tensor."""
    half = product >> (32 if b8 else 16) & 0xFFFF
    rotated = (half << 1 | half >> 15) & 0xFFFF
    return rotated & 0xFF if d8 else rotated >> 8


def keeps(byte, threshold):
    """Whether dropout keeps a score; the byte an integer or a tensor."""
    return byte >= threshold if threshold <= 128 else byte < 256 - threshold


@pytest.mark.parametrize(
    "seed, offset", [(0, 0), (2**62 + 12345, 77), (-1, -(2**63)), (-987654321, 2**40 + 9)]
)
@pytest.mark.parametrize("p", [0.3, 0.8])
def test_mask_bit_by_bit(seed, offset, p):
    batch, heads, sq, sk = 2, 3, 87, 75
    rng = torch.tensor([seed, offset])
    mask = dropout_mask(rng[0], rng[1], batch, heads, sq, sk, p)
    assert mask.shape == (batch, heads, sq, sk) and mask.dtype == torch.bool
    assert torch.equal(mask, dropout_mask(seed, offset, batch, heads, sq, sk, p))
    for b, h, r, c in torch.cartesian_prod(*map(torch.arange, mask.shape))[::31].tolist():
        byte = scalar_byte(seed, offset, b * heads + h, r, c)
        assert bool(mask[b, h, r, c]) == keeps(byte, drop_threshold(p)), (b, h, r, c)


def test_mask_depends_on_the_position_alone():
    large = dropout_mask(1, 2, 2, 4, 100, 90, 0.5)
    assert torch.equal(large[:, :, :33, :17], dropout_mask(1, 2, 2, 4, 33, 17, 0.5))


@pytest.mark.parametrize(
    "p, threshold", [(0.0, 0), (0.001, 1), (0.1, 26), (0.5, 128), (0.998, 255), (0.9999, 255)]
)
def test_threshold_and_scale(p, threshold):
    assert drop_threshold(p) == threshold
    assert dropout_scale(p) == 256 / (256 - threshold)


@pytest.mark.parametrize("p", [-0.1, 1.0, 1.5, float("nan")])
def test_bad_probability(p):
    with pytest.raises(ValueError, match=r"expected 0 <= p < 1.*nearest supported"):
        drop_threshold(p)


@pytest.mark.parametrize("p", [0.1, 0.25, 0.5, 0.9])
def test_kept_fraction(p):
    mask = dropout_mask(11, 3, 2, 2, 512, 512, p).double()
    expected = 1 - drop_threshold(p) / 256
    assert abs(expected - (1 - p)) <= 0.5 / 256
    sigma = math.sqrt(p * (1 - p) / mask.numel())
    assert abs(mask.mean() - expected) < 5 * sigma
    for dims in ((0, 1, 2), (0, 1, 3)):  # every column and every row
        count = mask.numel() / 512
        assert (mask.mean(dims) - expected).abs().max() < 6 * math.sqrt(p * (1 - p) / count)


def correlation(a, b):
    a, b = a.flatten().double(), b.flatten().double()
    a, b = a - a.mean(), b - b.mean()
    return float((a * b).mean() / (a.std() * b.std()))


def test_elements_are_independent():
    mask = dropout_mask(5, 6, 2, 2, 512, 512, 0.3)
    limit = 6 / math.sqrt(512 * 448)
    for step in (1, 2, 4, 8, 16, 32, 48, 64):
        assert abs(correlation(mask[:, :, step:], mask[:, :, :-step])) < limit
        assert abs(correlation(mask[..., step:], mask[..., :-step])) < limit
        assert abs(correlation(mask[..., step:, step:], mask[..., :-step, :-step])) < limit
    others = [mask[0, 1], mask[1, 0], mask[1, 1], mask[0, 0].T]
    others += [dropout_mask(5, 7, 1, 1, 512, 512, 0.3), dropout_mask(6, 6, 1, 1, 512, 512, 0.3)]
    for other in others:
        assert abs(correlation(mask[0, 0], other)) < limit


def every_tile(mask):
    """(batch, heads, 64 m, 64 n) -> (tiles, 64, 64): what a tile's 16 Philox calls decide."""
    tiles = mask.unflatten(2, (-1, 64)).unflatten(4, (-1, 64)).permute(0, 1, 2, 4, 3, 5)
    return tiles.flatten(0, 3)


def normal(mask, p):
    """Of mean 0 and variance 1."""
    kept = 1 - drop_threshold(p) / 256
    return (mask.float() - kept) / math.sqrt(kept * (1 - kept))


@pytest.mark.parametrize("p", [0.1, 0.5, 0.8])
def test_elements_of_a_tile_are_independent(p):
    """All pairs of the 4096 elements: bits of one call, one word, one product, one half word."""
    tiles = every_tile(dropout_mask(3, 4, 4, 4, 512, 512, p))
    x = normal(tiles.flatten(1), p)
    products = x.T @ x / math.sqrt(len(x))  # of unit variance
    pairs = products[torch.ones_like(products).triu(1).bool()]
    assert pairs.abs().max() < 7
    # What a word decides, in two rows and two columns of every square: its pairs are among them.
    for g, c in ((0, 0), (3, 6), (7, 7)):
        of_word = torch.zeros(64, 64, dtype=torch.bool)
        of_word[g::8, c::8] = True
        own = products[of_word.flatten()][:, of_word.flatten()]
        own = own[torch.ones_like(own).triu(1).bool()]
        assert abs(own.square().mean() - 1) < 6 * math.sqrt(2 / len(own))
    assert abs(pairs.square().mean() - 1) < 0.02
    # How many of a tile are kept varies as much as 4096 independent elements would.
    spread = x.sum(1).var() / 4096
    assert abs(spread - 1) < 6 * math.sqrt(2 / len(x))


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_elements_of_a_word_are_independent(p):
    """Pairs and threes of the 64 elements of a word: 16 squares, 4 bytes each; of 2^20 words."""
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(2**32, (2**20,), generator=generator)
    threshold = drop_threshold(p)
    flags = []
    for multiplier in MULTIPLIERS:
        product = words * multiplier  # modulo 2^64
        for b8, d8 in ((0, 0), (0, 1), (1, 0), (1, 1)):
            flags.append(keeps(score_byte(product, b8, d8), threshold))
    x = normal(torch.stack(flags), p)  # (64, words)
    limit = 6 / math.sqrt(len(words))
    pairs = x @ x.T / len(words)
    assert pairs[torch.ones_like(pairs).triu(1).bool()].abs().max() < limit
    for a, b in ((0, 1), (0, 4), (1, 63), (5, 22), (17, 40)):
        threes = x @ (x[a] * x[b]) / len(words)
        others = torch.ones(64, dtype=torch.bool)
        others[[a, b]] = False
        # The third moment of one factor widens the tails.
        assert threes[others].abs().max() < 1.5 * limit


def test_kept_fraction_of_every_threshold():
    """Both halves of the rule: up to 1/2 the lowest bytes are dropped, above it the highest."""
    for threshold in (1, 2, 127, 128, 129, 200, 248, 249, 254, 255):
        mask = dropout_mask(21, threshold, 1, 2, 512, 256, threshold / 256)
        expected = 1 - threshold / 256
        sigma = math.sqrt(expected * (1 - expected) / mask.numel())
        assert abs(mask.double().mean() - expected) < 5 * sigma


def test_no_tile_repeats():
    """Counters of all rows, columns and heads differ, in bits that a call's upper words see."""
    tiles = every_tile(dropout_mask(1, 1, 2, 2, 512, 256, 0.5)).flatten(1)
    assert len(tiles.unique(dim=0)) == len(tiles)


def test_expectation_is_the_output_without_dropout():
    q, k, v = (torch.randn(1, 4, 1, 8) for _ in range(3))
    plain, plain_lse = attention_reference(q, k, v)
    total = torch.zeros_like(plain)
    for i in range(400):
        out, lse = attention_reference(q, k, v, dropout_p=0.5, rng_state=torch.tensor([i, 0]))
        assert torch.equal(lse, plain_lse)  # the LSE knows nothing of dropout
        total += out
    assert (total / 400 - plain).abs().max() < 0.3


def test_calls_follow_torchs_generator():
    q, k, v = (torch.randn(1, 32, 2, 16) for _ in range(3))
    torch.manual_seed(3)
    first, second = (flash_attn_func(q, k, v, 0.5) for _ in range(2))
    torch.manual_seed(3)
    assert torch.equal(flash_attn_func(q, k, v, 0.5), first)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_replays_the_mask(use_reentrant):
    def call(q):
        return flash_attn_func(q, q * 0.5, q * 2.0, dropout_p=0.4, causal=True)

    q = torch.randn(2, 24, 2, 8, requires_grad=True)
    grads = []
    for run in (call, lambda q: checkpoint(call, q, use_reentrant=use_reentrant)):
        torch.manual_seed(1)
        out = run(q)
        q.grad = None
        out.square().sum().backward()
        grads.append((out.detach(), q.grad))
    assert torch.equal(grads[0][0], grads[1][0]) and torch.equal(grads[0][1], grads[1][1])


def test_backward_uses_the_forwards_mask():
    q, k, v = (torch.randn(1, 16, 1, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))
    torch.manual_seed(9)
    out = flash_attn_func(q, k, v, dropout_p=0.5)
    torch.manual_seed(9)
    rng_state = torch.randint(0, 2**62, (2,))
    expected, _ = attention_reference(q, k, v, dropout_p=0.5, rng_state=rng_state)
    torch.testing.assert_close(out, expected)
    dout = torch.randn_like(out)
    torch.testing.assert_close(
        torch.autograd.grad(out, (q, k, v), dout), torch.autograd.grad(expected, (q, k, v), dout)
    )
