"""How well a base model follows fresh rulebooks in context: the figures of the embedded model's card.

``python -m mpi_mlx.assets.measure_tiny [FOLDER]``: several documents a depth, scenes that no training row is
drawn from on purpose (the seeds are others'), greedy answers.
"""

from __future__ import annotations

import sys
from types import SimpleNamespace

import numpy as np

from mpi_mlx.data.clevr_policy import SceneImage, build_clevr_policy
from mpi_mlx.data.completion import split_completion
from mpi_mlx.data.pretraining import draw_step
from mpi_mlx.documents import place_document
from mpi_mlx.evaluation.metrics import majority_share
from mpi_mlx.models import load_model
from mpi_mlx.rollouts.sampler import generate_greedy

DOCUMENTS = 5
SCENES = 80  # a document
QUESTIONS = 1000
SEED = 90_000  # far from the seeds of training


def follow(model, depth: int, *, in_context: bool = True) -> dict[str, float]:
    """Accuracy, whole-trace match and the majority answer's accuracy over DOCUMENTS x SCENES, at ``depth``."""
    right, traces, majority = [], [], []
    for number in range(DOCUMENTS):
        spec = SimpleNamespace(
            depth=depth, conditions=("exists",), seed=SEED + number, document_seed=None, wording="compact",
            modality="text", rl=0, style="flat", image_size=None, max_objects=5, train=0, validation=0, test=SCENES,
        )
        data = build_clevr_policy(spec)
        prompts = [
            model.encode(place_document(e.messages, data.document if in_context else None), generation_prompt=True)
            for e in data.test
        ]
        for e, done in zip(data.test, generate_greedy(model, prompts, max_tokens=160, batch_size=80), strict=True):
            reasoning, answer = split_completion(model.decode(done.ids))
            right.append(answer == e.answer)
            traces.append(reasoning == e.reasoning)
        majority.append(majority_share([e.answer for e in data.test]))
    return {"accuracy": np.mean(right), "trace": np.mean(traces), "majority": np.mean(majority), "n": len(right)}


def ask(model) -> dict[str, float]:
    """Accuracy on plain questions about a picture: existence, places, attributes."""
    tasks = draw_step(SEED, 0, rows=QUESTIONS, shares={"ask": 1.0}, depths={1: 1.0}).tasks
    prompts = [
        model.encode(
            [{"role": "user", "content": [
                {"type": "image", "image": SceneImage(t.scene)}, {"type": "text", "text": t.user},
            ]}],
            generation_prompt=True,
        )
        for t in tasks
    ]
    found = generate_greedy(model, prompts, max_tokens=12, batch_size=125)
    kinds: dict[str, list[bool]] = {}
    for task, done in zip(tasks, found, strict=True):
        kind = {"Is": "existence", "What": "place", "Which": "attribute"}[task.user.split()[0]]
        kinds.setdefault(kind, []).append(model.decode(done.ids).strip() == task.answer)
    return {kind: float(np.mean(right)) for kind, right in sorted(kinds.items())}


def main(base: str = "embedded:tiny", depths: tuple[int, ...] = (1, 2, 3, 4)) -> None:
    model = load_model(base)
    for depth in depths:
        row = follow(model, depth)
        sys.stdout.write(f"depth {depth}: " + ", ".join(f"{k} {v:.3f}" for k, v in row.items()) + "\n")
        sys.stdout.flush()
    sys.stdout.write("questions: " + ", ".join(f"{k} {v:.3f}" for k, v in ask(model).items()) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:2], *([tuple(map(int, sys.argv[2].split(",")))] if len(sys.argv) > 2 else []))
