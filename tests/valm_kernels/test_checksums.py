from valm_kernels.checksums import json_sha256


def test_the_checksum_of_an_object_is_of_its_other_entries_in_any_order():
    content = {"a": 1, "b": {"c": [1.5, None], "d": "\u00e9"}}
    found = json_sha256(content)
    assert json_sha256({"sha256": found, "b": {"d": "\u00e9", "c": [1.5, None]}, "a": 1}) == found
    for other in ({"a": 1}, content | {"a": 1.0}, content | {"a": True}, content | {"b": {"c": [1.5], "d": "\u00e9"}}):
        assert json_sha256(other) != found
