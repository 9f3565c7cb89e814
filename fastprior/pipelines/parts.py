"""The parts of a diffusers pipeline: its prior and schedule, and encoders that are loaded when they are needed."""

from __future__ import annotations

import os
import threading
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastprior.checks import MOST, is_integer
from fastprior.diffusion.diffusers_schedules import DiffusersSchedule
from fastprior.kernels.reference import is_finite
from fastprior.models.prior_transformer.model import PriorTransformer
from fastprior.pipelines.text_encoding import TextEncoding
from fastprior.reading import quoted, read_json
from fastprior.weight_files.weights import check_weights

ENCODERS = {  # classes of transformers
    "text_encoder": "CLIPTextModelWithProjection",
    "tokenizer": "CLIPTokenizer",
    "image_encoder": "CLIPVisionModelWithProjection",
    "image_processor": "CLIPImageProcessor",
}
MOST_LAYERS = 2**8  # of an encoder
_tokenizing = threading.Lock()  # a call changes how the tokenizer pads, for all threads
if hasattr(os, "register_at_fork"):  # the thread that holds it is not in the child
    os.register_at_fork(after_in_child=_tokenizing._at_fork_reinit)


def listed(name: str, texts: str | list[str]) -> list[str]:
    """One text or several as a list. Raises TypeError, naming the argument, for anything else."""
    texts = [texts] if isinstance(texts, str) else texts
    if not isinstance(texts, (list, tuple)) or not texts or not all(isinstance(text, str) for text in texts):
        raise TypeError(f"{name}={texts!r}; it must be a string, a list of strings, or a TextEncoding")
    return list(texts)


def check_prior(prior: nn.Module) -> None:
    """Raise TypeError unless it is a `PriorTransformer` of ours, or a diffusers' one that was made so."""
    if not hasattr(prior, "prefill"):
        kind = f"{type(prior).__module__}.{type(prior).__name__}"
        raise TypeError(f"prior is a {kind}; it must be fastprior's, or made so by accelerate_prior")


def load(
    folder: str | os.PathLike, variant: str | None, dtype: torch.dtype | None, device: str | torch.device
) -> tuple[PriorTransformer, DiffusersSchedule]:
    """Read the prior and the scheduler of a pipeline's folder. Raises FileNotFoundError where one is missing."""
    folder = Path(folder)
    if not (folder / "prior").is_dir():
        raise FileNotFoundError(f"{folder} has no folder 'prior'; it must be the folder of a pipeline with a prior")
    schedule = DiffusersSchedule.from_pretrained(_subfolder(folder, "scheduler"))
    prior = PriorTransformer.from_pretrained(folder, subfolder="prior", variant=variant, torch_dtype=dtype)
    return prior.to(device), schedule


def _subfolder(folder: Path, name: str) -> Path:
    """The folder of a part; pipelines that hold a decoder as well say `prior_` in front of what is the prior's."""
    own = folder / f"prior_{name}"
    return own if own.is_dir() else folder / name


def _check_sizes(folder: Path) -> None:
    """Raise ValueError for numbers in an encoder's config.json that nothing should be built of."""
    waiting = [read_json(folder / "config.json")] if (folder / "config.json").is_file() else []
    while waiting:
        for name, value in waiting.pop().items():
            if isinstance(value, dict):
                waiting.append(value)
            most = MOST_LAYERS if name == "num_hidden_layers" else MOST
            if isinstance(value, int) and value > most:
                raise ValueError(f"{folder / 'config.json'}: {name:.100}={quoted(value)}; it must be at most {most:,}")


def _check_memory(kind: type, folder: Path) -> None:
    """Raise ValueError for an encoder with more weights than its files have bytes: what it lacks would be random."""
    if not issubclass(kind, nn.Module):
        return
    with torch.device("meta"):
        count = sum(weight.numel() for weight in kind(kind.config_class.from_pretrained(folder)).parameters())
    held = sum(file.stat().st_size for file in folder.iterdir() if file.suffix in (".safetensors", ".bin"))
    if count > held:
        raise ValueError(f"by its config it has {count:,} weights, and its files have {held:,} bytes")


class Encoders:
    """The encoders of a pipeline for texts and images, each loaded from its folder when it is first needed.

    Args:
        folder: of the pipeline.
        variant: of the weights' files, such as "fp16", where an encoder has it.
        text_encoder, tokenizer, image_encoder, image_processor: of transformers, instead of the folder's.
    """

    def __init__(
        self,
        folder: str | os.PathLike | None = None,
        variant: str | None = None,
        text_encoder: Any = None,
        tokenizer: Any = None,
        image_encoder: Any = None,
        image_processor: Any = None,
    ):
        self.folder, self.variant = None if folder is None else Path(folder), variant
        parts = text_encoder, tokenizer, image_encoder, image_processor
        self._parts = {name: part for name, part in zip(ENCODERS, parts) if part is not None}
        self._zero: Tensor | None = None

    def has(self, name: str) -> bool:
        """Whether there is a part of that name, loaded or not."""
        return name in self._parts or (self.folder is not None and _subfolder(self.folder, name).is_dir())

    def part(self, name: str, device: torch.device, dtype: torch.dtype) -> Any:
        """A part, there and in this dtype if it is loaded now."""
        if name not in self._parts:
            if not self.has(name):
                where = f"{self.folder} has no folder {name!r}" if self.folder else "no folder was given"
                raise ValueError(f"{name}=None; it is needed here and {where}: give {name}= or ready embeddings")
            try:
                import transformers
            except ImportError as error:
                raise ImportError(f"{name} of {self.folder} needs transformers: pip install transformers") from error
            folder, options = _subfolder(self.folder, name), {}
            if self.variant and any(folder.glob(f"*.{self.variant}.*")):
                options["variant"] = self.variant
            _check_sizes(folder)
            try:
                kind = getattr(transformers, ENCODERS[name])
                _check_memory(kind, folder)
                part = kind.from_pretrained(folder, local_files_only=True, **options)
            except Exception as error:  # of junk: transformers raises whatever its readers do
                detail = f"{type(error).__name__}: {quoted(str(error))[1:-1]}"
                raise ValueError(f"{name} cannot be read from {folder} ({detail})") from error
            if isinstance(part, nn.Module):
                check_weights(dict(part.named_parameters()), os.fspath(folder))
                part = part.to(device=device, dtype=dtype).eval()
            self._parts[name] = part
        return self._parts[name]

    def _encoded(self, name: str, encoder: nn.Module, given: Tensor) -> Any:
        """What an encoder gives; one that its config makes fail is named with its folder."""
        try:
            return encoder(given)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, TypeError, ValueError) as error:
            if self.folder is None:
                raise
            detail = f"{type(error).__name__}: {quoted(str(error))[1:-1]}"
            raise ValueError(f"{name} of {self.folder} cannot encode {tuple(given.shape)} ({detail})") from error

    @torch.no_grad()
    def encode_text(self, texts: str | list[str], device: torch.device, dtype: torch.dtype) -> TextEncoding:
        """Encode texts; those that are longer than the text encoder takes are cut, with a warning."""
        texts, tokenizer = listed("texts", texts), self.part("tokenizer", device, dtype)
        encoder = self.part("text_encoder", device, dtype)
        config = getattr(encoder, "config", None)
        length, positions = tokenizer.model_max_length, getattr(config, "max_position_embeddings", MOST)
        if not (is_integer(length) and 1 <= length <= positions):
            rule = f"it must be 1 to the text encoder's max_position_embeddings, {positions}"
            raise ValueError(f"tokenizer.model_max_length={quoted(length)}; {rule}")
        with _tokenizing:
            lengths = [len(tokens) for tokens in tokenizer(texts).input_ids]
            tokens = tokenizer(texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        if cut := [text for text, own in zip(texts, lengths) if own > length]:
            rule = f"have more than {length} tokens, and are cut there"
            warnings.warn(f"{len(cut)} texts {rule}; the first is {cut[0]!r}")
        highest, vocabulary = int(tokens.input_ids.max()), getattr(config, "vocab_size", MOST)
        if highest >= vocabulary:
            raise ValueError(f"the tokenizer gives the token {highest}; the text encoder has a vocab_size={vocabulary}")
        encoded = self._encoded("text_encoder", encoder, tokens.input_ids.to(device))
        if not is_finite(encoded.text_embeds):
            where = f" of {self.folder}" if self.folder else ""
            raise ValueError(f"the text encoder{where} gives NaN or infinity for {quoted(texts[0])} or others")
        mask = tokens.attention_mask.bool().to(device)
        return TextEncoding(encoded.text_embeds, encoded.last_hidden_state, mask)

    @torch.no_grad()
    def encode_image(self, image: Any, device: torch.device, dtype: torch.dtype) -> Tensor:
        """CLIP embeddings (images, dim) of a PIL image, a list of them, or preprocessed pixels (images, 3, h, w)."""
        if isinstance(image, (list, tuple)) and image and all(torch.is_tensor(pixels) for pixels in image):
            image = torch.cat(list(image))
        if not torch.is_tensor(image):
            image = self.part("image_processor", device, dtype)(image, return_tensors="pt").pixel_values
        if image.ndim != 4:
            raise ValueError(f"image has shape {tuple(image.shape)}; it must be (images, 3, height, width)")
        encoder = self.part("image_encoder", device, dtype)
        return self._encoded("image_encoder", encoder, image.to(device, dtype)).image_embeds

    def zero_embed(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        """(1, dim), the embedding of an all-zero image."""
        if self._zero is None:
            size = self.part("image_encoder", device, dtype).config.image_size
            self._zero = self.encode_image(torch.zeros(1, 3, size, size), device, dtype)
        return self._zero


def first_state(latents: Tensor, shape: tuple[int, ...], device: torch.device) -> Tensor:
    """The initial noise that a user gave, in fp32 or wider. Raises ValueError for another shape."""
    if latents.shape != shape:
        raise ValueError(f"latents has shape {tuple(latents.shape)}; it must be {shape}")
    return latents.to(device, torch.promote_types(latents.dtype, torch.float32))
