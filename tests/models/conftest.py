import pytest
from checkpoints import write_qwen2_5_vl

from mpi_mlx.models import load_model


@pytest.fixture(scope="session")
def qwen_folder(tmp_path_factory):
    return write_qwen2_5_vl(tmp_path_factory.mktemp("qwen2_5_vl"))


@pytest.fixture()
def qwen(qwen_folder):
    return load_model(qwen_folder)
