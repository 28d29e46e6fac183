"""mlx-lm-lora's GRPO trainer: seconds between its reports, one a step."""

from wire import Clock, preload_blas, report, settings, wait

preload_blas()

import mlx.core as mx  # noqa: E402
import mlx.optimizers as optim  # noqa: E402
from mlx_lm import load  # noqa: E402
from mlx_lm.tuner.utils import linear_to_lora_layers  # noqa: E402
from mlx_lm_lora.trainer.grpo_trainer import GRPOTrainingArgs, train_grpo  # noqa: E402

options = settings()
model, tokenizer = load(options["checkpoint"])
tokenizer._eos_token_ids = set()  # EOS not special: completions of full length on all sides
model.freeze()
linear_to_lora_layers(model, len(model.layers), {"rank": 8, "dropout": 0.0, "scale": 2.0})


def reward(prompts, completions, answer, types=None, **_):
    return [(sum(map(ord, t)) % 97) / 97 for t in completions]


def encoded(text):
    messages = [{"role": "user", "content": text}]
    return list(tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True))


rows = [(encoded(p["text"]), [1], p["text"], "") for p in options["prompts"]]


class Callback:
    clock = None

    def on_train_loss_report(self, info):
        mx.synchronize()
        report(**self.clock.read(), tokens=info["train_average_generated_tokens"], peak=mx.get_peak_memory())
        self.next()

    def on_val_loss_report(self, info):
        pass

    def next(self):
        wait()
        mx.reset_peak_memory()
        self.clock = Clock()


callback = Callback()
args = GRPOTrainingArgs(
    batch_size=len(rows), iters=10**6, steps_per_report=1, steps_per_save=10**6, group_size=options["group"],
    max_completion_length=options["tokens"], temperature=1.0, top_p=1.0, top_k=0, beta=0.0, epsilon=0.2,
    epsilon_high=0.2, max_seq_length=4096, adapter_file="/dev/null",
)  # fmt: skip
callback.next()
train_grpo(
    model, None, tokenizer, optim.AdamW(learning_rate=1e-5), rows, None, [reward], args,
    training_callback=callback, end_answer_token="",
)  # fmt: skip
