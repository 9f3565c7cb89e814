"""The structs of `c/`, field by field, which a call fills by name; a library whose sizes differ is not used."""

from __future__ import annotations

from collections.abc import Iterator
from ctypes import Structure, c_double, c_long, c_void_p

from ..arguments import BIASES, MATRICES, NORMS


class Vector(Structure):
    """Numbers side by side; those of an argument that is not given have no data."""

    _fields_ = ("data", c_void_p), ("kind", c_long)


class Matrix(Structure):
    """Rows of numbers, and how far they are apart."""

    _fields_ = ("data", c_void_p), ("kind", c_long), ("stride", c_long)


class Weight(Structure):
    """A matrix, and where it is quantised the scales of its rows."""

    _fields_ = ("matrix", Matrix), ("scale", Vector)


def _each(kind: type, *names: str) -> Iterator[tuple[str, type]]:
    return ((name, kind) for name in names)


def _flat(*names: str, struct: type[Structure]) -> Iterator[tuple[str, type]]:
    """The numbers of structs one by one, which takes half the time to fill: `x` for C's `x.data`, then `x_kind`, …"""
    for name in names:
        yield from ((name if field == "data" else f"{name}_{field}", kind) for field, kind in struct._fields_)


class Linear(Structure):
    """A linear, where C has arrays of three: numbers of the weight, of the one beside, and room for a third."""

    _fields_ = (
        *_flat("x", "out", struct=Matrix),
        *_flat("weight", struct=Matrix), *_flat("scale", struct=Vector),
        *_flat("beside", struct=Matrix), *_flat("beside_scale", struct=Vector), ("third", Weight),
        *_flat("bias", "beside_bias", "third_bias", "stream_gain", "norm_gain", "norm_bias", struct=Vector),
        *_each(c_void_p, "stream", "residual", "total"),
        *_each(c_long, "columns", "beside_columns", "third_columns", "rows", "dim", "activation", "alike"),
        ("eps", c_double),
    )  # fmt: skip


class Decode(Structure):
    """Attention behind a cached prefix."""

    _fields_ = (
        *_each(c_void_p, "q", "k", "v", "out"),
        *_each(c_long, "kind", "q_row", "q_token", "kv_row", "kv_token"),
        *_each(c_void_p, "prefix_k", "prefix_v"),
        *_each(c_long, "prefix_prompt", "prefix_token", "prefix_head"),
        *_each(c_void_p, "bias", "mask", "cos", "sin"),
        *_each(c_long, "rows", "seq", "suffix", "heads", "kv_heads", "dim_head"),
        *_each(c_long, "prompts", "prefix", "rotated", "cosine"), *_each(c_void_p, "starts", "prompt"),
        ("scale", c_double),
    )  # fmt: skip


class Block(Structure):
    """A row of the table that `Blocks.blocks` points to."""

    _fields_ = *((name, Weight) for name in MATRICES), *((name, Vector) for name in (*BIASES, *NORMS))


class Blocks(Structure):
    """All blocks of a step."""

    _fields_ = (
        *_each(c_void_p, "x", "out", "blocks"),
        *_each(c_long, "depth", "dim", "inner", "outputs", "head", "columns", "activation"),
        *_each(c_long, "prefix_layer", "alike"), ("attention", Decode), ("eps", c_double),
    )  # fmt: skip


class Run(Structure):
    """Steps of a run, of which each is `blocks`."""

    _fields_ = (
        ("blocks", Blocks), *_each(c_void_p, "time", "null", "coefficients"), ("query", Vector),
        *_each(c_void_p, "x", "x0", "cond_scale"), ("clamp", c_long), ("radius", c_double),
    )  # fmt: skip


class Row(Structure):
    """A step of one sample."""

    _fields_ = (
        *_each(c_void_p, "time", "null", "coefficients", "noise", "x", "x0"), ("clamp", c_long),
        *_each(c_double, "cond_scale", "radius"),
    )  # fmt: skip


ALL = Vector, Matrix, Weight, Linear, Decode, Block, Blocks, Run, Row
