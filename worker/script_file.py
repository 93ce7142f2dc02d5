"""job.toml of a script job (`kind = "script"`): read strictly like any other, without torch.

Its inputs are files of its own folder, named with their paths below it; a folder in `inputs` stands for all its files.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any, Final

from protocol import params
from protocol.credits import micro_of
from protocol.errors import IchibaError
from protocol.script import check_path
from worker.job_file import BadJobFile, JobFile, read_job_file
from worker.require import SCRIPT_KEYS, Require, read_require

__all__ = ["ScriptFile", "is_script", "read_any", "read_script_file"]

_KEYS: Final = (
    "kind", "name", "command", "file", "inputs", "seconds", "memory", "outputs", "seed", "replicas", "budget", "price",
    "require",
)  # fmt: skip
_SIZES: Final = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
_EXAMPLE: Final = "see examples/script_pi/job.toml"


@dataclass(frozen=True)
class ScriptFile:
    """A checked job.toml of a script. inputs: by their names below /inputs. unit_price_max: micro-credits a second."""

    name: str
    command: tuple[str, ...]
    inputs: Mapping[str, Path]
    seconds: int
    memory_bytes: int
    outputs_bytes: int
    seed: int
    replicas: int
    budget_micro: int | None
    unit_price_max: int | None
    require: Require


def _load(path: Path) -> tuple[Path, dict[str, Any]]:
    path = path / "job.toml" if path.is_dir() else path
    try:
        if path.stat().st_size > params.JOB_FILE_BYTES_MAX:
            raise BadJobFile(f"{path} has more than {params.JOB_FILE_BYTES_MAX} bytes")
        return path, tomllib.loads(path.read_text(), parse_float=Decimal)
    except OSError as error:
        raise BadJobFile(f"{path} cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise BadJobFile(f"{path} is not TOML: {error}") from None


def is_script(path: Path) -> bool:
    """Whether the job.toml, or the one in the directory `path`, is a script's. Raises BadJobFile."""
    return _load(path)[1].get("kind") == "script"


def read_any(path: Path) -> JobFile | ScriptFile:
    """Read and check a job.toml of either kind. Raises BadJobFile, BadRequirement."""
    return read_script_file(path) if is_script(path) else read_job_file(path)


def read_script_file(path: Path) -> ScriptFile:
    """Read and check it. Runs nothing of the user's. Raises BadJobFile, BadRequirement."""
    path, raw = _load(path)
    for key in raw:
        if key not in _KEYS:
            raise BadJobFile(f"unknown key {key!r} in a script's job.toml", next_step=f"known keys: {', '.join(_KEYS)}")
    folder = path.resolve().parent
    script, command = raw.get("file"), raw.get("command")
    if (script is None) == (command is None):
        raise BadJobFile("a script has a `file` or a `command`, one of them", next_step=_EXAMPLE)
    inputs = _texts(raw, "inputs", raw.get("inputs", []))
    words = _texts(raw, "command", command) if command is not None else ["python3", str(script)]
    found = _files(folder, [*inputs, *([str(script)] if script is not None else [])])
    memory = _size(raw, "memory", "512MiB")
    return ScriptFile(
        name=str(raw.get("name", folder.name))[:256],
        command=tuple(words),
        inputs=found,
        seconds=_integer(raw, "seconds", 1, params.SCRIPT_SECONDS_MAX, None),
        memory_bytes=memory,
        outputs_bytes=_size(raw, "outputs", f"{min(memory // 2, 64 * 2**20) // 2**20}MiB"),
        seed=_integer(raw, "seed", 0, 2**63 - 1, 0),
        replicas=_integer(raw, "replicas", 1, params.SCRIPT_REPLICAS_MAX, 1),
        budget_micro=_credits(raw, "budget"),
        unit_price_max=raw["price"] if type(raw.get("price")) is int else _credits(raw, "price"),
        require=read_require(raw.get("require"), SCRIPT_KEYS),
    )


def _texts(raw: Mapping[str, Any], key: str, value: Any) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(word, str) for word in value):
        raise BadJobFile(f"{key} is {raw.get(key)!r}, it must be a list of texts", next_step=_EXAMPLE)
    return list(value)


def _integer(raw: Mapping[str, Any], key: str, low: int, high: int, default: int | None) -> int:
    value = raw.get(key, default)
    if type(value) is not int or not low <= value <= high:
        raise BadJobFile(f"{key} is {value!r}, it must be a whole number from {low} to {high}", next_step=_EXAMPLE)
    return value


def _size(raw: Mapping[str, Any], key: str, default: str) -> int:
    match = re.fullmatch(r"(\d{1,6})(KiB|MiB|GiB)", str(raw.get(key, default)), re.ASCII)
    if match is None:
        raise BadJobFile(f"{key} is {raw.get(key)!r}, it must be a size", next_step=f'write it as in {key} = "512MiB"')
    return int(match[1]) * _SIZES[match[2]]


def _credits(raw: Mapping[str, Any], key: str) -> int | None:
    if key not in raw:
        return None
    try:
        return micro_of(str(raw[key]))
    except IchibaError as error:
        raise BadJobFile(f"{key}: {error.what}", next_step=error.next_step) from None


def _files(folder: Path, names: list[str]) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for name in names:
        given = folder / name
        below = [given] if given.is_file() else sorted(p for p in given.rglob("*") if p.is_file())
        if not below or not given.resolve().is_relative_to(folder):
            raise BadJobFile(f"input {name!r} is no file or folder of {folder}")
        for path in below:
            inside = path.relative_to(folder).as_posix()
            try:
                check_path(inside)
            except IchibaError as error:
                raise BadJobFile(f"input {inside!r}: {error.what}", why=error.why, next_step="rename it") from None
            found[inside] = path
    if len(found) > params.SCRIPT_INPUTS_MAX:
        raise BadJobFile(
            f"{len(found)} inputs, at most {params.SCRIPT_INPUTS_MAX}", next_step="pack them into one file"
        )
    return found
