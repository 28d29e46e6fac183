"""Vision-language families beside Qwen2.5-VL. They run mlx-vlm's own towers, image by image size."""

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from PIL import Image

from mpi_mlx.models.families import Qwen2_5VL, VisionFamily
from mpi_mlx.models.images import ImageInput, Processed
from mpi_mlx.models.positions import contiguous_positions


class Qwen2VL(Qwen2_5VL):
    """Qwen2-VL (arXiv 2409.12191). mlx-vlm's tower runs with its merger taken out, then the merger alone."""

    def tower(self, pixels: np.ndarray, grid: tuple[int, int, int] | None) -> mx.array:
        tower = self.net.vision_tower
        merger = tower.merger
        tower.merger = nn.Identity()
        try:
            states = tower(_flat(pixels, tower), mx.array([grid] * len(pixels)))
        finally:
            tower.merger = merger
        return states.reshape(len(pixels), -1, self.merge_size**2 * states.shape[-1])


class Qwen3VL(Qwen2_5VL):
    """Qwen3-VL (arXiv 2511.21631). Its deepstack features, one set for each of the first layers, ride beside
    the token embeddings, zero at text tokens: an embedding is ``1 + sets`` times a hidden state wide."""

    projector_path = None

    @property
    def sets(self) -> int:
        return len(self.net.config.vision_config.deepstack_visual_indexes)

    def tower(self, pixels: np.ndarray, grid: tuple[int, int, int] | None) -> mx.array:
        tower = self.net.vision_tower
        states, deep = tower(_flat(pixels, tower), mx.array([grid] * len(pixels)))
        return mx.concatenate([states, *deep], axis=-1).reshape(
            len(pixels), -1, states.shape[-1] * (1 + len(deep))
        )

    def project(self, states: mx.array) -> mx.array:
        return states

    def embed_tokens(self, ids: mx.array) -> mx.array:
        text = self.text.embed_tokens(ids)
        return mx.pad(text, [(0, 0)] * ids.ndim + [(0, self.sets * text.shape[-1])])

    def forward(self, embeds: mx.array, position_ids: mx.array, cache: list | None) -> mx.array:
        size = self.hidden_size
        options = {}
        if embeds.shape[-1] > size:
            deep = embeds[..., size:].reshape(-1, self.sets, size)
            options = {
                "visual_pos_masks": np.ones(embeds.shape[:2], dtype=bool),
                "deepstack_visual_embeds": [deep[:, index] for index in range(self.sets)],
            }
        return self.text(
            None,
            inputs_embeds=embeds[..., :size],
            mask=None,
            cache=cache,
            position_ids=position_ids,
            **options,
        )


class Idefics3(VisionFamily):
    """Idefics3 and SmolVLM (arXiv 2504.05299): tiles of one size, pixel shuffle, one linear projection."""

    image_token = "<image>"
    projector_path = "connector"

    def __init__(self, net: nn.Module, config: dict, processor: Any = None):
        super().__init__(net, config, processor)
        self.image_token_id = int(net.config.image_token_index)

    @property
    def text(self) -> nn.Module:
        return self.net.language_model

    @property
    def text_path(self) -> str:
        return "language_model.layers."

    @property
    def head_module(self) -> nn.Module:
        return self.net.language_model.lm_head

    def forward(self, embeds: mx.array, position_ids: mx.array, cache: list | None) -> mx.array:
        from mlx_vlm.models.base import create_attention_mask

        text = self.text  # its own __call__ goes on to the head
        cache = cache or [None] * len(text.layers)
        mask = create_attention_mask(embeds, cache)
        for layer, layer_cache in zip(text.layers, cache, strict=True):
            embeds = layer(embeds, mask, layer_cache)
        return text.norm(embeds)

    def visual_tokens(self) -> set[int]:
        tokenizer = self.processor.tokenizer
        special = {
            token: i
            for token, i in tokenizer.get_vocab().items()
            if token in ("<fake_token_around_image>", "<global-img>") or token.startswith("<row_")
        }
        return {self.image_token_id, *special.values()}

    def positions(self, visual: np.ndarray, images: tuple[ImageInput, ...]) -> np.ndarray:
        _check_count(visual, images)
        return contiguous_positions(len(visual))

    def process(self, picture: Image.Image) -> Processed:
        out = self.processor.image_processor([[picture]], return_row_col_info=True, return_tensors="np")
        pixels = np.asarray(out["pixel_values"], dtype=np.float32)[0]
        if not np.asarray(out["pixel_attention_mask"]).all():
            raise ValueError("the image processor pads it, which mlx-vlm's positions misread")
        rows, cols = int(out["rows"][0][0]), int(out["cols"][0][0])
        return Processed(pixels, None, len(pixels) * self.processor.image_seq_len, (rows, cols))

    def placeholder(self, image: ImageInput) -> str:
        from mlx_vlm.models.smolvlm.processing_smolvlm import get_image_prompt_string

        rows, cols = image.extra
        return get_image_prompt_string(
            rows,
            cols,
            self.processor.image_seq_len,
            "<fake_token_around_image>",
            self.image_token,
            "<global-img>",
        )

    def tower(self, pixels: np.ndarray, grid: tuple[int, int, int] | None) -> mx.array:
        count, tiles, channels, height, width = pixels.shape
        patch = self.net.config.vision_config.patch_size
        mask = mx.ones((count * tiles, height // patch, width // patch), dtype=mx.bool_)
        flat = mx.array(pixels).reshape(-1, channels, height, width).transpose(0, 2, 3, 1).astype(self.dtype)
        states = self.net.vision_model(flat, patch_attention_mask=mask, output_hidden_states=True)[0]
        connector = self.net.connector
        shuffled = connector.pixel_shuffle(states, connector.scale_factor)
        return shuffled.reshape(count, -1, shuffled.shape[-1])

    def project(self, states: mx.array) -> mx.array:
        return self.net.connector.modality_projection(states)


class Llava(VisionFamily):
    """LLaVA 1.5 (arXiv 2310.03744) on Llama or Qwen2: one tile, a two-layer projector."""

    image_token = "<image>"
    projector_path = "multi_modal_projector"

    def __init__(self, net: nn.Module, config: dict, processor: Any = None):
        super().__init__(net, config, processor)
        self.image_token_id = int(net.config.image_token_index)

    def positions(self, visual: np.ndarray, images: tuple[ImageInput, ...]) -> np.ndarray:
        _check_count(visual, images)
        return contiguous_positions(len(visual))

    def process(self, picture: Image.Image) -> Processed:
        pixels = np.asarray(
            self.processor.image_processor([picture], return_tensors="np")["pixel_values"], dtype=np.float32
        )[0]
        patch = self.net.config.vision_config.patch_size
        count = pixels.shape[-2] // patch * (pixels.shape[-1] // patch)
        count += self.net.config.vision_config.model_type == "clip_vision_model"  # its class token
        return Processed(pixels, None, count - (self.net.vision_feature_select_strategy == "default"))

    def tower(self, pixels: np.ndarray, grid: tuple[int, int, int] | None) -> mx.array:
        flat = mx.array(pixels).transpose(0, 2, 3, 1).astype(self.dtype)
        states = self.net.vision_tower(flat, output_hidden_states=True)[-1]
        first = 1 if self.net.vision_feature_select_strategy == "default" else 0
        layers = self.net.vision_feature_layer
        chosen = [states[index][:, first:] for index in ([layers] if isinstance(layers, int) else layers)]
        return chosen[0] if len(chosen) == 1 else mx.concatenate(chosen, axis=-1)

    def project(self, states: mx.array) -> mx.array:
        return self.net.multi_modal_projector(states)


def _flat(pixels: np.ndarray, tower: nn.Module) -> mx.array:
    return mx.array(pixels).reshape(-1, pixels.shape[-1]).astype(tower.patch_embed.proj.weight.dtype)


def _check_count(visual: np.ndarray, images: tuple[ImageInput, ...]) -> None:
    wanted = sum(image.num_tokens for image in images)
    if int(visual.sum()) != wanted:
        raise ValueError(f"{int(visual.sum())} visual tokens, but the images need {wanted}")
