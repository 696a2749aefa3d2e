"""`align doctor`: a verdict for every item, and the fix where something is wrong."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import tomli_w
from typer.testing import CliRunner

from cluster.cli import app
from cluster.doctor import machine, storage
from cluster.doctor.examination import before_a_run, examine, token
from cluster.doctor.verdict import Verdict, checked, exit_code, merged, require, together
from cluster.doctor.versions import TESTED
from cluster.faults import ConfigError, ResourceError
from cluster.spec.config import RunConfig, resolved
from cluster.spec.inputs import load_inputs
from tests.fakes.run_files import config, write


@pytest.fixture(autouse=True)
def on_its_own() -> Iterator[None]:
    """No cluster is named; what a command adds to the environment goes with its test."""
    before = dict(os.environ)
    os.environ.pop("RAY_ADDRESS", None)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def cfg(model_folder: Path, tmp_path: Path) -> RunConfig:
    """A run that can start."""
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "abc"}\n{"prompt": "abcdef"}\n')
    return config(
        run={"dir": str(tmp_path / "run")},
        policy={"model": str(model_folder)},
        reference={"model": str(model_folder)},
        prompts={"files": [str(prompts)]},
        rollout={"max_model_len": 64},
        sampling={"max_tokens": 8},
        wandb={"mode": "offline"},
    )


def verdicts(cfg: RunConfig | None) -> dict[str, Verdict]:
    def say(text: str) -> None:
        pytest.fail(f"a quick look starts nothing: {text}")

    return {verdict.item: verdict for verdict in examine(cfg, quick=True, say=say)}


# --- the examination ----------------------------------------------------------------------------------------------


def test_this_machine_is_fit_and_every_package_that_was_tested_is_looked_at() -> None:
    found = verdicts(None)
    assert set(TESTED) <= set(found)
    assert [v for v in found.values() if v.state == "fail"] == []
    assert all(v.fix for v in found.values() if v.state != "ok")


def test_a_run_that_can_start_is_ok_throughout(cfg: RunConfig) -> None:
    found = verdicts(cfg)
    of_the_run = ("inputs", "tokenizer", "end tokens", "chat template", "reward", "disk", "W&B")
    assert {found[item].state for item in of_the_run} == {"ok"}
    assert found["inputs"].found == "2 prompts to train on, 0 held out, at most 6 tokens"


def test_a_disk_that_is_too_small_is_named_with_what_is_needed(cfg: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    small = storage.shutil._ntuple_diskusage(9, 8, 1)
    monkeypatch.setattr(storage.shutil, "disk_usage", lambda path: small)
    found = verdicts(cfg)
    assert (found["disk"].state, found["shared memory"].state) == ("fail", "warn")
    assert "the run needs" in found["disk"].found


def test_shared_memory_that_is_too_small_fails_where_gpus_need_it(monkeypatch: pytest.MonkeyPatch) -> None:
    small = machine.shutil._ntuple_diskusage(9, 8, 1)
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda path: small)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert machine._shared_memory().state == "fail"


def test_the_short_examination_before_a_run_has_the_same_verdicts_and_asks_nobody_else(cfg: RunConfig) -> None:
    short = list(before_a_run(cfg, load_inputs(cfg), None))
    items = {verdict.item for verdict in short}
    assert {*TESTED, "interface", "disk", "tokenizer", "reward"} <= items
    assert not items & {"W&B", "inputs", "agreement"}, "those are looked at by the run itself"
    require(short, pytest.fail)


def test_a_run_does_not_start_on_a_machine_that_fails(
    cfg: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "run.toml"
    path.write_text(tomli_w.dumps(resolved(cfg)), encoding="utf-8")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nowhere0")
    done = CliRunner().invoke(app, ["train", str(path)])
    assert done.exit_code == 3, done.output
    assert "[RESOURCES] interface: GLOO_SOCKET_IFNAME=nowhere0 names no interface that is up" in done.output
    assert "-> unset GLOO_SOCKET_IFNAME" in done.output
    assert not (tmp_path / "run").exists(), "nothing was started"


# --- the command ----------------------------------------------------------------------------------------------------


def test_what_the_run_file_names_and_is_not_there_fails_the_command(tmp_path: Path) -> None:
    path = write(tmp_path / "run.toml", wandb={"mode": "offline"})
    result = CliRunner().invoke(app, ["doctor", str(path)])
    assert result.exit_code == 2
    assert "fail inputs         model folder absent/policy does not exist" in result.output
    assert "make one with `align models --help`" in result.output
    assert "Traceback" not in result.output


def test_as_json_every_verdict_is_an_object() -> None:
    result = CliRunner().invoke(app, ["doctor", "--json"])
    assert result.exit_code == 0
    found = json.loads(result.output)
    assert set(found[0]) == {"item", "state", "found", "fix", "exit_code", "node"}
    assert {row["item"] for row in found} >= set(TESTED)


def test_a_cluster_that_does_not_answer_is_a_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    from cluster.fleet import session

    def init(**_: object) -> None:
        raise ConnectionError("nobody answers")

    monkeypatch.setenv("RAY_ADDRESS", "")  # the command sets it; this puts it back
    monkeypatch.setattr(session.ray, "init", init)
    result = CliRunner().invoke(app, ["doctor", "--address", "10.0.0.7:6379"])
    assert result.exit_code == 3
    assert "fail Ray            could not join the cluster at 10.0.0.7:6379: nobody answers" in result.output


def test_the_address_of_a_dashboard_is_refused_with_the_way_to_look_at_a_cluster_from_outside(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "")
    result = CliRunner().invoke(app, ["doctor", "--address", "http://127.0.0.1:8265"])
    assert result.exit_code == 3
    assert "ray job submit --address http://127.0.0.1:8265 -- align doctor" in result.output


# --- the token -------------------------------------------------------------------------------------------------------


def test_a_cluster_without_a_token_and_a_token_that_others_may_read_are_warnings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def look(address: str | None = "10.0.0.7:6379") -> Verdict:
        (verdict,) = checked("Ray's token", lambda: token(address))
        return verdict

    assert look(None).found == "no cluster named; a local Ray gets a token of its own"
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    assert (look().state, look().fix.split()[1]) == ("warn", "RAY_AUTH_MODE=token")
    path = tmp_path / ".ray" / "auth_token"
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "secret")
    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH", raising=False)
    assert look().state == "ok"
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert look().state == "fail", "there is no such file"
    path.parent.mkdir()
    path.write_text("secret")
    path.chmod(0o644)
    assert (look().state, look().fix) == ("warn", f"chmod 600 {path}")
    path.chmod(0o600)
    assert (look().state, look().found) == ("ok", "on for 10.0.0.7:6379")
    assert "secret" not in str(look())


# --- verdicts --------------------------------------------------------------------------------------------------------


def test_the_exit_code_is_that_of_the_worst_and_warnings_are_none() -> None:
    warning, machine_fails = Verdict("a", "warn", "…", "do"), Verdict("b", "fail", "…", "do")
    file_fails = Verdict("c", "fail", "…", "do", ConfigError.exit_code)
    assert exit_code([]) == exit_code([warning]) == 0
    assert exit_code([warning, file_fails]) == 2
    assert exit_code([file_fails, machine_fails]) == exit_code([machine_fails, file_fails]) == 3


def test_a_run_goes_on_with_warnings_and_stops_at_failures_with_all_of_them_and_their_fixes() -> None:
    warnings: list[str] = []
    warning = Verdict("ports", "warn", "few", "open some", node="n1")
    require([Verdict("x", "ok", "fine"), warning], warnings.append)
    assert warnings == ["ports: few (n1); open some"]
    file_fails = Verdict("reward", "fail", "broken", "mend it", ConfigError.exit_code)
    with pytest.raises(ConfigError, match="reward: broken") as caught:
        require([file_fails], warnings.append)
    assert caught.value.advice == "mend it"
    with pytest.raises(ResourceError) as both:
        require([file_fails, Verdict("disk", "fail", "full", "make room", node="n2")], warnings.append)
    assert str(both.value) == "[RESOURCES] reward: broken\n  -> mend it\ndisk: full (n2)\n  -> make room"


def test_what_is_well_on_all_nodes_is_one_line_and_what_is_not_is_named_with_its_node() -> None:
    def on(node: str, state: str, found: str) -> Verdict:
        return Verdict("disk", state, found, "" if state == "ok" else "make room", node=node)

    seen = [on("n1", "ok", "9 GiB"), on("n2", "fail", "0 GiB"), on("n3", "ok", "7 GiB"), Verdict("x", "ok", "here")]
    lines = [verdict.line() for verdict in merged(seen)]
    assert lines == [
        "ok   disk           9 GiB … 7 GiB (n1, n3)",
        "fail disk           0 GiB (n2)\n     -> make room",
        "ok   x              here",
    ]
    many = [on(f"n{i}", "ok", "9 GiB") for i in range(8)]
    assert [verdict.line() for verdict in merged(many)] == ["ok   disk           9 GiB (n0 and 7 more nodes)"]


def test_verdicts_are_told_as_they_come_and_those_of_nodes_when_all_are_known() -> None:
    told: list[str] = []

    def looks() -> Iterator[Verdict]:
        for verdict in (
            Verdict("a", "ok", "1"),
            *(Verdict("b", "ok", "2", node=n) for n in "xy"),
            Verdict("c", "ok", "3"),
        ):
            told.append(f"{verdict.item} looked at")
            yield verdict

    for verdict in together(looks()):
        told.append(f"{verdict.item} told {verdict.node}".strip())
    assert told == [
        *("a looked at", "a told", "b looked at", "b looked at", "c looked at", "b told x, y", "c told"),
    ]


def test_a_look_that_ends_with_an_error_keeps_what_it_had_found() -> None:
    def look() -> list[Verdict]:
        raise ResourceError("too little", "take more")

    def half() -> Iterator[Verdict]:
        yield Verdict("a", "ok", "fine")
        raise OSError("gone")

    assert list(checked("it", look)) == [Verdict("it", "fail", "too little", "take more", 3)]
    first, second = checked("it", half)
    assert (first.item, second.item, second.found, second.exit_code) == ("a", "it", "gone", 2)


# --- storage ---------------------------------------------------------------------------------------------------------


def test_a_node_that_has_another_model_or_does_not_see_the_run_folder_fails(cfg: RunConfig) -> None:
    with storage.shared(cfg) as shared:
        assert [v.state for v in shared.look()] == ["ok", "ok"], "policy and reference are one folder"
        folder, num_bytes = shared.models[0]
        other = storage.Storage(((folder, num_bytes + 1), (folder / "none", 5)), shared.mark, "another run's")
        looks = list(other.look())
        assert [v.state for v in looks] == ["fail"] * 3
        assert looks[0].found == f"{folder} has {num_bytes} bytes of weights; where the run is driven: {num_bytes + 1}"
        assert looks[1].found == f"{folder / 'none'} cannot be read; where the run is driven: 5"
        assert "does not see a file that was written to" in looks[2].found
    assert not shared.mark.exists()
    assert list(shared.look())[-1].state == "fail"


def test_what_a_stopped_run_left_counts_as_room_that_it_has(cfg: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cfg.run.dir is not None
    (needed,) = [v.found.split("needs ")[1] for v in storage.disk(cfg)]
    assert needed != "0 GiB"
    cfg.run.dir.mkdir()
    with (cfg.run.dir / "checkpoint").open("wb") as file:
        os.truncate(file.fileno(), 1 << 30)
    (after,) = [v.found.split("needs ")[1] for v in storage.disk(cfg)]
    assert after == "0 GiB"
