"""From encoded conversations to arrays: loss weights, shared prefixes, buckets and micro-batches.

Rows that begin alike (the same document in the system message, the same document with several questions)
are split into one *prefix*, forwarded once, and a *tail* each that attends to it. The prefix's loss counts
once for every row that carries it, so losses and gradients equal those of the whole rows.

The last shared token belongs to the tails as well: there it predicts each tail's own first token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from mpi_mlx.errors import DataError

WIDTH_MULTIPLE = 8  # lengths are padded to a multiple of this, so that few distinct shapes occur


@dataclass(frozen=True)
class Row:
    """One training sequence of T tokens.

    ``weights``: float32 (T,), how much the loss of *predicting* each token counts; the first is 0 always.
    """

    encoded: object  # models.Encoded
    weights: np.ndarray
    identity: str = ""

    def __len__(self) -> int:
        return len(self.encoded.ids)


def loss_weights(encoded, stage: str) -> np.ndarray:
    """float32 (T,): which tokens a stage trains on (DESIGN section 1, the table's last column).

    ``cpt``: every text token, the document's included, never a visual placeholder.
    ``sft`` and ``rl``: the tokens of assistant turns, end-of-turn included.
    """
    if stage in ("cpt", "pretrain_all"):
        weights = ~encoded.visual
    elif stage in ("sft", "rl"):
        weights = encoded.assistant & ~encoded.visual
    else:
        raise ValueError(f"no loss weights are defined for stage {stage!r}")
    weights = weights.astype(np.float32)
    weights[0] = 0.0
    return weights


@dataclass(frozen=True)
class Block:
    """B sequences of up to T tokens, right-padded, as arrays. ``targets[b, t]`` follows ``ids[b, t]``."""

    ids: np.ndarray  # int32 (B, T)
    position_ids: np.ndarray  # int32 (3 or 1, B, T)
    lengths: np.ndarray  # int32 (B,)
    targets: np.ndarray  # int32 (B, T)
    weights: np.ndarray  # float32 (B, T): weight of predicting targets[b, t]
    images: tuple  # ImageInput in reading order over the rows
    visual: np.ndarray  # bool (B, T)


@dataclass(frozen=True)
class MicroBatch:
    """``prefix`` (P sequences, or None) and ``tails`` (B rows); ``owner[b]`` is the prefix of row b."""

    tails: Block
    prefix: Block | None = None
    owner: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))  # int32 (B,)
    identities: tuple[str, ...] = ()

    @property
    def count(self) -> float:
        """Sum of the loss weights: what the summed loss is divided by, once, over the whole step."""
        return float(self.tails.weights.sum() + (self.prefix.weights.sum() if self.prefix else 0.0))

    @property
    def tokens(self) -> int:
        """Tokens that pass through the model, padding not counted."""
        return int(self.tails.lengths.sum() + (self.prefix.lengths.sum() if self.prefix else 0))


def _block(pieces: Sequence[tuple[object, np.ndarray, int, int]], pad_id: int) -> Block:
    """``pieces``: (encoded, weights, start, stop) of each row; predictions of tokens start+1 .. stop."""
    width = max(stop - start for _, _, start, stop in pieces)
    width = -(-width // WIDTH_MULTIPLE) * WIDTH_MULTIPLE
    rows = len(pieces)
    axes = pieces[0][0].position_ids.shape[0]
    ids = np.full((rows, width), pad_id, np.int32)
    targets = np.full((rows, width), pad_id, np.int32)
    positions = np.zeros((axes, rows, width), np.int32)
    weights = np.zeros((rows, width), np.float32)
    visual = np.zeros((rows, width), bool)
    lengths = np.array([stop - start for _, _, start, stop in pieces], np.int32)
    images: list = []
    for r, (encoded, row_weights, start, stop) in enumerate(pieces):
        n = stop - start
        ids[r, :n] = encoded.ids[start:stop]
        positions[:, r, :n] = encoded.position_ids[:, start:stop]
        positions[:, r, n:] = encoded.position_ids[:, stop - 1 : stop]
        visual[r, :n] = encoded.visual[start:stop]
        following = encoded.ids[start + 1 : stop + 1]
        targets[r, : len(following)] = following
        weights[r, : len(following)] = row_weights[start + 1 : stop + 1]
        images += _images_between(encoded, start, stop)
    return Block(ids, positions, lengths, targets, weights, tuple(images), visual)


def _images_between(encoded, start: int, stop: int) -> list:
    """The images whose placeholders lie in [start, stop); cutting through one is a bug of the caller."""
    found, at = [], 0
    places = np.flatnonzero(encoded.visual)
    for image in encoded.images:
        first, last = places[at], places[at + image.num_tokens - 1]
        at += image.num_tokens
        if start <= first and last < stop:
            found.append(image)
        elif first < stop and last >= start:
            raise AssertionError("a sequence was cut through an image")
    return found


def common_prefix(rows: Sequence[Row]) -> int:
    """Number of leading tokens (with equal weights, images and positions) that all rows share."""
    first = rows[0].encoded
    length = min(len(r) for r in rows) - 1
    for row in rows[1:]:
        other = row.encoded
        same = first.ids[:length] == other.ids[:length]
        same &= rows[0].weights[:length] == row.weights[:length]
        same &= (first.position_ids[:, :length] == other.position_ids[:, :length]).all(0)
        length = min(length, int(np.argmin(same)) if not same.all() else length)
    while length > 0 and first.visual[length - 1]:
        length -= 1
    return _before_unshared_image(rows, length)


def _before_unshared_image(rows: Sequence[Row], length: int) -> int:
    """Shortens ``length`` so that the prefix ends before the first image that the rows do not share."""
    while length > 0:
        keys = []
        for row in rows:
            places, at, inside = np.flatnonzero(row.encoded.visual), 0, []
            for image in row.encoded.images:
                first, last = int(places[at]), int(places[at + image.num_tokens - 1])
                at += image.num_tokens
                if first < length:
                    inside.append((image.key, first, last))
            keys.append(inside)
        cut = None
        for n, (key, begin, last) in enumerate(keys[0]):
            if last >= length or any(len(k) <= n or k[n][0] != key for k in keys):
                cut = begin
                break
        if cut is None:
            return length
        length = cut
    return 0


def micro_batch(
    rows: Sequence[Row],
    pad_id: int,
    *,
    groups: Sequence[Sequence[int]] | None = None,
    min_prefix: int = 24,
    packed: bool = False,
) -> MicroBatch:
    """One forward's worth of rows.

    ``groups``: row indices that share a prefix, each group with its own (default: try all rows as one
    group). A prefix shorter than ``min_prefix`` tokens is not worth its own pass and is not split off.
    ``packed``: rows without a shared prefix may be put several into one (``packing.pack``).
    """
    groups = [list(range(len(rows)))] if groups is None else [list(g) for g in groups]
    shared = [common_prefix([rows[i] for i in g]) if len(g) > 1 else 0 for g in groups]
    identities = tuple(rows[i].identity for g in groups for i in g)
    if min(shared) < min_prefix:
        pieces = [(rows[i].encoded, rows[i].weights, 0, len(rows[i])) for g in groups for i in g]
        block = _block(pieces, pad_id)
        if packed:
            from mpi_mlx.training.packing import pack

            block = pack(block)
        return MicroBatch(block, identities=identities)
    heads, tails, owner = [], [], []
    for p, (g, length) in enumerate(zip(groups, shared, strict=True)):
        # The prefix predicts tokens 1 .. length-1; its last token is carried, and continued, by each tail.
        heads.append((rows[g[0]].encoded, rows[g[0]].weights * len(g), 0, length - 1))
        for i in g:
            tails.append((rows[i].encoded, rows[i].weights, length - 1, len(rows[i])))
            owner.append(p)
    prefix = _block(heads, pad_id)
    return MicroBatch(_block(tails, pad_id), prefix, np.array(owner, np.int32), identities)


def check_length(row: Row, limit: int | None, what: str = "max_tokens") -> Row:
    """The row itself, or DataError: a sequence is never truncated."""
    if limit is not None and len(row) > limit:
        raise DataError(
            f"example {row.identity!r}: {len(row)} tokens, over {what}={limit}; raise {what}, lower "
            "model.max_pixels, or shorten the example"
        )
    return row


def by_length(rows: Sequence[Row], size: int) -> list[list[int]]:
    """Indices of ``rows`` in micro-batches of at most ``size`` rows of similar length."""
    order = sorted(range(len(rows)), key=lambda i: (len(rows[i]), i))
    return [order[i : i + size] for i in range(0, len(order), size)]
