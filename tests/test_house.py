"""The rules of the house, read off the syntax trees: who imports whom, sizes, annotations, safe files.

Importing lazily is tested by running: the package and the command line's help must not load torch.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "semseg_automl"

# Modules (without "semseg_automl.") and whole subpackages, lowest first. Imports go to a lower line, or stay
# inside one subpackage. A new module is entered here. "" is the package itself, which no module imports from;
# build, features and callbacks stand between the plan they read and those who train and load; report_page
# below the estimator, and cli and demo above it, as calls go.
LAYERS = [
    "version errors third_party data",
    "files data.colours data.completeness data.npy data.rle data.drawn data.cache data.channels"
    " data.forms sharing",
    "tiling matching hardware meters processes soft_map soup",
    "data.images data.decoding data.headers data.encodings data.counting data.duplicates data.objects data.widths"
    " data.modes data.palettes",
    "class_values data.pooling data.listing data.annotated data.coco data.yolo data.labelme data.pairs",
    "data.annotations",
    "models task config saliency",
    "confusion weighted_f",
    "boundaries saliency_scores",
    "capacity choosing peft losses metrics",
    "data.table data.kept data.parallel data.checks data.survey data.transforms data.crops data.sampling data.repeats"
    " data.synthetic",
    "data.dataset data.splits adaptation framing uncertainty calibration fingerprint report",
    "plan findings strata review report_charts",
    "build features callbacks memory planning portfolio expert_chart",
    "resume rehearsal",
    "trackers slices probing",
    "trainer_options forecast",
    "training inference bundle",
    "evaluation",
    "sinks report_scores",
    "report_page",
    "saving fitted check_page study",
    "fitting",
    "race",
    "leaderboard searching",
    "judging",
    "estimator checking",
    "serve tune export comparison grid",
    "demo",
    "cli",
]
LEVELS = {name: level for level, line in enumerate(LAYERS) for name in line.split()} | {"": len(LAYERS)}
SUBPACKAGES = ("models", "peft", "data")

# Packages that must come through semseg_automl.third_party, which makes torchvision importable first.
THROUGH_THE_DOOR = {"lightning", "torchmetrics", "timm", "segment_anything"}
# Package -> the modules that may import it at run time; others may name its types under TYPE_CHECKING.
OWNERS = {
    "pandas": {
        "data.table", "data.annotations", "estimator", "fitted", "report", "evaluation", "comparison", "strata",
        "review", "judging", "checking", "check_page", "leaderboard",
    },
    "lightning": {
        "training", "trainer_options", "callbacks", "resume", "slices", "trackers", "processes", "sharing",
        "data.dataset",
    },
    "optuna": {"study"},
    "timm": {"models.timm_encoder"},
    "segment_anything": {"models.sam"},
}

MAX_FILE_LINES = 450
MAX_FUNCTION_LINES = 70
PICKLES = {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
HARMLESS = "pickle.UnpicklingError"  # what torch.load raises for a damaged file; reads nothing itself
SLOW_TO_IMPORT = {"torch", "torchvision", "lightning", "timm", "sklearn", "scipy", "pandas", "cv2", "optuna"}


@dataclass(frozen=True)
class Import:
    """`target`: for our own modules the name without the package, for foreign ones the top-level package."""

    target: str
    line: int
    ours: bool
    typing_only: bool = False
    through_door: bool = False


@dataclass(frozen=True)
class Module:
    """One parsed file: `name` without the package, `path` for messages."""

    name: str
    path: str
    source: str
    is_package: bool = False

    @property
    def tree(self) -> ast.Module:
        return ast.parse(self.source, filename=self.path)


def read_package() -> list[Module]:
    modules = []
    for path in sorted((ROOT / PACKAGE).rglob("*.py")):
        parts = path.relative_to(ROOT / PACKAGE).with_suffix("").parts
        is_package = parts[-1] == "__init__"
        name = ".".join(parts[:-1] if is_package else parts)
        shown = str(path.relative_to(ROOT))
        modules.append(Module(name, shown, path.read_text(encoding="utf-8"), is_package))
    return modules


MODULES = read_package()
NAMES = {module.name for module in MODULES}


def dotted(node: ast.expr) -> str:
    """``a.b.c`` of nested attributes, "" for anything else."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        base = dotted(node.value)
        return f"{base}.{node.attr}" if base else ""
    return ""


def walk_with_typing(node: ast.AST, typing_only: bool = False) -> Iterator[tuple[ast.AST, bool]]:
    """All nodes below `node`, each with whether it lies in the body of an ``if TYPE_CHECKING:``."""
    yield node, typing_only
    if isinstance(node, ast.If) and dotted(node.test).rpartition(".")[2] == "TYPE_CHECKING":
        for statement in node.body:
            yield from walk_with_typing(statement, True)
        for statement in node.orelse:
            yield from walk_with_typing(statement, typing_only)
        return
    for child in ast.iter_child_nodes(node):
        yield from walk_with_typing(child, typing_only)


def absolute_base(module: Module, node: ast.ImportFrom) -> str:
    """The full dotted name before ``import`` in ``from ... import``, dots in front resolved."""
    if not node.level:
        return node.module or ""
    parts = [PACKAGE, *(module.name.split(".") if module.name else [])]
    parts = parts[: len(parts) - node.level + module.is_package]
    return ".".join([*parts, *([node.module] if node.module else [])])


def from_import(module: Module, node: ast.ImportFrom, names: set[str], typing_only: bool) -> Iterator[Import]:
    base = absolute_base(module, node)
    top, _, rest = base.partition(".")
    if top != PACKAGE:
        yield Import(top, node.lineno, ours=False, typing_only=typing_only)
        return
    for alias in node.names:
        inner = f"{rest}.{alias.name}".lstrip(".")
        yield Import(inner if inner in names else rest, node.lineno, ours=True, typing_only=typing_only)
        if rest == "third_party" and alias.name in THROUGH_THE_DOOR:
            yield Import(alias.name, node.lineno, ours=False, typing_only=typing_only, through_door=True)


def named_modules(node: ast.Import | ast.Call) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if dotted(node.func).rpartition(".")[2] not in ("import_module", "__import__"):
        return []
    return [a.value for a in node.args[:1] if isinstance(a, ast.Constant) and isinstance(a.value, str)]


def imports_of(module: Module, names: set[str]) -> list[Import]:
    """Every import of `module`, wherever it stands, calls of ``import_module("...")`` among them."""
    found: list[Import] = []
    for node, typing_only in walk_with_typing(module.tree):
        if isinstance(node, ast.ImportFrom):
            found += from_import(module, node, names, typing_only)
        elif isinstance(node, ast.Import | ast.Call):
            for target in named_modules(node):
                top, _, rest = target.partition(".")
                ours = top == PACKAGE
                found.append(Import(rest if ours else top, node.lineno, ours=ours, typing_only=typing_only))
    return found


def level_of(name: str) -> int | None:
    """The level of a module: its own in LEVELS, else its subpackage's (data's modules have their own)."""
    top = name.partition(".")[0]
    return LEVELS.get(name, LEVELS.get(top) if top in ("models", "peft") else None)


def layer_violations(module: Module, names: set[str]) -> list[str]:
    own = level_of(module.name)
    if own is None:
        return [f"{module.path}: stands in no line of LAYERS in tests/test_house.py"]
    found = []
    for entry in imports_of(module, names):
        if not entry.ours:
            continue
        theirs = level_of(entry.target)
        top = module.name.partition(".")[0]
        same_house = top in SUBPACKAGES and entry.target.partition(".")[0] == top
        if theirs is None or theirs > own or (theirs == own and not same_house):
            found.append(
                f"{module.path}:{entry.line}: level {own} imports {entry.target!r} of level {theirs}"
            )
    return found


def door_violations(module: Module, names: set[str]) -> list[str]:
    found = []
    for entry in imports_of(module, names):
        where = f"{module.path}:{entry.line}: {entry.target}"
        if entry.ours:
            continue
        if entry.target in THROUGH_THE_DOOR and not entry.through_door and module.name != "third_party":
            found.append(f"{where} is imported past semseg_automl.third_party")
        owners = OWNERS.get(entry.target, {module.name}) | {"third_party"}
        if module.name not in owners and not entry.typing_only:
            found.append(f"{where} belongs to {sorted(owners - {'third_party'})}")
    return found


def network_violations(module: Module, names: set[str]) -> list[str]:
    """Networks know no DataFrame and no configuration, not even by type; models know no adapter."""
    house = module.name.partition(".")[0]
    banned = {"models": {"pandas", "config", "peft"}, "peft": {"pandas", "config"}}.get(house, set())
    return [
        f"{module.path}:{entry.line}: {entry.target}"
        for entry in imports_of(module, names)
        if entry.target.partition(".")[0] in banned
    ]


def functions_of(module: Module) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    return [n for n in ast.walk(module.tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]


def size_violations(module: Module, names: set[str]) -> list[str]:
    lines = module.source.count("\n")
    found = [f"{module.path}: {lines} lines, {MAX_FILE_LINES} allowed"] if lines > MAX_FILE_LINES else []
    for function in functions_of(module):
        length = (function.end_lineno or function.lineno) - function.lineno + 1
        if length > MAX_FUNCTION_LINES:
            place = f"{module.path}:{function.lineno}: {function.name}"
            found.append(f"{place} has {length} lines, {MAX_FUNCTION_LINES} allowed")
    return found


def annotation_violations(module: Module, names: set[str]) -> list[str]:
    found = []
    for function in functions_of(module):
        arguments = function.args
        every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
        every += [argument for argument in (arguments.vararg, arguments.kwarg) if argument is not None]
        bare = [a.arg for a in every if a.annotation is None and a.arg not in ("self", "cls")]
        if function.returns is None:
            bare.append("return")
        if bare:
            found.append(f"{module.path}:{function.lineno}: {function.name} lacks types of {', '.join(bare)}")
    return found


def is_unsafe_name(name: str) -> bool:
    """Whether a dotted name reads files by running code from them, whatever its arguments."""
    head, _, last = name.rpartition(".")
    unsafe_yaml = head == "yaml" and "load" in last and not last.startswith("safe_load")
    return unsafe_yaml or last in ("read_pickle", "to_pickle")


def unsafe_violations(module: Module, names: set[str]) -> list[str]:
    """Everything that reads pickles, or YAML that builds objects."""
    found = []
    for node in ast.walk(module.tree):
        bad = ""
        if isinstance(node, ast.Import):
            bad = ", ".join(a.name for a in node.names if a.name.partition(".")[0] in PICKLES)
        elif isinstance(node, ast.ImportFrom):
            full = [f"{node.module}.{alias.name}" for alias in node.names]
            pickles = (node.module or "").partition(".")[0] in PICKLES
            unsafe_names = [n for n in full if pickles or n == "torch.load" or is_unsafe_name(n)]
            bad = ", ".join(n for n in unsafe_names if n != HARMLESS)
        elif isinstance(node, ast.Call):
            name = dotted(node.func)
            keywords = {k.arg: k.value.value for k in node.keywords if isinstance(k.value, ast.Constant)}
            unsafe = is_unsafe_name(name)
            unsafe |= name == "torch.load" and keywords.get("weights_only") is not True
            unsafe |= any(k.arg == "allow_pickle" and keywords.get(k.arg) is not False for k in node.keywords)
            bad = (name or "a call") if unsafe else ""
        if bad:
            found.append(f"{module.path}:{getattr(node, 'lineno', 0)}: {bad}")
    return found


RULES = [
    layer_violations, door_violations, network_violations,
    size_violations, annotation_violations, unsafe_violations,
]  # fmt: skip

# The head of a snippet whose one import is for types only.
TYPING = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    "


def snippet(source: str, name: str = "task", *, is_package: bool = False) -> Module:
    return Module(name, f"{name}.py", source, is_package)


def run_python(code: str, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *options, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.parametrize("rule", RULES)
def test_house__every_module__keeps_the_rule(rule: Callable[[Module, set[str]], list[str]]) -> None:
    assert {"errors", "third_party"} <= NAMES  # the walk found the package
    found = [violation for module in MODULES for violation in rule(module, NAMES)]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("task", "from semseg_automl import plan"),
        ("task", "import semseg_automl.estimator"),
        ("task", "from semseg_automl.config import Config"),
        ("task", f"{TYPING}from semseg_automl.plan import Plan"),
        ("task", "def f():\n    from semseg_automl import SemanticSegmentor"),
        ("models.sam", "from ..peft import METHODS"),
        ("data.images", "from . import table"),
        ("adaptation", "from semseg_automl.data.dataset import Batch"),
        ("report", "from semseg_automl.evaluation import score_table"),
        ("bundle", "import importlib\nimportlib.import_module('semseg_automl.cli')"),
        ("task", "from semseg_automl.nowhere import x"),
        ("nowhere", ""),
    ],
)
def test_layers__import_upwards_or_sideways__is_found(name: str, source: str) -> None:
    names = {"plan", "config", "task", "estimator", "peft", "data.table", "data.dataset", "cli"}
    assert len(layer_violations(snippet(source, name), names)) == 1


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("plan", "from semseg_automl import task, config\nfrom semseg_automl.data import images"),
        ("models.sam", "from .encoder import Encoder\nfrom semseg_automl.models import attention"),
        ("data.table", "from semseg_automl.data.transforms import resize"),
        ("", "from semseg_automl.estimator import SemanticSegmentor"),
        ("cli", "import numpy as np\nfrom semseg_automl.report import overlay"),
    ],
)
def test_layers__import_downwards_or_in_the_same_subpackage__is_allowed(name: str, source: str) -> None:
    names = {"task", "config", "data.images", "models.attention", "models.encoder"}
    assert layer_violations(snippet(source, name), names) == []


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("training", "import lightning.pytorch as pl"),
        ("metrics", "from torchmetrics import Metric"),
        ("metrics", f"{TYPING}from torchmetrics import Metric"),
        ("plan", "from semseg_automl.third_party import lightning"),
        ("models.sam", "from semseg_automl.third_party import timm"),
        ("data.images", "import pandas as pd"),
        ("plan", "def f():\n    import pandas.api.types"),
    ],
)
def test_doors__dependency_past_its_door__is_found(name: str, source: str) -> None:
    assert len(door_violations(snippet(source, name), NAMES)) == 1


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("training", "from semseg_automl.third_party import lightning"),
        ("metrics", "from semseg_automl.third_party import torchmetrics"),
        ("report", "import pandas as pd"),
        ("bundle", f"{TYPING}import pandas as pd"),
        ("third_party", "import timm"),
    ],
)
def test_doors__dependency_through_its_door__is_allowed(name: str, source: str) -> None:
    assert door_violations(snippet(source, name), NAMES) == []


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("models.sam", "from semseg_automl.peft.lora import LoraLinear"),
        ("peft.lora", "from semseg_automl import config"),
        ("peft.lora", "import typing\nif typing.TYPE_CHECKING:\n    import pandas as pd"),
    ],
)
def test_networks__table_config_or_adapter__is_found(name: str, source: str) -> None:
    assert len(network_violations(snippet(source, name), {"config", "peft.lora"})) == 1


def test_sizes__long_file_and_long_function__are_found() -> None:
    body = "    x = 1\n" * MAX_FUNCTION_LINES
    assert size_violations(snippet(f"def f():\n{body}"), NAMES)[0].startswith("task.py:1: f has 71 lines")
    assert size_violations(snippet(f"def f():\n{body[10:]}"), NAMES) == []
    assert len(size_violations(snippet("x = 1\n" * (MAX_FILE_LINES + 1)), NAMES)) == 1


def test_annotations__bare_argument_or_return__is_found() -> None:
    source = "class A:\n    def f(self, a: int, *args, b=1) -> None: ...\n    def g(cls): ...\n"
    assert annotation_violations(snippet(source), NAMES) == [
        "task.py:2: f lacks types of b, args",
        "task.py:3: g lacks types of return",
    ]


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "from joblib import load",
        "from torch import load",
        "from yaml import load",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "torch.load(path, weights_only=flag)",
        "yaml.load(text, Loader=yaml.SafeLoader)",
        "yaml.full_load_all(text)",
        "np.load(path, allow_pickle=True)",
        "np.load(path, allow_pickle=flag)",
        "pd.read_pickle(path)",
    ],
)
def test_files__reading_that_can_run_code__is_found(source: str) -> None:
    assert len(unsafe_violations(snippet(source), NAMES)) == 1


@pytest.mark.parametrize(
    "source",
    [
        "torch.load(p, weights_only=True)",
        "yaml.safe_load(p)",
        "np.load(p)",
        "from pickle import UnpicklingError",
    ],
)
def test_files__reading_without_code__is_allowed(source: str) -> None:
    assert unsafe_violations(snippet(source), NAMES) == []


def test_import__package__loads_nothing_slow() -> None:
    result = run_python(f"import sys, {PACKAGE}; print(*(sys.modules.keys() & {SLOW_TO_IMPORT!r}))")
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == []


def test_help__command_line__loads_nothing_slow() -> None:
    code = f"import sys; sys.argv = ['semseg-automl', '--help']; from {PACKAGE}.cli import main; main()"
    result = run_python(code, "-X", "importtime")
    loaded = {
        line.rpartition("|")[2].strip() for line in result.stderr.splitlines() if "import time:" in line
    }
    assert result.returncode == 0, "\n".join(result.stderr.splitlines()[-5:])
    assert loaded & SLOW_TO_IMPORT == set()
    for command in ("fit", "evaluate", "predict", "check", "demo", "info"):
        assert command in result.stdout


def test_import__check_data__loads_no_trainer_and_no_tracer() -> None:
    unused = {"lightning", "torchmetrics", "torchvision", "timm", "torch._dynamo", "sklearn", "optuna"}
    result = run_python(f"import sys; from {PACKAGE} import check_data; print(*(sys.modules.keys() & {unused!r}))")
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == [], "they take as long to import as a thousand files to check"
