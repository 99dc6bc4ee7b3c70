"""The suites, in the order in which they run; and those that are not run, each with its reason."""

from __future__ import annotations

from tests.compat.base import Suite
from tests.compat.suites import (
    boofuzz_v2,
    clients,
    comply,
    drain,
    lm_eval,
    open_inference,
    proxies,
    sdk_tests,
)

SUITES: list[Suite] = [
    *comply.SUITES,
    *sdk_tests.SUITES,
    *open_inference.SUITES,
    *clients.SUITES,
    *proxies.SUITES,
    *boofuzz_v2.SUITES,
    *lm_eval.SUITES,
    *drain.SUITES,
]

NOT_RUN = {
    "k6": "PyPI and npm have no program of it; its Go module is under the AGPL, of which nothing is built here. "
    "V2 over REST and gRPC is put under load by `make bench`.",
    "Prism": "a mock, and a proxy in front of a server, rather than a suite. What its mock is made for, the tests of "
    "OpenAI's SDK, runs here against the server itself; llm-comply judges answers by OpenAI's description.",
    "Images, reasoning": "no model here sees anything or reasons. What suites ask of that is refused with a sentence, "
    "stands above as what the model lacks, and is not exercised.",
}
