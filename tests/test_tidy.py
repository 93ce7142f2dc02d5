"""The habits of STYLE that a machine can check, from the first commit on."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("protocol", "market", "worker", "peer")
SOURCES = sorted(p for package in PACKAGES for p in (ROOT / package).rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))
OTHERS = sorted([*(ROOT / "benchmarks").rglob("*.py"), *(ROOT / "examples").rglob("*.py")])
ALLOWED_IMPORTS = {
    "protocol": {"protocol"},
    "market": {"market", "protocol"},
    "worker": {"worker", "protocol"},
    "peer": set(PACKAGES),
}
SANS_IO = {  # everything the simulator runs as the daemon does, and the simulator itself
    f"peer/{name}.py"
    for name in (
        "acceptance", "answers", "arbiter", "beacon", "benches", "bidding", "case", "certificate_messages",
        "certificates", "challenger", "checker", "checking", "clock", "clock_doubts", "commands", "correcting",
        "cosigning", "credit", "credit_messages", "deals", "delivery", "desk", "disputant", "dispute_file", "disputes",
        "drawing", "drops", "events", "forcing", "hearing", "house", "house_view", "intake", "job_terms", "jobs",
        "kept", "link_reports", "market_view", "matches", "messages", "moves", "netting", "news", "node", "notary",
        "overtaken", "packet_lines", "parallel", "pricing", "profiles", "prover", "quarrels", "receipt_rows",
        "receiving", "reputations", "reruns", "restored", "rulings", "run_commands", "run_events", "run_messages",
        "run_planning", "run_row", "run_watch", "runs", "sealing", "settler", "simulated_bench", "simulated_faults",
        "simulated_units", "simulated_work", "simulator", "solver", "stake_reasons", "stakes", "submitter",
        "tensor_state", "tensor_wire", "unit_deals", "units", "whistleblower", "witness",
    )
}  # fmt: skip
BANNED_NAMES = {"utils", "helpers", "common", "misc"}
MODULE_LINES_MAX = 500
FUNCTION_LINES_MAX = 70
PURE_FORBIDDEN = {"trio", "socket", "threading", "time", "secrets", "sqlite3", "subprocess", "asyncio"}


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def imports_of(tree: ast.AST) -> set[str]:
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module)
    return found


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_imports_point_downwards(path: Path) -> None:
    package = path.relative_to(ROOT).parts[0]
    for module in imports_of(ast.parse(path.read_text())):
        top = module.split(".")[0]
        if top in PACKAGES:
            assert top in ALLOWED_IMPORTS[package], f"{name_of(path)} imports {module}"
        if top == "libp2p":
            assert name_of(path) == "peer/host.py", "libp2p is imported in peer/host.py only"
        if top == "sqlite3":
            assert "sqlite" in path.name or name_of(path) == "peer/store.py", name_of(path)
        if top == "torch":
            assert package == "worker", "torch is imported in worker/ only"


@pytest.mark.parametrize(
    "path",
    [p for p in SOURCES if p.parts[-2] in ("protocol", "market") or name_of(p) in SANS_IO],
    ids=name_of,
)
def test_pure_layers_touch_no_world(path: Path) -> None:
    used = {module.split(".")[0] for module in imports_of(ast.parse(path.read_text()))}
    if "sqlite" not in path.name:
        assert not used & PURE_FORBIDDEN, f"{name_of(path)} imports {used & PURE_FORBIDDEN}"
    # A generator may be named as the type of an argument, never made or used as the global one.
    for call in re.findall(r"\brandom\.(\w+)\(", path.read_text()):
        seeded = (path.name, call) in (
            ("simulated_faults.py", "Random"),
            ("simulator.py", "Random"),
            ("economy.py", "default_rng"),
        )  # each from a seed
        assert seeded, f"{name_of(path)} calls random.{call}"
    for node in ast.walk(ast.parse(path.read_text())):
        opens = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "open"
        assert not opens, f"{name_of(path)} opens files"


@pytest.mark.parametrize("path", SOURCES + TESTS + OTHERS, ids=name_of)
def test_modules_and_functions_stay_small(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= MODULE_LINES_MAX, f"{name_of(path)} is too long"
    assert path.stem not in BANNED_NAMES
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            assert lines <= FUNCTION_LINES_MAX, f"{name_of(path)}:{node.lineno} {node.name} has {lines} lines"


@pytest.mark.parametrize("path", SOURCES + OTHERS, ids=name_of)
def test_no_broad_except(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ExceptHandler):
            kinds = [node.type] if not isinstance(node.type, ast.Tuple) else list(node.type.elts)
            for kind in kinds:
                assert kind is not None, f"{name_of(path)}:{node.lineno} bare except"
                broad = isinstance(kind, ast.Name) and kind.id in ("Exception", "BaseException")
                assert not broad, f"{name_of(path)}:{node.lineno} catches {ast.unparse(kind)}"


@pytest.mark.parametrize("path", [p for p in TESTS if "swarm" not in name_of(p)], ids=name_of)
def test_tests_never_sleep(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "sleep":
            assert isinstance(node.func.value, ast.Name)
            assert node.func.value.id != "time", f"{name_of(path)}:{node.lineno} sleeps"


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_every_module_and_export_is_documented(path: Path) -> None:
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree), f"{name_of(path)} has no module docstring"
    exported: set[str] = set()
    for node in tree.body:
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == "__all__" for t in node.targets):
            exported = set(ast.literal_eval(node.value))
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and node.name in exported:
            assert ast.get_docstring(node), f"{name_of(path)}:{node.lineno} {node.name} has no docstring"


def test_the_protocol_page_draws_the_lifecycle_table_as_it_is() -> None:
    from protocol.lifecycle import diagram

    assert diagram() in (ROOT / "docs" / "protocol.md").read_text(), "paste protocol.lifecycle.diagram() again"


def test_every_dependency_has_a_line() -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    page = (ROOT / "docs" / "dependencies.md").read_text()
    for requirement in [*project["dependencies"], *project["optional-dependencies"]["dev"]]:
        name = re.split(r"[<>=\[]", requirement)[0]
        assert name in page, f"{name} has no line in docs/dependencies.md"


def test_every_link_between_pages_leads_somewhere() -> None:
    for page in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]:
        for target in re.findall(r"\]\(([^)#]+)", page.read_text()):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{name_of(page)} links to {target}"
