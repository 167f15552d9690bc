"""One rule for secrets, in stored files and in reports."""

from attnres.files.redaction import redact, redact_values


def test_redact_values_masks_whatever_kind_of_value_a_secret_key_has():
    plain = {"authorization": "Bearer x", "api_key": ["x"], "hub.token": {"x": 1}, "password": 7, "secret": None}
    assert redact_values(plain) == dict.fromkeys(plain, "***") | {"secret": None}
    assert redact_values({"max_tokens": 5, "tokenizer": ["x"]}) == {"max_tokens": 5, "tokenizer": ["x"]}
    assert redact("x.py authorization=Bearer") == "x.py authorization=***"
