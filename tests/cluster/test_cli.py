"""The `align` command: help, exit codes, one message per error, and no heavy import before it is needed."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import jsonschema
import pytest
from typer.testing import CliRunner

from align.demo import tiny
from cluster.cli import app, main
from cluster.faults import EXIT_CODES
from cluster.spec.config import RunConfig
from tests.fakes.run_files import config, tree, write

COMMANDS = [
    *(
        "train",
        "config",
        "plan",
        "doctor",
        "dashboard",
        "status",
        "inspect",
        "submit",
        "jobs list",
        "jobs logs",
        "jobs stop",
    ),
    *("models tiny", "models gguf", "models smollm2", "models round"),
]
HEAVY = ("torch", "ray", "vllm", "transformers", "wandb")


def align(*arguments: object) -> tuple[int, str]:
    """Exit code and output of the command, in this process."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.output


def exit_of_main(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["align", *map(str, arguments)])
    with pytest.raises(SystemExit) as caught:
        main()
    return int(caught.value.code or 0)


def align_process(*arguments: object) -> subprocess.CompletedProcess[str]:
    """The command as a user starts it."""
    command = [sys.executable, "-m", "cluster.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def loaded_by(code: str) -> set[str]:
    """Which heavy packages a piece of code loads in a fresh process."""
    report = f"\nimport sys; print([name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code + report], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stderr.strip().splitlines()[-1].replace("'", '"')))


# --- help ---------------------------------------------------------------------------------------------------------


def test_the_version_is_printed() -> None:
    code, output = align("--version")
    assert (code, output) == (0, "align 0.1.0\n")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_says_what_a_command_does_and_gives_an_example(command: str) -> None:
    code, output = align(*command.split(), "--help")
    assert code == 0
    assert f"Example: align {command} " in " ".join(output.split())


def test_help_lists_the_commands_and_the_exit_codes() -> None:
    code, output = align("--help")
    assert code == 0
    assert all(command.split()[0] in output for command in COMMANDS)
    codes = "; ".join(f"{code} {meaning}" for code, meaning in EXIT_CODES.items())
    assert f"Exit codes: {codes}." in " ".join(output.split())


@pytest.mark.parametrize("group", [[], ["models"], ["jobs"]], ids=["align", "models", "jobs"])
def test_on_80_columns_each_command_is_one_whole_sentence_in_the_list(group: list[str]) -> None:
    output = CliRunner().invoke(app, [*group, "--help"], terminal_width=80).output
    lines = output.split("Commands:\n")[1].split("\n\n")[0].splitlines()
    names = {command.split()[len(group)] for command in COMMANDS if command.split()[: len(group)] == group}
    assert {line.split()[0] for line in lines} == names
    assert [line for line in lines if not line.endswith(".") or "..." in line or len(line) > 80] == []


def test_every_command_is_tested_here() -> None:
    groups = {"": app, **{group.name: group.typer_instance for group in app.registered_groups}}
    found = {
        f"{group} {command.name or command.callback.__name__}".strip()  # type: ignore[union-attr]
        for group, commands in groups.items()
        for command in commands.registered_commands  # type: ignore[union-attr]
    }
    assert found == set(COMMANDS)


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["train", "--help"], ["models", "gguf", "--help"]])
def test_help_and_version_load_nothing_heavy(arguments: list[str]) -> None:
    code = f"import sys; sys.argv = ['align', *{arguments!r}]\ntry:\n    from cluster.cli import main; main()\n"
    assert loaded_by(code + "except SystemExit as end:\n    assert not end.code\n") == set()


# --- config -------------------------------------------------------------------------------------------------------


def test_config_prints_the_resolved_run_file(tmp_path: Path) -> None:
    path = write(tmp_path / "run.toml")
    code, output = align("config", path, "--set", "run.steps=7", "--set", "optimizer.lr=5e-4")
    assert code == 0
    expected = config(run={"steps": 7}, optimizer={"lr": 5e-4})
    assert RunConfig.model_validate(tomllib.loads(output)) == expected
    assert tomllib.loads(output)["sampling"]["temperature"] == 1.0, "defaults are written out"


def test_config_prints_a_json_schema_with_descriptions() -> None:
    code, output = align("config", "--schema")
    assert code == 0
    schema = json.loads(output)
    jsonschema.Draft202012Validator.check_schema(schema)
    assert schema["$defs"]["RunSection"]["properties"]["steps"]["description"] == "Optimizer steps."
    jsonschema.validate(tree(), schema)


# --- errors -------------------------------------------------------------------------------------------------------


def test_an_unknown_key_is_one_message_and_exit_code_2(tmp_path: Path) -> None:
    path = write(tmp_path / "run.toml", run={"step": 3})
    done = align_process("train", path)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == (
        f"error [CONFIG] {path}: unknown key 'run.step'; did you mean 'steps'?\n  -> correct the keys that are named\n"
    )


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["config", "none.toml"], "error [CONFIG] run file none.toml does not exist"),
        (["train", "none.toml"], "error [CONFIG] run file none.toml does not exist"),
        (["config"], "error [CONFIG] no run file given\n  -> align config FILE.toml, or align config --schema"),
        (["models", "gguf", "none.gguf", "DIR"], "error [CONFIG] "),
        (["models", "round", "none", "DIR"], "error [CONFIG] "),
    ],
)
def test_input_that_cannot_be_used_is_one_message_and_exit_code_2(
    arguments: list[str],
    expected: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert exit_of_main(monkeypatch, *arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(expected)
    if "gguf" in arguments:
        assert "none.gguf" in captured.err
    assert captured.out == ""
    assert os.listdir(tmp_path) == []


def test_tiny_models_of_the_seed_are_kept_and_those_of_another_seed_are_built_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiny, "build", functools.partial(tiny.build, steps=1))
    folder = tmp_path / "tiny"

    def build(*arguments: object) -> tuple[str, int | None]:
        code, output = align("models", "tiny", folder, *arguments)
        assert code == 0
        return output, tiny.built_seed(folder)

    kept = f"{folder} is there already\n"
    output, seed = build()
    assert "is there already" not in output and seed == 0
    assert build() == (kept, 0)
    output, seed = build("--seed", 3)
    assert "is there already" not in output and seed == 3
    assert build("--seed", "3") == (kept, 3)


def test_a_folder_that_holds_something_else_is_not_built_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    assert exit_of_main(monkeypatch, "models", "tiny", tmp_path) == 2
    assert capsys.readouterr().err.startswith("error [CONFIG] ")
    assert os.listdir(tmp_path) == ["thesis.tex"]


@pytest.mark.parametrize("arguments", [["nonsense"], ["train"], ["train", "run.toml", "--nonsense"]])
def test_a_wrong_command_line_is_exit_code_2(arguments: list[str]) -> None:
    code, output = align(*arguments)
    assert code == 2
    assert "Usage: " in output


def test_a_run_whose_inputs_are_missing_ends_with_exit_code_2_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert exit_of_main(monkeypatch, "train", write(tmp_path / "run.toml")) == 2
    captured = capsys.readouterr()
    assert captured.out.startswith("error [CONFIG] ")
    assert "absent/policy" in captured.out
    assert captured.err == ""
    assert os.listdir(tmp_path) == ["run.toml"], "no run folder was made"
