"""What several test files are given: small models as objects and as folders, the tiny task, a least run file."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import hypothesis
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from align.demo.tiny import build, is_built
from align.model.policy import Policy
from tests.fakes.learners import PolicyFactory
from tests.fakes.models import character_tokenizer, random_qwen3
from tests.fakes.run_files import write
from tests.places import REPOSITORY

hypothesis.settings.register_profile("align", deadline=None, derandomize=True, max_examples=60)
hypothesis.settings.load_profile("align")
torch.set_num_threads(1)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """At the end, what was skipped and why, one line a reason."""
    skipped = terminalreporter.stats.get("skipped", [])
    reasons = Counter(str(report.longrepr[2]).removeprefix("Skipped: ") for report in skipped)
    if reasons:
        terminalreporter.section("skipped, and why")
    for reason, number in reasons.most_common():
        terminalreporter.write_line(f"{number:5}  {reason}")


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """The character tokenizer; treat it as read-only."""
    return character_tokenizer()


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A Hugging Face folder with a random Qwen3 and its tokenizer."""
    folder = tmp_path_factory.mktemp("models") / "qwen3"
    random_qwen3(seed=0).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def policy(tokenizer: PreTrainedTokenizerFast) -> Policy:
    """A fresh random Qwen3 policy; equal in every test."""
    return Policy(random_qwen3(seed=0), tokenizer)


@pytest.fixture
def new_policy(policy: Policy) -> PolicyFactory:
    """Makes equal policies that share nothing."""
    state = {name: value.clone() for name, value in policy.model.state_dict().items()}

    def new() -> Policy:
        model = type(policy.model)(policy.model.config).eval()
        model.load_state_dict(state)
        return Policy(model, policy.tokenizer)

    return new


@pytest.fixture(scope="session")
def tiny_task() -> Path:
    """models/tiny, complete: the tiny task of the demo, built once where `make demo` builds it."""
    folder = REPOSITORY / "models" / "tiny"
    if not is_built(folder):
        build(folder)
    return folder


@pytest.fixture
def run_file(tmp_path: Path) -> Path:
    """The least run file."""
    return write(tmp_path / "run.toml")
