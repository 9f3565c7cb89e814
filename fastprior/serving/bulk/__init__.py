"""Image embeddings of shards of captions or text embeddings, in clip-retrieval's layout, shard by shard."""

from fastprior.serving.bulk.embedder import Embedder, Options, row_seed
from fastprior.serving.bulk.inputs import InputShard, find_shards
from fastprior.serving.bulk.manifest import Manifest
from fastprior.serving.bulk.runs import Summary, embed_shards, share_of

__all__ = [
    "Embedder",
    "InputShard",
    "Manifest",
    "Options",
    "Summary",
    "embed_shards",
    "find_shards",
    "row_seed",
    "share_of",
]
