"""CLIP's byte-pair tokenizer in dalle2-pytorch's conventions: no start and end ids, zero padding.

For the ids that CLIP itself expects (with start and end) use an adapter's `tokenize`. open-clip-torch, which holds
the vocabulary, is imported on first use.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

START_ID, END_ID = 49406, 49407


class SimpleTokenizer:
    """Lazy tokenizer over OpenCLIP's byte-pair merges, with `<|startoftext|>` and `<|endoftext|>` as special texts."""

    vocab_size = 49408

    @cached_property
    def _bpe(self) -> Any:
        try:
            import regex
            from open_clip.tokenizer import SimpleTokenizer as OpenClipTokenizer
        except ImportError as error:
            raise ImportError('open-clip-torch is not installed: pip install "fastprior[clip]"') from error
        bpe = OpenClipTokenizer()
        pattern = bpe.pat.pattern
        for index, text in ((START_ID, "<|startoftext|>"), (END_ID, "<|endoftext|>")):
            other = bpe.decoder[index]  # OpenCLIP's spelling, which is ordinary text here
            pattern = pattern.replace(other, regex.escape(text))
            del bpe.encoder[other], bpe.cache[other]
            bpe.encoder[text], bpe.decoder[index], bpe.cache[text] = index, text, text
        bpe.pat = regex.compile(pattern, regex.IGNORECASE)
        return bpe

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, cleaned and lower-cased, without start and end ids."""
        return self._bpe.encode(text)

    def decode(
        self, tokens: Tensor | Iterable[int], remove_start_end: bool = True, pad_tokens: Iterable[int] = frozenset()
    ) -> str:
        """Text of tokens: (seq,); leaves out `pad_tokens` and, by default, the start, end and padding (0) ids."""
        skipped = set(pad_tokens) | ({START_ID, END_ID, 0} if remove_start_end else set())
        ids = tokens.tolist() if isinstance(tokens, Tensor) else tokens
        return self._bpe.decode([i for i in ids if i not in skipped])

    def tokenize(self, texts: str | list[str], context_length: int = 256, truncate_text: bool = False) -> Tensor:
        """Ids of `texts`: (batch, context_length), int64, padded with 0.

        Raises RuntimeError for a text longer than `context_length`, unless truncate_text cuts it.
        """
        texts = [texts] if isinstance(texts, str) else texts
        result = torch.zeros(len(texts), context_length, dtype=torch.long)
        for row, text in zip(result, texts):
            ids = self.encode(text)
            if len(ids) > context_length and not truncate_text:
                raise RuntimeError(f"Input {text} is too long for context length {context_length}: {len(ids)} tokens")
            ids = ids[:context_length]
            row[: len(ids)] = torch.tensor(ids, dtype=torch.long)
        return result


tokenizer = SimpleTokenizer()
# so that the module, too, can be used as the tokenizer: `from fastprior import tokenizer; tokenizer.tokenize(...)`
encode, decode, tokenize, vocab_size = tokenizer.encode, tokenizer.decode, tokenizer.tokenize, tokenizer.vocab_size
