"""The one interface behind which every model stands."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mpi_mlx.data.completion import THINK_OPEN, with_opening
from mpi_mlx.errors import DataError, ModelError
from mpi_mlx.models.encoding import ChatEncoder, Encoded, message_images
from mpi_mlx.models.families import TextFamily
from mpi_mlx.models.images import ByteLRU, ImageInput, ImageStore
from mpi_mlx.models.tools import call_parser
from mpi_mlx.runtime import on_cpu

PATCHES_PER_CALL = 16384  # bounds the vision tower's activations
FEATURE_CACHE_BYTES = 512 << 20


class Model:
    """A loaded model: conversations in, hidden states and logits out.

    Made by :func:`mpi_mlx.models.load_model`. Shapes: B rows, T tokens, D hidden, V vocabulary, N visual
    tokens.

    Attributes:
        net: the mlx-vlm or mlx-lm module, which owns every parameter.
        tokenizer, processor: transformers' tokenizer, and the processor (None when text-only).
        family, config, path, base: model type, config.json, folder, and the name it was loaded by.
        eos_ids, end_of_turn_id, pad_id: where generation stops, what closes a turn, what fills a batch.
        call_parser: mlx-vlm's parser of the template's tool calls; None: they have the Hermes form.
        visual_ids: ids that may never be sampled.
        turn_tokens: the special tokens with which the template begins and ends turns.
    """

    def __init__(
        self,
        net: nn.Module,
        family: TextFamily,
        tokenizer: Any,
        template: str,
        config: dict,
        path: Path,
        base: str,
        eos_ids: Sequence[int] = (),
        signature: str = "",
    ):
        self.net, self.config, self.path, self.base = net, config, Path(path), base
        self.tokenizer, self.processor = tokenizer, family.processor
        self.parts = family
        self.family: str = config["model_type"]
        self.is_multimodal: bool = family.is_multimodal
        self.uses_mrope: bool = family.uses_mrope
        self.adapters = SimpleNamespace(enabled=True)
        self.lora_spec: Any = None
        self.projector_trained = False
        self.quantization: dict = {}
        self._chat = ChatEncoder(tokenizer, template, base, family.image_token, family.list_content)
        self._images = ImageStore(family.process, signature) if self.is_multimodal else None
        self._features: ByteLRU[mx.array] = ByteLRU(FEATURE_CACHE_BYTES)
        self.end_of_turn_id: int = int(tokenizer.convert_tokens_to_ids(self._chat.end_of_turn))
        self.turn_tokens = self._chat.turn_tokens
        self.eos_ids = frozenset(int(i) for i in eos_ids) | {self.end_of_turn_id}
        pad = tokenizer.pad_token_id
        self.pad_id = int(pad if pad is not None else self.end_of_turn_id)
        self.visual_ids: frozenset[int] = frozenset(family.visual_tokens())
        self.call_parser = call_parser(template)
        tags = ["<think>", "</think>", "<tool_call>", "</tool_call>"]
        if self.call_parser is not None:
            tags += [self.call_parser.tool_call_start, self.call_parser.tool_call_end]
        added = tokenizer.get_added_vocab()
        keep = {added[tag] for tag in tags if tag in added}
        self._hidden_ids = set(tokenizer.all_special_ids) - keep

    # ---- sizes

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def layers(self) -> list[nn.Module]:
        """The decoder layers."""
        return self.parts.text.layers

    @property
    def hidden_size(self) -> int:
        return self.parts.hidden_size

    @property
    def vocab_size(self) -> int:
        """Rows of the head, which may exceed the tokenizer's."""
        module = self.parts.head_module
        return module.get("linear", module).weight.shape[0]  # a linear with adapters wraps its own

    @property
    def dtype(self) -> mx.Dtype:
        return self.parts.dtype

    # ---- text

    def encode(
        self,
        messages: Sequence[Mapping],
        *,
        tools: Sequence[Mapping] | None = None,
        generation_prompt: bool = False,
    ) -> Encoded:
        """Tokenizes a conversation with the model's own chat template.

        Args:
            messages: chat messages; content is a string or a list of ``{"type": "text", "text"}`` and
                ``{"type": "image", "image": path or PIL image}`` parts.
            tools: function descriptions in OpenAI's form.
            generation_prompt: end with the opening of an assistant turn.

        Raises:
            DataError: an image is missing or broken, or the template refuses the conversation.
            ModelError: images for a text-only model.
        """
        pieces = self._chat.segments(messages, tools, generation_prompt)
        sources = message_images(messages)
        images = tuple(self._images.get(source) for source in sources) if sources else ()
        ids, assistant = self._tokenize(pieces, images)
        visual = ids == self.parts.image_token_id if self.is_multimodal else np.zeros(len(ids), dtype=bool)
        try:
            positions = self.parts.positions(visual, images)
        except ValueError as error:
            raise DataError(
                f"the conversation's images and placeholders do not match: {error}; "
                f"is {self.parts.image_token!r} written in the text?"
            ) from None
        return Encoded(ids, assistant, visual, images, positions)

    def _tokenize(
        self, pieces: Sequence[tuple[str, bool]], images: Sequence[ImageInput]
    ) -> tuple[np.ndarray, np.ndarray]:
        ids, flags, used = [], [], 0
        for text, is_turn in pieces:
            token = self.parts.image_token
            if token and not is_turn and token in text:
                parts = text.split(token)
                if used + len(parts) - 1 > len(images):
                    raise self._holds_placeholder()
                chosen = images[used : used + len(parts) - 1]
                used += len(chosen)
                text = parts[0] + "".join(
                    self.parts.placeholder(image) + rest
                    for image, rest in zip(chosen, parts[1:], strict=True)
                )
            piece = self._chat.token_ids(text)
            ids.append(piece)
            flags.append(np.full(len(piece), is_turn))
        if used != len(images):
            raise DataError(
                f"the chat template of {self.base} shows {used} of {len(images)} images; "
                "it may not take images in this role"
            )
        return np.concatenate(ids), np.concatenate(flags)

    def encode_completion(self, text: str) -> np.ndarray:
        """An assistant turn as int32 (T,), its end-of-turn token included.

        Raises:
            DataError: it holds an image's placeholder, which the model would learn to write.
        """
        if self.parts.image_token and self.parts.image_token in text:
            raise self._holds_placeholder()
        return self._chat.token_ids(text + self._chat.end_of_turn)

    def _holds_placeholder(self) -> DataError:
        return DataError(f"the text holds the image placeholder {self.parts.image_token!r}; remove it")

    def bound_caches(self, *, texts: int, images: int, features: int) -> None:
        """Bytes at most of what is remembered: ids of texts; images before the tower (as they came, and as
        arrays of pixels); their features. For a process that sees ever new ones."""
        self._chat.known.limit_bytes, self._features.limit_bytes = texts, features
        if self._images is not None:
            self._images.bound(images)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Text of token ids; special tokens are left out, reasoning tags are kept."""
        kept = [int(i) for i in ids if int(i) not in self._hidden_ids]
        return self.tokenizer.decode(kept, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def opens_trace(self, prompt: Encoded) -> bool:
        """Whether the template has opened the reasoning in the prompt, as those of thinking models do."""
        return self.decode(prompt.ids[-8:]).rstrip().endswith(THINK_OPEN)

    def turn_text(self, prompt: Encoded, ids: Sequence[int] | np.ndarray) -> str:
        """The assistant's turn that the completion ``ids`` of ``prompt`` makes, with a tag that the prompt has."""
        text = self.decode(ids)
        return with_opening(text) if self.opens_trace(prompt) else text

    # ---- images

    def image(self, source: Any) -> ImageInput:
        """A path or PIL image as the model takes it, processed once per content."""
        if self._images is None:
            raise ModelError(f"{self.base} is a text-only model and reads no images")
        return self._images.get(source)

    def features(self, images: Sequence[ImageInput]) -> list[mx.array]:
        """Frozen features, (N_i, D_features) each; every distinct image is encoded once and kept.

        With an adapted projector (``projector_trained``) they are the states before it, and :meth:`embed`
        applies it, with gradient. Call :meth:`forget_features` after changing the tower.
        """
        found = {image.key: self._features.get(image.key) for image in images}
        missing = {image.key: image for image in images if found[image.key] is None}
        groups: dict[tuple, list[ImageInput]] = {}
        for image in missing.values():
            groups.setdefault((image.grid, image.pixel_values.shape), []).append(image)
        for (grid, shape), group in groups.items():
            # A product's last bits depend on how many rows it has. One image a call keeps features, and with
            # them a resumed run, the same to the bit whichever images come together (promised on CPU alone).
            step = 1 if on_cpu() else max(1, PATCHES_PER_CALL // max(1, shape[0]))
            for start in range(0, len(group), step):
                chunk = group[start : start + step]
                states = self.parts.tower(np.stack([image.pixel_values for image in chunk]), grid)
                out = states if self.projector_trained else self.parts.project(states)
                for image, value in zip(chunk, out, strict=True):
                    value = mx.stop_gradient(value)
                    mx.eval(value)
                    found[image.key] = value
                    self._features.put(image.key, value, value.nbytes)
        return [found[image.key] for image in images]

    def forget_features(self) -> None:
        """Empties the feature cache."""
        self._features.clear()

    def vision(self, images: Sequence[ImageInput]) -> mx.array:
        """The vision tower and projector with gradient, for images of one size: (images, n, D_features)."""
        shapes = {(image.grid, image.num_tokens) for image in images}
        if len(shapes) != 1:
            raise ValueError(f"images of one size are wanted, got {sorted(map(str, shapes))}")
        pixels = np.stack([image.pixel_values for image in images])
        return self.parts.project(self.parts.tower(pixels, images[0].grid))

    # ---- forward

    def embed(self, ids: mx.array | np.ndarray, features: mx.array | None = None) -> mx.array:
        """Token embeddings with image features at the placeholders.

        Args:
            ids: int (B, T). A numpy array spares a device round trip.
            features: (N, D_features), the rows' visual tokens in reading order, N = number of placeholders.

        Returns:
            (B, T, D); wider for Qwen3-VL, whose deepstack features ride along until :meth:`hidden`.
        """
        text = self.parts.embed_tokens(ids if isinstance(ids, mx.array) else mx.array(ids))
        if features is None:
            return text
        if self.projector_trained:
            features = self.parts.project(features[None])[0]
        where = np.asarray(ids) == self.parts.image_token_id
        if int(where.sum()) != features.shape[0]:
            raise ValueError(f"{int(where.sum())} placeholders for {features.shape[0]} visual features")
        index = np.maximum(np.cumsum(where.reshape(-1)) - 1, 0).reshape(where.shape)
        return mx.where(mx.array(where)[..., None], features.astype(text.dtype)[mx.array(index)], text)

    def hidden(
        self, embeds: mx.array, position_ids: mx.array | np.ndarray, cache: list | None = None
    ) -> mx.array:
        """Final-norm hidden states (B, T, D) of embeddings (B, T, D).

        Args:
            position_ids: int32 (3, B, T) where ``uses_mrope``, else (B, T), which must go on from the cache.
            cache: one object a layer with ``offset``, ``update_and_fetch`` and ``make_mask``; None is plain
                causal attention over this sequence.
        """
        if not isinstance(position_ids, mx.array):
            position_ids = mx.array(position_ids)
        return self.parts.forward(embeds, position_ids, cache)

    def head(self, hidden: mx.array) -> mx.array:
        """Logits (..., V) of hidden states (..., D)."""
        return self.parts.head(hidden)

    def head_weight(self) -> mx.array | tuple[mx.array, mx.array] | None:
        """(V, D) with ``logits = hidden @ weight.T``, and a bias (V,) if the head has adapters and one; None when the
        head is quantized or not linear. Adapters are trained through the matrix: it is made anew at each call."""
        module = self.parts.head_module
        if hasattr(module, "weight_now"):  # a linear with adapters
            bias = module.linear.get("bias")
            return module.weight_now() if bias is None else (module.weight_now(), bias)
        plain = type(module) in (nn.Linear, nn.Embedding) and "bias" not in module
        return module.weight if plain else None

    def loss_head(self) -> mx.array | tuple[mx.array, mx.array] | Callable[[mx.array], mx.array]:
        """What losses compute logits with: `head_weight`, or `head`, as frozen, where that has no matrix."""
        weight = self.head_weight()
        return self.head if weight is None else weight

    # ---- adapters

    @property
    def has_adapters(self) -> bool:
        return self.lora_spec is not None

    @contextlib.contextmanager
    def adapters_disabled(self) -> Iterator[None]:
        """Within, the model is its own base: the reference. A flag, no copies; not seen by compiled functions
        traced outside."""
        before, self.adapters.enabled = self.adapters.enabled, False
        try:
            yield
        finally:
            self.adapters.enabled = before
