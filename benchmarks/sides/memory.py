"""Peak memory of one update; `what` is ours_sft, mlx_lm_sft or mlx_vlm_rl (ours in RL: `ours_rl.py`).

mlx-vlm's RL update scores and differentiates one completion after the other, so one is measured.
"""

from wire import preload_blas, report, settings, wait

preload_blas()

import mlx.core as mx  # noqa: E402
import mlx.nn as nn  # noqa: E402
import numpy as np  # noqa: E402

options = settings()
rng = np.random.default_rng(0)
length, tokens = options["length"], options.get("tokens", 48)
what, checkpoint, text, image = (options.get(k) for k in ("what", "checkpoint", "text", "image"))
if what == "ours_sft":
    from types import SimpleNamespace

    from mpi_mlx.models import load_model
    from mpi_mlx.models.lora import attach_lora
    from mpi_mlx.training import losses

    model = load_model(checkpoint, dtype="float32")
    lora = dict(rank=8, alpha=16.0, dropout=0.0, targets="all-linear", kind="lora", projector=False)
    attach_lora(model, SimpleNamespace(**lora))
    net = model.net
    ids = mx.array(rng.integers(10, 1000, (1, length + 1)))

    def loss():
        hidden = model.hidden(model.embed(ids[:, :-1]), mx.arange(length)[None])[0]
        return -losses.token_logprobs(model.head_weight(), hidden, ids[0, 1:]).mean()

elif what == "mlx_lm_sft":
    from mlx_lm import load
    from mlx_lm.tuner.trainer import default_loss
    from mlx_lm.tuner.utils import linear_to_lora_layers

    net, _ = load(checkpoint)
    net.freeze()
    linear_to_lora_layers(net, len(net.layers), {"rank": 8, "dropout": 0.0, "scale": 2.0})
    ids = mx.array(rng.integers(10, 1000, (1, length + 1)))

    def loss():
        return default_loss(net, ids, mx.array([[0, length + 1]]))[0]

else:
    from types import SimpleNamespace

    from mlx_vlm import load
    from mlx_vlm.trainer.peft.utils import get_peft_model
    from mlx_vlm.trainer.vlm.grpo.dataset import GRPOVisionDataset
    from mlx_vlm.trainer.vlm.grpo.loss import completion_logps

    net, processor = load(checkpoint)
    net = get_peft_model(net, None, rank=8, alpha=16.0, dropout=0.0, verbose=False)
    rows = GRPOVisionDataset([], net.config, processor, config=SimpleNamespace(max_seq_length=8192))
    inputs = rows.process({"prompt": text, "images": [image], "answer": ""})["inputs"]
    start = inputs["input_ids"].size - 1
    ids = mx.concatenate([inputs["input_ids"], mx.array(rng.integers(10, 1000, tokens))])[None]
    batch = dict(inputs, input_ids=ids, attention_mask=mx.ones_like(ids))

    def loss():
        return completion_logps(net, batch, start).sum()


value_and_grad = nn.value_and_grad(net, loss)
while True:
    wait()
    mx.clear_cache()
    mx.reset_peak_memory()
    mx.eval(value_and_grad())
    report(peak=mx.get_peak_memory(), seconds=0.0, cpu_seconds=0.0)
