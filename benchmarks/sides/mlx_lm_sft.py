"""mlx_lm.lora's trainer; with `packed`, mlx-train-perf's packing and chunked loss in it.

mlx-train-perf's attention to packed rows is a Metal kernel, with a slow reference beside it. Where there is no
Metal, its rows go through mlx-lm's own attention with their block-diagonal mask instead, which is quicker.
"""

from functools import partial

from wire import Clock, preload_blas, report, settings, wait

preload_blas()

import mlx.core as mx  # noqa: E402
import mlx.optimizers as optim  # noqa: E402
from mlx_lm import load  # noqa: E402
from mlx_lm.tuner.trainer import TrainingArgs, default_loss, iterate_batches, train  # noqa: E402
from mlx_lm.tuner.utils import linear_to_lora_layers  # noqa: E402

options = settings()
model, tokenizer = load(options["checkpoint"])
model.freeze()
linear_to_lora_layers(model, len(model.layers), {"rank": 8, "dropout": 0.0, "scale": 2.0})


def encoded(row):
    user = {"role": "user", "content": row["query"]}
    prompt = tokenizer.apply_chat_template([user], add_generation_prompt=True, tokenize=True)
    answer = {"role": "assistant", "content": row["answer"]}
    whole = tokenizer.apply_chat_template([user, answer], tokenize=True)
    return list(whole), len(prompt)


def packed_loss(model):
    if mx.metal.is_available() or options.get("reference"):
        from mlx_train_perf.adapters.mlx_lm import make_packed_loss_fn
        from mlx_train_perf.attention import enable_flash_attention

        kernel = mx.metal.is_available()
        enable_flash_attention(model, impl="auto" if kernel else "reference", packed=True)
        return make_packed_loss_fn(model, impl="auto" if kernel else "chunked")
    from mlx_train_perf.adapters.mlx_lm import split_model
    from mlx_train_perf.attention.segments import segment_allowed
    from mlx_train_perf.core.loss import linear_cross_entropy

    def loss(model, batch, segments, starts, weights):
        mask, hidden = segment_allowed(segments), model.model.embed_tokens(batch[:, :-1])
        for layer in model.model.layers:
            hidden = layer(hidden, mask, None)
        options = dict(impl="chunked", reduction="none", validate_targets=False)
        losses = linear_cross_entropy(model.model.norm(hidden), split_model(model)[1], batch[:, 1:], **options)
        return (losses * weights).sum() / weights.sum(), weights.sum()

    return loss


rows = [encoded(row) for row in options["rows"]]
batch, loss, batches = options["batch"], default_loss, iterate_batches
steps = options["epochs"] * len(rows) // batch
longest = max(len(ids) for ids, _ in rows)
if options.get("packed"):
    from mlx_train_perf.data.packing import pack_indices, packed_iterate_batches

    length = options.get("pack_length") or longest
    packs = len(pack_indices([len(ids) for ids, _ in rows], length, seed=0, epoch=0))
    batches = partial(packed_iterate_batches, seed=0)
    batch, longest = options.get("pack_batch", 1), length
    steps = options["epochs"] * (packs // batch)
    loss = packed_loss(model)


class Callback:
    clock, before = None, 0

    def on_train_loss_report(self, info):
        mx.synchronize()
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
args = TrainingArgs(
    batch_size=batch, iters=10**6, steps_per_report=steps, steps_per_eval=10**7, steps_per_save=10**7,
    max_seq_length=longest, adapter_file="/dev/null",
)  # fmt: skip
callback.next()
train(
    model, optim.AdamW(learning_rate=1e-5), rows, None, args, loss=loss, iterate_batches=batches,
    training_callback=callback,
)  # fmt: skip
