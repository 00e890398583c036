"""Each family of docs/reference/families.md does what its row says."""

import pytest

from tests.checks.families import describe, read_table

QUICK = (
    "llama",
    "exaone",
    "hrm_text",
    "gpt2",
    "gemma2",
    "gpt_oss",
    "qwen3",
    "qwen3_next",
    "olmo2",
    "deepseek_v3",
    "gptj",
    "doge",
    "dory",
    "hunyuan_v1_dense",
)
TABLE = read_table()


@pytest.mark.parametrize("family", QUICK)
def test_family(family):
    assert describe(family) == TABLE[family] or same_refusal(family)


@pytest.mark.slow  # four minutes together
@pytest.mark.parametrize("family", sorted(set(TABLE) - set(QUICK)))
def test_other_family(family):
    assert describe(family) == TABLE[family] or same_refusal(family)


def test_no_refusal_is_an_error_of_the_familys_code():
    """What `not_on_images` names is for people whose family is not among these."""
    assert not [family for family, (route, why) in TABLE.items() if route == "refused" and "does not run on" in why]


def same_refusal(family):
    """A refusal or a difference may name another number on another machine."""
    route, _ = describe(family)
    return route == TABLE[family][0] and route in ("refused", "differs", "not tried")
