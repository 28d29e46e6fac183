"""A recipe from beginning to end: stages, checkpoints, evaluations, report. The library's ``train``."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from mpi_mlx import runtime
from mpi_mlx.evaluation.evaluate import evaluation
from mpi_mlx.evaluation.forgetting import forgetting, perplexity
from mpi_mlx.evaluation.report import write_report
from mpi_mlx.evaluation.results import load_results, record, record_facts, results_path
from mpi_mlx.models.adapters import load_adapter, save_adapter
from mpi_mlx.models.full import restore_model, save_model
from mpi_mlx.models.gradient_checkpointing import enable_gradient_checkpointing
from mpi_mlx.models.memory import count_parameters
from mpi_mlx.recipe_changes import regrades, told
from mpi_mlx.stages.build import build_stage, stage_seed, validation
from mpi_mlx.training import checkpoint as ckpt
from mpi_mlx.training import world
from mpi_mlx.training.fit import fit
from mpi_mlx.training.folder import RunFolder
from mpi_mlx.training.optimizer import Optimizer
from mpi_mlx.training.prepare import prepare, trains_whole_model
from mpi_mlx.training.recorders import Recorders
from mpi_mlx.training.reports import (
    EvaluationProgress,
    EvaluationRow,
    Interrupted,
    Message,
    RunFinished,
    RunStarted,
    StageFinished,
    StageStarted,
    ValidationReport,
)
from mpi_mlx.training.stopping import Best, request_stop, stop_on_interrupt, stopping

__all__ = ["request_stop", "train"]


def train(recipe, *, resume: bool = False) -> Iterator[object]:
    """Runs ``recipe`` and yields the reports of :mod:`mpi_mlx.training.reports`.

    ``resume`` goes on from the newest checkpoint of ``recipe.output``; the numbers are those of a run that
    was never stopped. Without it the output folder must be new, with it hold the run.

    Raises:
        MPIError: a bad recipe, dataset, model or folder; before anything is trained where that can be.
    """
    stopping.clear()
    with stop_on_interrupt(), runtime.keep_awake():
        run = _Run(recipe, resume)
        try:
            yield from run.go()
        finally:
            run.close()


class _Run:
    def __init__(self, recipe, resume: bool):
        self.recipe, self.resume = recipe, resume
        self.began, self.seconds_before = time.perf_counter(), 0.0
        self.stopped = False  # by request; the same in every process
        self.whole = trains_whole_model(recipe)
        self.folder = RunFolder(Path(recipe.output), recipe, resume=resume, writes=world.is_main())
        self.recorders = None
        try:
            ready = prepare(recipe, survey=not self.folder.goes_on or bool(self.folder.changes))
            self.dataset, self.model, self.stages = ready.dataset, ready.model, ready.stages
            self.folder.begin(self.dataset)  # last: nothing is written for a recipe that cannot run
            self.anew = regrades(self.folder.changes)  # earlier rows were measured in another way
            if self.anew:
                self.folder.mark(evaluated=[])
            self.seconds_before = self.folder.progress.get("seconds_before", 0.0)
            self.recorders = Recorders(recipe, self.folder.path) if world.is_main() else None
        except BaseException:
            self.close()
            raise

    # ---- the whole

    def go(self) -> Iterator[object]:
        recipe = self.recipe
        total, trainable = count_parameters(self.model)
        stages = tuple((i, s.stage, self.stages[i].steps) for i, s in enumerate(recipe.stages))
        yield RunStarted(recipe.name, recipe.output, total, trainable, stages, runtime.device_summary())
        if self.folder.changes:
            yield Message(f"goes on with a changed recipe: {told(self.folder.changes)}")
        for spec, prepared in zip(recipe.stages, self.stages, strict=True):
            for what, found in (("prompts", prepared.prompts), ("labelled rows", prepared.labelled)):
                if found is not None:
                    yield Message(f"{spec.stage}: {found.rows:,} {what}, the longest of {found.longest:,} tokens")
        yield from self._evaluate("base")
        for index, spec in enumerate(recipe.stages):
            if self._stop_everywhere():
                break
            if self.folder.stage_done(index):
                if self.folder.stage_done(index + 1) and not self._modes_left(recipe.labels[index]):
                    continue
                self._restore(index)
            else:
                yield from self._stage(index, spec, stages[index][2])
            # A run may have been killed between a stage's end and the end of its evaluation.
            if not self.stopped:
                yield from self._evaluate(recipe.labels[index])
        if self.stopped:
            yield Interrupted(recipe.output, f"{recipe.command} --resume")
        else:
            yield from self._finish()

    def close(self) -> None:
        if self.recorders:
            self.recorders.close()
        self.folder.close()

    def _finish(self) -> Iterator[object]:
        rows, report = (), None
        if world.is_main():
            if self.whole:
                save_model(self.model, self.folder.path / "model")
            else:
                save_adapter(self.model, self.folder.path / "adapter")
            if results_path(self.folder.path).is_file():
                rows = tuple(load_results(self.folder.path)["rows"])
                record_facts(self.folder.path, seconds=round(self._elapsed(), 1), **self._kept_steps())
                report = str(write_report(self.folder.path, self.dataset.test if self.dataset else ()))
            self.folder.mark(finished=True)
        world.barrier()
        yield RunFinished(self.recipe.output, self._elapsed(), rows, report)

    def _kept_steps(self) -> dict:
        """What results.json tells of the stages whose result is not that of their last step."""
        done = self.folder.progress["stages"]
        names = ("kept_step", "of_steps", "validation_loss")
        kept = {
            label: {name: done[str(index)][name] for name in names}
            for index, label in enumerate(self.recipe.labels)
            if "kept_step" in done.get(str(index), {})
        }
        return {"kept": kept} if kept else {}

    def _elapsed(self) -> float:
        """Seconds of this process, and of the ones it continues."""
        return time.perf_counter() - self.began + self.seconds_before

    # ---- one stage

    def _stage(self, index: int, spec, total: int) -> Iterator[object]:
        recipe, folder = self.recipe, self.folder
        seed = stage_seed(recipe, index)
        enable_gradient_checkpointing(self.model, spec.gradient_checkpointing)
        self.model.net.train()
        module, source, objective = self._built(index, spec, seed)
        optimizer = Optimizer(spec.optimizer, weight_decay=spec.weight_decay)
        optimizer.init(module.trainable_parameters())
        root = folder.stage(index, spec.stage) / "checkpoints"
        start, best, seconds = 0, None, 0.0
        found = ckpt.checkpoints(root)
        if found:
            state = ckpt.load_checkpoint(found[-1][1], module, optimizer)
            source.load_state(state["source"])
            start, best, seconds = state["step"], Best.read(state.get("best"), spec), state.get("seconds", 0.0)
        last = start
        folder.truncate_metrics(index, start)
        yield StageStarted(index, spec.stage, total, start)
        began = time.perf_counter()

        def save(step: int) -> None:
            state = {
                "step": step, "source": source.state(), "best": best and asdict(best),
                "seconds": seconds + time.perf_counter() - began,
            }
            if world.is_main():
                ckpt.save_checkpoint(ckpt.checkpoint_folder(root, step), module, optimizer, state)
                ckpt.prune(root, best.step if best else None)
                folder.mark(seconds_before=self._elapsed())
            world.barrier()

        for report in fit(
            module, source, objective, spec, total=total, seed=seed, optimizer=optimizer, start=start
        ):
            last = step = report.step
            row, loss = {"stage_index": index, **asdict(report)}, None
            looks = spec.validate_every and (step % spec.validate_every == 0 or step == total)
            if not looks:
                folder.append_metrics(row)
            if self.recorders:
                self.recorders.step(index, report)
            yield report
            stop = self._stop_everywhere()
            if looks:
                loss = world.of_main(validation(self.model, spec, self.dataset))
                folder.append_metrics(row if loss is None else {**row, "validation_loss": loss})
            if loss is not None:
                validated = ValidationReport(spec.stage, step, loss)
                if self.recorders:
                    self.recorders.validation(index, validated)
                yield validated
                best = Best.after(best, step, loss, spec)
                if best is not None and best.step == step:
                    save(step)
                if best is not None and best.waited(step, spec):
                    yield Message(f"{spec.stage}: no better since step {best.since}; stopping early")
                    stop = "early"
            if stop == "early":
                break
            if (step % spec.save_every == 0 and step < total) or stop:
                save(step)
            if stop:
                return
        kept = {}
        if best is not None and best.step != last:
            ckpt.load_parameters(ckpt.checkpoint_folder(root, best.step), module)
            kept = {"kept_step": best.step, "of_steps": last, "validation_loss": best.loss}
            yield Message(best.told(spec.stage, last))
        yield from self._close_stage(index, spec, module, root, seconds + time.perf_counter() - began, kept)

    def _built(self, index: int, spec, seed: int) -> tuple:
        if spec.stage == "pretrain":  # its stages freeze different parts of the one model
            return build_stage(self.model, spec, self.dataset, seed, self.recipe.folder)
        prepared, self.stages[index] = self.stages[index], None  # its rows are not kept for the stages after it
        return prepared.module, prepared.source, prepared.objective

    def _stop_everywhere(self) -> bool:
        """Whether any process was asked to stop; the processes must stop at the same step, so all ask this."""
        self.stopped = self.stopped or world.sum_numbers([float(stopping.is_set())])[0] > 0
        return self.stopped

    def _close_stage(self, index: int, spec, module, root: Path, seconds: float, kept: dict) -> Iterator[object]:
        world.barrier()  # until every process has read the best checkpoint, none is deleted
        if world.is_main():
            if self.whole:
                save_model(self.model, self.folder.stage(index, spec.stage) / "model")
            else:
                save_adapter(self.model, self.folder.stage(index, spec.stage) / "adapter")
            self.folder.mark_stage(index, stage=spec.stage, done=True, seconds=round(seconds, 3), **kept)
            shutil.rmtree(root, ignore_errors=True)
        world.barrier()
        yield StageFinished(index, spec.stage, seconds)

    def _restore(self, index: int) -> None:
        """Puts the weights at the end of a finished stage back."""
        folder = self.folder.stage(index, self.recipe.stages[index].stage)
        if self.whole:
            restore_model(self.model, folder / "model")
        else:
            load_adapter(self.model, folder / "adapter")

    # ---- evaluation

    def _evaluate(self, label: str) -> Iterator[object]:
        """Both modes of one model; skipped when the recipe does not ask for it or a resumed run has it."""
        spec = self.recipe.evaluation
        if label not in spec.after or self.dataset is None or not self.dataset.test:
            return
        self.model.net.eval()
        for document in self._modes_left(label):
            if self._stop_everywhere():
                return
            yield from self._evaluate_mode(label, document)
            if self.stopped:
                return
        if spec.forgetting and world.is_main():
            self._measure_forgetting(label)
        world.barrier()

    def _modes_left(self, label: str) -> list:
        """The documents (None: without one) with which a model is still to be evaluated."""
        spec = self.recipe.evaluation
        if label not in spec.after or self.dataset is None or not self.dataset.test:
            return []
        documents = [None]
        if spec.with_document and self.dataset.document is not None:
            documents.append(self.dataset.document)
        return [d for d in documents if [label, d is not None] not in self.folder.progress["evaluated"]]

    def _evaluate_mode(self, label: str, document) -> Iterator[object]:
        """Every process answers its share; rank 0 writes. A stop is looked at after each batch but the last."""
        in_context = document is not None
        work = evaluation(
            self.model, self.dataset.test, document, label=label, spec=self.recipe.evaluation,
            reasoning=self.recipe.reasoning,
        )
        while True:
            try:
                done, total = next(work)
            except StopIteration as end:
                row, predictions = end.value
                break
            yield EvaluationProgress(label, in_context, done, total)
            if done < total and self._stop_everywhere():
                work.close()
                return
        self.folder.progress["evaluated"].append([label, in_context])
        if world.is_main():
            record(self.folder.path, row, predictions, anew=self.anew)
            self.anew = False
            self.folder.mark()
            self.recorders.row(("base", *self.recipe.labels).index(label), row)
        yield EvaluationRow(row)

    def _measure_forgetting(self, label: str) -> None:
        """Perplexity on unrelated text, beside the base's."""
        facts = load_results(self.folder.path)
        known = facts.get("perplexity", {})
        if label in known:
            return
        known = {**known, label: perplexity(self.model)}
        record_facts(self.folder.path, perplexity=known, forgetting=forgetting(known))
