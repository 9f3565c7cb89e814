"""PriorTransformer: the prior of Kandinsky, Karlo and Shap-E under diffusers' names, without diffusers."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from fastprior.checks import check_count, check_share
from fastprior.models.prior_transformer.blocks import Block, TimeEmbedding, TimeFeatures
from fastprior.models.prior_transformer.forward import PriorForward
from fastprior.reading import quoted
from fastprior.weight_files import diffusers_folder
from fastprior.weight_files.weights import FLOATS


class Config(dict):
    """A dict whose entries are attributes too."""

    def __getattr__(self, name):
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"the config has no {name!r}") from None


def _choose(name: str, value: str | None, known: str) -> bool:
    if value not in (None, known):
        raise ValueError(f"{name}={quoted(value)}; it must be {known!r} or None")
    return value is not None


class PriorTransformer(PriorForward, nn.Module):
    """The prior transformer without diffusers: its arguments, parameter names, folders and results.

    Args:
        num_attention_heads, attention_head_dim, num_layers: of the transformer, as wide as heads * head_dim.
        embedding_dim: width of the noisy embeddings and of the text encodings.
        num_embeddings, additional_embeddings: text tokens, and tokens beside them.
        dropout: in training, after attention and within the feed-forwards.
        time_embed_act_fn: "silu", "swish", "mish", "gelu" or "relu".
        norm_in_type, embedding_proj_norm_type: "layer" or None: a norm of all tokens, and of the text embedding.
        encoder_hid_proj_type: "linear", or None for no projection of text encodings.
        added_emb_type: "prd", or None for no learned token: the outputs of the noisy tokens are the prediction then.
        time_embed_dim, embedding_proj_dim, clip_embed_dim: width of the time embedding inside, of the text embedding
            and of the prediction; by default that of the transformer, and twice `embedding_dim`.

    Attributes:
        config: the arguments.
        clip_mean, clip_std: (1, clip_embed_dim), see `post_process_latents`.
    """

    def __init__(
        self,
        num_attention_heads: int = 32,
        attention_head_dim: int = 64,
        num_layers: int = 20,
        embedding_dim: int = 768,
        num_embeddings: int = 77,
        additional_embeddings: int = 4,
        dropout: float = 0.0,
        time_embed_act_fn: str = "silu",
        norm_in_type: str | None = None,
        embedding_proj_norm_type: str | None = None,
        encoder_hid_proj_type: str | None = "linear",
        added_emb_type: str | None = "prd",
        time_embed_dim: int | None = None,
        embedding_proj_dim: int | None = None,
        clip_embed_dim: int | None = None,
    ):
        arguments = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        super().__init__()
        for name in ("num_attention_heads", "attention_head_dim", "embedding_dim", "num_embeddings"):
            check_count(name, arguments[name])
        check_count("num_layers", num_layers, most=2**12)
        check_count("additional_embeddings", additional_embeddings, 0)
        check_share("dropout", dropout)
        for name in ("time_embed_dim", "embedding_proj_dim", "clip_embed_dim"):
            if arguments[name]:
                check_count(name, arguments[name])
        self.config = Config(arguments)
        dim = num_attention_heads * attention_head_dim
        embedding_proj_dim, clip_embed_dim = embedding_proj_dim or embedding_dim, clip_embed_dim or embedding_dim
        self.time_proj = TimeFeatures(dim)
        self.time_embedding = TimeEmbedding(dim, time_embed_dim or dim, time_embed_act_fn)
        self.proj_in = nn.Linear(embedding_dim, dim)
        normed_text = _choose("embedding_proj_norm_type", embedding_proj_norm_type, "layer")
        self.embedding_proj_norm = nn.LayerNorm(embedding_proj_dim) if normed_text else None
        self.embedding_proj = nn.Linear(embedding_proj_dim, dim)
        projected_text = _choose("encoder_hid_proj_type", encoder_hid_proj_type, "linear")
        self.encoder_hidden_states_proj = nn.Linear(embedding_dim, dim) if projected_text else None
        self.positional_embedding = nn.Parameter(torch.zeros(1, num_embeddings + additional_embeddings, dim))
        with_prd = _choose("added_emb_type", added_emb_type, "prd")
        self.prd_embedding = nn.Parameter(torch.zeros(1, 1, dim)) if with_prd else None
        self.transformer_blocks = nn.ModuleList(
            Block(num_attention_heads, attention_head_dim, dropout) for _ in range(num_layers)
        )
        self.norm_in = nn.LayerNorm(dim) if _choose("norm_in_type", norm_in_type, "layer") else None
        self.norm_out = nn.LayerNorm(dim)
        self.proj_to_clip_embeddings = nn.Linear(dim, clip_embed_dim)
        self.clip_mean = nn.Parameter(torch.zeros(1, clip_embed_dim))
        self.clip_std = nn.Parameter(torch.zeros(1, clip_embed_dim))

    @property
    def dtype(self) -> torch.dtype:
        return self._weight_dtype

    @property
    def device(self) -> torch.device:
        return self.positional_embedding.device

    def enable_gradient_checkpointing(self, gradient_checkpointing_func=None) -> None:
        """Recompute each block in backward; the function is called with the block and its arguments."""
        recompute = gradient_checkpointing_func or partial(checkpoint, use_reentrant=False)
        self._gradient_checkpointing_func, self.gradient_checkpointing = recompute, True

    def disable_gradient_checkpointing(self) -> None:
        self.gradient_checkpointing = False

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike,
        *,
        subfolder: str | None = None,
        variant: str | None = None,
        torch_dtype: torch.dtype | None = None,
        **hub,
    ) -> PriorTransformer:
        """Load a diffusers folder, or that of a repository on the hub: config.json and weights, sharded or not.

        Args:
            pretrained_model_name_or_path: a folder, or the id of a repository.
            subfolder: of that folder, such as "prior" of a pipeline.
            variant: "fp16" where the files' names have it.
            torch_dtype: of the weights, fp32 by default.
            **hub: revision, token, cache_dir, local_files_only, force_download: see `huggingface_hub`.
        Returns:
            The model in eval mode.
        Raises:
            FileNotFoundError: a file is missing.
            ValueError: a file cannot be read, the config has an unknown key or value, the weights do not fit it or are
                not finite.
        """
        if torch_dtype not in (None, *FLOATS):
            raise ValueError(f"torch_dtype={torch_dtype}; it must be floating point of 16 bits or more")
        path = pretrained_model_name_or_path
        config, state = diffusers_folder.read(path, subfolder, variant, **hub)
        where = str(Path(path, subfolder or ""))
        return diffusers_folder.build(cls, config, state, torch_dtype or torch.float32, where).eval()

    def save_pretrained(
        self, save_directory: str | os.PathLike, *, variant: str | None = None, safe_serialization: bool = True
    ) -> None:
        """Write config.json and the weights, as diffusers reads them. `safe_serialization=False` writes a torch pickle.

        Raises ValueError where `save_directory` is a file.
        """
        diffusers_folder.write(save_directory, self.config, self.state_dict(), variant, safe_serialization)
