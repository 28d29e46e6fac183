"""From a config to an mlx module: definitions are mlx-vlm's and mlx-lm's, never a checkpoint's code."""

import copy
import importlib

import mlx.core as mx
import mlx.nn as nn

from mpi_mlx.errors import ModelError

VISION_FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "smolvlm", "idefics3", "llava")
REFUSED = {
    "gemma3": "its tokens attend in both directions inside an image, which shared prompts do not reproduce",
    "paligemma": "its prompt attends in both directions, which shared prompts do not reproduce",
}


def model_type(config: dict) -> str:
    """The architecture's name; raises ModelError when the config names none."""
    name = config.get("model_type")
    if not isinstance(name, str) or not name:
        raise ModelError("config.json has no model_type; is this a model folder?")
    return name.lower()


def is_multimodal(config: dict) -> bool:
    """Whether the checkpoint has a vision tower that this project reads.

    Raises:
        ModelError: the checkpoint has a vision tower of a family that is not supported.
    """
    name = model_type(config)
    if name in VISION_FAMILIES:
        return True
    if name in REFUSED:
        raise ModelError(
            f"vision-language family {name!r} is not supported: {REFUSED[name]}; "
            f"choose one of {', '.join(VISION_FAMILIES)}"
        )
    if config.get("vision_config"):
        raise ModelError(
            f"vision-language family {name!r} is not supported; "
            f"supported are {', '.join(VISION_FAMILIES)} and mlx-lm's text-only families"
        )
    return False


def build_net(config: dict, seed: int = 0) -> nn.Module:
    """An mlx-vlm or mlx-lm model with random weights drawn from ``seed``.

    Leaves the global random state as it was. Raises ModelError for an unknown family or a config that the
    definition refuses.
    """
    high, low = mx.random.state[0].tolist()
    mx.random.seed(seed)
    try:
        net = _vision_net(config) if is_multimodal(config) else _text_net(config)
        mx.eval(net.parameters())
    except (TypeError, ValueError, KeyError, AttributeError, AssertionError) as error:
        raise ModelError(f"config.json does not make a {model_type(config)} model: {error}") from error
    finally:
        mx.random.seed(high << 32 | low)  # the state cannot be assigned; this seed is this state
    return net


def _vision_net(config: dict) -> nn.Module:
    from mlx_vlm.utils import update_module_configs

    config = copy.deepcopy(config)
    module = importlib.import_module(f"mlx_vlm.models.{model_type(config)}")
    config.setdefault("text_config", {})
    config.setdefault("vision_config", {})
    model_config = module.ModelConfig.from_dict(config)
    model_config = update_module_configs(model_config, module, config, ["text", "vision", "projector"])
    return module.Model(model_config)


def _text_net(config: dict) -> nn.Module:
    model_class, args_class = text_classes(config)
    return model_class(args_class.from_dict(copy.deepcopy(config)))


def text_classes(config: dict) -> tuple[type, type]:
    """mlx-lm's (Model, ModelArgs) for a config; raises ModelError for a family it does not know."""
    from mlx_lm.utils import _get_classes

    try:
        return _get_classes(config)
    except ValueError:
        raise ModelError(
            f"model family {model_type(config)!r} is unknown to mlx-lm and mlx-vlm; "
            "choose another base or upgrade them"
        ) from None
