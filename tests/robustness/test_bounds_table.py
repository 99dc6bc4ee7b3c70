"""The table of bounds in the threat model says what the code does."""

from __future__ import annotations

import pytest

from kserve_vllm.config.settings import ServerSettings
from kserve_vllm.engine import items
from kserve_vllm.engine.hooks import costs
from kserve_vllm.grpc_server import calls as grpc_calls
from kserve_vllm.grpc_server import http2
from kserve_vllm.protocols import moderation as moderated
from kserve_vllm.protocols.oip import grpc_servicer as servicer
from kserve_vllm.protocols.oip import protobuf, tensors
from tests.support import ROOT

TABLE = dict(
    (cell.strip() for cell in line.split("|")[1:3])
    for line in (ROOT / "docs/operations/threat-model.md").read_text().split("## Bounds")[1].splitlines()
    if line.startswith("| ") and not line.startswith("|---")
)


PAGE = (ROOT / "docs/reference/bounds.md").read_text()


@pytest.mark.parametrize(
    ("what", "numbers"),
    [
        ("prompts of a completion, or conversations of a batch of chats, times `n`", [items.MAX_PROMPTS]),
        ("`stop`; `bad_words`; `stop_token_ids`; `logit_bias`: entries", list(costs.MAX_LISTED.values())),
        ("one entry of `stop` or `bad_words`, characters", [costs.MAX_WORD]),
        (
            "a regular expression or grammar; a schema or structural tag, characters",
            [most >> 10 for most in costs.MAX_GRAMMAR.values()],
        ),
        (
            "values to choose from (`choice`, `enum`), together; characters of `choice`",
            [costs.MAX_CHOICES, costs.MAX_CHOICE_TEXT >> 10],
        ),
        ("properties and alternatives of a schema, with all that is in it", [costs.MAX_PROPERTIES]),
        (
            "squares of the properties of each object that may be left out, times `minProperties` or `maxProperties`",
            [costs.MAX_ORDERS],
        ),
        ("`minItems`, `maxItems` and their like in a schema, together", [costs.MAX_ITEMS]),
        ("structures of a structural tag", [costs.MAX_TAGS]),
    ],
)
def test_a_bound_of_a_request_is_what_its_page_says(what: str, numbers: list[int]) -> None:
    cell = PAGE.split(f"| {what} |")[1].split("|")[0]
    for number in numbers:
        assert f"{number:,}" in cell


@pytest.mark.parametrize(
    ("what", "numbers"),
    [
        ("gRPC: open connections of its own port", [http2.MAX_CONNECTIONS]),
        ("gRPC: calls at once on one connection", [http2.MAX_STREAMS]),
        (
            "gRPC: the event loop's time for connections that have shown no key, together",
            [http2.STRANGERS_SHARE * 100],
        ),
        ("gRPC: calls that need no key, on one connection", [http2.MAX_KEYLESS_STREAMS]),
        ("gRPC: calls that need no key, on all connections", [grpc_calls.MAX_KEYLESS_CALLS]),
        ("gRPC: metadata of a call", [http2.MAX_HEADERS >> 10]),
        ("gRPC: a block of headers, from its first frame to its last", [http2.HEADER_TIMEOUT_S]),
        ("gRPC: the first frames of a connection", [http2.PREFACE_TIMEOUT_S]),
        ("gRPC: a message", [ServerSettings().max_body_mib, grpc_calls.KEYLESS_MESSAGE >> 10]),
        ("gRPC: time for a message", [ServerSettings().body_timeout]),
        ("gRPC: the same, of calls that need no key", [grpc_calls.KEYLESS_HELD >> 20]),
        ("gRPC: what every caller may hold of it, however many there are", [grpc_calls.ReceiveBudget(1).least >> 10]),
        ("gRPC: streams that are taken back or refused", [http2.RESETS, http2.RESETS_PER_S]),
        ("gRPC: changes of settings", [http2.SETTINGS_CHANGES, http2.SETTINGS_CHANGES_PER_S]),
        ("gRPC: requests of one `ModelStreamInfer` call at once", [servicer.MAX_OPEN]),
        ("gRPC: fields and texts in one message", [protobuf.MAX_FIELDS]),
        ("V2: tensors of a request, and outputs asked for", [tensors.MAX_TENSORS]),
        ("V2: parameters of a request or tensor", [tensors.MAX_PARAMETERS]),
        ("V2: numbers in one tensor", [tensors.MAX_ELEMENTS]),
        ("V2: texts in one tensor", [ServerSettings().max_batch, tensors.MAX_TEXTS]),
        ("V2, V1, generate: JSON of one request", [tensors.MAX_JSON >> 20, tensors.MAX_JSON_VALUES]),
        ("moderated bodies: values", [moderated.MAX_VALUES]),
        (
            "gRPC: frames that move nothing (pings, priorities, unknown ones, empty data)",
            [http2.IDLE_FRAMES, http2.IDLE_FRAMES_PER_S],
        ),
    ],
)
def test_a_bound_is_what_the_table_says(what: str, numbers: list[float]) -> None:
    for number in numbers:
        assert f"{number:,.0f}" in TABLE[what]
