"""Checkpoints, peers' environments, and measurements that alternate between the sides."""

import glob
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import sysconfig
import venv
from datetime import date
from pathlib import Path

HERE = Path(__file__).parent
CACHE = Path(os.environ.get("BENCH_CACHE", Path.home() / ".cache" / "mpi-mlx-benchmarks"))
PEERS = {
    "mlx-vlm": ["mlx-vlm==0.7.10"],
    "mlx-lm": ["mlx-lm==0.32.2"],
    "mlx-lm-lora": ["mlx-lm-lora==5.10.2"],
    "inductive-mlxrl": ["inductive-mlxrl==0.2.4", "mlx-lm==0.32.2"],
    "textpolicy": ["textpolicy==0.1.11", "mlx-lm==0.32.2"],
    "mlx-train-perf": ["mlx-train-perf[mlx-lm]==0.9.1"],  # pins mlx 0.32.0 itself
}


NEEDS = {"textpolicy": (3, 12)}  # the oldest Python a peer installs on, where that is newer than ours


def peer_python(name: str) -> str:
    """The interpreter of a peer's own environment, made and filled on first use.

    `BENCH_PYTHON_<NAME>` (upper case, dashes as underscores) names an existing one instead.
    """
    given = os.environ.get("BENCH_PYTHON_" + name.upper().replace("-", "_"))
    if given:
        return given
    folder = CACHE / "environments" / name
    python = folder / "bin" / "python"
    if not (folder / "complete").exists():
        _environment(folder, NEEDS.get(name))
        version = "0.32.0" if name == "mlx-train-perf" else "0.32.4"
        mlx = [f"mlx[cpu]=={version}" if sys.platform == "linux" else f"mlx=={version}"]
        subprocess.run([python, "-m", "pip", "install", "-q", *mlx, *PEERS[name]], check=True)
        (folder / "complete").touch()
    return str(python)


def _environment(folder: Path, oldest: tuple[int, int] | None) -> None:
    """An empty environment on this Python, or on a newer one that PATH holds."""
    if oldest is None or sys.version_info >= oldest:
        venv.create(folder, with_pip=True, clear=True)
        return
    found = filter(None, (shutil.which(f"python3.{minor}") for minor in range(oldest[1], oldest[1] + 6)))
    python = next(found, None)
    if python is None:
        raise SystemExit(f"{folder.name} needs Python {oldest[0]}.{oldest[1]}: put a python3.{oldest[1]} on PATH")
    subprocess.run([python, "-m", "venv", "--clear", folder], check=True)


def blas() -> str | None:
    """The OpenBLAS that all sides open on Linux; `BENCH_BLAS` overrides."""
    if "BENCH_BLAS" in os.environ or sys.platform != "linux":
        return os.environ.get("BENCH_BLAS")
    site = sysconfig.get_paths()["purelib"]
    found = glob.glob(f"{site}/opencv_python*.libs/libopenblas*")
    return found[0] if found else None


class Side:
    """A process that measures once each time it is asked."""

    def __init__(self, name: str, script: str, python: str = sys.executable, **settings):
        self.name = name
        path = os.pathsep.join(filter(None, [str(HERE.parent), os.environ.get("PYTHONPATH")]))
        env = {**os.environ, "BENCH_BLAS": blas() or "", "PYTHONPATH": path}
        self.process = subprocess.Popen(
            [python, str(HERE / "sides" / script), json.dumps(settings)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=_log(name), text=True, env=env,
        )  # fmt: skip
        self.results: list[dict] = []

    def measure(self) -> dict:
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name} stopped; see {_log(self.name).name}")
        return json.loads(line)

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def _log(name: str):
    (CACHE / "logs").mkdir(parents=True, exist_ok=True)
    return open(CACHE / "logs" / f"{name}.log", "a")


def alternate(
    sides: list[Side], repeats: int = 5, warmup: int = 1, earlier: str | None = None, cold: tuple[str, ...] = ()
) -> dict[str, list[dict]]:
    """Measure the sides in turn, so that what else the machine does hits all alike.

    `earlier`: the name of a saved result whose repeats these are added to, for machines that are quiet only in pieces.
    `cold`: sides without a warm-up, whose single measurement takes minutes.
    """
    if earlier:
        before = json.loads((HERE / "results" / f"{earlier}.json").read_text())["results"]
        for side in sides:
            side.results += before[side.name]
    for round_ in range(warmup + repeats):
        for side in sides:
            if round_ >= warmup:
                side.results.append(side.measure())
            elif side.name not in cold:
                side.measure()
    for side in sides:
        side.close()
    return {side.name: side.results for side in sides}


def median(results: list[dict], key: str = "seconds") -> float:
    return statistics.median(r[key] for r in results)


def save(name: str, result: dict) -> None:
    """Keep a benchmark's figures with where they come from."""
    import mlx.core as mx

    where = {
        "date": date.today().isoformat(), "machine": platform.processor() or platform.machine(),
        "system": platform.system(), "cores": os.cpu_count(), "device": str(mx.default_device()),
        "mlx": mx.__version__, "blas_threads": os.environ.get("OPENBLAS_NUM_THREADS", "all"),
    }  # fmt: skip
    (HERE / "results").mkdir(exist_ok=True)
    (HERE / "results" / f"{name}.json").write_text(json.dumps({"where": where, **result}, indent=1) + "\n")


def checkpoint(kind: str, *, vocabulary: int = 8192, hidden: int = 256, layers: int = 6, head: int = 32) -> Path:
    """A random checkpoint folder in float32: `qwen2_5_vl` of about 8M parameters, or `llama` like it.

    `head`: the size of an attention head; there are half as many of keys and values as of queries.
    """
    text = dict(vocab_size=vocabulary, hidden_size=hidden, num_hidden_layers=layers, intermediate_size=704)
    text |= dict(num_attention_heads=hidden // head, num_key_value_heads=max(1, hidden // (2 * head)))
    sections = [4, 6, 6]
    vision = dict(depth=4, hidden_size=128, intermediate_size=512, fullatt_block_indexes=[3])
    return _random(f"{kind}-{vocabulary}-{hidden}-{layers}-{head}", kind, text, sections, vision, "float32")


def checkpoint_3b() -> Path:
    """Random weights in bfloat16 in the shapes of Qwen2.5-VL-3B; making them takes 25 GB of memory once."""
    text = dict(vocab_size=151936, hidden_size=2048, num_hidden_layers=36, intermediate_size=11008)
    text |= dict(num_attention_heads=16, num_key_value_heads=2, rope_theta=1e6)
    vision = dict(depth=32, hidden_size=1280, intermediate_size=3420, num_heads=16)
    vision |= dict(fullatt_block_indexes=[7, 15, 23, 31])
    return _random("qwen2_5_vl-3B", "qwen2_5_vl", text, [16, 24, 24], vision, "bfloat16")


def _random(name: str, kind: str, text: dict, sections: list[int], vision: dict, dtype: str) -> Path:
    """The folder of a checkpoint with the embedded model's tokenizer and processor."""
    folder = CACHE / "checkpoints" / name
    if (folder / "model.safetensors").exists():
        return folder
    import mlx.core as mx
    from mlx.utils import tree_flatten

    import mpi_mlx.assets
    from mpi_mlx.models.building import build_net

    tiny = Path(mpi_mlx.assets.__file__).parent / "tiny"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(tiny, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    config = json.loads((tiny / "config.json").read_text())
    config.update(text, max_position_embeddings=32768, torch_dtype=dtype)
    if kind == "llama":
        config.update(model_type="llama", architectures=["LlamaForCausalLM"])
        del config["vision_config"], config["rope_scaling"]
        (folder / "preprocessor_config.json").unlink()
    else:
        config["rope_scaling"] = {"type": "mrope", "mrope_section": sections}
        config["vision_config"].update(vision, out_hidden_size=text["hidden_size"])
        processor = json.loads((folder / "preprocessor_config.json").read_text())
        processor.update(min_pixels=3136, max_pixels=1003520)
        processor["size"] = {"shortest_edge": 3136, "longest_edge": 1003520}
        (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    (folder / "config.json").write_text(json.dumps(config))
    net = build_net(config, seed=0)
    weights = {key: value.astype(getattr(mx, dtype)) for key, value in tree_flatten(net.parameters())}
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "mlx"})
    return folder


def words(count: int, seed: int) -> str:
    """`count` words that are one token each in the checkpoints' vocabulary."""
    import random

    pool = "the red blue green gray brown cube sphere cylinder metal small left right color answer yes no".split()
    return " ".join(random.Random(seed).choices(pool, k=count))


def pictures(count: int, size: int = 224) -> list[str]:
    """Paths of random images."""
    import numpy as np
    from PIL import Image

    folder = CACHE / f"pictures-{size}"
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        if not (folder / f"{i}.png").exists():
            noise = np.random.default_rng(i).integers(0, 255, (size, size, 3), dtype=np.uint8)
            Image.fromarray(noise).save(folder / f"{i}.png")
    return [str(folder / f"{i}.png") for i in range(count)]
