"""Proves that the layers keep to themselves: who imports whom, and what nobody may use; and tests to what is theirs."""

import ast
import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.imports import LATE_IMPORTS
from tests.conftest import RAY_TOKEN

ROOT = Path(__file__).resolve().parents[1]
LAYERS = ("lenet", "pipeline", "flows")
SHIPPED = sorted(path for layer in LAYERS for path in (ROOT / layer).rglob("*.py"))
EVERYTHING = sorted([*SHIPPED, *(ROOT / "tests").rglob("*.py"), *(ROOT / "infra").rglob("*.py")])
MAX_LINES = 400
OWN = ["AWS_PROFILE", "CUDA_VISIBLE_DEVICES", "LENET_STORAGE", "PREFECT_API_URL",
       "PREFECT_SERVER_DATABASE_CONNECTION_URL", "RAY_ADDRESS"]  # fmt: skip


def named(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imported_modules(path: Path) -> Iterator[str]:
    """Dotted names of all that a file imports, inside functions too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{named(path)}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def packages(path: Path) -> set[str]:
    return {name.split(".")[0] for name in imported_modules(path)}


def importers(*names: str) -> set[str]:
    return {named(path) for path in SHIPPED if packages(path) & set(names)}


def test_every_layer_is_looked_at() -> None:
    assert {named(path).split("/")[0] for path in SHIPPED} == set(LAYERS)
    assert len(SHIPPED) > 20


def test_lenet_is_plain_torch() -> None:
    for path in (ROOT / "lenet").rglob("*.py"):
        assert packages(path) <= {"torch", "lenet", *sys.stdlib_module_names}, named(path)


def test_only_flows_knows_prefect_and_only_flows_knows_flows() -> None:
    assert {name.split("/")[0] for name in importers("prefect")} == {"flows"}
    assert {name.split("/")[0] for name in importers("flows")} == {"flows"}


def test_nothing_shipped_imports_infra_or_tests() -> None:
    assert importers("infra", "tests", "conftest", "pytest", "hypothesis") == set()


def test_only_eight_modules_know_ray() -> None:
    assert importers("ray") == {
        f"pipeline/{name}.py"
        for name in ("cluster", "jobs", "progress", "scorer", "train", "trainer", "tune", "worker")
    }


def test_only_storage_knows_s3() -> None:
    assert importers("s3fs", "botocore", "aiobotocore", "boto3") == {"pipeline/storage.py"}


@pytest.mark.parametrize("path", SHIPPED, ids=named)
def test_nothing_is_ever_unpickled(path: Path) -> None:
    assert not packages(path) & {"pickle", "cloudpickle", "dill", "shelve", "marshal"}
    used = {ast.unparse(node) for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)}
    assert not used & {"torch.load", "torch.save", "joblib.load", "np.load", "numpy.load"}


def test_no_file_is_a_drawer_for_odds_and_ends() -> None:
    assert not [named(path) for path in EVERYTHING if path.stem in {"utils", "util", "helpers", "misc", "common"}]


def test_no_file_is_longer_than_one_can_read() -> None:
    lengths = {named(path): len(path.read_text().splitlines()) for path in EVERYTHING}
    assert {name: length for name, length in lengths.items() if length > MAX_LINES} == {}


def test_what_is_imported_late_is_there_and_not_imported_early() -> None:
    script = f"import sys, flows.cli; assert not {set(LATE_IMPORTS)} & {{*sys.modules}}"
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True)
    for name in LATE_IMPORTS:
        assert importlib.util.find_spec(name) is not None


def test_the_local_stack_starts_without_what_trains() -> None:
    script = "import sys, infra.__main__; assert not {'torch', 'ray', 'prefect'} & {*sys.modules}"
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True)


@pytest.mark.parametrize(("token", "left"), [("another", []), (RAY_TOKEN, OWN)], ids=["test", "worker"])
def test_nothing_of_a_developers_own_reaches_a_test_and_a_ray_worker_of_a_test_keeps_what_it_has(
    token: str, left: list[str]
) -> None:
    script = f"import os, tests.conftest; print(*[name for name in {OWN} if os.environ.get(name) == 'own'])"
    env = {**os.environ, **dict.fromkeys(OWN, "own"), "RAY_AUTH_TOKEN": token}
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    assert done.stdout.split() == left
