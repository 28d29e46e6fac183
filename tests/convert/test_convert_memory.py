"""Memory stays below 1.3 of the largest shard, whatever the checkpoint's size."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hand_made import LLAMA, shapes_of

from mpi_mlx.convert.shards import Output, write_checkpoint

ROOT = Path(__file__).parents[2]
CONFIG = {**LLAMA, "hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8, "head_dim": 64,
          "num_key_value_heads": 8, "vocab_size": 24_000, "num_hidden_layers": 6}  # fmt: skip
SHARD = 25_000_000  # the embedding alone has 24.6 MB
MEASURE = """
import resource, sys
from pathlib import Path
from mpi_mlx.convert import layout, shards
from mpi_mlx.convert.weights import to_mlx
# blocks as small against these shards as the real ones are against real shards
shards.COPY_BYTES, layout.BLOCK_VALUES = 1 << 18, 1 << 16
small, big, out, dtype = sys.argv[1:]
keys = dict(check=False, dtype=None if dtype == "None" else dtype)
to_mlx(small, out + "-small", **keys)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
to_mlx(big, out, **keys)
grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
print(grown if sys.platform == "darwin" else grown * 1024)
"""


def write(folder, config):
    folder.mkdir()
    row = np.full(1 << 16, 0x3C00, np.uint16).tobytes()  # 2^-7 in bfloat16

    def blocks(nbytes):
        return [row[: min(len(row), nbytes - at)] for at in range(0, nbytes, len(row))]

    outputs = []
    for name, shape in shapes_of(config).items():
        nbytes = 2 * int(np.prod(shape))
        outputs.append(Output(name, "BF16", shape, lambda k=nbytes: blocks(k)))
    write_checkpoint(folder, outputs, limit=SHARD)
    (folder / "config.json").write_text(json.dumps(config))
    return outputs


@pytest.mark.parametrize("dtype", [None, "float32"])
def test_peak_memory_of_streaming(tmp_path, dtype):
    write(tmp_path / "small", LLAMA)
    outputs = write(tmp_path / "big", CONFIG)
    files = sorted((tmp_path / "big").glob("*.safetensors"))
    largest = max(f.stat().st_size for f in files)
    assert len(files) >= 3 and sum(o.nbytes for o in outputs) > 2.2 * largest
    args = [str(tmp_path / n) for n in ("small", "big", "out")] + [str(dtype)]
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, *args], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert int(done.stdout.split()[-1]) < 1.3 * largest
