"""The page that tells a newcomer how Pagewire works tells what really happens."""

from __future__ import annotations

from pathlib import Path

from tests.e2e.life_of_a_request import PAGE, renew, tell


def test_the_page_shows_the_messages_of_a_run(model_path: Path) -> None:
    page = PAGE.read_text()
    assert renew(page, tell(model_path)) == page, "renew it: python -m tests.e2e.life_of_a_request --write --model …"
