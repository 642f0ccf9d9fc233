"""The rules of the house: who imports whom, what is called what, and that what people are told is true."""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import importlib
import importlib.metadata
import importlib.util
import io
import logging
import os
import re
import runpy
import subprocess
import sys
import tomllib
import warnings
from functools import cache
from pathlib import Path

import pytest
import tyro
from importlinter.cli import lint_imports
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from jobs import runtime
from tests.material import REPOSITORY

PACKAGES = ("pipelines", "models", "jobs")
NOT_JOBS = ("__init__", "runtime", "script_path")
JOBS = sorted(path.stem for path in (REPOSITORY / "jobs").glob("*.py") if path.stem not in NOT_JOBS)


def modules(*packages: str) -> list[Path]:
    """Python files of the packages, relative to the repository."""
    found = [path for name in packages for path in (REPOSITORY / name).rglob("*.py")]
    return sorted(path.relative_to(REPOSITORY) for path in found)


def text_files() -> list[Path]:
    """Files of the repository that are text, ignored ones left out, relative to it."""
    git = ["git", "-C", str(REPOSITORY), "ls-files", "-z", "--cached", "--others"]
    listed = subprocess.run(
        [*git, "--exclude-standard"], capture_output=True, text=True, check=True
    )
    names = [Path(name) for name in listed.stdout.split("\0") if name]
    binary = {".jpg", ".mp4", ".npy", ".npz", ".png", ".tar"}
    return [name for name in names if name.suffix not in binary and (REPOSITORY / name).is_file()]


def test_import_rules_hold() -> None:
    result = lint_imports(config_filename=str(REPOSITORY / "pyproject.toml"), no_cache=True)
    for logger in logging.Logger.manager.loggerDict.values():  # it has disabled all there were
        if isinstance(logger, logging.Logger):
            logger.disabled = False
    assert result == 0


@pytest.mark.parametrize("name", PACKAGES)
def test_our_generic_names_are_ours(name: str) -> None:
    spec = importlib.util.find_spec(name)
    assert spec is not None
    assert spec.origin == str(REPOSITORY / name / "__init__.py")
    owners = set(importlib.metadata.packages_distributions().get(name, []))
    assert owners <= {"headray"}, f"{name} is also a package of {owners}"


def test_no_module_is_named_like_one_that_is_imported_from_elsewhere() -> None:
    ours = {path.stem for path in modules(*PACKAGES)} - {"__init__"}
    taken = sys.stdlib_module_names | set(importlib.metadata.packages_distributions())
    assert len(ours) > 15
    assert ours & taken == set()


def test_only_jobs_print() -> None:
    files = modules("pipelines", "models")
    calls = [
        f"{path}:{node.lineno}"
        for path in files
        for node in ast.walk(ast.parse((REPOSITORY / path).read_text()))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id == "print"
    ]
    assert len(files) > 15
    assert calls == []


def test_only_the_loop_imports_ray_train() -> None:
    """import-linter knows packages of others as a whole only."""
    importers = {
        str(path)
        for path in modules(*PACKAGES)
        for node in ast.walk(ast.parse((REPOSITORY / path).read_text()))
        if (
            isinstance(node, ast.Import) and any(a.name.startswith("ray.train") for a in node.names)
        )
        or (isinstance(node, ast.ImportFrom) and (node.module or "").startswith("ray.train"))
    }
    assert importers == {"pipelines/training.py"}


def test_every_module_says_what_it_is_for() -> None:
    silent = [
        str(path)
        for path in modules(*PACKAGES)
        if (REPOSITORY / path).read_text().strip()
        and not ast.get_docstring(ast.parse((REPOSITORY / path).read_text()))
    ]
    assert silent == []


def test_no_file_names_a_place_of_somebodys_machine() -> None:
    homes = r"/(?:home|Users)/(?!ray/)[\w.-]+/|[A-Z]:\\Users\\"  # /home/ray is the container's
    here = "|".join(re.escape(f"{place}/") for place in (REPOSITORY, Path.home(), sys.prefix))
    places = re.compile(f"{homes}|{here}")
    files = text_files()
    found = [
        f"{name}:{number}: {line.strip()[:100]}"
        for name in files
        for number, line in enumerate((REPOSITORY / name).read_text().splitlines(), 1)
        if places.search(line)
    ]
    assert len(files) > 40
    assert found == []


def readme_tree() -> dict[str, str]:
    """Path → description of every line of the README's tree."""
    readme = (REPOSITORY / "README.md").read_text()
    block = re.search(r"^## The tree\n.*?```\n(.*?)```", readme, re.DOTALL | re.MULTILINE)
    assert block, "README.md has no fenced block under '## The tree'"
    tree = {}
    parents: list[str] = []
    for line in block[1].splitlines():
        name, _, description = line.strip().partition(" ")
        depth = (len(line) - len(line.lstrip())) // 2
        parents = parents[:depth]
        tree["".join([*parents, name])] = description.strip()
        if name.endswith("/"):
            parents.append(name)
    return tree


def test_the_readmes_tree_is_the_repository() -> None:
    tree = readme_tree()
    files = {str(path) for path in modules(*PACKAGES) if (REPOSITORY / path).read_text().strip()}
    told = {path for path in tree if path.startswith(PACKAGES) and path.endswith(".py")}
    assert told == files
    assert [path for path in tree if not (REPOSITORY / path).exists()] == []
    top = {path.parts[0] for path in text_files() if not path.name.startswith(".")}
    untold = {name for name in top if name not in tree and f"{name}/" not in tree}
    assert {name for name in untold if not name.startswith(".")} == set()
    assert [path for path, description in tree.items() if not description] == []


def test_jobs_can_be_run_as_files() -> None:
    assert len(JOBS) >= 3
    for name in JOBS:
        path = REPOSITORY / "jobs" / f"{name}.py"
        assert path.read_text().startswith("#!/usr/bin/env python\n"), name
        assert os.access(path, os.X_OK), f"jobs/{name}.py has no run bit"


@cache
def help_text(*words: str) -> str:
    """What ``python jobs/NAME.py [VERB] --help`` says, in this process, which has torch already; asserts that it ends with 0."""
    told = io.StringIO()
    argv, sys.argv = sys.argv, [f"jobs/{words[0]}.py", *words[1:], "--help"]
    try:
        with (
            contextlib.redirect_stdout(told),
            pytest.raises(SystemExit) as ended,
            warnings.catch_warnings(
                action="ignore", category=RuntimeWarning
            ),  # of runpy, imported before
        ):
            runpy.run_module(f"jobs.{words[0]}", run_name="__main__", alter_sys=True)
    finally:
        sys.argv = argv
    assert ended.value.code in (0, None), f"{words}: {told.getvalue()}"
    return told.getvalue()


@pytest.mark.slow
@pytest.mark.parametrize("name", JOBS)
def test_every_job_explains_itself(name: str) -> None:
    docstring = ast.get_docstring(ast.parse((REPOSITORY / "jobs" / f"{name}.py").read_text()))
    assert docstring
    first_line = docstring.splitlines()[0]
    assert first_line in " ".join(help_text(name).split())


@pytest.mark.slow
def test_documents_name_only_flags_that_exist() -> None:
    checked = 0
    for document in (REPOSITORY / "README.md", REPOSITORY / "infra" / "README.md"):
        lines = document.read_text().replace("\\\n", " ").splitlines()
        commands = [line for line in lines if re.search(r"python jobs/[a-z]\w*\.py", line)]
        assert commands
        for line in commands:
            name, *words = line.split("python jobs/")[1].split("`")[0].split()
            name = name.removesuffix(".py")
            has_verbs = "subcommands" in help_text(name)
            text = help_text(name, words[0]) if has_verbs else help_text(name)
            for flag in re.findall(r"(?<=\s)--[a-z][\w.-]*", " " + " ".join(words)):
                assert flag in text, f"{document.name}: {line.strip()}"
                checked += 1
    assert checked >= 8


@pytest.mark.slow
def test_every_preset_parses(monkeypatch: pytest.MonkeyPatch) -> None:
    parsed = []
    for name in JOBS:
        presets = getattr(importlib.import_module(f"jobs.{name}"), "PRESETS", {})
        for preset, config in presets.items():
            required = [
                f"--{field.name.replace('_', '-')}=x"
                for field in dataclasses.fields(config)
                if getattr(config, field.name) is tyro.MISSING
            ]
            monkeypatch.setattr(sys, "argv", [name, preset, *required])
            resolved = runtime.parse(presets, "")
            assert type(resolved) is type(config)
            parsed.append(f"{name} {preset}")
    assert {"preprocess laptop", "preprocess voxceleb2"} <= set(parsed)


def test_constraints_pin_every_dependency_inside_its_range() -> None:
    lines = (REPOSITORY / "constraints.txt").read_text().splitlines()
    pins = [Requirement(line) for line in lines if not line.startswith("#")]
    assert all(re.fullmatch(r"==[\w.]+", str(pin.specifier)) and not pin.url for pin in pins)
    version = {canonicalize_name(pin.name): str(pin.specifier).removeprefix("==") for pin in pins}
    assert len(version) == len(pins) > 100
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    for requirement in map(Requirement, wanted):
        assert requirement.specifier.contains(version[canonicalize_name(requirement.name)])


def test_make_offers_what_the_readme_says() -> None:
    done = subprocess.run(
        ["make", "help"], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    offered = set(re.findall(r"^make (\w+)", done.stdout, re.MULTILINE))
    told = set(re.findall(r"^\s*make (\w+)", (REPOSITORY / "README.md").read_text(), re.MULTILINE))
    assert {"demo", "test"} <= told <= offered
