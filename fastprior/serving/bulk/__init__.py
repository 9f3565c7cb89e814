"""Image embeddings of shards of captions or text embeddings, in clip-retrieval's layout, shard by shard."""

from fastprior.serving.bulk.embedder import Embedder, Options, row_seed
from fastprior.serving.bulk.inputs import InputShard, find_shards
from fastprior.serving.bulk.manifest import Manifest

__all__ = ["Embedder", "InputShard", "Manifest", "Options", "find_shards", "row_seed"]
