"""Secrets in commands and configurations, masked before they are stored, logged or shown: one rule for all of them."""

import re
from collections.abc import Mapping
from typing import Any

MASK = "***"
# `tokenizer` and `max_tokens` are not secrets; `token` and `hf_token` are.
_SECRET = re.compile(r"(^|[._-])token$|secret|passw|credential|authorization|api[_-]?key|access[_-]?key", re.IGNORECASE)
# Values that give themselves away, whatever they are called: tokens of hubs, and the user part of a URL.
_SECRET_VALUE = re.compile(r"\b(?:hf|api_org|ghp|gho|glpat|sk)[_-][A-Za-z0-9_-]{16,}|(?<=://)[^/\s@]+@")


def redact(command: str) -> str:
    """Masks the values of `key=value` and `--key value` arguments whose key looks like a secret, and known tokens."""
    words = command.split(" ")
    for i, word in enumerate(words):
        key, separator, _ = word.partition("=")
        if separator and _SECRET.search(key):
            words[i] = f"{key}={MASK}"
        elif i and words[i - 1].startswith("--") and "=" not in words[i - 1] and _SECRET.search(words[i - 1]):
            words[i] = MASK
    return _SECRET_VALUE.sub(MASK, " ".join(words))


def redact_values(value: Any) -> Any:
    """Masks what looks like a secret in plain containers: any value whose key does, and in texts as `redact` does."""
    if isinstance(value, Mapping):
        return {
            key: MASK if item is not None and _SECRET.search(str(key)) else redact_values(item)
            for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [redact_values(item) for item in value]
    return redact(value) if isinstance(value, str) else value
