"""What differs between model families: where the parts are, and how an image becomes text positions.

A family gives :class:`~mpi_mlx.models.base.Model` its text stack, its vision tower in two steps (``tower``,
frozen and cached, then ``project``, the merger that an adapter may train) and its placeholder text.
"""

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from PIL import Image

from mpi_mlx.models import qwen_vision
from mpi_mlx.models.images import ImageInput, Processed
from mpi_mlx.models.positions import contiguous_positions, mrope_positions


class TextFamily:
    """mlx-lm's decoder-only models. Rotary positions come from the cache's offset, so they are contiguous."""

    is_multimodal = False
    uses_mrope = False
    list_content = False
    image_token: str | None = None
    image_token_id: int | None = None
    projector_path: str | None = None

    def __init__(self, net: nn.Module, config: dict, processor: Any = None):
        self.net = net
        self.config = config
        self.processor = processor

    @property
    def text(self) -> nn.Module:
        """The decoder stack: ``embed_tokens``, ``layers`` and the final norm."""
        return self.net.model

    @property
    def text_path(self) -> str:
        """Where the decoder layers' linears live in the parameter tree."""
        return "model.layers."

    @property
    def head_module(self) -> nn.Module:
        """The module that maps (..., D) to logits: an ``lm_head`` or the tied embedding."""
        return self.net.lm_head if "lm_head" in self.net else self.text.embed_tokens

    @property
    def hidden_size(self) -> int:
        embedding = self.text.embed_tokens
        return embedding.weight.shape[-1] * (32 // embedding.bits if hasattr(embedding, "bits") else 1)

    @property
    def dtype(self) -> mx.Dtype:
        embedding = self.text.embed_tokens
        found = embedding.get("scales", embedding.weight).dtype
        # scales of mxfp4 and the like are bytes
        return found if mx.issubdtype(found, mx.floating) else self.text.norm.weight.dtype

    def embed_tokens(self, ids: mx.array) -> mx.array:
        return self.text.embed_tokens(ids)

    def head(self, hidden: mx.array) -> mx.array:
        module = self.head_module
        return module.as_linear(hidden) if hasattr(module, "as_linear") else module(hidden)

    def forward(self, embeds: mx.array, position_ids: mx.array, cache: list | None) -> mx.array:
        return self.text(None, cache=cache, input_embeddings=embeds)

    def visual_tokens(self) -> set[int]:
        """Ids that may never be sampled."""
        return set()

    def positions(self, visual: np.ndarray, images: tuple[ImageInput, ...]) -> np.ndarray:
        return contiguous_positions(len(visual))


class VisionFamily(TextFamily):
    """Vision-language models of mlx-vlm."""

    is_multimodal = True
    list_content = True

    @property
    def text(self) -> nn.Module:
        return self.net.language_model.model

    @property
    def text_path(self) -> str:
        return "language_model.model.layers."

    @property
    def head_module(self) -> nn.Module:
        language = self.net.language_model
        return language.lm_head if "lm_head" in language else self.text.embed_tokens

    def forward(self, embeds: mx.array, position_ids: mx.array, cache: list | None) -> mx.array:
        return self.text(None, inputs_embeds=embeds, mask=None, cache=cache)

    def visual_tokens(self) -> set[int]:
        return {self.image_token_id}

    def placeholder(self, image: ImageInput) -> str:
        """The text that stands for an image in the prompt, holding ``image.num_tokens`` image tokens."""
        return self.image_token * image.num_tokens

    def process(self, picture: Image.Image) -> Processed:
        """One RGB image through the model's own image processor."""
        raise NotImplementedError

    def tower(self, pixels: np.ndarray, grid: tuple[int, int, int] | None) -> mx.array:
        """N images of one size -> (N, n, D_tower): what ``project`` takes, frozen and cached."""
        raise NotImplementedError

    def project(self, states: mx.array) -> mx.array:
        """(N, n, D_tower) -> (N, n, D_features)."""
        raise NotImplementedError


class Qwen2_5VL(VisionFamily):
    """Qwen2.5-VL (arXiv 2502.13923): windowed vision tower, multimodal rotary positions."""

    uses_mrope = True
    list_content = False
    image_token = "<|image_pad|>"
    projector_path = "vision_tower.merger"

    def __init__(self, net: nn.Module, config: dict, processor: Any = None):
        super().__init__(net, config, processor)
        self.image_token_id = int(net.config.image_token_id)

    def forward(self, embeds: mx.array, position_ids: mx.array, cache: list | None) -> mx.array:
        # LanguageModel.__call__ drops the mask and keeps positions between calls: go to the stack itself.
        return self.text(None, inputs_embeds=embeds, mask=None, cache=cache, position_ids=position_ids)

    def visual_tokens(self) -> set[int]:
        config = self.net.config
        names = (
            "image_token_id",
            "video_token_id",
            "vision_start_token_id",
            "vision_end_token_id",
            "vision_token_id",
        )
        return {int(value) for name in names if (value := getattr(config, name, None)) is not None}

    def positions(self, visual: np.ndarray, images: tuple[ImageInput, ...]) -> np.ndarray:
        return mrope_positions(visual, [image.grid for image in images], self.merge_size)

    @property
    def merge_size(self) -> int:
        return int(self.net.config.vision_config.spatial_merge_size)

    def process(self, picture: Image.Image) -> Processed:
        out = self.processor.image_processor(images=[picture])
        grid = tuple(int(x) for x in np.array(out["image_grid_thw"])[0])
        pixels = np.asarray(out["pixel_values"], dtype=np.float32)
        return Processed(pixels, grid, int(np.prod(grid)) // self.merge_size**2)

    def tower(self, pixels: np.ndarray, grid: tuple[int, int, int] | None) -> mx.array:
        states = qwen_vision.vision_states(self.net.vision_tower, mx.array(pixels), grid)
        return states.reshape(len(pixels), -1, self.merge_size**2 * states.shape[-1])

    def project(self, states: mx.array) -> mx.array:
        merger = self.net.vision_tower.merger
        out = merger(states.reshape(-1, merger.hidden_size // self.merge_size**2))
        return out.reshape(*states.shape[:-1], -1)
