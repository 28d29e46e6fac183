"""mlx-vlm's SFT trainer (what `python -m mlx_vlm.train --algorithm sft` runs) through its Trainer API."""

from wire import Clock, preload_blas, report, settings, wait

preload_blas()

import mlx.core as mx  # noqa: E402
import mlx.optimizers as optim  # noqa: E402
from mlx_vlm import load  # noqa: E402
from mlx_vlm.trainer.api import Trainer  # noqa: E402
from mlx_vlm.trainer.peft.utils import get_peft_model  # noqa: E402
from mlx_vlm.trainer.vlm.config import VLMTrainingArgs  # noqa: E402

options = settings()
model, processor = load(options["checkpoint"])
model = get_peft_model(model, None, rank=8, alpha=16.0, dropout=0.0, verbose=False)
rows = [
    {
        "messages": [
            {"role": "user", "content": row["query"]},
            {"role": "assistant", "content": row["answer"]},
        ],
        "images": [row["image"]],
    }
    for row in options["rows"]
]
steps = options["epochs"] * len(rows) // options["batch"]


class Callback:
    clock, before = None, 0

    def on_train_loss_report(self, info):
        tokens, self.before = info["trained_tokens"] - self.before, info["trained_tokens"]
        report(**self.clock.read(), tokens=tokens, peak=mx.get_peak_memory())
        self.next()

    def on_val_loss_report(self, info):
        pass

    def next(self):
        wait()
        mx.reset_peak_memory()
        self.clock = Clock()


callback = Callback()
args = VLMTrainingArgs(
    batch_size=options["batch"], iters=10**6, steps_per_report=steps, steps_per_eval=None,
    steps_per_save=10**6, max_seq_length=4096, train_on_completions=True, adapter_file="/dev/null",
    cache_size=None,
)  # fmt: skip
callback.next()
Trainer(
    model, args, algorithm="sft", train_dataset=rows, processing_class=processor,
    optimizer=optim.AdamW(learning_rate=1e-5), training_callback=callback,
).train()  # fmt: skip
