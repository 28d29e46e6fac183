"""Stretches of encoded conversations as one padded batch, and what conversations begin with in common."""

from collections.abc import Sequence
from typing import NamedTuple

import mlx.core as mx
import numpy as np


class Piece(NamedTuple):
    """Tokens [start, stop) of an `Encoded`; never cuts through an image."""

    encoded: object
    start: int
    stop: int


def embed_pieces(
    model, pieces: Sequence[Piece], width: int | None = None
) -> tuple[mx.array, mx.array, np.ndarray]:
    """Embeddings (B, T, D) with image features, position ids and lengths (B,).

    Position ids are (3, B, T), or (B, T) without mrope. Right-padded to `width`, or to the longest.
    """
    lengths = np.array([p.stop - p.start for p in pieces], np.int32)
    width = max(int(lengths.max()), width or 0)
    ids = np.full((len(pieces), width), model.pad_id, np.int32)
    positions = np.zeros((pieces[0].encoded.position_ids.shape[0], len(pieces), width), np.int32)
    images = []
    for row, (encoded, start, stop) in enumerate(pieces):
        ids[row, : stop - start] = encoded.ids[start:stop]
        positions[:, row, : stop - start] = encoded.position_ids[:, start:stop]
        positions[:, row, stop - start :] = encoded.position_ids[:, stop - 1 : stop]
        images += images_between(encoded, start, stop)
    features = mx.concatenate(model.features(images)) if images else None
    embeds = model.embed(ids, features)
    return embeds, mx.array(positions if model.uses_mrope else positions[0]), lengths


def images_between(encoded, start: int, stop: int) -> list:
    """The images whose placeholders lie in [start, stop)."""
    if not encoded.images:
        return []
    places = np.flatnonzero(encoded.visual)
    ends = np.cumsum([image.num_tokens for image in encoded.images])
    return [
        image
        for image, end in zip(encoded.images, ends, strict=True)
        if start <= places[end - image.num_tokens] and places[end - 1] < stop
    ]


def comparable(prompts: Sequence) -> list[np.ndarray]:
    """Token codes (T,) that are equal where tokens are, and, at placeholders, only where the images are."""
    numbers: dict[str, int] = {}
    codes = []
    for encoded in prompts:
        code = encoded.ids.astype(np.int64)
        if encoded.images:
            of_image = [-1 - numbers.setdefault(image.key, len(numbers)) for image in encoded.images]
            code[encoded.visual] = np.repeat(of_image, [image.num_tokens for image in encoded.images])
        codes.append(code)
    return codes


def common_length(a: np.ndarray, b: np.ndarray) -> int:
    """Leading codes that `a` and `b` share, at least one short of the shorter, outside of images."""
    length = min(len(a), len(b)) - 1
    differs = np.flatnonzero(a[:length] != b[:length])
    length = int(differs[0]) if len(differs) else length
    while 0 < length < len(a) and a[length] < 0 and a[length] == a[length - 1]:
        length -= 1  # the last shared token was within an image
    return length


class Cluster(NamedTuple):
    """Indices of prompts that share their first `shared` tokens (0: nothing worth sharing)."""

    indices: list[int]
    shared: int


def cluster_prompts(prompts: Sequence, least: int = 32, most: int = 3) -> list[Cluster]:
    """Group prompts by a shared beginning of at least `least` tokens: a document, or none.

    Greedy: the first prompt left over chooses the length that spares most tokens. At most `most` clusters
    share; what is left comes last, as one cluster that shares nothing.
    """
    codes = comparable(prompts)
    left, loose, clusters = list(range(len(prompts))), [], []
    while left and len(clusters) < most:
        leader = left[0]
        shared = np.array([common_length(codes[leader], codes[i]) for i in left[1:]], np.int64)
        lengths = sorted({n for n in shared.tolist() if n >= least})
        if not lengths:
            loose.append(left.pop(0))
            continue
        length = max(lengths, key=lambda n: n * int((shared >= n).sum()))
        members = [leader, *(i for i, n in zip(left[1:], shared, strict=True) if n >= length)]
        clusters.append(Cluster(members, length))
        left = [i for i in left if i not in set(members)]
    if loose or left:
        clusters.append(Cluster(sorted(loose + left), 0))
    return clusters
