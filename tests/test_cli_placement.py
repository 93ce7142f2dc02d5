"""`ichiba placement plan`: what people type and read, the picture, and files that are no links."""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from market.placement import Links, Planner, Progress, cost_of, model
from peer.placement_map import drawn, layout
from protocol.params import PLACEMENT_DEVICES_MAX
from tests.cli_scene import ichiba, lines


def links_file(path: Path, count: int = 16, **more: Any) -> Path:
    rng = np.random.default_rng(3)
    np.savez(path, delay_ms=rng.uniform(1, 300, (count, count)), gbps=rng.uniform(0.1, 3, (count, count)), **more)
    return path


def planned(tmp_path: Path, file: Path, *words: str) -> dict[str, Any]:
    result = ichiba(tmp_path, "placement", "plan", "--links", str(file), "--json", *words)
    assert result.exit_code == 0, result.stderr
    (found,) = lines(result)
    return found


def test_a_plan_is_printed_with_what_it_is_held_against(tmp_path: Path) -> None:
    file = links_file(tmp_path / "links.npz")
    words = ("--stages", "4", "--replicas", "4", "--moves", "5000")
    found = planned(tmp_path, file, *words)
    assert found["lower_bound"] <= found["cost"] <= found["greedy"] < found["random_mean"]
    assert found["seconds"] > 0
    assert sorted(device for stage in found["assignment"] for device in stage) == list(range(16))
    with np.load(file) as arrays:
        problem = model(Links(arrays["delay_ms"], arrays["gbps"]), stages=4, replicas=4)
    assert cost_of(problem, np.array(found["assignment"])).total_s == found["cost"]
    again = planned(tmp_path, file, *words)
    assert again["assignment"] == found["assignment"]


def test_people_read_a_table_and_whether_it_could_be_better(tmp_path: Path) -> None:
    file = links_file(tmp_path / "links.npz", 8)
    result = ichiba(tmp_path, "placement", "plan", "--links", str(file), "--stages", "4", "--replicas", "2")
    assert result.exit_code == 0
    assert "No plan is better" in result.stdout
    file = links_file(tmp_path / "links.npz", 20)
    words = ("--stages", "4", "--replicas", "5", "--seconds", "0.1")
    result = ichiba(tmp_path, "placement", "plan", "--links", str(file), *words)
    assert "No plan is below" in result.stdout


def test_what_the_file_says_of_devices_counts(tmp_path: Path) -> None:
    file = links_file(tmp_path / "links.npz", 10, memory_gb=[1.0] * 2 + [8.0] * 8, work_s=[1.0] * 10)
    words = ("--stages", "4", "--replicas", "2", "--spare", "--memory-gb", "4")
    found = planned(tmp_path, file, *words)
    assert sorted(device for stage in found["assignment"] for device in stage) == list(range(2, 10))
    assert found["work_s"] == 4.0


def test_the_picture_has_every_device_and_is_well_formed(tmp_path: Path) -> None:
    file, plot = links_file(tmp_path / "links.npz", 12), tmp_path / "map.svg"
    planned(tmp_path, file, "--stages", "3", "--replicas", "4", "--plot", str(plot))
    picture = ElementTree.fromstring(plot.read_text())  # our own
    assert len([dot for dot in picture.iter("{http://www.w3.org/2000/svg}circle") if len(dot)]) == 12


def test_the_map_keeps_distances_and_stands_on_equal_links() -> None:
    places = np.random.default_rng(1).uniform(0, 1, (30, 2)) * (3, 1)
    far = np.hypot(*(places[:, None] - places[None]).transpose(2, 0, 1))
    made = layout(far)
    assert np.abs(np.hypot(*(made[:, None] - made[None]).transpose(2, 0, 1)) - far).max() < 0.05
    for count in (1, 2, 6):
        problem = model(Links(np.ones((count, count)), np.ones((count, count))), stages=count, replicas=1)
        planner = Planner(problem, seed=0)
        assert list(planner.run(moves=1))
        assert "NaN" not in drawn(planner.plan(), problem, title="equal").replace("nan", "NaN")


def test_ctrl_c_gives_the_best_so_far(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(planner: Planner, **budget: Any) -> Any:
        yield Progress(1.0, 10, 0.1)
        raise KeyboardInterrupt

    monkeypatch.setattr(Planner, "run", interrupted)
    file = links_file(tmp_path / "links.npz", 20)
    result = ichiba(tmp_path, "placement", "plan", "--links", str(file), "--stages", "5", "--replicas", "4", "--json")
    assert result.exit_code == 0
    assert "best plan so far" in result.stderr
    found = json.loads(result.stdout)
    assert found["cost"] <= found["greedy"]


def npz(path: Path, **members: bytes) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(f"{name}.npy", data)
    return path


def npy(array: Any) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=True)
    return buffer.getvalue()


GOOD = npy(np.ones((4, 4)))
HOSTILE = {
    "no zip": b"PK but no",
    "empty": b"",
    "no gbps": {"delay_ms": GOOD},
    "pickle": {"delay_ms": npy(np.full((4, 4), None)), "gbps": GOOD},
    "no array": {"delay_ms": b"hello", "gbps": GOOD},
    "short": {"delay_ms": GOOD[:-9], "gbps": GOOD},
    "claims 8 TB": {"delay_ms": GOOD.replace(b"(4, 4), }            ", b"(1000000, 1000000), }"), "gbps": GOOD},
    "a header cut short": {"delay_ms": GOOD.replace(b"(4, 4), }    ", b"(1000, 1000),"), "gbps": GOOD},
    "a header of another kind": {"delay_ms": GOOD.replace(b"(4, 4), }", b"('a', 4),"), "gbps": GOOD},
    "a negative side": {"delay_ms": GOOD.replace(b"(4, 4), }  ", b"(-4, -4), }"), "gbps": GOOD},
    "claims more devices": {"delay_ms": npy(np.ones((PLACEMENT_DEVICES_MAX + 1, 1))), "gbps": GOOD},
    "unpacks to too much": {"delay_ms": bytes(PLACEMENT_DEVICES_MAX**2 * 16 + 1), "gbps": GOOD},
    "words": {"delay_ms": npy(np.full((4, 4), "x")), "gbps": GOOD},
    "not square": {"delay_ms": npy(np.ones((4, 3))), "gbps": GOOD},
    "nan": {"delay_ms": npy(np.full((4, 4), np.nan)), "gbps": GOOD},
    "zero bandwidth": {"delay_ms": GOOD, "gbps": npy(np.zeros((4, 4)))},
    "a column that is a matrix": {"delay_ms": GOOD, "gbps": GOOD, "work_s": GOOD},
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_file_that_holds_no_links_is_refused_in_words(tmp_path: Path, name: str) -> None:
    content, file = HOSTILE[name], tmp_path / "links.npz"
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        assert isinstance(content, dict)
        npz(file, **content)
    words = ("--stages", "2", "--replicas", "2", "--json")
    result = ichiba(tmp_path, "placement", "plan", "--links", str(file), *words)
    assert result.exit_code == 2, result.output
    told = json.loads(result.stderr)
    assert told["code"] == "placement"
    assert told["what"]


@pytest.mark.parametrize("words", [("--grad-gb", "nan"), ("--act-gb", "-1"), ("--seconds", "nan"), ("--stages", "3")])
def test_numbers_that_do_not_fit_are_refused(tmp_path: Path, words: tuple[str, str]) -> None:
    file = links_file(tmp_path / "links.npz")
    result = ichiba(
        tmp_path, "placement", "plan", "--links", str(file), "--stages", "4", "--replicas", "4", "--json", *words
    )
    assert result.exit_code == 2
    assert json.loads(result.stderr)["exit_code"] == 2
