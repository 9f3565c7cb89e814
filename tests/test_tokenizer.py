"""The tokenizer against dalle2-pytorch's."""

import importlib.util
import sys

import pytest
import torch

from fastprior.tokenizer import tokenizer

needs_open_clip = pytest.mark.skipif(importlib.util.find_spec("open_clip") is None, reason="needs open_clip")

TEXTS = [
    "a cat",
    "A  Photograph of\tTWO corgis' ears; it's 1969!\n",
    "naïve café, 東京タワー 🗼 ¿qué? ½ ﬁ",
    "&lt;b&gt; &amp;amp; l’été “quoted” — dash…",
    "<|startoftext|>hello<|endoftext|> <start_of_text> <end_of_text> <|STARTOFTEXT|>",
    "supercalifragilisticexpialidocious antidisestablishmentarianism xqzwv",
    "",
    "\x1c\x1f\x85\u2003 zero​width",
]


@pytest.fixture(scope="module")
def peer_tokenizer():
    pytest.importorskip("dalle2_pytorch")
    from dalle2_pytorch import dalle2_pytorch

    return dalle2_pytorch.tokenizer


def random_text(seed):
    generator = torch.Generator().manual_seed(seed)
    ranges = ((32, 127), (32, 127), (160, 600), (0x4E00, 0x4E40), (0x1F600, 0x1F640), (0x2000, 0x2070))
    pick = torch.randint(0, len(ranges), (40,), generator=generator).tolist()
    shift = torch.rand(40, generator=generator).tolist()
    return "".join(chr(ranges[i][0] + int(f * (ranges[i][1] - ranges[i][0]))) for i, f in zip(pick, shift))


@pytest.mark.parametrize("texts", [TEXTS, [random_text(seed) for seed in range(200)]], ids=["chosen", "random"])
def test_tokenizer_gives_the_peers_ids(peer_tokenizer, texts):
    for text in texts:
        assert tokenizer.encode(text) == peer_tokenizer.encode(text), text
    ours, theirs = tokenizer.tokenize(texts), peer_tokenizer.tokenize(texts)
    assert ours.shape == (len(texts), 256) and ours.dtype == torch.int64
    assert torch.equal(ours, theirs)
    for row in theirs:
        if not set(row.tolist()) & {49407, 40407}:
            assert tokenizer.decode(row) == peer_tokenizer.decode(row)
        options = dict(remove_start_end=False, pad_tokens={0, 320})
        assert tokenizer.decode(row, **options) == peer_tokenizer.decode(row.tolist(), **options)


@needs_open_clip
def test_tokenizer_adds_no_start_or_end():
    assert tokenizer.tokenize("a cat", context_length=4).tolist() == [[320, 2368, 0, 0]]
    assert tokenizer.vocab_size == 49408


@needs_open_clip
def test_decode_drops_the_end_id_and_nothing_else():
    """dalle2-pytorch drops 40407, an ordinary token, in place of the end id 49407."""
    assert tokenizer.decode([49406, 320, 40407, 2368, 49407, 0]) == f"a {tokenizer.decode([40407])}cat "
    assert tokenizer.decode([40407]).strip()


@needs_open_clip
def test_long_text_needs_truncate_text(peer_tokenizer):
    text = "one two three four"
    expected = peer_tokenizer.tokenize(text, context_length=3, truncate_text=True)
    assert torch.equal(tokenizer.tokenize(text, context_length=3, truncate_text=True), expected)
    with pytest.raises(RuntimeError, match="Input one two three four is too long for context length 3: 4 tokens"):
        tokenizer.tokenize(text, context_length=3)


@needs_open_clip
def test_tokenizer_module_can_stand_for_the_tokenizer():
    module = sys.modules[type(tokenizer).__module__]
    assert torch.equal(module.tokenize("a cat"), tokenizer.tokenize("a cat"))
    assert module.decode(module.encode("a cat")) == "a cat " and module.vocab_size == 49408


def test_tokenizer_without_open_clip_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "open_clip", None)
    monkeypatch.setitem(sys.modules, "open_clip.tokenizer", None)
    with pytest.raises(ImportError, match=r'pip install "fastprior\[clip\]"'):
        type(tokenizer)().encode("a cat")
