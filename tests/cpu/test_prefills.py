"""Prefills in one call of C: of texts of several lengths, and of priors that read no text."""

import copy

import pytest
import torch

from fastprior import DiffusionPriorNetwork
from fastprior.kernels.cpu import blocks as cpu_blocks
from fastprior.models import snapshot
from fastprior.models.prior_transformer import cached_blocks
from helpers.cpu_cases import (
    BF16,
    FP32,
    NEEDS_KERNELS,
    block_arguments,
    check,
    count_calls,
    make_blocks,
    prior_step,
    random,
    through_reference,
)
from helpers.priors import relative_error

pytestmark = NEEDS_KERNELS
LENGTHS = 4, 1, 7, 0, 3, 7  # of texts, of which one has nothing to read


@pytest.fixture
def calls(monkeypatch):
    return count_calls(monkeypatch)


@pytest.fixture
def tokens(monkeypatch):
    """Of x, in each call of `run_blocks`."""
    found, run = [], cpu_blocks.run_blocks

    def counted(x, *args, **kwargs):
        found.append(x.shape[:2].numel())
        return run(x, *args, **kwargs)

    monkeypatch.setattr(cpu_blocks, "run_blocks", counted)
    return found


def texts(lengths=LENGTHS, dim=40):
    """Tokens (texts, 7, dim), and a mask that hides some in the middle and some behind."""
    mask = torch.full((len(lengths), 7), cached_blocks.HIDDEN)
    for row, length in zip(mask, lengths):
        row[torch.randperm(7, generator=torch.Generator().manual_seed(length))[:length]] = 0
    return random(len(lengths), 7, dim), mask


@torch.no_grad()
def prefill(blocks, x, mask, prompts=None):
    dtype = BF16 if blocks[0].norm1.weight.dtype == BF16 else None
    return cached_blocks.prefill(blocks, x, mask, prompts, dtype=dtype)


def seen(prefix, name, lengths):
    """Keys or values of the tokens that there are, (tokens, depth, heads, dim_head)."""
    rows = getattr(prefix, name).permute(1, 3, 0, 2, 4)
    return torch.cat([row[:length] for row, length in zip(rows, lengths)])


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("most, parts", [(1000, [22]), (12, [12, 10]), (7, [5, 7, 3, 7])])
def test_texts_of_several_lengths(calls, tokens, monkeypatch, dtype, most, parts):
    monkeypatch.setattr(cpu_blocks, "most_tokens", lambda _: most)
    blocks, (x, mask) = make_blocks(dtype=dtype), texts()
    got = prefill(blocks, x, mask)
    assert tokens == parts and not calls["linear"], "of the tokens that there are, and no others"
    plain = through_reference(prefill, blocks, x, mask)
    exact = through_reference(prefill, copy.deepcopy(blocks).double(), x.double(), mask.double())
    for name in "k", "v":
        check(*(seen(prefix, name, LENGTHS) for prefix in (got, exact, plain)))
    torch.testing.assert_close(got.mask, plain.mask, rtol=0, atol=0)
    assert got.k.shape == plain.k.shape and got.k.isfinite().all() and got.v.isfinite().all()


def test_each_text_is_what_it_is_alone():
    blocks, (x, mask) = make_blocks(), texts((7, 2, 5))
    together = prefill(blocks, x, mask)
    for row, length in enumerate((7, 2, 5)):
        alone = prefill(blocks, x[row : row + 1], mask[row : row + 1])
        for name in "k", "v":
            found, wanted = getattr(together, name)[:, row, :, :length], getattr(alone, name)[:, 0]
            assert relative_error(found, wanted) < 1e-5, f"{name} of text {row}"


def test_prompts_of_the_same_text(calls):
    blocks, (x, mask) = make_blocks(), texts((3, 5))
    got, (first, second) = prefill(blocks, x, mask, torch.tensor([1, 1, 0])), prefill(blocks, x, mask).k.unbind(1)
    torch.testing.assert_close(got.k, torch.stack((second, second, first), dim=1), rtol=0, atol=0)
    assert got.mask.shape == (3, 5) and calls["run_blocks"] == 2


def test_masks_that_only_weaken_tokens_are_left_to_pytorch(calls):
    blocks, (x, mask) = make_blocks(), texts((7, 7))
    mask[0, 3] = -2.0
    got, before = prefill(blocks, x, mask), calls["run_blocks"]
    assert before == 0 and relative_error(got.k, through_reference(prefill, blocks, x, mask).k) < 1e-5
    assert prior_step(blocks, x[:, :6], random(4, 3, 40)).isfinite().all()


@pytest.mark.parametrize("starts", [[0, 2, 5], [1, 6], [0, 4, 3, 6], [0], [], [0, 2, 7]], ids=str)
def test_starts_that_are_none(starts):
    given = block_arguments(suffix=6) | dict(outputs=0, rotary=None, bias=None, starts=starts)
    given["x"] = given["x"][:1]
    with pytest.raises(ValueError, match="they must rise from 0 to the 6 tokens of x"):
        cpu_blocks.run_blocks(**given)


@pytest.mark.parametrize("change", [dict(outputs=1), dict(bias=True), dict(rotary=True), dict(rows=2)], ids=str)
def test_what_starts_go_without(change):
    given = block_arguments(suffix=6)
    plain = dict(outputs=0, rotary=None, bias=None, starts=[0, 6], x=given["x"][: change.get("rows", 1)])
    kept = {name: given[name] for name in ("rotary", "bias") if name in change}
    with pytest.raises(ValueError, match="starts are of one row"):
        cpu_blocks.run_blocks(**given | plain | kept | {k: v for k, v in change.items() if k == "outputs"})


# without a text


def network(**changes):
    torch.manual_seed(0)
    config = dict(dim=40, depth=3, dim_head=12, heads=3, num_timesteps=10, max_text_len=9) | changes
    return DiffusionPriorNetwork(**config).eval()


@torch.no_grad()
def of_embeds(net, text_embed, text_encodings=None, null_rows=0):
    with snapshot.running(net) as running:
        return running.prefill(text_embed, text_encodings, torch.arange(3), null_rows).cache


@pytest.mark.parametrize("changes", [{}, dict(num_text_embeds=2), dict(self_cond=True), dict(max_text_len=0)], ids=str)
def test_what_all_prompts_begin_with_runs_once(tokens, changes):
    net, embeds = network(**changes), random(5, 40)
    plain = through_reference(of_embeds, net, embeds)
    own, shared = 5 * net.num_text_embeds, [net.max_text_len] * bool(net.max_text_len)
    for expected in (shared + [own], [own]):
        tokens.clear()
        got = of_embeds(net, embeds)
        assert tokens == expected
        assert torch.equal(got.bias, plain.bias) and torch.equal(got.rotary[0], plain.rotary[0])
        for name in "k", "v":
            assert relative_error(getattr(got, name), getattr(plain, name)) < 1e-5


def test_an_edit_of_weights_is_seen():
    net, embeds = network(), random(5, 40)
    before = of_embeds(net, embeds)
    with torch.no_grad():
        net.null_text_encodings.mul_(2)
        net.causal_transformer.layers[0][0].to_kv.weight.mul_(1.5)
    got, wanted = of_embeds(net, embeds), through_reference(of_embeds, net, embeds)
    assert relative_error(got.k, wanted.k) < 1e-5 < relative_error(got.k, before.k)


def test_the_unconditional_branch_runs_once(tokens):
    net, embeds, encodings = network(self_cond=True), random(2, 40), random(2, 9, 40)
    plain = through_reference(of_embeds, copy.deepcopy(net), embeds, encodings, 2)
    for expected in ([20, 10], [20]):
        tokens.clear()
        got = of_embeds(net, embeds, encodings, 2)
        assert tokens == expected and relative_error(got.k, plain.k) < 1e-5
    with torch.no_grad():
        net.null_text_embeds[..., :20].add_(1)
    got, wanted = of_embeds(net, embeds, encodings, 2), through_reference(of_embeds, net, embeds, encodings, 2)
    assert relative_error(got.k, wanted.k) < 1e-5 < relative_error(got.k, plain.k)


def test_conditions_stand_in_front_of_what_would_be_shared(tokens):
    net, embeds = network(conditions=dict(score=dict(kind="scalar"))), random(5, 40)
    with torch.no_grad():
        got = net.prefill(embeds, None, torch.arange(3), conditions=dict(score=torch.arange(5.0))).cache
        with_reference = through_reference(
            net.prefill, embeds, None, torch.arange(3), 0, dict(score=torch.arange(5.0))
        ).cache
    assert tokens == [5 * net.prefix_tokens] and relative_error(got.k, with_reference.k) < 1e-5
