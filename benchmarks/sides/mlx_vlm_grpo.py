"""mlx-vlm's GRPO trainer through its Trainer API: rollout plus update, as it reports them."""

from wire import Clock, preload_blas, report, settings, wait

preload_blas()

import mlx.core as mx  # noqa: E402
import mlx.optimizers as optim  # noqa: E402
from mlx_vlm import load  # noqa: E402
from mlx_vlm.trainer.api import Trainer  # noqa: E402
from mlx_vlm.trainer.peft.utils import get_peft_model  # noqa: E402
from mlx_vlm.trainer.vlm.grpo.config import GRPOTrainingArgs  # noqa: E402

options = settings()
model, processor = load(options["checkpoint"])
tokenizer = getattr(processor, "tokenizer", processor)
for name in ("eos_token_ids", "eos_token"):  # EOS not special: completions of full length on all sides
    if hasattr(tokenizer, name):
        setattr(tokenizer, name, None)
model = get_peft_model(model, None, rank=8, alpha=16.0, dropout=0.0, verbose=False)


def reward(*, completions, **_):
    return [(sum(map(ord, t)) % 97) / 97 for t in completions]


rows = []
for prompt in options["prompts"]:
    row = {"prompt": prompt["text"], "answer": ""}
    if prompt.get("system"):
        row["system"] = prompt["system"]
    if prompt.get("image"):
        row["images"] = [prompt["image"]]
    rows.append(row)


class Callback:
    clock = None

    def on_train_loss_report(self, info):
        spent = self.clock.read()
        report(
            seconds=info["data_time_per_step"] + info["step_time"],
            cpu_seconds=spent["cpu_seconds"],
            rollout_seconds=info["data_time_per_step"],
            tokens=info["train_average_generated_tokens"], length=info["average_sequence_length"],
            peak=mx.get_peak_memory(),
        )
        self.next()

    def on_val_loss_report(self, info):
        pass

    def next(self):
        wait()
        mx.reset_peak_memory()
        self.clock = Clock()


callback = Callback()
args = GRPOTrainingArgs(
    batch_size=len(rows), iters=10**6, steps_per_report=1, steps_per_eval=None, steps_per_save=10**6,
    group_size=options["group"], max_completion_length=options["tokens"], temperature=1.0, top_p=1.0, top_k=0,
    max_seq_length=8192, adapter_file="/dev/null",
)  # fmt: skip
callback.next()
Trainer(
    model, args, algorithm="grpo", train_dataset=rows, processing_class=processor,
    optimizer=optim.AdamW(learning_rate=1e-5), reward_funcs=[reward], training_callback=callback,
).train()  # fmt: skip
