"""What is taken out of a text, and what stays."""

from __future__ import annotations

from cluster.redaction import redact


def test_the_values_of_variables_that_are_named_like_secrets_are_replaced_by_their_names() -> None:
    environment = {"WANDB_API_KEY": "0123456789", "HF_TOKEN": "hf_abcdefgh", "db_password": "correct horse"}
    text = "keys 0123456789 and hf_abcdefgh; correct horse"
    assert redact(text, environment) == "keys [WANDB_API_KEY] and [HF_TOKEN]; [db_password]"


def test_other_variables_and_short_values_stay() -> None:
    text = "in /shared/runs/demo at step 12"
    assert redact(text, {"RUN_DIR": "/shared/runs/demo", "TOKENIZERS_PARALLELISM": "12", "MONKEY": "1"}) == text


def test_passwords_in_addresses_are_taken_out_and_the_rest_of_the_address_stays() -> None:
    assert redact("redis://:hunter2@head:6379/0", {}) == "redis://[…]@head:6379/0"
    assert redact("https://hub/x@y and me@home", {}) == "https://hub/x@y and me@home"


def test_a_secret_that_begins_with_another_leaves_no_tail() -> None:
    assert redact("x abcdefgh12345678", {"A_TOKEN": "abcdefgh", "B_SECRET": "abcdefgh12345678"}) == "x [B_SECRET]"
