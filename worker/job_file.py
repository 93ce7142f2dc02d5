"""job.toml: what a submitter writes down about a job. Read strictly, explained kindly, without torch.

An unknown key is refused with the nearest known one, because a misspelt limit must never become no limit. Rates are
read as decimals, not floats: they become integers in units of 1e-9 (protocol/task.py) without a rounding between.
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any, Final, Literal, NoReturn, TypeVar

from protocol import params
from protocol.credits import micro_of
from protocol.errors import IchibaError
from protocol.task import BatchRule, Kind, Schedule
from worker.parallel_file import PARALLEL_KEYS, PRIVACY_KEYS, Parallel, read_keep, read_parallel
from worker.require import Require, read_require

__all__ = ["BadJobFile", "JobFile", "SettledJob", "Table", "read_job_file"]

_T = TypeVar("_T", str, int)
_KEYS: Final = (
    "kind", "name", "model", "data", "initial", "mode", "width", "seed", "steps", "steps_per_segment", "budget",
    "price", "sandbox", "batch", "learning_rate", "parallel", "privacy", "require",
)  # fmt: skip
_SAVED: Final = {
    "model": ", or the .program that captured.save() wrote",
    "data": ", or a file: .npz for arrays by name, anything else as bytes",
}
_LEVELS: Final = tuple(name.lower() for name in params.SANDBOX_LEVELS)
_KINDS: Final = ("train", "evaluate", "infer", "generate")
_BATCH_KEYS: Final = ("rule", "size", "length")
_RATE_KEYS: Final = ("kind", "peak", "floor", "warmup_steps")


class BadJobFile(IchibaError):
    """job.toml, or what it names, does not describe a job."""

    code = "bad-job-file"
    exit_code = 2


@dataclass(frozen=True)
class SettledJob:
    """The finished job that another is stacked on: the beginning of its id, or the folder `ichiba job get` wrote."""

    job: str
    folder: Path | None


@dataclass(frozen=True)
class JobFile:
    """A checked job.toml. budget_micro and unit_price_max are None if the file leaves them to the command line.

    initial: "seed", "model", the path of a checkpoint, or what the job is stacked on. model: (file, function), or
    (file, "") for a saved capture; data: (file, function), or (file, "") for a .npz of arrays or a file whose bytes are
    the data. Paths are absolute. sandbox: the level a solver must have, 2 to 4. sealed: the offer shows terms only.
    require: what else its solver must have. parallel: of a job that is cut into units; batch is then that of one
    micro-batch. keep: "first" and "last", the stages of it that the submitter runs.
    """

    path: Path
    kind: Kind
    name: str
    model: tuple[Path, str]
    data: tuple[Path, str] | None
    initial: Literal["seed", "model"] | Path | SettledJob
    mode: Literal["exact", "tolerant"]
    width: Literal[8, 15, 22]
    seed: int
    steps: int
    steps_per_segment: int
    batch: BatchRule
    schedule: Schedule
    budget_micro: int | None
    unit_price_max: int | None
    sandbox: int
    sealed: bool
    require: Require
    parallel: Parallel | None = None
    keep: tuple[str, ...] = ()


class Table:
    """A table of the file, from which each key is taken once."""

    def __init__(self, raw: Mapping[str, Any], known: tuple[str, ...], where: str) -> None:
        self.raw, self.where = raw, where
        for key in raw:
            if key not in known:
                near = difflib.get_close_matches(key, known, n=1)
                raise BadJobFile(
                    f"unknown key {key!r} in {where}",
                    next_step=f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}",
                )

    def refuse(self, what: str, *, why: str = "", next_step: str = "") -> NoReturn:
        """Raises BadJobFile about this table."""
        raise BadJobFile(f"{what} in {self.where}", why=why, next_step=next_step)

    def take(self, key: str, kind: type[_T], default: _T | None = None) -> _T:
        """The value of `key`; without a default it must be there."""
        value = self.raw.get(key, default)
        if value is None:
            raise BadJobFile(f"{self.where} has no {key!r}", next_step="see examples/mlp/job.toml")
        if type(value) is not kind:  # bool is an int to Python, and steps = true is a mistake
            raise BadJobFile(f"{key} in {self.where} is {value!r}, it must be {_ARTICLE[kind]}")
        return value

    def integer(self, key: str, low: int, high: int, default: int | None = None) -> int:
        """An integer in [low, high]."""
        value = self.take(key, int, default)
        if not low <= value <= high:
            raise BadJobFile(f"{key} in {self.where} is {value}, it must be from {low} to {high}")
        return value

    def flag(self, key: str) -> bool:
        """true or false."""
        value = self.raw.get(key)
        if not isinstance(value, bool):
            raise BadJobFile(f"{key} in {self.where} is {value!r}, it must be true or false")
        return value

    def choice(self, key: str, choices: tuple[str, ...], default: str | None = None) -> Any:
        """One of a few words."""
        value = self.take(key, str, default)
        if value not in choices:
            near = difflib.get_close_matches(value, choices, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"one of {', '.join(map(repr, choices))}"
            raise BadJobFile(f"{key} in {self.where} is {value!r}", next_step=hint)
        return value

    def nano(self, key: str, default: int | Decimal | None = None) -> int:
        """A rate in units of 1e-9, exactly."""
        value = self.raw.get(key, default)
        if value is None:
            raise BadJobFile(f"{self.where} has no {key!r}", next_step="give it as in peak = 0.001")
        if isinstance(value, bool) or not isinstance(value, int | Decimal):
            raise BadJobFile(f"{key} in {self.where} is {value!r}, it must be a number such as 0.001")
        scaled = Decimal(value) * 10**9
        if not scaled.is_finite() or not 0 <= scaled <= 2**62 or scaled != scaled.to_integral_value():
            raise BadJobFile(f"{key} in {self.where} is {value}, it must be a positive multiple of 0.000000001")
        return int(scaled)

    def table(self, key: str, known: tuple[str, ...]) -> Table:
        """A table inside this one."""
        value = self.raw.get(key)
        if not isinstance(value, dict):
            raise BadJobFile(f"{self.where} has no [{key}] table", next_step="see examples/mlp/job.toml")
        return Table(value, known, f"[{key}]")


_ARTICLE: Final = {str: "text in quotes", int: "a whole number"}


def read_job_file(path: Path) -> JobFile:
    """Read and check a job.toml, or the one in the directory `path`. Runs no code of the user's.
    Raises BadJobFile, BadRequirement."""
    if path.is_dir():
        path = path / "job.toml"
    try:
        if path.stat().st_size > params.JOB_FILE_BYTES_MAX:
            raise BadJobFile(
                f"{path} has {path.stat().st_size} bytes", why=f"at most {params.JOB_FILE_BYTES_MAX} are read"
            )
        raw = tomllib.loads(path.read_text(), parse_float=Decimal)
    except OSError as error:
        raise BadJobFile(f"{path} cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise BadJobFile(f"{path} is not TOML: {error}") from None
    top = Table(raw, _KEYS, path.name)
    folder = path.resolve().parent
    steps = top.integer("steps", 1, params.TASK_STEPS_MAX)
    per_segment = top.integer("steps_per_segment", 1, params.TASK_STEPS_MAX, default=min(steps, 100))
    if -(-steps // per_segment) > params.TASK_SEGMENTS_MAX:
        raise BadJobFile(
            f"{steps} steps in segments of {per_segment} are more than {params.TASK_SEGMENTS_MAX} segments",
            next_step=f"set steps_per_segment to at least {-(-steps // params.TASK_SEGMENTS_MAX)}",
        )
    width = top.integer("width", 8, 22, default=15)
    if width not in (8, 15, 22):
        raise BadJobFile(f"width is {width}, it must be 8, 15 or 22 bits", next_step="width = 15")
    require = read_require(raw.get("require"))
    kind = top.choice("kind", _KINDS, default="train")
    return JobFile(
        path=path,
        kind=kind,
        name=top.take("name", str, default=folder.name)[:256] or "job",
        model=_model(folder, top.take("model", str, default="model.py:build")),
        data=None if kind == "generate" else _data(folder, top.take("data", str, default="model.py:data")),
        initial=_initial(folder, top.take("initial", str, default="seed")),
        mode=top.choice("mode", ("exact", "tolerant"), default="exact"),
        width=width,  # type: ignore[arg-type]
        seed=top.integer("seed", 0, 2**63 - 1, default=0),
        steps=steps,
        steps_per_segment=per_segment,
        batch=_batch_of(kind, top),
        schedule=_schedule_of(kind, top, steps),
        budget_micro=_money(top, "budget"),
        unit_price_max=_money(top, "price"),
        sandbox=_sandbox(top, require),
        sealed="privacy" in top.raw and _sealed(top),
        require=require,
        parallel=_parallel(kind, top),
        keep=_keep(top),
    )


def _sealed(top: Table) -> bool:
    table = top.table("privacy", PRIVACY_KEYS)
    return table.flag("sealed") if "sealed" in table.raw or "keep" not in table.raw else False


def _keep(top: Table) -> tuple[str, ...]:
    if "privacy" not in top.raw:
        return ()
    table = top.table("privacy", PRIVACY_KEYS)
    return read_keep(table.raw, table, parallel="parallel" in top.raw)


def _parallel(kind: Kind, top: Table) -> Parallel | None:
    if "parallel" not in top.raw:
        return None
    if kind != "train" or top.raw.get("mode", "exact") != "exact":
        raise BadJobFile(
            f"[parallel] in {top.where}, a {top.raw.get('mode', 'exact')} job of the kind {kind}",
            why="only training in exact mode is cut into units, each of which is checked alone, bit for bit",
            next_step='mode = "exact", or remove [parallel]',
        )
    return read_parallel(top.table("parallel", PARALLEL_KEYS))


def _sandbox(top: Table, require: Require) -> int:
    if require.sandbox is None:
        return _LEVELS.index(top.choice("sandbox", _LEVELS[2:], default=_LEVELS[2]))
    if "sandbox" in top.raw:
        raise BadJobFile(f"sandbox is in {top.where} and in its [require]", next_step="keep the one in [require]")
    return require.sandbox


def _function(folder: Path, text: str, key: str) -> tuple[Path, str]:
    file, colon, function = text.partition(":")
    if not colon or not file.endswith(".py") or not function.isidentifier():
        raise BadJobFile(f"{key} is {text!r}", next_step=f'write {key} = "model.py:function"{_SAVED[key]}')
    return _inside(folder, file, key), function


def _model(folder: Path, text: str) -> tuple[Path, str]:
    if text.endswith(".program"):
        return _inside(folder, text, "model"), ""
    return _function(folder, text, "model")


def _data(folder: Path, text: str) -> tuple[Path, str]:
    if ".py:" in text:
        return _function(folder, text, "data")
    return _inside(folder, text, "data"), ""


def _initial(folder: Path, text: str) -> Literal["seed", "model"] | Path | SettledJob:
    if text in ("seed", "model"):
        return text  # type: ignore[return-value]
    if text.startswith("job:"):
        name = text.removeprefix("job:").strip().lower()
        if not 1 <= len(name) <= 64 or set(name) - set("0123456789abcdef"):
            raise BadJobFile(f"initial is {text!r}", next_step='"job:" and an id, or its beginning, of `ichiba job ls`')
        return SettledJob(name, None)
    if (folder / text / "proof.json").is_file():
        return SettledJob("", folder / text)
    if not text.endswith(".safetensors"):
        raise BadJobFile(
            f"initial is {text!r}",
            next_step='one of "seed", "model", the path of a .safetensors checkpoint, "job:" and the id of a finished '
            "job, or the folder that `ichiba job get` wrote of one",
        )
    return _inside(folder, text, "initial")


def _inside(folder: Path, name: str, key: str) -> Path:
    path = folder / name
    if not path.is_file():
        raise BadJobFile(f"{key} names {name!r}, and {path} is no file")
    return path


def _refuse_table(key: str, kind: Kind, top: Table, why: str) -> None:
    if key in top.raw:
        raise BadJobFile(f"[{key}] in {top.where}, whose kind is {kind}", why=why, next_step=f"remove [{key}]")


def _batch_of(kind: Kind, top: Table) -> BatchRule:
    if kind == "generate":
        _refuse_table("batch", kind, top, "it reads no data but the prompt, which build() gives")
        return BatchRule("rows", 1, 0)
    rule = _batch(top.table("batch", _BATCH_KEYS))
    if kind in ("evaluate", "infer") and rule.rule != "sequence":
        raise BadJobFile(
            f"the rule {rule.rule!r} in [batch] of a job of the kind {kind}", why="it would not read each row once",
            next_step='rule = "sequence"',
        )  # fmt: skip
    return rule


def _schedule_of(kind: Kind, top: Table, steps: int) -> Schedule:
    if kind != "train":
        _refuse_table("learning_rate", kind, top, "it trains nothing")
        return Schedule("constant", 0, 0, 0)
    return _schedule(top.table("learning_rate", _RATE_KEYS), steps)


def _batch(table: Table) -> BatchRule:
    rule = table.choice("rule", ("windows", "rows", "sequence"))
    size = table.integer("size", 1, 2**20)
    if rule == "rows" and "length" in table.raw:
        raise BadJobFile("length in [batch] belongs to the rules `windows` and `sequence`", next_step="remove it")
    windows = rule == "windows" or "length" in table.raw
    return BatchRule(rule, size, table.integer("length", 1, 2**24) if windows else 0)


def _schedule(table: Table, steps: int) -> Schedule:
    kind = table.choice("kind", ("constant", "warmup-cosine"), default="constant")
    peak = table.nano("peak")
    if kind == "constant":
        for key in ("floor", "warmup_steps"):
            if key in table.raw:
                raise BadJobFile(f"{key} in [learning_rate] belongs to the kind `warmup-cosine`", next_step="remove it")
        return Schedule("constant", peak, 0, 0)
    floor = table.nano("floor", default=0)
    if floor > peak:
        raise BadJobFile("floor in [learning_rate] is above peak")
    return Schedule("warmup-cosine", peak, floor, table.integer("warmup_steps", 0, steps, default=0))


def _money(table: Table, key: str) -> int | None:
    """Credits as text or a decimal, or, for the price alone, micro-credits as a whole number."""
    value = table.raw.get(key)
    if value is None:
        return None
    if key == "price" and type(value) is int:
        if not 1 <= value <= 10**12:
            raise BadJobFile(f"price is {value} micro-credits per giga-operation")
        return value
    if isinstance(value, bool) or not isinstance(value, str | int | Decimal):
        raise BadJobFile(f'{key} is {value!r}, it must be credits such as "1.50"')
    try:
        return micro_of(str(value))
    except IchibaError as error:
        raise BadJobFile(f"{key}: {error.what}", next_step=error.next_step) from None
