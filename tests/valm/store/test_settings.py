"""`check_same`."""

import pytest

from valm.errors import ValmError
from valm.store.settings import check_same

THERE = {"seed": 3, "sizes": [1, 2], "text": "a"}


@pytest.mark.parametrize(
    ("here", "says"),
    [
        ({"seed": 4, "sizes": (1, 2), "text": "b"}, "its seed is 3, here it is 4; choose"),
        ({"seed": 3, "sizes": [1, 2]}, "its text is 'a', here it is not given; choose"),
        ({**THERE, "k": 4}, "its k is not given, here it is 4; choose"),
    ],
)
def test_the_first_setting_that_differs_is_named(here, says):
    with pytest.raises(ValmError, match=f"out holds a study: {says} another folder"):
        check_same("out holds a study", THERE, here, "choose another folder")


def test_settings_are_compared_as_json_and_none_is_as_if_not_given():
    check_same("", THERE, {**THERE, "sizes": (1, 2), "k": None}, "")
