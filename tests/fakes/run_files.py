"""Small run files for the tests of the runtime: the least that a run needs, with sections replaced."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from cluster.faults import ConfigError
from cluster.spec.config import RunConfig, load_config

LEAST: dict[str, Any] = {
    "run": {"steps": 3, "prompts_per_step": 2},
    "policy": {"model": "absent/policy"},
    "reference": {"model": "absent/reference"},
    "prompts": {"files": ["prompts.jsonl"]},
}


def tree(**sections: dict[str, Any] | None) -> dict[str, Any]:
    """The least run file as a tree, with these values added to its sections; a section that is None is left out."""
    content = copy.deepcopy(LEAST)
    for section, values in sections.items():
        if values is None:
            del content[section]
        else:
            content.setdefault(section, {}).update(values)
    return content


def config(**sections: dict[str, Any] | None) -> RunConfig:
    """The same as a checked config."""
    return RunConfig.model_validate(tree(**sections))


def write(path: Path, **sections: dict[str, Any] | None) -> Path:
    """The same as a file."""
    path.write_text(tomli_w.dumps(tree(**sections)), encoding="utf-8")
    return path


def refused(path: Path, *overrides: str) -> str:
    """The message of the ConfigError that a run file gives."""
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    assert caught.value.advice
    return caught.value.message


def write_answers(folder: Path, tiny_task: Path) -> dict[str, Path]:
    """The prompts of the tiny task, each with the answer "my", which its policy gives in about a fifth of all cases."""
    files = {}
    for name in ("train", "heldout"):
        rows = map(json.loads, (tiny_task / "prompts" / f"{name}.jsonl").read_text().splitlines())
        files[name] = folder / f"{name}.jsonl"
        files[name].write_text("".join(json.dumps({**row, "answer": "my"}) + "\n" for row in rows))
    return files


def write_prompts(path: Path, *prompts: str) -> Path:
    path.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts), encoding="utf-8")
    return path
