"""The components of diffusers' prior pipelines, tiny."""

import json
import string

import diffusers
import torch
import transformers

DIM, LENGTH = 16, 9
KARLO = dict(variance_type="fixed_small_log", prediction_type="sample", clip_sample_range=5.0)
CLIP = dict(
    hidden_size=DIM, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, projection_dim=DIM,
    hidden_act="quick_gelu",
)  # fmt: skip


def make_tokenizer(folder):
    """A byte-level tokenizer of single letters, in CLIP's files."""
    letters = string.ascii_lowercase
    tokens = ["!", *letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps({token: number for number, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    ends = dict(bos_token="<|startoftext|>", eos_token="<|endoftext|>", pad_token="<|endoftext|>")
    config = dict(tokenizer_class="CLIPTokenizer", model_max_length=LENGTH, unk_token="<|endoftext|>", **ends)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return transformers.CLIPTokenizer.from_pretrained(folder), len(tokens)


def make_parts(folder):
    """The components of a tiny pipeline, with random weights; the tokenizer's files go to `folder`."""
    torch.manual_seed(0)
    tokenizer, vocabulary = make_tokenizer(folder)
    ends = dict(bos_token_id=vocabulary - 2, eos_token_id=vocabulary - 1, pad_token_id=vocabulary - 1)
    text = transformers.CLIPTextConfig(**CLIP, **ends, vocab_size=vocabulary, max_position_embeddings=LENGTH)
    vision = transformers.CLIPVisionConfig(**CLIP, image_size=8, patch_size=4)
    size = dict(height=8, width=8)
    prior = diffusers.PriorTransformer(
        num_attention_heads=2, attention_head_dim=8, num_layers=2, embedding_dim=DIM, num_embeddings=LENGTH
    ).eval()
    for name, weights in prior.named_parameters():
        if weights.ndim == 1 and not name.endswith("bias"):
            continue
        torch.nn.init.normal_(weights, std=0.2)
    return dict(
        prior=prior,
        text_encoder=transformers.CLIPTextModelWithProjection(text).eval(),
        tokenizer=tokenizer,
        image_encoder=transformers.CLIPVisionModelWithProjection(vision).eval(),
        image_processor=transformers.CLIPImageProcessor(size=size, crop_size=size),
        scheduler=diffusers.UnCLIPScheduler(**KARLO),
    )
