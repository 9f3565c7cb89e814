"""CLIP adapters: one interface, tokens and images in, embeddings out, over OpenCLIP, OpenAI CLIP, x-clip and CoCa.

Importing this module loads torch only; open-clip-torch is imported when an adapter that needs it is constructed.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastprior.weight_files.clip_file import fill_clip

EOS_ID = 49407  # end of text in CLIP's byte-pair vocabulary; 0 is both the padding and "!"


class EmbedTextReturn(NamedTuple):
    """text_embed: (batch, dim_latent), text_encodings: (batch, seq, dim_text_encodings), 0 where masked, or None."""

    text_embed: Tensor
    text_encodings: Tensor | None


class EmbedImageReturn(NamedTuple):
    """image_embed: (batch, dim_latent), image_encodings: (batch, patches, dim) or None."""

    image_embed: Tensor
    image_encodings: Tensor | None


EmbeddedText, EmbeddedImage = EmbedTextReturn, EmbedImageReturn


def freeze_and_eval(module: nn.Module) -> nn.Module:
    """Put `module` in eval mode, turn its parameters' gradients off, and return it."""
    return module.eval().requires_grad_(False)


def resize_image_to(image: Tensor, size: int) -> Tensor:
    """Scale image: (batch, channels, height, width), float, so that its width becomes `size`, antialiased bicubic.

    Uses `resize_right` where it is installed, else `F.interpolate`: the two differ only at the border, which
    resize_right mixes with zeros.
    """
    height, width = image.shape[-2:]
    if width == size:
        return image
    scale = size / width  # which times width can exceed size by one rounding (293 -> 224): the width is given
    out_shape = (size if height == width else math.ceil(scale * height), size)
    try:
        from resize_right import resize
    except ImportError:
        return F.interpolate(image, out_shape, mode="bicubic", antialias=True)
    return resize(image, scale_factors=scale, out_shape=out_shape)


class BaseClipAdapter(nn.Module):
    """Base of CLIP adapters; subclass it to plug in your own.

    A subclass defines the methods `embed_text` and `embed_image`, `tokenize` where strings are to be accepted, and the
    properties `dim_latent` (width of `text_embed` and `image_embed`), `dim_text_encodings` (that of `text_encodings`,
    which a prior can be conditioned on only where it equals `dim_latent`, the default), `image_size`, `image_channels`
    and `max_text_len`. `overrides` are kept in `self.overrides`. An adapter stays in eval mode when the model around it
    is put in training mode: its embeddings are conditioning and targets, which dropout must not blur.
    """

    def _undefined(self):
        raise NotImplementedError

    dim_latent = image_size = image_channels = max_text_len = property(_undefined)
    dim_text_encodings = property(lambda self: self.dim_latent)

    def __init__(self, clip: nn.Module, **overrides: Any):
        super().__init__()
        self.clip = clip
        self.overrides = overrides

    def train(self, mode: bool = True) -> BaseClipAdapter:
        return super().train(False)

    def tokenize(self, texts: list[str]) -> Tensor:
        """Token ids of `texts`: (batch, max_text_len), int64, on the CPU."""
        raise NotImplementedError(
            f"{type(self).__name__} has no tokenizer: pass token ids instead of strings, or override tokenize(texts)"
        )

    def embed_text(self, text: Tensor) -> EmbedTextReturn:
        """Embed text: (batch, seq), int64 token ids, cut to `max_text_len`."""
        raise NotImplementedError

    def embed_image(self, image: Tensor) -> EmbedImageReturn:
        """Embed image: (batch, channels, height, width), float in [0, 1], scaled down to `image_size`."""
        raise NotImplementedError

    def validate_and_resize_image(self, image: Tensor) -> Tensor:
        """Scale `image` down to `image_size`. Raises ValueError if it is smaller than that."""
        if image.shape[-1] < self.image_size:
            raise ValueError(f"image is {image.shape[-1]} wide; this CLIP needs at least {self.image_size}")
        return resize_image_to(image, self.image_size)


class XClipAdapter(BaseClipAdapter):
    """Adapter for an `x_clip.CLIP` with a text CLS token; encodings are (batch, seq, dim_text), 0 at token 0."""

    dim_latent = property(lambda self: self.clip.dim_latent)
    dim_text_encodings = property(lambda self: self.clip.dim_text)
    image_size = property(lambda self: self.clip.image_size)
    image_channels = property(lambda self: self.clip.image_channels)
    max_text_len = property(lambda self: self.clip.text_seq_len)

    @torch.no_grad()
    def embed_text(self, text: Tensor) -> EmbedTextReturn:
        text = text[..., : self.max_text_len]
        cls, encodings = self.clip.text_transformer(text), None
        if cls.ndim == 3:  # a text encoder of the user's own may return the CLS alone
            cls, encodings = cls[:, 0], cls[:, 1:]
            if encodings.shape[1] != text.shape[1]:
                raise ValueError("x_clip.CLIP must have a text CLS token: text_causal_mask=True has none")
            encodings = encodings.masked_fill((text == 0).unsqueeze(-1), 0.0)
        return EmbedTextReturn(F.normalize(self.clip.to_text_latent(cls), dim=-1), encodings)

    @torch.no_grad()
    def embed_image(self, image: Tensor) -> EmbedImageReturn:
        encoded = self.clip.visual_transformer(self.validate_and_resize_image(image))
        embed = F.normalize(self.clip.to_visual_latent(encoded[:, 0]), dim=-1)
        return EmbedImageReturn(embed, encoded[:, 1:])


class CoCaAdapter(BaseClipAdapter):
    """Adapter for a `coca_pytorch.CoCa`, given with image_size=, image_channels= and max_text_len=.

    The embeddings are CoCa's layer-normed CLS tokens, (batch, dim), not l2-normed; encodings are 0 at token 0.
    """

    def _override(self, name: str) -> int:
        if name not in self.overrides:
            raise ValueError(f"CoCaAdapter needs {name}=: a CoCa does not know it (given: {sorted(self.overrides)})")
        return self.overrides[name]

    dim_latent = property(lambda self: self.clip.dim)
    image_size = property(lambda self: self._override("image_size"))
    image_channels = property(lambda self: self._override("image_channels"))
    max_text_len = property(lambda self: self._override("max_text_len"))

    @torch.no_grad()
    def embed_text(self, text: Tensor) -> EmbedTextReturn:
        text = text[..., : self.max_text_len]
        embed, encodings = self.clip.embed_text(text)
        return EmbedTextReturn(embed, encodings.masked_fill((text == 0).unsqueeze(-1), 0.0))

    @torch.no_grad()
    def embed_image(self, image: Tensor) -> EmbedImageReturn:
        return EmbedImageReturn(*self.clip.embed_image(self.validate_and_resize_image(image)))


class _OpenAINames(nn.Module):
    """What OpenAI's CLIP has and OpenCLIP's models lack: mixed into the class of a model, for whoever reads it."""

    _TEXT = "transformer", "token_embedding", "positional_embedding", "ln_final", "text_projection", "attn_mask"

    def __getattr__(self, name: str) -> Any:
        if name in self._TEXT and "text" in self._modules:  # of open_clip.CustomTextCLIP
            return getattr(self._modules["text"], name)
        return super().__getattr__(name)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights that images meet first."""
        return next(self.visual.parameters()).dtype

    def encode_image(self, image: Tensor, *args, **kwargs) -> Tensor:
        return super().encode_image(image.to(self.dtype), *args, **kwargs)

    def build_attention_mask(self) -> Tensor:
        return self.attn_mask.clone()

    def __reduce__(self):
        return _bare, (type(self).__bases__[1],), self.__dict__


@lru_cache
def _with_openai_names(model_class: type) -> type:
    return type(model_class.__name__, (_OpenAINames, model_class), {"__module__": model_class.__module__})


def _bare(model_class: type) -> nn.Module:
    """What a pickle of a model is filled into."""
    named = _with_openai_names(model_class)
    return named.__new__(named)


class OpenClipAdapter(BaseClipAdapter):
    """A frozen OpenCLIP model (open-clip-torch >= 2.24), `clip`, with the names that OpenAI's has besides.

    name: an OpenCLIP model name, `/` or `-` alike, or `hf-hub:owner/model`.
    pretrained: a tag of OpenCLIP, the path of a local checkpoint, or None for random weights. A file is read without
        running anything in it, as `fastprior.load` reads; OpenCLIP downloads and reads what it has a tag for, with the
        SHA-256 that it knows of OpenAI's, and `hf-hub:` models.
    cache_dir: where downloads are kept; device: where the model is built.
    force_quick_gelu: the activation OpenAI's weights (and some others) were trained with. Always on for the tag
        "openai", for which recent OpenCLIP releases only warn.

    Text encodings are the output of `ln_final`, so `dim_text_encodings` is the text tower's width. It differs from
    `dim_latent` in a few models (RN50: 512 and 1024): those can only drive priors without text encodings.
    Raises ImportError without open-clip-torch, ValueError for a text tower without `ln_final` (Hugging Face towers) and
    for a file that is damaged, unsafe, not finite, or does not fit the model.

    `description` is what `make_adapter` makes the same adapter of, in plain values.
    """

    def __init__(
        self,
        name: str = "ViT-B/32",
        pretrained: str | os.PathLike[str] | None = "laion400m_e32",
        *,
        cache_dir: str | None = None,
        device: str | torch.device = "cpu",
        force_quick_gelu: bool = False,
    ):
        pretrained = None if pretrained is None else os.fspath(pretrained)
        name = name if ":" in name else name.replace("/", "-")  # hf-hub:owner/model keeps its slash
        quick_gelu = force_quick_gelu or pretrained == "openai"
        options = dict(cache_dir=cache_dir, device=device, force_quick_gelu=quick_gelu)
        clip, preprocess = _load_open_clip(name, pretrained, **options)
        super().__init__(clip)
        self.name, self.cleared = name, False
        options = dict(pretrained=pretrained) | ({"force_quick_gelu": True} if quick_gelu else {})
        self.description = dict(make="open_clip", model=name, base_model_kwargs=options)
        self._captured: dict[int, Tensor | None] = {}  # by thread, so that concurrent calls do not mix
        ln_final = getattr(self._tower, "ln_final", None)
        if ln_final is None:
            raise ValueError(f"OpenCLIP model {name!r} has no ln_final in its text tower to read text encodings from")
        self.clip_normalize = preprocess.transforms[-1]
        clip.__class__ = _with_openai_names(type(clip))
        if hasattr(clip.visual, "image_size"):
            clip.visual.input_resolution = self.image_size
        self.handle = ln_final.register_forward_hook(self._capture)
        freeze_and_eval(self)

    eos_id = EOS_ID

    def find_layer(self, layer: str) -> nn.Module | None:
        """The CLIP's module of a name; None where there is none."""
        return dict(self.clip.named_modules()).get(layer)

    @property
    def _tower(self) -> nn.Module:
        return getattr(self.clip, "text", self.clip)  # `text` in open_clip.CustomTextCLIP

    def _capture(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        thread = threading.get_ident()
        if thread in self._captured:
            self._captured[thread] = output

    def clear(self) -> None:
        """Remove the hook from the CLIP; afterwards `embed_text` and `embed_image` raise RuntimeError."""
        self.handle.remove()
        self.cleared = True

    def _require_hook(self) -> None:
        if self.cleared:
            raise RuntimeError(f"this {type(self).__name__} was cleared and can no longer embed: construct a new one")

    @property
    def dim_latent(self) -> int:
        projection = self._tower.text_projection
        if isinstance(projection, nn.Linear):
            return projection.out_features
        return self.dim_text_encodings if projection is None else projection.shape[1]

    @property
    def image_size(self) -> int:
        size = self.clip.visual.image_size
        return max(size) if isinstance(size, (tuple, list)) else size

    dim_text_encodings = property(lambda self: self._tower.ln_final.weight.shape[0])
    image_channels = property(lambda self: 3)
    max_text_len = property(lambda self: self.clip.context_length)

    def tokenize(self, texts: list[str]) -> Tensor:
        """Token ids of `texts` with start, end and padding: (batch, max_text_len), int64; longer ones are cut."""
        return _open_clip_tokenizer(self.name)(texts, context_length=self.max_text_len)

    @torch.no_grad()
    def embed_text(self, text: Tensor) -> EmbedTextReturn:
        """Embed text: (batch, seq), int64. Returns fp32: text_embed l2-normed, text_encodings 0 after the end token.

        There may be less than `max_text_len` tokens. Token 0 is masked before the end too, where it means "!": trained
        priors have seen it so.
        """
        self._require_hook()
        text = text[..., : self.max_text_len]
        length = text.shape[-1]
        if getattr(self._tower, "attn_mask", None) is not None:  # of whole contexts; nothing that is kept sees padding
            text = F.pad(text, (0, self.max_text_len - length))
        thread = threading.get_ident()
        self._captured[thread] = None
        try:
            embed = self.clip.encode_text(text)
            encodings = self._captured[thread]
        finally:
            del self._captured[thread]
        if encodings is None or encodings.shape[:2] != text.shape:  # e.g. OpenCLIP's CoCa norms only the pooled token
            raise ValueError(f"ln_final of {self.name!r} gave no encoding for each token of text {tuple(text.shape)}")
        is_eos = text == EOS_ID
        ended_before = is_eos.cumsum(dim=-1) - is_eos.long() > 0
        encodings = encodings.masked_fill((ended_before | (text == 0)).unsqueeze(-1), 0.0)[:, :length]
        return EmbedTextReturn(F.normalize(embed.float(), dim=-1), encodings.float())

    @torch.no_grad()
    def embed_image(self, image: Tensor) -> EmbedImageReturn:
        """Embed image: (batch, 3, height, width), float in [0, 1]. Returns image_embed l2-normed in fp32."""
        self._require_hook()
        image = self.clip_normalize(self.validate_and_resize_image(image))
        return EmbedImageReturn(F.normalize(self.clip.encode_image(image).float(), dim=-1), None)


class OpenAIClipAdapter(OpenClipAdapter):
    """OpenAI's CLIP, run by open-clip-torch in fp32 with the same parameter names as OpenAI's package.

    name: as OpenAI spells it ("ViT-B/32", "ViT-L/14@336px"); pretrained: "openai", or the path of a local file: the
    TorchScript archive that OpenAI distributes, or a state dict. The activation is always QuickGELU.
    """

    def __init__(
        self,
        name: str = "ViT-B/32",
        pretrained: str | os.PathLike[str] = "openai",
        *,
        cache_dir: str | None = None,
        device: str | torch.device = "cpu",
    ):
        name = name.replace("@336px", "-336")
        super().__init__(name, pretrained, cache_dir=cache_dir, device=device, force_quick_gelu=True)


def make_adapter(
    make: str = "openai", model: str = "ViT-L/14", base_model_kwargs: Mapping[str, Any] | None = None, **overrides: Any
) -> BaseClipAdapter:
    """Make an adapter as configs describe it; `overrides` are kept by those of x-clip and CoCa models.

    make: "openai", "open_clip", "x-clip" or "coca". model: its name, for the first two.
    base_model_kwargs: arguments of the x-clip or CoCa model, or further ones of the adapter, such as `pretrained`;
        without it, open_clip takes the last of the model's tags that it lists.
    Raises ImportError without the package, ValueError where the model or its weights cannot be loaded.
    """
    kwargs = dict(base_model_kwargs or {})
    try:
        if make == "openai":
            return OpenAIClipAdapter(model, **kwargs)
        if make == "open_clip":
            return OpenClipAdapter(model, **({} if "pretrained" in kwargs else _last_tag(model)), **kwargs)
        if make == "x-clip":
            from x_clip import CLIP

            return XClipAdapter(CLIP(**kwargs), **overrides)
        if make == "coca":
            from coca_pytorch import CoCa

            return CoCaAdapter(CoCa(**kwargs), **overrides)
    except (ImportError, ValueError):
        raise
    except Exception as error:  # of arguments, a reader or a network: packages raise whatever these do
        raise ValueError(f"the CLIP {model!r} of make {make!r} cannot be loaded: {error}") from error
    raise ValueError(f"make={make!r}; it must be one of 'openai', 'open_clip', 'x-clip', 'coca'")


def _last_tag(model: str) -> dict[str, str | None]:
    if ":" in model:  # hf-hub:owner/model carries its own weights
        return {"pretrained": None}
    tags = _import_open_clip().list_pretrained_tags_by_model(model.replace("/", "-"))
    if not tags:
        raise ValueError(f"model={model!r}; open_clip lists no weights for it: give them as `pretrained`")
    return {"pretrained": tags[-1]}


def as_clip_adapter(clip: nn.Module, **overrides: Any) -> nn.Module:
    """Return `clip` as an adapter: adapters unchanged, an x_clip.CLIP or a coca_pytorch.CoCa wrapped.

    An adapter is any module with `embed_text`, `embed_image` and `dim_latent`, so dalle2-pytorch's are too.
    overrides: passed to the adapter made here, unused for one that was given. Raises TypeError for anything else.
    """
    if isinstance(clip, BaseClipAdapter):
        return clip
    ancestors = {(cls.__module__.partition(".")[0], cls.__name__) for cls in type(clip).__mro__}
    for package_class, adapter in ((("x_clip", "CLIP"), XClipAdapter), (("coca_pytorch", "CoCa"), CoCaAdapter)):
        if package_class in ancestors:  # by name: the package need not be imported
            return adapter(clip, **overrides)
    wanted = ("embed_text", "embed_image", "dim_latent")
    if isinstance(clip, nn.Module) and all(hasattr(type(clip), n) or n in vars(clip) for n in wanted):
        return clip
    raise TypeError(
        "clip must be an adapter (a torch module with embed_text, embed_image and dim_latent, such as OpenClipAdapter "
        f"or a subclass of BaseClipAdapter), an x_clip.CLIP or a coca_pytorch.CoCa, not {type(clip).__module__}."
        f"{type(clip).__qualname__}"
    )


def _import_open_clip() -> Any:
    try:
        import open_clip
    except ImportError as error:
        raise ImportError('open-clip-torch is not installed: pip install "fastprior[clip]"') from error
    return open_clip


@lru_cache
def _open_clip_tokenizer(name: str) -> Any:
    return _import_open_clip().get_tokenizer(name)


def _load_open_clip(name: str, pretrained: str | None, **options: Any) -> tuple[nn.Module, Any]:
    """The model and its inference transform; we read files, and OpenCLIP what it has a tag for."""
    open_clip = _import_open_clip()
    tag, file = pretrained, None
    if pretrained and not open_clip.get_pretrained_cfg(name, pretrained):
        if not os.path.exists(pretrained):
            tags = ", ".join(open_clip.list_pretrained_tags_by_model(name)) or "it has none"
            raise ValueError(f"pretrained={pretrained!r}; it must be a file, or a tag of {name}: {tags}")
        tag, file, options = None, pretrained, dict(options, pretrained_hf=False)
    model, _, preprocess = open_clip.create_model_and_transforms(name, pretrained=tag, **options)
    if file:
        fill_clip(open_clip, model, name, file)
    return model, preprocess
