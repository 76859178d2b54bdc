"""A built run with its data: probe, evaluate, train, save, evaluate, record."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from planner.errors import PlanError
from planner.ledger import Phase
from planner.plan import Plan
from planner.stages import shapes
from trainer.beginning import Beginning, Place
from trainer.built import BuiltRun
from trainer.data import Batch, Data
from trainer.data_told import data_counts
from trainer.device import hold
from trainer.judging import Judge, Judged
from trainer.layer_progress import LayerProgress, planned_ratio
from trainer.loading import find_source
from trainer.measure import BETWEEN, Recorder
from trainer.merging import merge
from trainer.out_of_memory import explained, is_out_of_memory
from trainer.output import RunFolder
from trainer.probing import OverBound, check_bound, compile_first, give_back_unused, probe
from trainer.progress import Progress
from trainer.rate_search import go_by, picture, search_rate
from trainer.rates import RateFound
from trainer.record import Run, measurement
from trainer.replanning import Asked, Short, TooLittle, kept, lacked_of, let_go
from trainer.report import closing_lines, memory_table
from trainer.saving import Saved, Saver, digest
from trainer.shown import put_averages, shown_as_saved
from trainer.stages import stage_begun
from trainer.step import Evaluation, evaluate
from trainer.training import Announce, batches_of, nobody, planned_steps, train_steps

INTERRUPTED = 130
HELD_STEPS = 2
"""So many steps show whether a smaller limit suffices: the second finds memory as the first has left it."""


@dataclass(frozen=True)
class Running:
    """A run once its data are read: what all its parts work with."""

    plan: Plan
    built: BuiltRun
    data: Data
    judged: list[Batch]
    recorder: Recorder
    folder: RunFolder
    console: Console
    progress: Progress
    announce: Announce
    asked: Asked

    def go(self, saved: Saved | None) -> int:
        """From the first step, or from where it was stored, to the record; gives the exit code."""
        beginning = self._beginning(saved)
        if saved is not None:
            self._go_on(saved)
        plan, built, data, recorder, place = self.plan, self.built, self.data, self.recorder, Place()
        steps = planned_steps(plan.train, len(data.train.rows))
        judge = self._judge_of(saved, steps)
        self.folder.rate = beginning.rate.rate if beginning.rate else None
        if built.spikes is not None and saved is not None and saved.about.get("spikes"):
            built.spikes.restore(saved.about["spikes"])
        if built.cache_release is not None and saved is not None:
            built.cache_release.released += [(step, size) for step, size in saved.about.get("cache_released", ())]
        about = partial(self._about, beginning, judge)
        saver, free = self._saver(beginning, about), steps - HELD_STEPS
        try:
            for step in train_steps(plan, built, data, recorder, self.announce, saver, saved, place):
                self.progress.show(step)
                if self.asked.last_held is not None and step["step"] == free:
                    give_back_unused(self.built.device)
                    hold(self.built.device, self.asked.last_held)
                    self.recorder.held(free)
                if (stage := stage_begun(step["step"], steps, built.stages)) is not None:
                    self._begin_stage(stage)
                if built.cache_release is not None:
                    built.cache_release.after(step["step"], recorder.peak("allocated_bytes"), built.device)
                if judge.due(step["step"], steps) and (why := self._judge_while(judge, step["step"])):
                    self.console.print(f"Stopped after step {step['step']}: {why}.", highlight=False)
                    break
        except KeyboardInterrupt:
            self._tell_interrupted(saver)
            return INTERRUPTED
        except RuntimeError as error:
            # An update that has begun may have changed some of the adapters.
            if self.asked.replan == "never" or not is_out_of_memory(error) or place.changing:
                raise
            if place.schedule is None and not self.asked.answers(saved):
                raise  # while what was stored of it was put back
            why, lacked = explained(error, plan, self.recorder.phase), lacked_of(error)
            let_go(built.device, error)  # in the host there may be too little even for what is kept
            if place.schedule is not None:
                known = about() | {"recorder": self.recorder.times()}
                saved = kept(self.folder.path, built, place, digest(data.train.rows), known)
            raise TooLittle(Short(why, lacked, saved)) from None
        self._finish(beginning, saver, judge)
        return 0

    def _begin_stage(self, stage: int) -> None:
        """Give back the sizes of the stage before, and tell."""
        give_back_unused(self.built.device)
        stages, plan = self.built.stages, self.plan
        most = shapes(plan.total_tokens, plan.target, plan.train.batch, stages)[stage].total
        self.console.print(f"Stage {stage + 1} of {stages}: rows of up to {most:,} tokens.", highlight=False)

    def _judge_of(self, saved: Saved | None, steps: int) -> Judge:
        """What goes by evaluations while it trains; of a run that goes on, with what they gave before."""
        every = self.built.judging.every(self.plan.train, steps)
        judged = Judged.of(saved.about.get("judging")) if saved is not None else None
        return Judge(self.built.judging, self.folder.path, every, judged)

    def _judge_while(self, judge: Judge, step: int) -> str | None:
        """Judge after a step what would be saved now, averages in place of the adapters; says why to stop, if so."""
        with shown_as_saved(self.built):
            made = self._judge(f"after step {step}", step)
            save = partial(self.folder.write_adapter, self.built, step)
            why = judge.after(step, made.loss if made else None, save)
        if why:
            judge.judged.stopped = step
        return why

    def _beginning(self, saved: Saved | None) -> Beginning:
        """What is known when the next step begins: of a run that begins, goes on, or goes on by another plan."""
        if saved is not None and not saved.elsewhere:
            compile_first(self.plan, self.built, self.announce)
            return Beginning.of(saved).gone_on(saved)
        terms, seconds = self._probe(saved)
        if saved is None:
            before = self._judge_first()
            return Beginning(terms, seconds, before, rate=self._search_rate())
        return replace(Beginning.of(saved), terms=terms, probe_seconds=seconds)

    def _probe(self, saved: Saved | None) -> tuple[dict[str, int], float]:
        """The probe step, and the folder where there was none; gives exact bytes of terms, and seconds."""
        try:
            terms, seconds = probe(self.plan, self.built, self.recorder, self.announce)
        except RuntimeError as error:
            if not is_out_of_memory(error) or not self.asked.answers(saved):
                raise
            raise self._too_little(error, saved) from error
        self.console.print(memory_table(self.plan, self.recorder, terms))
        try:
            check_bound(self.plan, self.recorder)
        except OverBound as over:
            if self.asked.answers(saved):
                raise TooLittle(Short(over.why, over.size, saved)) from over
            self.folder.begin()
            run = Run([], seconds, [], 0, terms, None, None, data_counts(self.data))
            self.folder.save_record(measurement(self.plan, self.built, self.recorder, run))
            raise
        if saved is None:
            self.folder.begin()
        return terms, seconds

    def _judge_first(self) -> Evaluation | None:
        try:
            return self._judge("before")
        except RuntimeError as error:  # somebody took memory since the probe step, which evaluates, too
            if not is_out_of_memory(error) or not self.asked.answers(None):
                raise
            raise self._too_little(error, None) from error

    def _search_rate(self) -> RateFound | None:
        """A range test, where the plan asks for one; the run goes by what it finds, and a picture of it is kept."""
        search, plan, built = self.built.rate_search, self.plan, self.built
        if search is None:
            return None
        try:
            batches = partial(batches_of, plan, 1, self.data)  # whole rows, of which all stages are pieces
            found = search_rate(search, built, plan.train, batches, self.recorder, self.announce, self._show_rate)
        except RuntimeError as error:
            if not is_out_of_memory(error) or not self.asked.answers(None):
                raise
            raise self._too_little(error, None) from error
        self.folder.log(rate_search=found.document())
        if found.curve:
            self.folder.save_picture("rate_search.svg", picture(found))
        made = f"{len(found.curve)} steps, {self.folder.path / 'rate_search.svg'}"
        if not found.curve:
            told = f"Range test: no step of it had a loss that is a number; train.lr {plan.train.lr:g} stays."
        elif found.rate is None:
            told = f"Range test ({made}): the loss never fell; train.lr {plan.train.lr:g} stays."
        else:
            go_by(found, built.optimizer)
            told = f"Range test ({made}): the rate is {found.rate:.3g}, {found.told}."
            if found.still_fell(search):
                told += " The loss still fell at the last rate: a larger rate_range_test.high goes on."
        self.console.print(told, highlight=False)
        return found

    def _show_rate(self, step: int, rate: float, loss: float) -> None:
        assert self.built.rate_search is not None
        steps = self.built.rate_search.steps
        if step % max(1, steps // 10) == 0:
            self.console.print(f"range test {step}/{steps}: rate {rate:.3g}, loss {loss:.4f}", highlight=False)

    def _too_little(self, error: RuntimeError, saved: Saved | None) -> TooLittle:
        return TooLittle(Short(explained(error, self.plan, self.recorder.phase), lacked_of(error), saved))

    def _go_on(self, saved: Saved) -> None:
        """Everything around the model as it was when the run was stored."""
        if saved.rows != digest(self.data.train.rows):
            why = "the data are not those that the run was trained on so far."
            raise PlanError("--resume", why, "Put them back, or start another run with another --set train.out=…")
        self.recorder.add(saved.about["recorder"])
        self.progress.go_on(line for line in self.folder.go_back_to(saved.step) if "taken" in line)
        self.console.print(f"Going on {saved.where}.", highlight=False)

    def _about(self, beginning: Beginning, judge: Judge) -> dict[str, Any]:
        """What is stored beside the state itself."""
        about = {"beginning": beginning.document(), "recorder": self.recorder.found()}
        about["judging"] = judge.judged.document()
        if self.built.cache_release is not None:
            about["cache_released"] = self.built.cache_release.released
        return about | ({"spikes": self.built.spikes.document()} if self.built.spikes is not None else {})

    def _saver(self, beginning: Beginning, about: Callable[[], dict[str, Any]]) -> Saver | None:
        if not self.plan.train.save_minutes:
            return None
        rows = digest(self.data.train.rows)
        saver = Saver(self.folder.path, self.plan, self.built, rows, about, self.console.print)
        saver.check_room(beginning.terms)
        return saver

    def _tell_interrupted(self, saver: Saver | None) -> None:
        done = self.progress.done
        put_averages(self.built)
        written = self.folder.save_adapter(self.built, done)
        self.console.print(f"Interrupted after step {done}; the adapter of that moment is in {written}.")
        if saver is not None:
            command = f"plan --plan {self.folder.path / 'plan.yaml'} --execute --resume"
            self.console.print(f"`{command}` goes on {saver.where}.", highlight=False)

    def _judge_last(self, judge: Judge) -> Evaluation | None:
        """The adapters of the last step are judged like those before, unless they have been."""
        step = self.progress.done
        if any(judged == step for judged, _ in judge.judged.losses):
            return None
        made = self._judge("after")
        judge.after(step, made.loss if made else None, partial(self.folder.write_adapter, self.built, step))
        return made

    def _judge(self, when: str, step: int | None = None) -> Evaluation | None:
        """Judge the held-out rows; ``when``: in words, to follow "loss"; ``step``: the last one, while it trains."""
        if not self.judged:
            return None
        told = when if step is not None else f"{when} training"
        self.announce(f"held-out rows {told}", [batch.tokens for batch in self.judged])
        made = evaluate(self.built.loss, self.judged, self.built.device, self.recorder.mark)
        self.recorder.mark(BETWEEN)
        where = {} if step is None else {"step": step}
        self.folder.log(evaluation=when, **where, loss=made.loss, perplexity=made.perplexity, tokens=made.tokens)
        self.console.print(
            f"Held-out loss {told}: {made.loss:.4f} (perplexity {made.perplexity:.3f}).", highlight=False
        )
        return made

    def _finish(self, beginning: Beginning, saver: Saver | None, judge: Judge) -> None:
        """The adapter, the held-out rows after training, the record, and the merged model."""
        plan, built, recorder, folder, progress = self.plan, self.built, self.recorder, self.folder, self.progress
        put_averages(built)
        recorder.mark(Phase.SAVE)
        saved = folder.save_adapter(built, progress.done)  # before the evaluation, whatever may go wrong in it
        recorder.mark(BETWEEN)
        trained, after = progress.done, None
        if judge.goes_by_best:
            after = self._judge_last(judge)
            if (best := judge.put_best(built.model)) not in (None, progress.done):
                trained, after = best, None
                saved = folder.save_adapter(built, trained)
        after = after or self._judge("after")
        run = Run(
            step_seconds=progress.seconds,
            probe_seconds=beginning.probe_seconds,
            losses=progress.losses,
            skipped_steps=progress.skipped,
            terms=beginning.terms,
            before=beginning.before,
            after=after,
            data=data_counts(self.data),
            resumed=beginning.resumed,
            replanned=beginning.replanned,
            judged=judge.judged,
            rate=beginning.rate,
            steps=planned_steps(plan.train, len(self.data.train.rows)),
        )
        record = measurement(plan, built, recorder, run)
        written, lines = folder.save_record(record), closing_lines(record)
        folder.complete_card(trained, " ".join(lines))
        lines += [told] if (told := judge.told()) else []
        if saver is not None:
            saver.finish()
        if plan.train.merge:
            merged = _merge(plan, built, recorder, folder)
            folder.save_record(measurement(plan, built, recorder, run))  # once more, with what merging took
            lines.append(f"Merged model: {merged}")
        self.console.print(memory_table(plan, recorder, beginning.terms))
        write = f"Write with it: plan generate {shlex.quote(str(self.folder.path))} PROMPT"
        for line in [*lines, f"Adapter: {saved}", write, f"Record: {written}"]:
            self.console.print(line, highlight=False)


def _merge(plan: Plan, built: BuiltRun, recorder: Recorder, folder: RunFolder) -> Path:
    """Write the merged model; the host memory that held checkpoints makes room for it."""
    if built.disk is not None:
        built.disk.close()
    if built.host is not None:
        built.host.close()
    recorder.mark(Phase.MERGE)
    merged = merge(
        built.model,
        find_source(plan.model.source),
        built.tokenizer,
        folder.path / "merged",
        built.dtype,
        built.weights,
        plan.rope,
    )
    recorder.mark(BETWEEN)
    return merged


def listen(plan: Plan, built: BuiltRun, progress: Progress) -> Announce:
    """Let layers be shown where they run one by one; gives what wants to be told of each step beforehand."""
    if built.streamed is None:
        return nobody
    layers = LayerProgress(built.device, planned_ratio(plan), progress.show_layer)
    built.streamed.tell = layers
    return layers.begin
