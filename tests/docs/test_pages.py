"""What the documents name exists: links, paths, commands, targets of make; and the run files in them are valid."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from align.data.prompts import PromptConfig
from cluster.cli import app
from cluster.faults import EXIT_CODES
from cluster.spec.config import RunConfig, load_config
from tests.docs.documents import documents, read
from tests.places import REPOSITORY, RUNS

MAX_LINES = 250
EVERY = pytest.mark.parametrize("path", documents(), ids=lambda path: str(path.relative_to(REPOSITORY)))
README = read(REPOSITORY / "README.md")


def anchors(text: str) -> set[str]:
    """The names by which GitHub links to the headings of a text."""
    heads = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", text, flags=re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


def toml_blocks(path: Path) -> list[str]:
    return re.findall(r"```toml\n(.*?)```", read(path), flags=re.S)


def over(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Two run files, the keys of the second over those of the first."""
    return {key: {**below.get(key, {}), **above.get(key, {})} for key in below | above}


def test_the_first_page_is_short() -> None:
    assert len(README.splitlines()) <= MAX_LINES


@EVERY
def test_every_link_leads_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"```.*?```|`[^`\n]*`", "", read(path), flags=re.S)):
        if "://" in target:
            continue
        file, _, anchor = target.partition("#")
        found = (path.parent / file).resolve() if file else path
        assert found.exists(), target
        assert not anchor or anchor in anchors(read(found)), target


@EVERY
def test_every_path_of_the_repository_exists(path: Path) -> None:
    named = set(re.findall(r"(?<![\w./@-])((?:align|cluster|deploy|tests)/[\w./+-]*\w/?)", read(path)))
    placeholders = {name for name in named if re.search(r"/[XY]\.toml$", name)}
    folders = (REPOSITORY, path.parent)
    assert [n for n in sorted(named - placeholders) if not any((folder / n).exists() for folder in folders)] == []


def test_every_document_is_reached_from_the_first_page() -> None:
    reached, waiting = set(), [REPOSITORY / "README.md"]
    while waiting:
        path = waiting.pop()
        if path not in reached:
            reached.add(path)
            links = re.findall(r"\]\(([^)\s#]+\.md)", read(path))
            waiting += [(path.parent / link).resolve() for link in links if "://" not in link]
    assert set(documents()) <= reached


@EVERY
def test_every_command_exists(path: Path) -> None:
    group = r"[a-z0-9]+(?: (?:list|logs|stop|tiny|gguf|smollm2|round)\b)?"
    used = set(re.findall(rf"(?:^\s*(?:\$ |\.venv/bin/)?|`)align ({group})", read(path), re.M))
    for command in used:
        assert CliRunner().invoke(app, [*command.split(), "--help"]).exit_code == 0, command


def test_the_commands_of_the_first_page_are_all_there_are() -> None:
    listed = set(re.findall(r"^align ((?:models )?[a-z0-9]+)", README, re.M))
    top = {command.name or command.callback.__name__ for command in app.registered_commands}  # type: ignore[union-attr]
    assert {command for command in listed if " " not in command} == {*top, "jobs"}
    assert {"models tiny", "models gguf", "models smollm2", "models round"} <= listed


@EVERY
def test_every_target_of_make_exists(path: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (REPOSITORY / "Makefile").read_text(), flags=re.M))
    assert set(re.findall(r"(?:`|^)make ([a-z-]+)", read(path), flags=re.M)) <= targets


# --- run files ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [path for path in documents() if toml_blocks(path)], ids=lambda path: path.parent.name)
def test_every_run_file_in_a_document_is_valid(path: Path) -> None:
    first, *others = (tomllib.loads(block) for block in toml_blocks(path))
    for tree in (first, *(over(first, other) for other in others)):
        RunConfig.model_validate(tree)


def test_the_run_file_of_the_first_page_is_the_one_whose_figures_stand_below_it() -> None:
    first, _ = toml_blocks(REPOSITORY / "README.md")
    cfg, measured = RunConfig.model_validate(tomllib.loads(first)), load_config(RUNS / "smollm2_addition.toml")
    for section in ("policy", "reference", "prompts", "reward", "sampling", "algorithm", "optimizer", "filter"):
        assert getattr(cfg, section) == getattr(measured, section), section
    assert cfg.run == measured.run.model_copy(update={"name": "mine"})
    assert cfg.evaluation.heldout == measured.evaluation.heldout
    assert len([line for line in first.splitlines() if line.strip()]) <= 30


def test_the_prompts_of_a_reader_take_the_place_of_the_generator() -> None:
    names = re.findall(r'`(?:heldout = \{ )?(files = \["\w+\.jsonl"\])', README)
    assert len(names) == 2
    for text in names:
        assert PromptConfig.model_validate(tomllib.loads(text)).files


def test_on_gpus_the_run_file_of_the_first_page_sends_its_weights_from_gpu_to_gpu() -> None:
    first, more = (tomllib.loads(block) for block in toml_blocks(REPOSITORY / "README.md"))
    cfg = RunConfig.model_validate(over(first, more))
    assert (cfg.transport, cfg.engine_dtype, cfg.run.max_staleness) == ("nccl", "bfloat16", 1)


def test_a_run_file_that_aligns_to_a_reference_on_gpus_is_in_the_guide() -> None:
    (text,) = toml_blocks(REPOSITORY / "deploy" / "README.md")
    cfg = RunConfig.model_validate(tomllib.loads(text))
    assert cfg.reference is not None
    assert (cfg.transport, cfg.engine_dtype) == ("nccl", "bfloat16")


def test_an_exit_code_of_the_first_page_is_one_of_the_command() -> None:
    shown = dict(re.findall(r"^\| (\d+) \| (.+) \|$", README, re.M))
    assert shown == {str(code): text for code, text in EXIT_CODES.items()}
