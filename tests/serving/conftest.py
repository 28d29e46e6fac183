"""Tiny random models to serve; nothing here needs the embedded model."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "models"))


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    from checkpoints import write_qwen2_5_vl

    return write_qwen2_5_vl(tmp_path_factory.mktemp("tiny") / "tiny", hidden_size=32, num_hidden_layers=2,
                            intermediate_size=48, rope_scaling={"type": "mrope", "mrope_section": [1, 1, 2]},
                            max_position_embeddings=2048)  # fmt: skip


@pytest.fixture(scope="session")
def tiny(tiny_folder):
    from mpi_mlx.models import load_model

    return load_model(tiny_folder)


@pytest.fixture(scope="session")
def picture(tmp_path_factory):
    from PIL import Image

    path = tmp_path_factory.mktemp("pictures") / "a red one.png"
    Image.new("RGB", (56, 84), (200, 30, 30)).save(path)
    return path


@pytest.fixture(scope="module")
def server(tiny_folder):
    """A tiny model behind the endpoints, for modules without one of their own."""
    pytest.importorskip("openai")
    from http_server import serving

    from mpi_mlx.models import load_model
    from mpi_mlx.serving.engine import Engine

    engine = Engine(lambda: load_model(tiny_folder), {"tiny": None}, max_rows=4).start()
    with serving(engine, max_tokens=100) as served:
        yield served
    engine.close()
