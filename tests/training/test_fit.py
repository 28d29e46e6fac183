"""The loop, on a linear model whose losses and gradients can be worked out by hand."""

from types import SimpleNamespace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mpi_mlx.errors import TrainingError
from mpi_mlx.training import world
from mpi_mlx.training.fit import Batch, fit
from mpi_mlx.training.optimizer import Optimizer


class Linear(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = mx.array([1.0, 2.0])


class Objective:
    """Half the squared error, summed over rows; each row counts one."""

    def __init__(self, module, noise=0.0):
        self.module, self.noise, self.calls = module, noise, 0

    def __call__(self, micro):
        x, y = micro
        self.calls += 1
        error = x @ self.module.w - y
        if self.noise:
            error = error + self.noise * mx.random.normal(error.shape)
        return 0.5 * mx.square(error).sum(), {"size": (mx.abs(error).sum(), mx.array(float(len(y))))}


class Source:
    def __init__(self, split, updates=1, break_at=None):
        self.split, self.updates, self.break_at = split, updates, break_at

    def batch(self, step):
        rng = np.random.default_rng([5, step])
        x, y = rng.normal(size=(6, 2)).astype(np.float32), rng.normal(size=6).astype(np.float32)
        if step == self.break_at:
            y[4] = np.inf
        cuts = np.split(np.arange(6), self.split)
        micros = [(mx.array(x[c]), mx.array(y[c])) for c in cuts]
        return Batch(micros, 6.0, 6, self.updates, {"drawn": 1.0}, tuple(f"row-{i}" for i in range(6)))


def train(
    split=(), *, total=4, start=0, clip_norm=0.0, noise=0.0, state=None, updates=1, break_at=None, source=None,
    **changes,
):
    usual = {"warmup": 0.5, "schedule": "linear"} | changes
    spec = SimpleNamespace(stage="sft", learning_rate=0.1, min_lr_ratio=0.0, clip_norm=clip_norm, **usual)
    module = Linear()
    optimizer = Optimizer("adamw")
    optimizer.init(module.trainable_parameters())
    if state is not None:
        module.w, kept = state
        optimizer.load_state(kept)
    objective = Objective(module, noise)
    source = (source or Source)(split, updates, break_at)
    reports = []
    for report in fit(module, source, objective, spec, total=total, seed=7, optimizer=optimizer, start=start):
        reports.append((report, mx.array(module.w), dict(optimizer.state)))
    return reports, objective


def test_losses_and_gradients_are_divided_by_the_count_of_the_whole_step():
    """Micro-batches of 1, 3 and 2 rows: a mean of means would weigh their rows 1/3, 1/9 and 1/6."""
    (whole, *_), _ = train()
    (split, *_), _ = train((1, 4))
    batch = Source(()).batch(0)
    x, y = (np.array(a) for a in batch.micros[0])
    error = x @ np.array([1.0, 2.0]) - y
    gradient = (error[:, None] * x).mean(0)
    for report, *_ in (whole, split):
        assert report.loss == pytest.approx(0.5 * np.square(error).mean(), rel=1e-5)
        assert report.grad_norm == pytest.approx(np.linalg.norm(gradient), rel=1e-5)
        assert report.metrics == {"drawn": 1.0, "size": pytest.approx(np.abs(error).mean(), rel=1e-5)}
    means = [0.5 * np.square(error[c]).mean() for c in (slice(0, 1), slice(1, 4), slice(4, 6))]
    assert abs(np.mean(means) - split[0].loss) > 0.01  # what it is not


def test_accumulation_equals_one_big_batch():
    whole, _ = train()
    split, objective = train((1, 4))
    assert objective.calls == 4 * 3
    for (a, wa, _), (b, wb, _) in zip(whole, split, strict=True):
        assert a.loss == pytest.approx(b.loss, rel=1e-6)
        np.testing.assert_allclose(np.array(wa), np.array(wb), rtol=1e-6)


def test_reports_and_rates():
    reports, _ = train()
    assert [(r.step, r.total_steps, r.stage, r.tokens) for r, *_ in reports] == [
        (i, 4, "sft", 6) for i in (1, 2, 3, 4)
    ]
    assert [r.learning_rate for r, *_ in reports] == pytest.approx([0.05, 0.1, 0.1, 0.0])


def test_the_gradient_is_clipped_before_the_update():
    """Adam's second moment after one step is 0.01 g^2: it tells which gradient came."""
    free, clipped = train()[0][0], train(clip_norm=0.1)[0][0]
    assert clipped[0].grad_norm == free[0].grad_norm > 0.1  # the norm before

    def came(state):
        return np.sqrt(np.array(state["0.w.v"]) / 0.01)

    assert np.linalg.norm(came(free[2])) == pytest.approx(free[0].grad_norm, rel=1e-3)
    assert np.linalg.norm(came(clipped[2])) == pytest.approx(0.1, rel=1e-3)
    np.testing.assert_allclose(came(clipped[2]) / 0.1, came(free[2]) / free[0].grad_norm, rtol=1e-3)


def test_several_updates_on_a_batch_report_the_first_loss():
    (once, *_), _ = train()
    (thrice, *_), objective = train(updates=3, total=4)
    assert objective.calls == 12 and thrice[0].loss == once[0].loss
    assert thrice[2]["0.step"].item() == 3 and once[2]["0.step"].item() == 1
    assert thrice[0].metrics["size"] != once[0].metrics["size"]  # of the last update


def test_a_step_draws_the_same_numbers_whenever_it_is_run():
    whole, _ = train(noise=0.3)
    _, w, state = whole[1]
    rest, _ = train(noise=0.3, start=2, state=(w, state))
    assert [r.step for r, *_ in rest] == [3, 4]
    for (a, wa, _), (b, wb, _) in zip(whole[2:], rest, strict=True):
        assert a.loss == b.loss and mx.array_equal(wa, wb)
    assert whole[0][0].loss != train()[0][0][0].loss


def test_each_process_draws_numbers_of_its_own(monkeypatch):
    """Dropout masks, for one; rank 0 draws what a process alone draws."""

    class Drawing(Source):
        def batch(self, step):
            seen.append(mx.random.uniform().item())
            return super().batch(step)

    numbers = []
    for rank in (None, 0, 1):
        if rank is not None:
            group = SimpleNamespace(rank=lambda rank=rank: rank, size=lambda: 1)
            monkeypatch.setattr(world, "world", lambda group=group: group)
        seen = []
        train(source=Drawing, total=3)
        numbers.append(seen)
    assert numbers[0] == numbers[1] and len(set(numbers[0] + numbers[2])) == 6


def test_minibatches_are_updated_in_turn_each_with_its_own_count():
    """Two rounds over rows 0-3 and 4-5: the same weights as four steps on those batches, one after the other."""

    class Parts(Source):
        def batch(self, step):
            whole = super().batch(step)
            first, second = whole.micros
            rest = Batch([second], 2.0, 0)
            return Batch([first], 4.0, 6, self.updates, {}, whole.identities, [rest])

    class Alternating(Source):
        def batch(self, step):
            return Batch([super().batch(0).micros[step % 2]], (4.0, 2.0)[step % 2], 6)

    flat = {"schedule": "constant", "warmup": 0.0}
    (together, *_), _ = train((4,), total=1, updates=2, source=Parts, **flat)
    apart, _ = train((4,), total=4, source=Alternating, **flat)
    np.testing.assert_allclose(together[1], apart[-1][1], rtol=1e-6)
    assert together[0].loss == pytest.approx((apart[0][0].loss + apart[1][0].loss) / 2, rel=1e-6)


def test_not_finite_names_the_rows_and_updates_nothing():
    spec = SimpleNamespace(
        stage="sft", learning_rate=0.1, warmup=0.0, schedule="constant", min_lr_ratio=0.0, clip_norm=1.0
    )
    module = Linear()
    optimizer = Optimizer("adamw")
    optimizer.init(module.trainable_parameters())
    run = fit(
        module, Source((1, 4), break_at=1), Objective(module), spec, total=3, seed=0, optimizer=optimizer
    )
    next(run)
    before, moments = mx.array(module.w), {k: mx.array(v) for k, v in optimizer.state.items()}
    with pytest.raises(
        TrainingError, match=r"stage sft, step 2: loss inf.* row-4.*bad tensor w.*nothing was updated"
    ) as error:
        next(run)
    assert "\n" not in str(error.value) and error.value.exit_code == 2
    assert mx.array_equal(before, module.w)
    assert all(mx.array_equal(v, moments[k]) for k, v in optimizer.state.items())


def test_a_step_without_rows_is_no_gradient():
    """DAPO may find no group with signal in any process."""

    class Nothing(Source):
        def batch(self, step):
            return Batch([], 1e-9, 0)

    spec = SimpleNamespace(
        stage="rl", learning_rate=0.1, warmup=0.0, schedule="constant", min_lr_ratio=0.0, clip_norm=1.0
    )
    module = Linear()
    optimizer = Optimizer("adamw")
    optimizer.init(module.trainable_parameters())
    (report,) = fit(module, Nothing(()), Objective(module), spec, total=1, seed=0, optimizer=optimizer)
    assert (report.loss, report.grad_norm) == (0.0, 0.0)
    assert module.w.tolist() == [1.0, 2.0]
    # nor does the optimizer go on along what it has seen before
    optimizer.update(module, {"w": mx.array([1.0, -1.0])}, 0.1)
    before, state = module.w.tolist(), {k: v.tolist() for k, v in optimizer.state.items()}
    (report,) = fit(module, Nothing(()), Objective(module), spec, total=1, seed=0, optimizer=optimizer)
    assert module.w.tolist() == before != [1.0, 2.0]
    assert {k: v.tolist() for k, v in optimizer.state.items()} == state
