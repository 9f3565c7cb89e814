"""The parts of a diffusers pipeline around its prior, loaded from its folder when they are needed, and its noise."""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from fastprior.diffusion.diffusers_schedules import DiffusersSchedule
from fastprior.diffusion.solvers import StepTable
from fastprior.draws import drawing
from fastprior.pipelines.text_encoding import Generators, TextEncoding

if TYPE_CHECKING:
    from fastprior.models.prior_transformer.model import PriorTransformer

PARTS = {  # all but the prior and the scheduler; transformers has these
    "text_encoder": "CLIPTextModelWithProjection",
    "tokenizer": "CLIPTokenizer",
    "image_encoder": "CLIPVisionModelWithProjection",
    "image_processor": "CLIPImageProcessor",
}
_tokenizing = threading.Lock()  # a call changes how the tokenizer pads, for all threads
Pipeline = TypeVar("Pipeline", bound="PipelineParts")


def listed(name: str, texts: str | list[str]) -> list[str]:
    texts = [texts] if isinstance(texts, str) else texts
    if not isinstance(texts, (list, tuple)) or not texts or not all(isinstance(text, str) for text in texts):
        raise TypeError(f"{name}={texts!r}; it must be a string, a list of strings, or a TextEncoding")
    return list(texts)


def _subfolder(folder: Path, name: str) -> Path:
    """Of a part; pipelines that hold a decoder as well say `prior_` in front of what is the prior's."""
    own = folder / f"prior_{name}"
    return own if own.is_dir() else folder / name


class PipelineParts:
    """A prior, its schedule, and the encoders of its pipeline.

    Args:
        prior: in eval mode.
        schedule: of the noise.
        folder: of the pipeline, from where `PARTS` are loaded when they are needed.
        variant: of the weights' files, such as "fp16", where a part has it.
        **parts: those of `PARTS` that are not in the folder, or in place of the folder's.
    """

    def __init__(
        self,
        prior: PriorTransformer,
        schedule: DiffusersSchedule,
        *,
        folder: str | os.PathLike | None = None,
        variant: str | None = None,
        **parts: Any,
    ):
        if not hasattr(prior, "prefill"):
            kind = f"{type(prior).__module__}.{type(prior).__name__}"
            raise TypeError(f"prior is a {kind}; it must be fastprior's, or made so by accelerate_prior")
        if unknown := sorted(set(parts) - set(PARTS)):
            raise TypeError(f"{unknown[0]}= is no part of a pipeline; it must be one of {', '.join(PARTS)}")
        self.prior, self.schedule, self.variant = prior, schedule, variant
        self.folder = None if folder is None else Path(folder)
        self._parts = {name: part for name, part in parts.items() if part is not None}
        self._zero: Tensor | None = None

    @classmethod
    def from_pretrained(
        cls: type[Pipeline],
        folder: str | os.PathLike,
        *,
        variant: str | None = None,
        dtype: torch.dtype | None = None,
        device: str | torch.device = "cpu",
        **kwargs: Any,
    ) -> Pipeline:
        """Read a pipeline's folder, as diffusers saves it: the prior and the scheduler now, the rest when needed.

        Args:
            dtype: of the prior and the encoders, fp32 by default.
            **kwargs: see the class.
        Raises:
            FileNotFoundError: there is no such folder, or no prior or scheduler in it.
        """
        from fastprior.models.prior_transformer.model import PriorTransformer

        if not (Path(folder) / "prior").is_dir():
            raise FileNotFoundError(f"{folder} has no folder 'prior'; it must be the folder of a pipeline with a prior")
        schedule = DiffusersSchedule.from_pretrained(_subfolder(Path(folder), "scheduler"))
        prior = PriorTransformer.from_pretrained(folder, subfolder="prior", variant=variant, torch_dtype=dtype)
        return cls(prior.to(device), schedule, folder=folder, variant=variant, **kwargs)

    @property
    def device(self) -> torch.device:
        return self.prior.device

    @property
    def dtype(self) -> torch.dtype:
        return self.prior.dtype

    def has(self, name: str) -> bool:
        """Whether there is a part of that name, loaded or not."""
        return name in self._parts or (self.folder is not None and _subfolder(self.folder, name).is_dir())

    def part(self, name: str) -> Any:
        """A part, loaded when it is first needed."""
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
            part = getattr(transformers, PARTS[name]).from_pretrained(folder, local_files_only=True, **options)
            if isinstance(part, nn.Module):
                part = part.to(device=self.device, dtype=self.dtype).eval()
            self._parts[name] = part
        return self._parts[name]

    @torch.no_grad()
    def encode_text(self, texts: str | list[str]) -> TextEncoding:
        """Encode texts; those that are longer than the text encoder takes are cut, with a warning."""
        texts, tokenizer = listed("texts", texts), self.part("tokenizer")
        length = tokenizer.model_max_length
        with _tokenizing:
            lengths = [len(tokens) for tokens in tokenizer(texts).input_ids]
            tokens = tokenizer(texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        if cut := [text for text, own in zip(texts, lengths) if own > length]:
            rule = f"have more than {length} tokens, and are cut there"
            warnings.warn(f"{len(cut)} texts {rule}; the first is {cut[0]!r}")
        encoded = self.part("text_encoder")(tokens.input_ids.to(self.device))
        mask = tokens.attention_mask.bool().to(self.device)
        return TextEncoding(encoded.text_embeds, encoded.last_hidden_state, mask)

    @torch.no_grad()
    def encode_image(self, image: Any) -> Tensor:
        """CLIP embeddings (images, dim) of a PIL image, a list of them, or preprocessed pixels (images, 3, h, w)."""
        if isinstance(image, (list, tuple)) and image and all(torch.is_tensor(pixels) for pixels in image):
            image = torch.cat(list(image))
        if not torch.is_tensor(image):
            image = self.part("image_processor")(image, return_tensors="pt").pixel_values
        if image.ndim != 4:
            raise ValueError(f"image has shape {tuple(image.shape)}; it must be (images, 3, height, width)")
        return self.part("image_encoder")(image.to(self.device, self.dtype)).image_embeds

    def zero_embed(self) -> Tensor:
        """(1, dim), the embedding of an all-zero image: what decoders are guided away from by default."""
        if self._zero is None:
            size = self.part("image_encoder").config.image_size
            self._zero = self.encode_image(torch.zeros(1, 3, size, size))
        return self._zero

    def noise(self, rows: int, dim: int, generator: Generators, dtype: torch.dtype) -> Callable[[], Tensor]:
        """Draws noise (rows, dim), fp32 or wider, as diffusers does: in the text's dtype, where the generator lives."""
        generators = list(generator) if isinstance(generator, (list, tuple)) else [generator]
        if len(generators) not in (1, rows):
            raise ValueError(f"generator has {len(generators)} entries; it must be one, or one for each of {rows} rows")
        shape = rows // len(generators), dim

        def draw() -> Tensor:
            noise = []
            for one in generators:
                device = one.device if one else self.device
                with drawing(device, one):
                    noise.append(torch.randn(shape, generator=one, device=device, dtype=dtype))
            return torch.cat(noise).to(self.device, torch.promote_types(dtype, torch.float32))

        return draw

    def pure_noise(
        self, table: StepTable, draw: Callable[[], Tensor], latents: Tensor | None, shape: tuple[int, ...]
    ) -> Tensor:
        """What a run begins with, drawn where `latents` are not given."""
        if latents is None:
            return draw() * table.noise_scale
        if latents.shape != shape:
            raise ValueError(f"latents has shape {tuple(latents.shape)}; it must be {shape}")
        return latents.to(self.device, torch.promote_types(latents.dtype, torch.float32)) * table.noise_scale
