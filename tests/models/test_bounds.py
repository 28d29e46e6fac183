import numpy as np
from PIL import Image


def test_what_is_remembered_is_bounded(qwen):
    """Bounds of one byte leave the last of everything: three pictures and texts come, the last is known."""
    towers = []
    tower = qwen.parts.tower
    qwen.parts.tower = lambda pixels, grid: towers.append(len(pixels)) or tower(pixels, grid)
    qwen.bound_caches(texts=1, images=1, features=1)
    pictures = [Image.fromarray(np.full((56, 56, 3), value, np.uint8)) for value in (10, 90, 170)]
    for number, picture in enumerate(pictures):
        encoded = qwen.encode(
            [{"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": f"{number}"}]}],
            generation_prompt=True,
        )
        qwen.features(encoded.images)
    assert len(qwen._features) == len(qwen._images._pixels) == len(qwen._images._inputs) == 1
    assert len(qwen._chat.known) == 1 and len(towers) == 3
    qwen.features(encoded.images)
    assert len(towers) == 3  # known
    qwen.features([qwen.image(pictures[0])])
    assert len(towers) == 4  # forgotten
