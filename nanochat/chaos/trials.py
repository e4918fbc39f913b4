"""Trials of a training run: a small world, stages that train in it, and faults that befall them.

A world is a folder with a tokenizer, some text and conversations, and for every stage the runs that nothing befell: the
reference, the same in float64 (other numbers of ranks add up in another order, so only there the ends can be told from
each other), and an earlier run of the same tag for trials in which one is replaced. A trial has a base folder of its
own, which links to what it needs of the world's.
"""

import json
import shutil
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from time import monotonic

from nanochat.chaos.faults import KINDS, Course, Fault, Kind, Supervision, read_counts, shim_environment
from nanochat.chaos.lives import Life, Watch
from nanochat.chaos.verify import End, Lost, Tolerance, check_after_death, check_end
from nanochat.common import UserError
from nanochat.runlock import lock_path

TAG = "run"  # of the runs that are struck
NUM_STEPS, SAVE_EVERY, PREVIOUS_STEPS = 14, 3, 20  # the replaced run's step is one that the new one never saves
COMMON = [f"--num-iterations={NUM_STEPS}", f"--save-every={SAVE_EVERY}", "--eval-every=6", "--eval-tokens=500"]
COMMON += ["--total-batch-size=256", "--device-batch-size=2", "--logger=none", "--compile=off", "--device-type=cpu"]
SHAPE = ["--depth=1", "--aspect-ratio=16", "--head-dim=16", "--max-seq-len=64"]
RANKS_TOLERANCE = Tolerance(loss=1e-9, weights=1e-7)
Pair = tuple["Stage", str]  # a stage and one of VARIANTS


@dataclass(frozen=True)
class Stage:
    """A recipe that trains. flags: of its command. needs: stages whose reference it starts from."""

    name: str  # also the folder below checkpoints/
    recipe: str
    flags: Callable[["World"], list[str]]
    needs: tuple[str, ...] = ()


STAGES = {
    stage.name: stage
    for stage in (
        Stage("base", "base_train", lambda world: [f"--data-dir={world.text}", *SHAPE]),
        Stage("sft", "chat_sft", lambda world: [f"--data={world.chats}", "--base-tag=whole"], needs=("base",)),
    )
}

# Undisturbed runs, by tag: (environment, flags).
VARIANTS: Mapping[str, tuple[list[str], list[str]]] = {
    "whole": ([], []),
    "exact": (["NANOCHAT_DTYPE=float64"], []),
    "previous": ([], ["--seed=7", f"--num-iterations={PREVIOUS_STEPS}", "--save-every=-1"]),
}


@dataclass
class World:
    """What all trials share. stop: set when all are to end."""

    root: Path
    repository: Path
    python: str
    shim: Path | None
    stop: threading.Event
    ends: dict[tuple[str, str], End] = field(default_factory=dict)
    courses: dict[str, Course] = field(default_factory=dict)

    @property
    def text(self) -> Path:
        return self.root / "text"

    @property
    def chats(self) -> Path:
        return self.root / "chats.jsonl"

    @property
    def base(self) -> Path:
        """The base folder of the references."""
        return self.root / "references"

    def prepare(self, trials: Iterable["Trial"], pool: Executor) -> None:
        """Make data, tokenizer and every reference that these trials need. Raises UserError where one fails."""
        write_data(self.text, self.chats)
        tokenizer = [f"--data-dir={self.text}", "--vocab-size=300"]
        self._run("tokenizer", self.command(self.base, "tok_train", tokenizer))
        waiting = {pair for trial in trials for pair in trial.references()}
        while waiting:
            ready = [pair for pair in waiting if all((name, "whole") in self.ends for name in pair[0].needs)]
            list(pool.map(self._make_reference, sorted(ready, key=lambda pair: (pair[0].name, pair[1]))))
            waiting -= set(ready)

    def command(
        self, base: Path, recipe: str, flags: Sequence[str], environment: Sequence[str] = (), num_ranks: int = 1
    ) -> list[str]:
        """A recipe in a base folder of its own, as words for `env`."""
        words = ["-u", "NANOCHAT_DTYPE", "OMP_NUM_THREADS=1", "RAYON_NUM_THREADS=1", f"NANOCHAT_BASE_DIR={base}"]
        words.append(f"TMPDIR={self.root}")  # a torchrun that is killed leaves a folder there
        launch = ["-m", f"scripts.{recipe}"]
        if num_ranks > 1:
            launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={num_ranks}", *launch, "--"]
        return ["env", *words, *environment, self.python, *launch, *flags]

    def _make_reference(self, pair: Pair) -> None:
        stage, variant = pair
        environment, flags = VARIANTS[variant]
        log, folder = self.root / f"{stage.name}-{variant}.calls", self.base / "checkpoints" / stage.name
        if self.shim:  # in place, but it only counts
            environment = [*environment, *shim_environment(self.shim, folder, log, "any", 0, "none")]
        flags = [*stage.flags(self), *COMMON, *flags, f"--model-tag={variant}"]
        watch = Watch(folder / variant)
        command = self.command(self.base, stage.recipe, flags, environment)
        startup_s = self._run(f"{stage.name}-{variant}", command, watch)
        self.ends[stage.name, variant] = End.of(watch.folder)
        if variant == "whole":
            self.courses[stage.name] = Course(NUM_STEPS, startup_s, read_counts(log))

    def _run(self, name: str, command: Sequence[str], watch: Watch | None = None) -> float:
        """Seconds to the first step. Raises UserError unless the command ends well."""
        log = self.root / f"{name}.log"
        life = Life(command, self.repository, f"{self.root.name}-{name}", log)
        supervision = Supervision(life, watch or Watch(self.root / "nothing"), self.stop)
        code = supervision.until_it_ends()
        if code:
            raise UserError(f"the undisturbed run {name} left with {code}; it printed:\n{tail(log)}")
        return supervision.startup_s


def write_data(text: Path, chats: Path) -> None:
    """A little text, so little that a run comes to its second epoch, and some conversations."""
    text.mkdir(parents=True)
    words = ("river", "stone", "cloud", "tree", "house", "light", "water", "road", "one", "two", "three", "ten")
    random = Random(0)
    for number in range(12):
        sentences = (f"{' '.join(random.choices(words, k=random.randint(3, 12)))}." for _ in range(60))
        (text / f"part_{number:02}.txt").write_text("\n".join(sentences), encoding="utf-8")
    with chats.open("w", encoding="utf-8") as file:
        for i in range(60):
            question, answer = f"What is {i} + {i % 7}?", f"It is {i + i % 7}."
            turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            file.write(json.dumps({"messages": turns}) + "\n")


def tail(log: Path, lines: int = 12) -> str:
    """The end of what a process printed."""
    text = log.read_text(encoding="utf-8", errors="replace") if log.is_file() else ""
    return "\n".join(f"    | {line}" for line in text.splitlines()[-lines:])


# Trials ----------------------------------------------------------------------------------------------------------


def usable_kinds(shim: Path | None) -> list[Kind]:
    return [kind for kind in KINDS.values() if shim or not kind.shim]


def draw_trial(seed: int, number: int, stages: Sequence[str], kinds: Sequence[Kind]) -> "Trial":
    """Trial `number` of a series. Every kind comes first in one of as many successive trials as there are kinds."""
    random = Random(f"{seed} {number}")
    order = Random(f"{seed} kinds {number // len(kinds)}").sample(list(kinds), len(kinds))
    first, stage = order[number % len(kinds)], STAGES[random.choice(list(stages))]
    if first.num_ranks > 1:  # each number of ranks saves a part of the run: 2, 1, 2
        two = (draw_fault(random, first, 0.25, 0.5), draw_fault(random, KINDS["kill"], 0.4, 0.7, "step"))
        return Trial(number, stage, two, num_ranks=(2, 1, 2))
    alone = [kind for kind in kinds if kind.num_ranks == 1]
    others = random.choices(alone, k=random.choice((0, 0, 1, 2)))
    faults = tuple(draw_fault(random, kind) for kind in (first, *others))
    return Trial(number, stage, faults, num_ranks=(1,), replaces=random.random() < 0.25)


def draw_fault(random: Random, kind: Kind, low: float = 0.0, high: float = 1.0, event: str = "") -> Fault:
    return Fault(kind, event or random.choice(kind.events), random.uniform(low, high), random.random())


@dataclass
class Outcome:
    """What came of a trial. loss: a kind of `Lost`, or empty."""

    number: int
    stage: str
    replaces: bool
    num_ranks: tuple[int, ...]
    faults: tuple[Fault, ...]
    folder: Path
    restarts: int = 0
    kills_in_save: int = 0
    loss: str = ""
    message: str = ""
    log_tail: str = ""
    seconds: float = 0.0
    unexpected_exits: list[str] = field(default_factory=list)
    stray_files: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        how = " replacing" if self.replaces else f" ranks {self.num_ranks}" if len(self.num_ranks) > 1 else ""
        notes = "; ".join([*self.unexpected_exits, *(f"left {name}" for name in self.stray_files)])
        verdict = f"LOST ({self.loss})" if self.loss else "ok"
        faults = ", ".join(map(str, self.faults))
        parts = [f"trial {self.number:>3} {self.stage:<5}{how}", faults, f"{self.restarts} restarts"]
        return " | ".join([*parts, f"{self.seconds:.0f} s", verdict, *([notes] if notes else [])])


@dataclass(frozen=True)
class Trial:
    """num_ranks: of the first, second, ... life; the last entry holds for all that follow."""

    number: int
    stage: Stage
    faults: tuple[Fault, ...]
    num_ranks: tuple[int, ...]
    replaces: bool = False

    @property
    def variant(self) -> str:
        return "exact" if max(self.num_ranks) > 1 else "whole"

    def references(self) -> list[Pair]:
        needed = [
            (self.stage, "whole"),
            (self.stage, self.variant),
            *((STAGES[name], "whole") for name in self.stage.needs),
        ]
        return needed + ([(self.stage, "previous")] if self.replaces else [])

    def run(self, world: World, is_strict: bool = False) -> Outcome:
        """From the first start to the check of the end."""
        folder = world.root / f"trial_{self.number:03}"
        outcome = Outcome(self.number, self.stage.name, self.replaces, self.num_ranks, self.faults, folder)
        began = monotonic()
        try:
            struggle = Struggle(self, world, outcome)
            struggle.until_finished()
            check_end(struggle.run, world.ends[self.stage.name, self.variant], self._tolerance)
            hidden = sorted(struggle.run.parent.rglob(".*"))
            outcome.stray_files = [path.name for path in hidden if path != lock_path(struggle.run)]
            if is_strict and (told := outcome.unexpected_exits + outcome.stray_files):
                raise Lost("exits", "; ".join(told))
        except Lost as loss:
            outcome.loss, outcome.message = loss.kind, str(loss)
            outcome.log_tail = tail(folder / "log.txt")
        outcome.seconds = monotonic() - began
        return outcome

    @property
    def _tolerance(self) -> Tolerance:
        return Tolerance() if self.variant == "whole" else RANKS_TOLERANCE


class Struggle:
    """One trial under way: lives that are struck, one after the other, until one comes to the end."""

    def __init__(self, trial: Trial, world: World, outcome: Outcome) -> None:
        self.trial, self.world, self.outcome = trial, world, outcome
        self.folder, self.log = outcome.folder, outcome.folder / "log.txt"
        self.run = self.folder / "checkpoints" / trial.stage.name / TAG
        self.run.parent.mkdir(parents=True)
        self.previous_step = PREVIOUS_STEPS if trial.replaces else -1
        self.newest = self.previous_step
        (self.folder / "tokenizer").symlink_to(world.base / "tokenizer")
        for name in trial.stage.needs:
            (self.folder / "checkpoints" / name).symlink_to(world.base / "checkpoints" / name)
        if trial.replaces:
            shutil.copytree(world.base / "checkpoints" / trial.stage.name / "previous", self.run)

    def until_finished(self) -> None:
        for index, fault in enumerate([*self.trial.faults, None]):
            self.outcome.restarts = index
            if self._live(index, fault):
                return
        raise Lost("exits", f"a life that nothing befell did not finish:\n{tail(self.log)}")

    def _live(self, index: int, fault: Fault | None) -> bool:
        """One start; whether the run has finished."""
        is_fresh = self.newest in (-1, self.previous_step)
        course, start = self.world.courses[self.trial.stage.name], 0 if is_fresh else self.newest
        before, calls = unfinished_saves(self.run), self.folder / f"calls_{index}.txt"
        watch = Watch(self.run, self.newest)
        command = self._command(index, fault, course, start, calls)
        life = Life(command, self.world.repository, f"{self.world.root.name}-{self.trial.number}-{index}", self.log)
        supervision = Supervision(life, watch, self.world.stop, fault, course, start)
        code = supervision.until_it_ends()
        if fault and fault.kind.shim and calls.is_file():
            fault.struck.extend(line.removeprefix("struck ") for line in calls.read_text().splitlines())
        if fault and fault.struck:
            was_saving = bool(unfinished_saves(self.run) - before)
            self.outcome.kills_in_save += fault.kind.name.startswith("kill") and was_saving
            if supervision.was_in_training and fault.kind.codes is not None and code not in fault.kind.codes:
                self.outcome.unexpected_exits.append(f"{fault.kind.name} led to exit {code}")
        self.newest = check_after_death(self.run, watch.newest, self.previous_step)
        if code and not (fault and fault.struck):
            raise Lost("exits", f"a life that nothing befell left with {code}:\n{tail(self.log)}")
        return code == 0

    def _command(self, index: int, fault: Fault | None, course: Course, start: int, calls: Path) -> list[str]:
        trial, world = self.trial, self.world
        environment = list(VARIANTS[trial.variant][0])
        if fault and fault.kind.shim and world.shim:
            environment += course.shim_variables(fault, start, world.shim, self.run.parent, calls)
        is_replacing = trial.replaces and self.newest == self.previous_step
        how = "--overwrite" if is_replacing else "--resume=auto"
        flags = [*trial.stage.flags(world), *COMMON, f"--model-tag={TAG}", how]
        num_ranks = trial.num_ranks[min(index, len(trial.num_ranks) - 1)]
        return world.command(self.folder, trial.stage.recipe, flags, environment, num_ranks)


def unfinished_saves(run: Path) -> set[tuple[str, int]]:
    """What saves that did not end have left, each by name and time."""
    places = (run, run.with_name(f".{run.name}.new"))
    return {(path.name, path.stat().st_ctime_ns) for place in places for path in place.glob(".step_*")}
