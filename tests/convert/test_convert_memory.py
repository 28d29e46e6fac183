"""Memory stays below 1.3 of the largest shard, whatever the checkpoint's size."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
from hand_made import LLAMA, shapes_of

from mpi_mlx.convert.shards import Output, write_checkpoint

ROOT = Path(__file__).parents[2]
SMALL = {**LLAMA, "hidden_size": 64, "head_dim": 16, "intermediate_size": 64}
BIG = {**LLAMA, "hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8, "head_dim": 64,
       "num_key_value_heads": 8, "vocab_size": 2000, "num_hidden_layers": 12}  # fmt: skip
SHARD = 25_000_000
MEASURE = """
import resource, sys
from pathlib import Path
import numpy as np
from mpi_mlx.convert import adapters, families, layout, shards
from mpi_mlx.convert.fuse import fuse
from mpi_mlx.convert.weights import to_hf, to_mlx
# blocks as small against these shards as the real ones are against real shards
shards.COPY_BYTES, layout.BLOCK_VALUES = 1 << 18, 1 << 16
root, limit = Path(sys.argv[1]), int(sys.argv[2])

def write_adapter(folder, layers):
    low = {
        n.removesuffix(".weight"): adapters.LowRank(
            np.full((4, t.shape[1]), 0.01, np.float32), np.full((t.shape[0], 4), 0.01, np.float32), 1.0
        )
        for n, t in shards.open_checkpoint(folder).tensors.items() if n.endswith("proj.weight")
    }
    adapter, out = adapters.Adapter("lora", 4, 1.0, 0.0, low), folder.with_name(folder.name + "-adapter")
    out.mkdir()
    adapters.write_mlx_adapter(out, adapter, families.FAMILIES["llama"], layers, str(folder))
    return out

def convert(name, layers):
    source, keys = root / name, dict(check=False, shard_bytes=limit)
    to_mlx(source, root / (name + "-mlx"), **keys)
    yield "to-mlx"
    to_mlx(source, root / (name + "-q4"), quantize=4, **keys)
    yield "to-mlx --quantize 4"
    to_hf(root / (name + "-q4"), root / (name + "-hf"), dtype="float32", **keys)
    yield "to-hf of 4 bits in float32"
    fuse(write_adapter(source, layers), root / (name + "-fused"), **keys)
    yield "fuse"

list(convert("small", 2))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for what in convert("big", 12):
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    print("grown by", grown if sys.platform == "darwin" else grown * 1024, "after", what)
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


def test_peak_memory_of_streaming(tmp_path):
    write(tmp_path / "small", SMALL)
    outputs = write(tmp_path / "big", BIG)
    files = sorted((tmp_path / "big").glob("*.safetensors"))
    largest = max(f.stat().st_size for f in files)
    assert len(files) >= 4 and sum(o.nbytes for o in outputs) > 4 * largest
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path), str(SHARD)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    grown = [line.split(maxsplit=4) for line in done.stdout.splitlines() if line.startswith("grown by")]
    assert len(grown) == 4
    for _, _, nbytes, _, what in grown:
        assert int(nbytes) < 1.3 * largest, f"{what}: {nbytes} bytes, largest shard {largest}"
