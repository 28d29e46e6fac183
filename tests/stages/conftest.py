"""A qwen2_5_vl of hidden size 32, and a rulebook of one decision with a few pictures."""

import sys
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import pytest
from mlx.utils import tree_map

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "training"))

from small_runs import write_base  # noqa: E402

from mpi_mlx.data.clevr_policy import build_clevr_policy  # noqa: E402
from mpi_mlx.models import load_model  # noqa: E402
from mpi_mlx.models.lora import attach_lora  # noqa: E402
from mpi_mlx.recipe import BenchmarkData  # noqa: E402


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory):
    return write_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="session")
def dataset():
    return build_clevr_policy(
        BenchmarkData(
            benchmark="clevr_policy", depth=1, train=5, rl=6, validation=3, test=1, wording="compact"
        )
    )


@pytest.fixture()
def adapted(base_folder):
    """Makes models with adapters that are not zero."""

    def make(dropout=0.0):
        model = load_model(base_folder)
        spec = SimpleNamespace(
            rank=2, alpha=4, dropout=dropout, targets="all-linear", kind="lora", projector=False
        )
        attach_lora(model, spec)
        mx.random.seed(1)
        model.net.update(
            tree_map(lambda p: p + 0.1 * mx.random.normal(p.shape), model.net.trainable_parameters())
        )
        return model

    return make


@pytest.fixture()
def model(adapted):
    return adapted()
