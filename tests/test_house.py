"""The house holds together: who imports whom, what a process loads, and that the papers name what is there.

The table is docs/architecture.md's. Rooms that are still to come stand in it already, so that they start out right.
"""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
HOUSE = ROOT / "src" / "luthier"
FILES = sorted(HOUSE.rglob("*.py"))
SHIPPED = sorted(path for path in HOUSE.rglob("*") if path.is_file() and path.suffix not in (".pyc", ".so"))

# room -> rooms whose names it may import. A dotted room is one file with a rule of its own.
MAY_IMPORT: dict[str, set[str]] = {
    "settings": {"spec"},
    "spec": set(),
    "data": {"spec"},
    "engine": {"proof", "data", "spec", "settings"},
    "proof": {"data", "spec"},  # torch-free: measures and verdicts from answers
    "store": {"spec"},
    "work": {"store", "data", "spec", "settings"},  # data: files are checked before they queue
    "serve.router": {"spec", "settings"},
    "serve": {"engine", "data", "spec", "settings"},
    "api": {"proof", "store", "data", "serve.router", "spec", "settings"},
    "web": {"api", "proof", "store", "data", "serve.router", "spec", "settings"},
    "cli": {"api", "data", "engine", "proof", "serve", "serve.router", "settings", "spec", "store", "web", "work"},
}
HEAVY = {"torch", "transformers", "peft", "accelerate"}
# Libraries that only the named rooms may use.
KEPT_FOR: dict[str, set[str]] = {
    "torch": {"engine", "serve"},
    "transformers": {"engine", "serve"},
    "peft": {"engine", "serve"},
    "safetensors": {"engine", "serve"},
    "sqlalchemy": {"store"},
    "alembic": {"store"},
    "fastapi": {"api", "web", "serve", "serve.router"},
    "uvicorn": {"api", "cli", "serve", "serve.router"},
    "nicegui": {"web"},
    "ray": {"work"},
    "typer": {"cli"},
}
SHARED = {"luthier", "luthier.__version__"}  # the package itself holds the version and imports nothing


def imports(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Every imported dotted name below `tree`, functions included, with its line."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative imports hide the room"
            for alias in node.names:
                yield f"{node.module}.{alias.name}", node.lineno


def at_import(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """The imports that importing the module carries out: not those in functions or under TYPE_CHECKING."""
    waiting: list[ast.AST] = list(tree.body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            waiting.extend(node.orelse)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            yield from imports(node)
        else:
            waiting.extend(ast.iter_child_nodes(node))


def room_of(dotted: str) -> str:
    """`luthier.data.render` -> `data`; the longest room that the table names wins (`serve.router`)."""
    parts = dotted.split(".")[1:]
    longer = ".".join(parts[:2])
    return longer if longer in MAY_IMPORT else parts[0]


def room_of_file(path: Path) -> str:
    return room_of(".".join(["luthier", *path.relative_to(HOUSE).with_suffix("").parts]))


def named(path: Path) -> str:
    return str(path.relative_to(HOUSE))


@pytest.mark.parametrize("path", FILES, ids=named)
def test_imports_keep_to_the_table(path: Path) -> None:
    room = room_of_file(path)
    tree = ast.parse(path.read_bytes())
    if room == "__init__":
        assert list(imports(tree)) == []
        return
    assert room in MAY_IMPORT, f"{named(path)} is in no room of the table"
    for name, line in imports(tree):
        top = name.split(".")[0]
        if top == "luthier" and name not in SHARED:
            asked = room_of(name)
            assert asked == room or asked in MAY_IMPORT[room], f"{named(path)}:{line}: {room} may not import {name}"
        elif top in KEPT_FOR:
            assert room in KEPT_FOR[top], f"{named(path)}:{line}: {top} is not for {room}"
        elif room == "spec":
            assert top in sys.stdlib_module_names | {"pydantic", "luthier"}, f"{named(path)}:{line}: {name}"


def test_cli_imports_rooms_inside_its_commands() -> None:
    """At the top of a cli file only the words, the settings and what is free of torch."""
    for path in HOUSE.glob("cli/**/*.py"):
        for name, line in at_import(ast.parse(path.read_bytes())):
            if name.startswith("luthier.") and name not in SHARED:
                assert room_of(name) in {"cli", "spec", "settings"}, (
                    f"{named(path)}:{line}: import {name} in its command"
                )


def test_catalogue_knows_no_torch_before_it_is_asked() -> None:
    tree = ast.parse((HOUSE / "engine" / "catalogue.py").read_bytes())
    assert {name.split(".")[0] for name, _ in at_import(tree)} & HEAVY == set()


def test_only_settings_reads_the_environment() -> None:
    for path in FILES:
        if path == HOUSE / "settings.py":
            continue
        for node in ast.walk(ast.parse(path.read_bytes())):
            read = isinstance(node, ast.Attribute) and node.attr in ("environ", "environb", "getenv")
            taken = (
                isinstance(node, ast.ImportFrom)
                and node.module == "os"
                and {alias.name for alias in node.names} & {"environ", "environb", "getenv"}
            )
            assert not read and not taken, f"{named(path)}:{node.lineno}: the environment is settings.py's"


# --- what a process loads -------------------------------------------------------------------------------------------


def loaded_by(code: str) -> set[str]:
    """Top-level modules in a fresh interpreter after `code`."""
    script = f"import sys\n{code}\nprint('LOADED', *{{name.partition('.')[0] for name in sys.modules}})"
    here = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=here, timeout=120)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.rpartition("LOADED")[2].split())


@pytest.mark.parametrize(
    "modules",
    [
        "luthier.spec.job, luthier.spec.report, luthier.spec.run",
        "luthier.settings",
        "luthier.data.read, luthier.data.formats, luthier.data.render",
        "luthier.engine.catalogue",
        "luthier.proof.judge, luthier.proof.choose, luthier.proof.neighbours, luthier.proof.graders",
    ],
)
def test_light_rooms_load_no_torch(modules: str) -> None:
    assert loaded_by(f"import {modules}") & HEAVY == set()


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["data", "show", "--help"]], ids=" ".join)
def test_help_loads_no_torch(arguments: list[str]) -> None:
    code = (
        f"sys.argv = ['luthier', *{arguments!r}]\nfrom luthier.cli import main\n"
        "try:\n    main()\nexcept SystemExit as leaving:\n    assert not leaving.code, leaving.code"
    )
    assert loaded_by(code) & HEAVY == set()


def test_the_engine_loads_no_database_and_no_server() -> None:
    loaded = loaded_by("import luthier.engine.train")
    assert "torch" in loaded
    assert loaded & {"sqlalchemy", "alembic", "fastapi", "uvicorn", "nicegui", "typer", "ray"} == set()


# --- size and papers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", FILES, ids=named)
def test_a_file_can_be_read_at_one_sitting(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.count("\n") <= 450, f"{named(path)} has {text.count(chr(10))} lines"
    assert not text or ast.get_docstring(ast.parse(text)), f"{named(path)} does not say what it is"


def test_no_room_for_leftovers() -> None:
    assert [named(path) for path in FILES if path.stem in ("utils", "util", "helpers", "misc", "common")] == []


def pyproject() -> dict[str, object]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def plain(requirement: str) -> str:
    """`Jinja2>=3` -> `jinja2`: the name as package indexes compare it."""
    found = re.match(r"[A-Za-z0-9._-]+", requirement)
    assert found, requirement
    return re.sub(r"[-_.]+", "-", found[0]).lower()


def locked() -> dict[str, str]:
    lines = (ROOT / "requirements.lock").read_text(encoding="utf-8").splitlines()
    pins = [line.partition("#")[0].strip() for line in lines]
    return {plain(pin): pin.partition("==")[2] for pin in pins if pin}


def test_lock_has_every_dependency_at_one_version() -> None:
    project = pyproject()["project"]
    assert isinstance(project, dict)
    wanted = {plain(name) for name in project["dependencies"]}
    for name, extra in project["optional-dependencies"].items():
        if name != "trackers":  # a tracker is the user's, with the version that their server speaks
            wanted |= {plain(package) for package in extra}
    pins = locked()
    assert wanted - pins.keys() == set()
    assert [name for name, version in pins.items() if not re.fullmatch(r"[0-9][0-9A-Za-z.]*", version)] == []
    assert pins["torch"] == "2.13.0"


def test_lock_names_no_place_and_no_gpu_libraries() -> None:
    lines = (ROOT / "requirements.lock").read_text(encoding="utf-8").splitlines()[1:]
    pin = re.compile(r"[a-z0-9.-]+==[0-9A-Za-z.]+(\s+# via [a-z0-9 ,().-]+)?")
    assert [line for line in lines if not pin.fullmatch(line)] == []
    assert [name for name in locked() if name.startswith(("nvidia-", "cuda-", "triton"))] == []


def test_changelog_has_this_version() -> None:
    source = (HOUSE / "__init__.py").read_text(encoding="utf-8")
    version = re.search(r'__version__ = "([^"]+)"', source)
    assert version
    assert re.search(rf"^## \[?{re.escape(version[1])}\]?\b", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.M)


def test_readme_shows_every_file_with_a_caption() -> None:
    """README's tree: a line a file, `name.py  what it is`, below a line for its folder; none too many, none missing."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    tree = re.search(r"^src/luthier/\n((?:[ │├└─]+.*\n)+)", readme, re.M)
    assert tree, "README.md has no tree that starts with the line src/luthier/"
    folders: list[tuple[int, str]] = []
    shown = {}
    for line in tree[1].splitlines():
        name, _, caption = line.lstrip(" │├└─").partition(" ")
        depth = len(line) - len(line.lstrip(" │├└─"))
        folders = [(deep, folder) for deep, folder in folders if deep < depth]
        if name.endswith("/"):
            folders.append((depth, name))
        else:
            shown["".join(folder for _, folder in folders) + name] = caption.strip()
    bare = {"__init__.py"}  # a folder's own caption stands on the folder's line
    there = {str(path.relative_to(HOUSE)) for path in SHIPPED}
    assert set(shown) - there == set()
    assert {path for path in there - set(shown) if Path(path).name not in bare} == set()
    assert [path for path, caption in shown.items() if not caption] == []
