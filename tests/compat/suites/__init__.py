"""The suites, in the order in which they run; and those that are not run, each with its reason."""

from __future__ import annotations

from tests.compat.base import Suite
from tests.compat.suites import (
    boofuzz_v2,
    clients,
    comply,
    drain,
    lm_eval,
    load,
    object_store,
    open_inference,
    prism,
    proxies,
    sdk_tests,
)

SUITES: list[Suite] = [
    *comply.SUITES,
    *sdk_tests.SUITES,
    *open_inference.SUITES,
    *clients.SUITES,
    *proxies.SUITES,
    *prism.SUITES,
    *load.SUITES,
    *object_store.SUITES,
    *boofuzz_v2.SUITES,
    *lm_eval.SUITES,
    *drain.SUITES,
]

NOT_RUN = {
    "k6": "its Go module is under the AGPL, of which nothing is built here. What it would ask, V2 over REST and gRPC "
    "and chats under load with checks of every answer, `vegeta` and `ghz` ask.",
    "Images, reasoning": "no model here sees anything or reasons. What suites ask of that is refused with a sentence, "
    "stands above as what the model lacks, and is not exercised.",
}
