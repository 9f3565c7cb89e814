"""Pairs of image embeddings and texts from folders of shards, with DALLE2-pytorch's readers."""

from fastprior.dataloaders.files import ShardError
from fastprior.dataloaders.readers import PriorEmbeddingDataset, distribute_to_rank, get_reader, make_splits
from fastprior.dataloaders.shards import EmbeddingShards
from fastprior.dataloaders.stream import PairStream

__all__ = [
    "EmbeddingShards",
    "PairStream",
    "PriorEmbeddingDataset",
    "ShardError",
    "distribute_to_rank",
    "get_reader",
    "make_splits",
]
