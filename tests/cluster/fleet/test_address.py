"""Which Ray a run uses, and what keeps its own one closed."""

from __future__ import annotations

import pytest

from cluster.fleet.address import closed_ray, cluster_address


@pytest.mark.parametrize(
    ("value", "expected"),
    [(None, None), ("", None), ("local", None), ("auto", "auto"), ("10.0.0.7:6379", "10.0.0.7:6379")],
)
def test_a_cluster_is_joined_only_where_ray_address_names_one(
    value: str | None, expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if value is None:
        monkeypatch.delenv("RAY_ADDRESS", raising=False)
    else:
        monkeypatch.setenv("RAY_ADDRESS", value)
    assert cluster_address() == expected


def test_a_ray_of_its_own_has_a_token_that_no_other_run_has() -> None:
    first, second = closed_ray(), closed_ray()
    assert first["RAY_AUTH_MODE"] == "token"
    assert len(first["RAY_AUTH_TOKEN"]) == 64
    assert first["RAY_AUTH_TOKEN"] != second["RAY_AUTH_TOKEN"]
