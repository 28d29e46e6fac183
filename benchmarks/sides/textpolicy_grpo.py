"""textpolicy: its quickest rollout (a call a prompt, which prefills it once) and its trainer's step.

On a CPU, one call for all rows takes half as long again, a step in one batch or of larger micro-batches up to twice as
long, and compiling it gains nothing. Its native decode backend does not run with this mlx-lm.
"""

from wire import Clock, preload_blas, report, settings, wait

preload_blas()

import mlx.core as mx  # noqa: E402
import mlx.optimizers as optim  # noqa: E402
from mlx_lm import load  # noqa: E402
from textpolicy.algorithms import grpo  # noqa: E402
from textpolicy.generation.lora import apply_lora, freeze_base  # noqa: E402
from textpolicy.generation.mlx_generation import batch_generate_tokens  # noqa: E402
from textpolicy.training import Trainer  # noqa: E402

options = settings()
model, tokenizer = load(options["checkpoint"])
apply_lora(model, lora_layers=len(model.layers), lora_rank=8, lora_scale=2.0)
freeze_base(model)
tokenizer._eos_token_ids = set()  # EOS not special: completions of full length on all sides
tokenizer._tokenizer.eos_token = None
prompts = []
for prompt in options["prompts"]:
    messages = [{"role": "user", "content": prompt["text"]}]
    prompts.append(mx.array(tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True)))
group = options["group"]
trainer = Trainer(
    model, grpo.compute_advantages, grpo.policy_loss, optim.AdamW(learning_rate=1e-5), max_grad_norm=1.0,
    compile_training=False, micro_batch_size=1,
)  # fmt: skip
while True:
    wait()
    mx.reset_peak_memory()
    clock = Clock()
    episodes = []
    for prompt in prompts:
        drawn = batch_generate_tokens(
            model, tokenizer, [prompt] * group, max_tokens=options["tokens"], temperature=1.0, top_p=1.0,
        )  # fmt: skip
        for tokens, extra in drawn:
            ids = tokens.tolist()
            reward = (sum(map(ord, tokenizer.decode(ids))) % 97) / 97
            log = extra["logprob"].tolist()
            episodes.append({"obs": prompt.tolist(), "act": ids, "logprob": log, "rew": reward})
    rollout = clock.read()["seconds"]
    trainer.train(grpo._pack_episodes(episodes))
    mx.synchronize()
    tokens = sum(len(e["act"]) for e in episodes) / len(episodes)
    report(**clock.read(), rollout_seconds=rollout, tokens=tokens, peak=mx.get_peak_memory())
