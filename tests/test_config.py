"""Comma lists: what a flag may hold, and what is said of what it may not."""

import pytest

from stepdistill.config import CommaList
from stepdistill.errors import InputError


def test_numbers_of_a_comma_list() -> None:
    assert CommaList.parse("8, 4,2,").ints() == (8, 4, 2)
    assert CommaList.parse("1,2.5,-1e-3").floats() == (1.0, 2.5, -0.001)
    assert CommaList.parse([1, 2.5]).floats() == (1.0, 2.5)


@pytest.mark.parametrize("text", ["1,two", "nan", "1,inf"])
def test_no_numbers(text: str) -> None:
    with pytest.raises(InputError, match="numbers separated by commas, got"):
        CommaList.parse(text).floats()
    with pytest.raises(InputError, match="integers separated by commas, got"):
        CommaList.parse(text).ints()
