"""The page about quantized checkpoints tells what is true of the fixtures."""

from __future__ import annotations

from tests.quantized.table import PAGE, fixtures, real, renewed, shape, speed


def test_the_page_is_of_these_fixtures() -> None:
    page = PAGE.read_text()
    new = renewed(page, {"fixtures": fixtures(), "real": real(), "speed": speed()})
    assert shape(new) == shape(page), "renew it: make quant-table"
