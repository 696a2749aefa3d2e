"""How the processes of a learner meet."""

from __future__ import annotations

import pytest

from align.learner.meeting import interface_of


def test_an_address_that_no_interface_has_is_refused() -> None:
    assert interface_of("127.0.0.1") == "lo"
    with pytest.raises(ValueError, match=r"no network interface of this node has the address 203\.0\.113\.9"):
        interface_of("203.0.113.9")
