"""Handwritten digits with captions in words: the data, the tiny CLIP and the terminal pictures of the quickstart."""

from __future__ import annotations

import hashlib
import re
import sys
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastprior.clip import BaseClipAdapter, EmbedImageReturn, EmbedTextReturn
from fastprior.utils import atomic, save_array

NAME = "digits"  # how a checkpoint names this text encoder
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
PHRASINGS = (
    "a handwritten {}",
    "the digit {}, written by hand",
    "a {} drawn with a pen",
    "handwriting of the number {}",
)
SIDE = 8  # an image is SIDE x SIDE pixels
DIM = SIDE * SIDE
MAX_WORDS = 8
SHARDS = 4


# the tiny CLIP


def words_of(caption: str) -> list[str]:
    """The words of a caption in lower case, with single digits spelled out."""
    words = re.findall(r"\w+", caption.lower())
    return [NUMBERS[int(word)] if len(word) == 1 and word in "0123456789" else word for word in words]


KNOWN_WORDS = frozenset(word for phrase in PHRASINGS for word in (*words_of(phrase.format("")), *NUMBERS))


def digit_of(caption: str) -> int:
    """The digit that a caption names. Raises ValueError where it does not name exactly one."""
    named = {NUMBERS.index(word) for word in words_of(caption) if word in NUMBERS}
    if len(named) != 1:
        raise ValueError(f"caption={caption!r}; it must name exactly one digit")
    return named.pop()


@lru_cache(maxsize=4096)
def _direction(key: str) -> np.ndarray:
    """A pseudorandom unit vector (DIM,), the same on every machine: uniform numbers from a hash of the key."""
    raw = np.frombuffer(hashlib.shake_256(key.encode()).digest(2 * DIM), dtype="<u2")
    centred = raw.astype(np.float64) - 32767.5
    return centred / np.linalg.norm(centred)


class DigitsClip(BaseClipAdapter):
    """A CLIP for digits that needs no training: words become hashed vectors, and images their own pixels.

    `text_encodings` is one vector per word, of word and position; `text_embed` is the mean of the words. Both towers
    are of unit length in the same 64 dimensions, but they were never aligned: their cosine is about zero.
    """

    dim_latent = property(lambda self: DIM)
    image_size = property(lambda self: SIDE)
    image_channels = property(lambda self: 1)
    max_text_len = property(lambda self: MAX_WORDS)

    def __init__(self):
        super().__init__(nn.Identity())

    def tokenize(self, texts: list[str]) -> Tensor:
        """Hashed words, 0 behind the last: (batch, 8), int64. Raises ValueError for no words, or more than 8."""
        tokens = torch.zeros(len(texts), MAX_WORDS, dtype=torch.int64)
        for row, text in zip(tokens, texts):
            words = words_of(text)
            if not 1 <= len(words) <= MAX_WORDS:
                raise ValueError(f"caption {text!r} has {len(words)} words; it must have 1 to {MAX_WORDS}")
            for place, word in enumerate(words):
                row[place] = 1 + int.from_bytes(hashlib.sha256(word.encode()).digest()[:7], "little")
        return tokens

    def embed_text(self, text: Tensor) -> EmbedTextReturn:
        """Embed text: (batch, words), int64 from `tokenize`."""
        encodings = np.zeros((*text.shape, DIM), dtype=np.float32)
        embeds = np.zeros((len(text), DIM), dtype=np.float32)
        for index, row in enumerate(text.tolist()):
            words = [_direction(f"word {token}") for token in row if token]
            for place, word in enumerate(words):
                encodings[index, place] = word + _direction(f"position {place}")
            total = np.sum(words, axis=0)
            embeds[index] = total / np.linalg.norm(total)
        # features of about unit variance, as a CLIP's last layer norm leaves them
        encodings *= (DIM / 2) ** 0.5
        return EmbedTextReturn(torch.from_numpy(embeds).to(text.device), torch.from_numpy(encodings).to(text.device))

    def embed_image(self, image: Tensor) -> EmbedImageReturn:
        """Embed image: (batch, 1, height, width), float in [0, 1]."""
        return EmbedImageReturn(F.normalize(self.validate_and_resize_image(image).flatten(1), dim=-1), None)


# the data, on disk as clip-retrieval leaves it


def write_digits(folder: Path, seed: int) -> None:
    """Write scikit-learn's 1,797 digits, shuffled, as shards of embeddings and captions.

    `folder/img_emb/img_emb_<i>.npy` and `folder/text_emb/text_emb_<i>.npy` hold (rows, 64) fp32 and
    `folder/metadata/metadata_<i>.parquet` the columns `image_path` (the image's index in the bundle) and `caption`, as
    clip-retrieval writes them; `folder/text_encodings/text_encodings_<i>.npy` holds (rows, 8, 64) fp32.
    """
    import pandas as pd
    from sklearn.datasets import load_digits

    bundle = load_digits()
    rng = np.random.default_rng(seed)
    images = torch.from_numpy(bundle.images).float()[:, None] / 16
    clip = DigitsClip()
    embeds = clip.embed_image(images).image_embed.numpy()
    phrasings = rng.integers(len(PHRASINGS), size=len(embeds))
    captions = [PHRASINGS[p].format(NUMBERS[digit]) for p, digit in zip(phrasings, bundle.target)]
    table = pd.DataFrame({"image_path": [f"load_digits/{i}" for i in range(len(embeds))], "caption": captions})
    text = (t.numpy() for t in clip.embed_text(clip.tokenize(captions)))
    arrays = dict(zip(("img_emb", "text_emb", "text_encodings"), (embeds, *text)))
    for kind in (*arrays, "metadata"):
        (folder / kind).mkdir(parents=True, exist_ok=True)
    for shard, rows in enumerate(np.array_split(rng.permutation(len(embeds)), SHARDS)):
        for kind, array in arrays.items():
            save_array(folder / kind / f"{kind}_{shard}.npy", array[rows])
        with atomic(folder / "metadata" / f"metadata_{shard}.parquet") as path:
            table.iloc[rows].to_parquet(path, index=False)


def read_digits(folder: Path) -> tuple[Tensor, list[str]]:
    """Read the shards back: image embeddings (images, 64) and their captions.

    Raises ValueError where the folder holds shards other than those that `write_digits` leaves.
    """
    from fastprior.dataloaders import EmbeddingShards, PairStream

    for kind, suffix in (("img_emb", "npy"), ("metadata", "parquet")):
        found = sorted(str(path.relative_to(folder)) for path in folder.glob(f"{kind}/**/*.{suffix}"))
        wanted = [str(Path(kind) / f"{kind}_{shard}.{suffix}") for shard in range(SHARDS)]
        if found != wanted:
            raise ValueError(f"{folder} holds {', '.join(found) or 'nothing'}; it must hold {', '.join(wanted)}")
    shards = EmbeddingShards.open(folder / "img_emb", folder / "metadata")
    (batch,) = PairStream(shards, batch_size=shards.pairs)
    return batch["image_embed"], batch["text"]


@dataclass
class Pairs:
    """Pairs of captions and images by row."""

    text_embed: Tensor  # (rows, 64), fp32
    text_encodings: Tensor  # (rows, 8, 64), fp32
    image_embed: Tensor  # (rows, 64), fp32
    digits: Tensor  # (rows,), int64

    def __len__(self) -> int:
        return len(self.digits)

    def __getitem__(self, rows) -> Pairs:
        return Pairs(*(t[rows] for t in (self.text_embed, self.text_encodings, self.image_embed, self.digits)))

    @property
    def text_cond(self) -> dict[str, Tensor]:
        return dict(text_embed=self.text_embed, text_encodings=self.text_encodings)


def load_pairs(folder: Path) -> Pairs:
    """The rows of a folder that `write_digits` wrote."""
    image_embed, captions = read_digits(folder)
    clip = DigitsClip()
    text_embed, text_encodings = clip.embed_text(clip.tokenize(captions))
    return Pairs(text_embed, text_encodings, image_embed, torch.tensor([digit_of(caption) for caption in captions]))


# pictures


def terminal_picture(embeds: Tensor) -> str:
    """Draw image embeddings (images, 64) side by side in block characters; plain ASCII where those cannot be shown."""
    shades = " ░▒▓█"
    try:
        shades.encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        shades = " .+%@"
    pixels = embeds.float().cpu().clamp(min=0).view(-1, SIDE, SIDE)
    brightest = pixels.amax(dim=(1, 2), keepdim=True).clamp(min=1e-6)
    levels = (pixels / brightest * (len(shades) - 1)).round().long().tolist()
    rows = ["    ".join("".join(shades[level] * 2 for level in image[y]) for image in levels) for y in range(SIDE)]
    return "\n".join(row.rstrip() for row in rows)
