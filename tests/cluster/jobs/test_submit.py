"""Jobs of a cluster, and following them, against a cluster that is played."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from cluster.faults import ClusterAway, ConfigError, ResourceError, RunError
from cluster.jobs import submit
from cluster.jobs.follow import advice, follow
from cluster.jobs.submit import read_resources, within
from tests.fakes.jobs import FakeClient, FakeClock, details, jobs_of
from tests.fakes.run_files import config

GONE = RuntimeError("Request failed with status code 404: Job demo does not exist.")
AWAY = ConnectionError("nobody answers")


def followed(client: FakeClient) -> tuple[int, str, list[str], FakeClock]:
    """Exit code, what was printed, what was noted, and the clock."""
    jobs, said, noted = jobs_of(client), [], []  # type: ignore[var-annotated]
    code = follow(jobs, "demo", said.append, noted.append)
    assert isinstance(jobs.clock, FakeClock)
    return code, "".join(said), noted, jobs.clock


# --- following -----------------------------------------------------------------------------------------------------


def test_a_log_is_printed_as_it_grows_and_the_exit_code_is_that_of_the_driver() -> None:
    done = details("FAILED", 6)
    code, text, noted, _ = followed(FakeClient([details(), details(), done], ["a\n", "a\nb\n", "a\nb\nc\n"]))
    assert (code, text, noted) == (6, "a\nb\nc\n", [])


def test_a_lost_connection_is_made_again_after_growing_pauses_and_no_line_is_lost_or_doubled() -> None:
    logs = ["a\n", *[AWAY] * 6, "a\nb\n", "a\nb\nc\n"]
    infos = [details(), details(), details(), details("SUCCEEDED", 0)]
    code, text, noted, clock = followed(FakeClient(infos, logs))
    assert (code, text) == (0, "a\nb\nc\n")
    assert clock.slept[1:7] == [1, 2, 4, 8, 16, 30]
    assert noted == ["the cluster at http://c:8265 does not answer; it is asked again for 300 s", "the cluster is back"]


def test_a_cluster_that_stays_away_ends_the_following_within_its_deadline() -> None:
    client = FakeClient(logs=["a\n", AWAY])
    jobs = jobs_of(client)
    with pytest.raises(ClusterAway, match="does not answer: nobody answers; it was asked for 300 s") as caught:
        follow(jobs, "demo", print, print)
    assert caught.value.exit_code == 3
    assert "align jobs logs demo --follow --address http://c:8265" in caught.value.advice
    assert 300 < jobs.clock.monotonic() - 1000 < 340


def test_a_server_error_is_not_the_end_either() -> None:
    oops = RuntimeError("Request failed with status code 500: Traceback ...")
    code, text, _, _ = followed(FakeClient([details(), details("SUCCEEDED", 0)], [oops, "a\n"]))
    assert (code, text) == (0, "a\n")


def test_a_job_that_was_deleted_meanwhile_is_named_at_once() -> None:
    jobs = jobs_of(FakeClient(logs=["a\n", GONE]))
    with pytest.raises(ConfigError, match="no job 'demo' at http://c:8265"):
        follow(jobs, "demo", print, print)
    assert jobs.clock.monotonic() < 1010


def test_a_token_that_is_no_longer_taken_ends_the_following_at_once() -> None:
    class AuthenticationError(Exception):
        pass

    jobs = jobs_of(FakeClient(logs=["a\n", AuthenticationError("403")]))
    with pytest.raises(ResourceError, match="does not accept this token") as caught:
        follow(jobs, "demo", print, print)
    assert not isinstance(caught.value, ClusterAway)


def test_a_stopped_job_is_an_interrupted_run() -> None:
    assert followed(FakeClient([details("STOPPED")], ["a\n"]))[0] == 130


def test_a_job_that_could_not_start_says_why() -> None:
    failed = details("FAILED", message="pip failed")
    with pytest.raises(ResourceError, match="job demo could not start: pip failed"):
        followed(FakeClient([failed]))


def test_a_job_that_waits_for_its_driver_says_so_every_thirty_seconds() -> None:
    pending = details("PENDING", message="waiting for resources")
    _, _, noted, _ = followed(FakeClient([pending] * 50 + [details("SUCCEEDED", 0)]))
    assert noted == [
        "the job is PENDING for 5 s: waiting for resources",
        "the job is PENDING for 35 s: waiting for resources",
    ]


@pytest.mark.parametrize(
    ("end", "expected"),
    [
        ("  import vllm\nModuleNotFoundError: No module named 'vllm'\n", "the image has no package vllm"),
        ("bash: line 1: align: command not found\n", "the image has no align; align submit takes the code along"),
        ("/bin/sh: 1: align: not found\n", "the image has no align"),
        ("/bin/sh: 1: python: not found\n", "the image has no python"),
    ],
)
def test_an_image_without_the_package_is_recognised_and_the_remedy_named(end: str, expected: str) -> None:
    code, _, noted, _ = followed(FakeClient([details("FAILED", 127)], ["starting\n" + end]))
    assert code == 127
    assert [note.startswith(f"  -> {expected}") for note in noted] == [True]
    assert "deploy/docker/" in noted[0]


def test_other_ends_get_no_advice() -> None:
    assert advice("error [CONFIG] prompt file x does not exist\n") == ""


# --- asking --------------------------------------------------------------------------------------------------------


def test_an_unknown_job_and_a_cluster_that_is_away_are_told_apart() -> None:
    with pytest.raises(ConfigError, match="no job 'demo'"):
        jobs_of(FakeClient([GONE])).status("demo")
    with pytest.raises(ClusterAway, match="does not answer: nobody answers"):
        jobs_of(FakeClient([AWAY])).log("demo")


def test_an_answer_that_does_not_come_is_not_waited_for() -> None:
    began = time.monotonic()
    with pytest.raises(TimeoutError, match=r"no answer within 0\.05 s"):
        within(0.05, lambda: time.sleep(5))
    assert time.monotonic() - began < 4, "less than the work takes"
    assert within(5, lambda: 7) == 7


@pytest.mark.parametrize("version", ["2.59.0", "3.0.0"])
def test_another_version_of_ray_is_refused_with_both_ways_out(version: str) -> None:
    jobs = jobs_of(FakeClient(pages={"/api/version": {"ray_version": version}}))
    jobs.check_version(version)
    with pytest.raises(ResourceError, match=rf"runs Ray {version}, this machine has 2\.60\.0") as caught:
        jobs.check_version("2.60.0")
    assert caught.value.advice == f"install ray=={version} here, or use an image with 2.60.0"


def test_rays_client_still_has_the_private_way_to_ask_the_dashboard() -> None:
    from ray.job_submission import JobSubmissionClient

    assert callable(JobSubmissionClient._do_request)


def test_a_dashboard_that_answers_with_an_error_is_away() -> None:
    with pytest.raises(ClusterAway, match="503"):
        jobs_of(FakeClient()).check_room(config(), {})


# --- submitting ----------------------------------------------------------------------------------------------------


@pytest.fixture
def cfg(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(submit, "stage", lambda cfg, folder: None)
    return config(run={"dir": "/shared/runs/a", "name": "demo"})


def test_a_job_says_whose_it_is_and_is_stopped_gently(cfg: Any) -> None:
    client = FakeClient()
    jobs_of(client).submit(cfg)
    (job,) = client.submitted
    assert job["submission_id"].startswith("demo-")
    assert job["metadata"]["align_run_dir"] == "/shared/runs/a"
    environment = job["runtime_env"]["env_vars"]
    assert environment["RAY_JOB_STOP_SIGNAL"] == "SIGINT"
    assert environment["WANDB_RUN_ID"] == job["metadata"]["align_wandb_id"]
    assert not set(job) & {"entrypoint_num_cpus", "entrypoint_resources"}, "the driver runs on the head"


def test_a_run_that_goes_on_has_the_id_in_wandb_that_it_had(cfg: Any) -> None:
    earlier = [
        details(metadata={"align_run": "x", "align_run_dir": folder, "align_wandb_id": name}, start_time=at)
        for folder, name, at in (
            ("/shared/runs/a", "old", 1),
            ("/shared/runs/b", "other", 3),
            ("/shared/runs/a", "new", 2),
        )
    ]
    foreign = details(metadata={"owner": "somebody"})
    assert jobs_of(FakeClient(jobs=[*earlier, foreign])).wandb_id(cfg) == "new"
    assert len({jobs_of(FakeClient()).wandb_id(cfg) for _ in range(2)}) == 2, "a new run has a new one"


def test_the_driver_asks_for_what_was_said(cfg: Any) -> None:
    client = FakeClient()
    jobs_of(client).submit(cfg, driver=read_resources(["CPU=1", "driver=0.5"]))
    assert client.submitted[0]["entrypoint_num_cpus"] == 1
    assert client.submitted[0]["entrypoint_resources"] == {"driver": 0.5}


@pytest.mark.parametrize("text", ["CPU", "CPU=many", "CPU=1=2"])
def test_driver_resources_of_another_form_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="expected NAME=AMOUNT"):
        read_resources([text])


def test_an_id_that_is_taken_is_named_with_what_it_does(cfg: Any) -> None:
    taken = RuntimeError("... Job with submission_id demo already exists. Please use a different submission_id.")
    with pytest.raises(ConfigError, match="there is a job 'demo' already, and it is RUNNING") as caught:
        jobs_of(FakeClient(submissions=[taken])).submit(cfg, "demo")
    assert "choose another --id, or see it: align jobs logs demo --follow" in caught.value.advice


def test_a_cluster_that_has_just_started_is_given_a_minute_for_its_agent(cfg: Any) -> None:
    early = RuntimeError("No available agent to submit job, please try again later.")
    jobs = jobs_of(FakeClient(submissions=[early, early, "demo"]))
    assert jobs.submit(cfg, "demo") == "demo"
    with pytest.raises(ConfigError, match="the job was not accepted: No available agent"):
        jobs_of(FakeClient(submissions=[early])).submit(cfg, "demo")


# --- stopping ------------------------------------------------------------------------------------------------------


def test_the_run_of_a_job_is_found_by_its_id_where_its_folder_is_seen(tmp_path: Path) -> None:
    own = details(metadata={"align_run": "x", "align_run_dir": str(tmp_path)})
    assert jobs_of(FakeClient([own])).folder("demo") == tmp_path
    far = details(metadata={"align_run": "x", "align_run_dir": str(tmp_path / "far")})
    with pytest.raises(ConfigError, match=r"far of job demo is not seen from here\n.*align jobs logs demo"):
        jobs_of(FakeClient([far])).folder("demo")
    with pytest.raises(ConfigError, match="job demo was not submitted by align"):
        jobs_of(FakeClient([details()])).folder("demo")


def test_a_job_is_waited_for_after_it_was_told_to_stop() -> None:
    client = FakeClient([details(), details(), details("STOPPED")])
    assert jobs_of(client).stop("demo") == "STOPPED"
    assert client.stopped == ["demo"]


def test_a_job_that_does_not_stop_is_named() -> None:
    with pytest.raises(RunError, match="job demo is RUNNING 150 s after it was told to stop"):
        jobs_of(FakeClient()).stop("demo")


def test_a_job_that_has_not_started_is_dropped_by_ending_what_waits_for_its_place() -> None:
    client = FakeClient([details("PENDING"), details("PENDING"), details("FAILED")])
    assert jobs_of(client).stop("demo") == "FAILED"
    assert client.stopped == [], "Ray would say yes and do nothing"
    assert "_ray_internal_job_actor_demo" in client.submitted[0]["entrypoint"]
