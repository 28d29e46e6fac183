"""``pretrain``: all parameters, from random weights, on endless generated rows. Makes the embedded model.

An auxiliary linear head reads each cell's attributes off the visual tokens; it is what makes perception
learn in minutes rather than hours, and is dropped when the model is written.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from PIL import Image

from mpi_mlx.data.pretraining import TaskBatch, cell_labels, draw_step
from mpi_mlx.data.render_flat import render_flat_array
from mpi_mlx.data.scenes import ATTRIBUTES
from mpi_mlx.training import world
from mpi_mlx.training.batch import MicroBatch, Row, micro_batch
from mpi_mlx.training.fit import Batch
from mpi_mlx.training.forward import hidden_states, weighted_logprobs
from mpi_mlx.training.losses import sft_loss

CLASSES = (2, *(len(v) for v in ATTRIBUTES.values()))  # present, then each attribute
SIDE, PATCH, MERGE, FRAMES = 84, 14, 2, 2


class Pretrained(nn.Module):
    """The network and the auxiliary perception head, trained together."""

    def __init__(self, net: nn.Module, width: int):
        super().__init__()
        self.net = net
        self.perception = nn.Linear(width, sum(CLASSES))


def patches(pictures: np.ndarray) -> np.ndarray:
    """uint8 (N, 84, 84, 3) -> float32 (N, 36, 1176), equal to the Qwen2-VL image processor's output."""
    n = len(pictures)
    grid = SIDE // PATCH // MERGE
    x = (pictures.astype(np.float32) / 255 - 0.5) / 0.5
    x = x.transpose(0, 3, 1, 2).reshape(n, 3, grid, MERGE, PATCH, grid, MERGE, PATCH)
    x = x.transpose(0, 2, 5, 3, 6, 1, 4, 7).reshape(n, grid * grid * MERGE * MERGE, 3, 1, PATCH, PATCH)
    return np.repeat(x, FRAMES, axis=3).reshape(n, grid * grid * MERGE * MERGE, -1)


class PretrainSource:
    """Micro-batches drawn from (seed, step). Rows of one document share its prefix."""

    def __init__(self, model, spec, seed: int):
        self.model, self.spec, self.seed = model, spec, seed
        # These stand for the pictures in the text; the pixels go to the tower directly. They differ, or rows
        # of one document would seem to share their picture as well.
        self.blanks = [Image.new("RGB", (SIDE, SIDE), (n % 256, n // 256, 0)) for n in range(spec.batch_size)]

    def state(self) -> dict:
        return {}

    def load_state(self, state: dict) -> None:
        pass

    def batch(self, step: int) -> Batch:
        spec, group = self.spec, world.world()
        # Every process draws its own rows; the seed keeps them apart.
        drawn = draw_step(
            self.seed + 7919 * group.rank(), step, rows=spec.batch_size // group.size(), shares=dict(spec.tasks),
            depths=dict(spec.depths), scenes_per_document=spec.scenes_per_document,
        )
        rows = [self._row(drawn, n) for n in range(len(drawn.tasks))]
        micros = []
        about: dict[int, list[int]] = {}
        for n, task in enumerate(drawn.tasks):
            if task.document is not None:
                about.setdefault(task.document, []).append(n)
        # Documents of one size go together, so that little is padded.
        order = sorted(about.values(), key=lambda g: (len(rows[g[0]]), g[0]))
        size = max(1, spec.documents_per_micro)
        for start in range(0, len(order), size):
            micros.append(self._micro(drawn, rows, order[start : start + size]))
        plain = sorted(
            (n for n, t in enumerate(drawn.tasks) if t.document is None), key=lambda n: (len(rows[n]), n)
        )
        for start in range(0, len(plain), spec.rows_per_micro):
            micros.append(self._micro(drawn, rows, [[n] for n in plain[start : start + spec.rows_per_micro]]))
        count, tokens = world.sum_numbers(
            [sum(m[0].count for m in micros), float(sum(m[0].tokens for m in micros))]
        )
        return Batch(micros, count, int(tokens), identities=(f"pretrain step {step}",))

    def _row(self, drawn: TaskBatch, n: int) -> Row:
        task = drawn.tasks[n]
        messages = []
        if task.document is not None:
            messages.append({"role": "system", "content": drawn.documents[task.document]})
        content: list[dict] = [{"type": "text", "text": task.user}]
        if task.scene is not None:
            content.insert(0, {"type": "image", "image": self.blanks[n]})
        messages.append({"role": "user", "content": content})
        prompt = self.model.encode(messages, generation_prompt=True)
        ids, graded = self._answer(task)
        encoded = prompt.concat(ids)
        weights = np.zeros(len(encoded.ids), np.float32)
        weights[len(prompt.ids) :] = graded
        return Row(encoded, weights, f"{task.kind}-{n}")

    def _answer(self, task) -> tuple[np.ndarray, np.ndarray]:
        ids = self.model.encode_completion(task.answer)
        if task.graded is None:
            return ids, np.ones(len(ids), np.float32)
        offsets = self.model.tokenizer(task.answer, return_offsets_mapping=True, add_special_tokens=False)
        graded = np.zeros(len(ids), np.float32)
        for t, (start, stop) in enumerate(offsets["offset_mapping"]):
            graded[t] = any(a <= start and stop <= b for a, b in task.graded)
        return ids, graded

    def _micro(self, drawn: TaskBatch, rows: list[Row], groups: list[list[int]]):
        chosen = [n for g in groups for n in g]
        local = {n: i for i, n in enumerate(chosen)}
        micro = micro_batch(
            [rows[n] for n in chosen], self.model.pad_id, groups=[[local[n] for n in g] for g in groups]
        )
        kinds = [drawn.tasks[n].kind for n in chosen]
        scenes = [drawn.tasks[n].scene for n in chosen if drawn.tasks[n].scene is not None]
        if not scenes:
            return micro, None, None, kinds
        pictures = np.stack([render_flat_array(s, SIDE) for s in scenes])
        return micro, patches(pictures), cell_labels(scenes), kinds


class PretrainObjective:
    """Cross-entropy on the rows plus ``perception_loss`` times that of the cells' attributes."""

    def __init__(self, wrapped: Pretrained, model, spec):
        self.wrapped, self.model, self.spec = wrapped, model, spec

    def __call__(self, item) -> tuple[mx.array, dict]:
        micro, pixels, labels, kinds = item
        features, perception, metrics = None, None, {}
        if pixels is not None:
            parts = self.model.parts
            features = parts.project(parts.tower(pixels, (1, SIDE // PATCH, SIDE // PATCH)))  # (N, 9, D)
            if not self.spec.train_vision:
                features = mx.stop_gradient(features)
            elif self.spec.perception_loss > 0:
                perception, right = self._perceive(features, labels)
                metrics["cells_right"] = (right, mx.array(float(labels.shape[0] * labels.shape[1])))
            features = features.reshape(-1, features.shape[-1])
        loss, more = self._language(micro, features, kinds)
        if perception is not None:
            loss = loss + self.spec.perception_loss * perception * micro.count
        return loss, metrics | more

    def _language(self, micro: MicroBatch, features, kinds: list[str]) -> tuple[mx.array, dict]:
        """The summed cross-entropy, and the mean over the tokens of each kind of row."""
        _, hidden = hidden_states(self.model, micro, (None, features))
        logprobs, weights = weighted_logprobs(self.model, hidden, micro.tails)
        loss, _ = sft_loss(logprobs, weights)
        row = np.flatnonzero(micro.tails.weights.reshape(-1)) // micro.tails.weights.shape[1]
        row_kinds = np.array(kinds)[row]
        metrics = {}
        for kind in sorted(set(kinds)):
            of_kind = mx.array((row_kinds == kind).astype(np.float32))
            metrics[f"loss/{kind}"] = (-mx.stop_gradient(logprobs * of_kind).sum(), of_kind.sum())
        return loss, metrics

    def _perceive(self, features: mx.array, labels: np.ndarray) -> tuple[mx.array, mx.array]:
        """Mean cross-entropy a cell, and the number of cells with everything right."""
        logits = self.wrapped.perception(features)
        total, right, at = 0.0, mx.ones(labels.shape[:2], mx.bool_), 0
        present = mx.array(labels[..., 0] == 1)
        for k, size in enumerate(CLASSES):
            part = logits[..., at : at + size]
            at += size
            target = mx.array(np.maximum(labels[..., k], 0).astype(np.int32))
            loss = nn.losses.cross_entropy(part, target)
            hit = part.argmax(-1) == target
            if k:
                loss, hit = loss * present, hit | ~present
            total, right = total + loss.mean(), right & hit
        return total, right.sum()


def zero_residual_outputs(net: nn.Module) -> None:
    """Starts every layer as the identity: token embeddings are not drowned, and copying emerges earlier."""
    for layer in net.language_model.model.layers:
        for linear in (layer.self_attn.o_proj, layer.mlp.down_proj):
            linear.weight = mx.zeros_like(linear.weight)


def pretrain_stage(model, spec, seed: int) -> tuple[nn.Module, PretrainSource, PretrainObjective]:
    """Module to train, source and objective of the stage."""
    model.net.unfreeze()
    if not spec.train_vision:
        model.net.vision_tower.freeze()
    mx.random.seed(seed)
    wrapped = Pretrained(model.net, model.hidden_size)
    return wrapped, PretrainSource(model, spec, seed), PretrainObjective(wrapped, model, spec)
