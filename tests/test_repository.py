"""What holds for the repository as a whole: the import arrow, sizes, names, and what the README says."""

import ast
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

import objectives
from objectives.base import Widths
from pretrain import runfile
from pretrain.cli import parse
from pretrain.pretrainer import Pretrainer
from pretrain.testing import TinyImage, TinyText, make_samples, merge
from pretrain.zoo.dual import Dual

ROOT = Path(__file__).resolve().parent.parent
TINY_WIDTHS = Widths(embed=6, image_tokens=8, text_tokens=8, vocabulary=20, temperature=False, contrast=False)
ARROW = ["datasets", "objectives", "pretrain", "slurm"]
OURS = sorted(path for folder in [*ARROW, "tests", "benchmarks"] for path in (ROOT / folder).rglob("*.py"))


def imported(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add(node.module or "")
    return {name.partition(".")[0] for name in names}


def test_imports_go_one_way():
    for place, folder in enumerate(ARROW):
        for path in (ROOT / folder).rglob("*.py"):
            wrong = imported(path) & {*ARROW[place + 1 :], "tests"}
            assert not wrong, f"{path.relative_to(ROOT)} imports {wrong}"


@pytest.mark.parametrize("path", OURS, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_are_small(path):
    text = path.read_text()
    assert text.count("\n") <= 400
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef) and node.end_lineno is not None:
            assert node.end_lineno - node.lineno < 60, (
                f"{node.name} has {node.end_lineno - node.lineno} lines"
            )


def test_no_module_is_named_after_a_library_and_tests_are_no_package():
    libraries = {
        "webdataset",
        "ffcv",
        "wandb",
        "submitit",
        "torch",
        "timm",
        "open_clip",
        "transformers",
        "tyro",
    }
    assert not libraries & {path.stem for path in OURS}
    assert not list((ROOT / "tests").rglob("__init__.py"))


def test_datasets_is_ours_and_nothing_else_is_installed():
    import datasets

    assert Path(datasets.__file__).parent == ROOT / "datasets"
    assert not hasattr(datasets, "load_dataset")
    with pytest.raises(AttributeError, match="Medley's package"):
        datasets.load_dataset  # noqa: B018, TID251
    assert "packages = []" in (ROOT / "pyproject.toml").read_text()


def test_libraries_that_look_for_a_package_of_that_name_still_import():
    code = "import open_clip, timm.data, transformers; from transformers import AutoModel"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=300)


def test_from_elsewhere_the_program_says_where_to_run_it(tmp_path):
    (tmp_path / "datasets").mkdir()
    (tmp_path / "datasets" / "__init__.py").write_text("")
    code = f"import sys; sys.path.append({str(ROOT)!r}); import pretrain"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert "run from the repository root" in result.stderr


def test_nothing_is_unpickled_evaluated_or_given_to_a_shell():
    """Names that would let data run code. Recipes are the user's own Python and run by `runpy`."""
    banned = re.compile(r"\b(pickle|torch\.load|eval\(|exec\(|os\.system|shell=True|yaml\.load\()")
    for path in OURS:
        if path.parts[len(ROOT.parts)] == "tests":
            continue
        for line in path.read_text().splitlines():
            code = line.partition("#")[0]
            if banned.search(code) and ".eval()" not in code:
                assert '"""' in code or "`" in code or "convert" in code.lower(), f"{path}: {line}"


README = (ROOT / "README.md").read_text() if (ROOT / "README.md").exists() else ""


def commands() -> list[str]:
    blocks = re.findall(r"```(?:bash|sh)\n(.*?)```", README, re.S)
    joined = "\n".join(blocks).replace("\\\n", " ")
    return [line.partition("  #")[0].strip() for line in joined.splitlines() if line.strip()]


def launches() -> list[str]:
    found = [c for line in commands() for c in line.split(" && ") if "pretrain.launch" in c]
    arguments = {c.partition("pretrain.launch")[2].strip() for c in found}
    return sorted(each for each in arguments if "RUN_DIR/" not in each and "mine.py" not in each)


@pytest.mark.parametrize("arguments", launches())
def test_every_launch_in_the_readme_is_a_run(arguments):
    if "--help" in arguments:
        with pytest.raises(SystemExit) as raised:
            parse(shlex.split(arguments))
        assert raised.value.code == 0
    else:
        parse(shlex.split(arguments))


def python_block(beginning: str) -> str:
    blocks = re.findall(r"```python\n(.*?)```", README, re.S)
    return next(block for block in blocks if beginning in block)


def test_the_recipe_in_the_readme_is_a_recipe(tmp_path):
    (tmp_path / "mine.py").write_text(python_block("def recipe"))
    assert parse(["--recipe", str(tmp_path / "mine.py")]).run.seed == 1


def test_the_objective_in_the_readme_is_an_objective(tmp_path, monkeypatch):
    """One file and one line in the table: it is chosen, weighted, written to run.yaml and trained."""
    (tmp_path / "agreement.py").write_text(python_block("class Agreement"))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(objectives.OBJECTIVES, "agreement", "agreement.Agreement")
    run = parse(["--objectives", "agreement:0.1", "--objectives.agreement.weight", "0.2"]).run
    (tmp_path / "run.yaml").write_text(runfile.dump(run))
    assert runfile.load(tmp_path / "run.yaml") == run

    objective = objectives.objective_class("agreement")(run.objectives["agreement"], TINY_WIDTHS)
    model = Dual(
        image=TinyImage(),
        text=TinyText(),
        captioner=None,
        fusion=None,
        logit_scale=torch.zeros(1),
        logit_bias=None,
    )
    batch = merge(make_samples(9))
    one = {"agreement": torch.tensor(1.0)}
    pretrainer = Pretrainer(model, {"agreement": objective})
    outcome = pretrainer(batch, phase="push", names=["agreement"], factors=one, key=())
    outcome.total.backward()
    assert 0 < outcome.total.item() < 4 * objective.denominator(batch).item()


def test_the_readme_begins_with_the_two_commands_and_ci_runs_the_second():
    assert commands()[0] == "pip install -e . && python -m pretrain.launch --objectives itc,lm"
    assert commands()[1] == "pip install -e '.[dev]' && pytest"
    assert "pip install -q -e '.[dev]' && pytest" in (ROOT / ".ci" / "run").read_text().replace("\\\n", "")


def test_every_link_and_file_of_the_readme_exists():
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
    tree = re.search(r"```text\n(pyproject.toml.*?)```", README, re.S)
    assert tree is not None
    folder = Path()
    for line in tree[1].splitlines():
        if not line.strip():
            continue
        indent, name = len(line) - len(line.lstrip()), line.split()[0]
        if indent == 0:
            folder = Path(name) if name.endswith("/") else Path()
            path = ROOT / name
        elif indent <= 4:
            path = ROOT / folder / name
        else:
            continue
        assert path.exists(), f"{path.relative_to(ROOT)} is in the README's tree"


def test_hooks_run_what_ci_runs():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    entries = {hook["entry"] for repo in hooks["repos"] for hook in repo["hooks"]}
    ci = (ROOT / ".ci" / "run").read_text()
    assert {"ruff check .", "ruff format --check .", "pyright"} <= entries
    for entry in entries:
        assert entry in ci, entry
