"""The pages of `align inspect --web`: what they show, what they refuse, and that nothing of a run is ever markup."""

from __future__ import annotations

import http.client
import re
import socket
import threading
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pyarrow
import pyarrow.parquet
import pytest
from typer.testing import CliRunner

from cluster.cli import app
from cluster.faults import ConfigError
from cluster.views.selection import Selection
from cluster.views.web import server
from cluster.views.web.colours import LEVELS, Scale
from cluster.views.web.pages import Pages
from cluster.views.web.server import Server, address
from tests.fakes import web_runs
from tests.fakes.web_runs import HOSTILE, PIECES

PAGES = ("/", "/trajectories", "/step/1", "/step/1/ticket/0", "/step/1/ticket/0/repeat/0", "/report")


class Parsed(HTMLParser):
    """Elements and text of a page, as a browser would take them."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def links(self) -> list[str]:
        """Where its links lead."""
        return [str(attributes["href"]) for tag, attributes in self.elements if tag == "a"]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = web_runs.write(tmp_path / "run", tmp_path / "nowhere")
    web_runs.save_tokenizer(folder)
    return folder


@pytest.fixture
def pages(run: Path) -> Pages:
    return Pages(run)


def shown(pages: Pages, target: str, status: int = 200) -> Parsed:
    answer = pages.answer(target)
    assert answer.status == status, answer.body.decode()
    return Parsed(answer.body.decode())


def table(page: Parsed) -> list[str]:
    """Addresses of the trajectories that a list names, in its order."""
    found = [link for link in page.links() if "/repeat/" in link]
    return list(
        dict.fromkeys(found[len([e for e in page.elements if "extreme" in str(e[1].get("class", "")).split()]) :])
    )


# --- data is never markup ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", PAGES)
def test_what_a_run_holds_is_text_on_every_page(pages: Pages, target: str) -> None:
    page = shown(pages, target)
    assert "script" not in {tag for tag, _ in page.elements}
    assert not {"img", "iframe", "object", "base"} & {tag for tag, _ in page.elements}
    assert not [name for _, attributes in page.elements for name in attributes if name.startswith("on")]
    assert "8641969" not in page.text, "a template in the data was carried out"


def test_the_hostile_text_is_shown_as_it_is(pages: Pages) -> None:
    assert HOSTILE in shown(pages, "/step/1/ticket/0").text
    assert HOSTILE in shown(pages, "/").text, "the name"
    page = shown(pages, "/step/1/ticket/0/repeat/0")
    assert "".join(PIECES).replace("\n", "↵\n") in page.text, "token by token"
    title = [
        attributes["title"]
        for _, attributes in shown(pages, "/step/1/ticket/0/repeat/0").elements
        if "title" in attributes
    ]
    assert any("log-prob -0.1" in str(text) for text in title)


@pytest.mark.parametrize("target", [*PAGES, "/nothing", "/trajectories?min_reward=x"])
def test_every_page_forbids_scripts_and_anything_from_elsewhere(pages: Pages, target: str) -> None:
    answer = pages.answer(target)
    policy = answer.headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy and "script-src" not in policy
    assert "frame-ancestors 'none'" in policy and "form-action 'self'" in policy and "base-uri 'none'" in policy
    page = Parsed(answer.body.decode())
    outside = [
        v for _, attributes in page.elements for v in attributes.values() if v and "//" in v and "script" not in v
    ]
    assert [v for v in outside if v.startswith(("http", "//")) and "w3.org" not in v] == []
    if target != "/report":
        assert not [e for e in page.elements if e[0] == "style" or "style" in e[1]], "the policy would drop it"


def test_what_an_address_says_is_escaped_too(pages: Pages) -> None:
    for target in (f"/trajectories?prompt={quote(HOSTILE)}x", f"/trajectories?min_reward={quote(HOSTILE)}"):
        answer = pages.answer(target)
        assert b"<script" not in answer.body and b"<img" not in answer.body


# --- what the pages show -----------------------------------------------------------------------------------------


def test_the_steps_come_newest_first_with_their_figures(pages: Pages) -> None:
    html = pages.answer("/").body.decode()
    assert [html.index(f'href="/step/{k}"') for k in (3, 2, 1)] == sorted(
        html.index(f'href="/step/{k}"') for k in (3, 2, 1)
    )
    page = shown(pages, "/")
    assert "3 of 4 steps so far" in page.text
    assert "0.125" in page.text, "the gradient norm of metrics.jsonl"
    assert "stalest" in page.text and "2 versions" in page.text
    assert "largest log-ratio" in page.text and "0.2 nats" in page.text


@pytest.mark.parametrize(
    ("query", "found"),
    [
        ("prompt=quiet", ["1/1/0", "1/1/1", "2/2/0", "2/2/1"]),
        ("prompt=prompt-3", ["2/3/0", "2/3/1"]),
        ("prompt=quiet&ending=length", ["1/1/1", "2/2/1"]),
        ("first_step=2&last_step=2&max_reward=0", ["2/2/1", "2/3/0", "2/3/1"]),
        ("min_staleness=1", ["3/4/0", "3/4/1"]),
        ("min_staleness=&prompt=another&order=longest&page=", ["3/4/0", "3/4/1", "2/3/0", "2/3/1"]),
        ("prompt=another&order=drifted", ["3/4/0", "3/4/1", "2/3/0", "2/3/1"]),
        ("prompt=nobody", []),
    ],
)
def test_a_list_shows_what_its_address_asks_for(pages: Pages, query: str, found: list[str]) -> None:
    wanted = ["/step/{}/ticket/{}/repeat/{}".format(*name.split("/")) for name in found]
    page = shown(pages, f"/trajectories?{query}")
    assert table(page) == wanted
    assert (f"{len(found)} match" in page.text) == bool(found)


def test_a_long_list_has_pages_that_keep_the_question(run: Path) -> None:
    web_runs.add_step(run, 4, [web_runs.scored(9, "many", [3] * 60)])
    pages = Pages(run)
    first = shown(pages, "/trajectories?prompt=many")
    assert "page 1 of 2" in first.text
    (following,) = [link for link in first.links() if "page=2" in link]
    assert following == "/trajectories?prompt=many&page=2"
    assert len(table(shown(pages, following))) == 10
    assert "page 2 of 2" in shown(pages, "/trajectories?prompt=many&page=99").text


def test_a_group_stands_side_by_side_and_leads_to_its_tokens(pages: Pages) -> None:
    page = shown(pages, "/step/1/ticket/1?colour=reward")
    assert page.text.count("ended by") == 2
    assert {f"/step/1/ticket/1/repeat/{k}?colour=reward" for k in (0, 1)} <= set(page.links())
    assert "/step/1/ticket/0?colour=reward" in page.links()


@pytest.mark.parametrize("measure", ["advantage", "pull", "reward", "return", "logratio", "logprob", "reference"])
def test_every_measure_colours_the_tokens_and_stands_in_the_table(pages: Pages, measure: str) -> None:
    page = shown(pages, f"/step/3/ticket/4/repeat/1?colour={measure}")
    current = [a["href"] for tag, a in page.elements if tag == "a" and a.get("aria-current") == "true"]
    assert current == [f"?colour={measure}"]
    marked = [a for tag, a in page.elements if tag == "a" and str(a.get("href")).startswith("#t")]
    assert len(marked) == 8
    levels = [str(a["class"]) for a in marked]
    assert f"p{LEVELS}" in levels or f"n{LEVELS}" in levels, "the largest size has the strongest colour"
    assert [a["id"] for tag, a in page.elements if tag == "tr" and "id" in a] == [f"t{k}" for k in range(8)]


def test_without_a_reference_it_is_no_colour_and_no_column(tmp_path: Path) -> None:
    folder = web_runs.write(tmp_path / "run", tmp_path / "nowhere")
    web_runs.add_step(folder, 1, [web_runs.scored(0, "p", [3], with_reference=False)])
    page = shown(Pages(folder), "/step/1/ticket/0/repeat/0?colour=reference")
    assert "?colour=reference" not in page.links()
    assert "reference" not in page.text.replace(str(folder), "")


def test_the_parts_of_a_composite_reward_stand_beside_it(run: Path, pages: Pages) -> None:
    path = run / "trajectories" / "step_00003.parquet"
    table = pyarrow.parquet.read_table(path)
    parts = pyarrow.array([{"exact_match": 1.0, "overlong": None}, None])
    pyarrow.parquet.write_table(table.drop_columns("reward_parts").append_column("reward_parts", parts), path)
    page = shown(pages, "/step/3/ticket/4/repeat/0")
    assert "Reward: exact_match1" in page.text and "overlong" not in page.text
    assert "Reward:" not in shown(pages, "/step/3/ticket/4/repeat/1").text


def test_without_the_tokenizer_tokens_are_ids_and_the_page_says_so(tmp_path: Path) -> None:
    page = shown(Pages(web_runs.write(tmp_path / "run", tmp_path / "nowhere")), "/step/1/ticket/1/repeat/0")
    assert "Tokens are shown by their ids" in page.text and "[0][1]" in page.text


def test_a_step_says_what_moved_its_loss_and_by_which_formula(pages: Pages) -> None:
    page = shown(pages, "/step/1")
    assert "pull = w × A × (1 − p)" in page.text
    shares = [float(share) for share in re.findall(r"^\d\.\d ([\d.]+)%$", page.text, re.M)]
    assert len(shares) > 4
    trajectories, tokens = shares[:4], shares[4:]
    assert sum(trajectories) == pytest.approx(100, abs=1)
    assert trajectories == sorted(trajectories, reverse=True) and tokens == sorted(tokens, reverse=True)
    assert [link for link in page.links() if link.endswith("?colour=pull#t2")]


def test_a_critic_leaves_advantages_of_an_unfinished_update_unknown_and_the_rest_in_place(tmp_path: Path) -> None:
    critic = {"algorithm": {"name": "ppo"}, "critic": {"optimizer": {"lr": 1e-4}}}
    folder = web_runs.write(tmp_path / "run", tmp_path / "nowhere", **critic)
    web_runs.add_step(folder, 1, [web_runs.scored(1, "p", [2, 5])], ended=False)
    pages = Pages(folder)
    assert "?colour=pull" in shown(pages, "/step/2/ticket/3").links(), "of an update that ended they are recorded"
    assert "values are not recorded" in shown(pages, "/step/1").text
    page = shown(pages, "/step/1/ticket/1/repeat/0")
    assert "Advantages are not shown" in page.text
    assert "?colour=advantage" not in page.links() and "?colour=reward" in page.links()


def test_a_run_under_way_shows_each_step_as_soon_as_it_is_there(tmp_path: Path) -> None:
    folder = web_runs.write(tmp_path / "run", tmp_path / "nowhere")
    for path in (folder / "trajectories").iterdir():
        path.unlink()
    pages = Pages(folder)
    assert "No step is over yet" in shown(pages, "/").text
    assert "No step is over yet" in shown(pages, "/trajectories").text
    shown(pages, "/step/1", 404)
    web_runs.add_step(folder, 1, [web_runs.scored(0, "first", [3])])
    assert "/step/1" in shown(pages, "/").links()
    web_runs.add_step(folder, 1, [web_runs.scored(0, "again", [3])])
    assert "again" in shown(pages, "/trajectories").text, "a step that a resumed run wrote again"


def test_a_damaged_file_is_named_and_the_other_steps_stay(run: Path, pages: Pages) -> None:
    (run / "trajectories" / "step_00002.parquet").write_bytes(b"PAR1 torn")
    assert "step_00002.parquet cannot be read" in shown(pages, "/step/2", 404).text
    shown(pages, "/step/1")


def test_the_report_links_to_the_trajectories_of_its_training_prompts(pages: Pages) -> None:
    assert "/sample/0" in shown(pages, "/report").links()
    answer = pages.answer("/sample/0")
    assert answer.status == 303
    assert table(shown(pages, answer.headers["Location"])) == ["/step/1/ticket/0/repeat/0", "/step/1/ticket/0/repeat/1"]


def test_the_report_in_the_folder_says_the_command_and_where_to_look(run: Path) -> None:
    from cluster.views.report import write_report

    page = Parsed(write_report(run).read_text())
    assert "align inspect . --web" in page.text
    assert "/sample/0" in page.text and page.links() == [], "without the server a link would lead nowhere"


def test_all_links_of_all_pages_lead_somewhere(pages: Pages) -> None:
    waiting, seen = ["/"], set()
    while waiting:
        target = waiting.pop().split("#")[0]
        if target in seen or len(seen) > 200:
            continue
        seen.add(target)
        answer = pages.answer(target)
        assert answer.status in (200, 303), target
        path = target.split("?")[0]
        found = Parsed(answer.body.decode()).links() if answer.status == 200 else [answer.headers["Location"]]
        waiting += [path + link if link.startswith("?") else link for link in found if not link.startswith("#")]
    assert {"/report", "/step/3/ticket/4/repeat/1?colour=pull", "/sample/0"} <= seen


# --- colours -----------------------------------------------------------------------------------------------------


def test_levels_of_colour_are_square_steps_up_to_the_largest_size() -> None:
    scale = Scale.over([None, 36.0, -4.0, float("nan")])
    assert [scale.level(v) for v in (36.0, 25.1, 25.0, 1.0, 0.5, 0.0, -1.1, -36.0)] == [
        *("p6", "p6", "p5", "p1", "p1", "zero", "n2", "n6")
    ]
    assert (scale.level(None), scale.level(float("inf"))) == ("none", "none")
    assert scale.legend(signed=True)[0] == ("n6", -36.0) and scale.legend(signed=True)[-1] == ("p6", 36.0)
    assert scale.legend(signed=False)[-1] == ("zero", 0.0)
    for name, end in scale.legend(signed=True):
        assert scale.level(end) == name, "the legend says what the colours do"


def test_where_all_values_are_zero_nothing_is_coloured() -> None:
    assert Scale.over([0.0, None]).level(0.0) == "zero"


# --- what is refused ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "target",
    [
        *(
            "/../config.toml",
            "/config.toml",
            "/%2e%2e/config.toml",
            "/step/1/../../config.toml",
            "//etc/passwd",
            "/static/x",
        ),
        *(
            "/step/-1",
            "/step/one",
            "/step/9999999999",
            "/step/9",
            "/step/1/ticket/9",
            "/step/1/ticket/0/repeat/9",
            "/sample/7",
        ),
    ],
)
def test_what_is_no_page_is_not_found(pages: Pages, target: str) -> None:
    text = shown(pages, target, 404).text
    assert "root:" not in text and "[policy]" not in text


@pytest.mark.parametrize("query", ["min_reward=nan", "first_step=1.5", "order=sideways", "page=x", "max_staleness=x"])
def test_a_value_that_cannot_be_meant_is_named(pages: Pages, query: str) -> None:
    assert query.split("=")[0] in shown(pages, f"/trajectories?{query}", 400).text


@pytest.mark.parametrize("make", [lambda path: path, lambda path: path.mkdir() or path])
def test_a_folder_without_a_run_is_refused(tmp_path: Path, make: Any) -> None:
    with pytest.raises(ConfigError, match="holds no run"):
        Server(make(tmp_path / "nothing"), 0)


@pytest.fixture
def served(run: Path) -> Iterator[Server]:
    with Server(run, 0) as found:
        thread = threading.Thread(target=found.serve_forever)
        thread.start()
        yield found
        found.shutdown()
        thread.join(timeout=10)


def ask(served: Server, method: str, target: str, **headers: str) -> tuple[int, bytes, dict[str, str]]:
    connection = http.client.HTTPConnection("127.0.0.1", served.server_address[1], timeout=20)
    try:
        connection.request(method, target, headers=headers)
        response = connection.getresponse()
        return response.status, response.read(), dict(response.getheaders())
    finally:
        connection.close()


def test_only_this_machine_is_listened_to(served: Server) -> None:
    assert served.server_address[0] == "127.0.0.1"
    status, body, headers = ask(served, "GET", "/")
    assert status == 200 and b"Steps" in body
    assert headers["X-Content-Type-Options"] == "nosniff" and headers["Cache-Control"] == "no-store"
    assert "Python" not in headers["Server"]


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8440", "127.0.0.1.evil.example", "", "[::1"])
def test_a_request_under_another_name_is_refused(served: Server, host: str) -> None:
    status, body, _ = ask(served, "GET", "/", Host=host)
    assert status == 403 and b"align" not in body.lower()


@pytest.mark.parametrize("host", ["localhost", "localhost:9000", "127.0.0.1:80"])
def test_the_own_names_are_served_whatever_port_a_tunnel_gave_them(served: Server, host: str) -> None:
    assert ask(served, "GET", "/", Host=host)[0] == 200


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS"])
def test_nothing_but_reading_is_allowed(served: Server, method: str) -> None:
    assert ask(served, method, "/")[0] == 405


def test_a_head_has_the_headers_of_the_page_and_no_body(served: Server) -> None:
    status, body, headers = ask(served, "HEAD", "/style.css")
    assert (status, body, headers["Content-Type"]) == (200, b"", "text/css; charset=utf-8")
    assert int(headers["Content-Length"]) > 1000


def test_reading_leaves_the_run_folder_as_it_was(run: Path, served: Server) -> None:
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    for target in (*PAGES, "/sample/0"):
        assert ask(served, "GET", target)[0] in (200, 303)
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


def test_a_usual_port_that_is_taken_is_replaced_and_a_named_one_is_not(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        monkeypatch.setattr(server, "DEFAULT_PORT", port)
        with Server(run) as other:
            assert other.server_address[1] not in (0, port)
        with pytest.raises(ConfigError, match=f"port {port} is taken"):
            Server(run, port)


# --- the command -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("selection", "more", "path"),
    [
        (Selection(), (None, None, None), "/"),
        (Selection(3, 3), (None, None, None), "/step/3"),
        (Selection(3, 3), (None, None, "pull"), "/step/3"),
        (Selection(3, 3), (7, None, None), "/step/3/ticket/7"),
        (Selection(3, 3), (7, 1, None), "/step/3/ticket/7/repeat/1"),
        (
            Selection(3, 3, ending="stop"),
            (None, None, "longest"),
            "/trajectories?first_step=3&last_step=3&ending=stop&order=longest",
        ),
        (Selection(prompt="a b"), (None, None, None), "/trajectories?prompt=a+b"),
    ],
)
def test_the_command_prints_the_address_of_what_it_names(
    selection: Selection, more: tuple[Any, Any, Any], path: str
) -> None:
    assert address(selection, *more) == path


def test_the_command_serves_until_it_is_interrupted(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(self: Server) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Server, "serve_forever", interrupted)
    result = CliRunner().invoke(app, ["inspect", str(run), "--web", "--port", "0", "--step", "2"])
    assert result.exit_code == 0
    assert f"{run} is at http://127.0.0.1:" in result.output and "/step/2\n" in result.output
    assert "no longer served" in result.output
