"""Every argument list of the chart and the catalogue is one that the runtime's own parser takes.

Those of other engines, whose parsers are not here, have only flags that the parsers name (engine_flags.json).
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from kserve_vllm.cli import command as cli
from kserve_vllm.config.profiles import PROFILES
from kserve_vllm.core import errors
from tests.charts import kserve_merge
from tests.charts.support import (
    CATALOGUE,
    CHART,
    CI_FILES,
    Document,
    load,
    load_all,
    of_kind,
    render_ci,
    runtime_of,
    runtimes_of,
)


def services() -> Iterator[tuple[str, Document, Document]]:
    """(where, InferenceService, its runtime) of every scenario and every manifest."""
    for path in CI_FILES:
        documents = render_ci(path)
        runtimes = runtimes_of(documents)
        for name, isvc in of_kind(documents, "InferenceService").items():
            yield f"{path.stem}/{name}", isvc, runtimes[isvc["spec"]["predictor"]["model"]["runtime"]]
    for path in sorted(CATALOGUE.rglob("*.yaml")):
        for isvc in of_kind(load_all(path.read_text()), "InferenceService").values():
            yield str(path.relative_to(CATALOGUE)), isvc, runtime_of(path, isvc)


def other_engine(isvc: Document) -> str:
    """The engine that an InferenceService runs, where it is not kserve-vllm."""
    name = str(isvc["spec"]["predictor"]["model"]["runtime"]).removeprefix("kserve-").rpartition("-")[0]
    return name if name in KNOWN else ""


def argument_lists() -> dict[tuple[str, ...], str]:
    """Each list of arguments that a container is started with, and one place that it comes from."""
    found: dict[tuple[str, ...], str] = {}

    def add(container: Document, where: str) -> None:
        words = kserve_merge.expanded(container)
        # On a cluster the model is at /mnt/models, which need not exist where the test runs.
        if not any(word.startswith(("--model=", "--demo")) for word in words):
            words.append("--model=/mnt/models")
        found.setdefault(tuple(words), where)

    for where, isvc, runtime in services():
        if other_engine(isvc):
            continue
        add(kserve_merge.pod(isvc, runtime)["spec"]["containers"][0], where)
        if "workerSpec" in isvc["spec"]["predictor"]:
            worker = kserve_merge.worker_pod(isvc, runtime)["containers"][0]
            # The start script adds the rank that it finds.
            add({**worker, "args": [*worker["args"], "--node-rank=1"]}, f"{where} (worker)")
        for canary in isvc["spec"].get("canary", []):
            laid_over = {**isvc["spec"]["predictor"]["model"], **canary["predictor"]["model"]}
            variant = {**isvc, "spec": {"predictor": {**isvc["spec"]["predictor"], "model": laid_over}}}
            add(kserve_merge.pod(variant, runtime)["spec"]["containers"][0], f"{where} (canary)")
    return found


KNOWN: dict[str, list[str]] = json.loads((Path(__file__).parent / "engine_flags.json").read_text())
LISTS = argument_lists()
OTHERS = {where: (isvc, runtime) for where, isvc, runtime in services() if other_engine(isvc)}
# What the chart's start scripts take and turn into something else.
SCRIPTS = {"lmdeploy": {"--model-path"}, "ollama": {"--name", "--model"}}


@pytest.fixture(scope="module", autouse=True)
def _engine() -> None:
    """Import the engine once; what its dependencies warn of while they load is not ours."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cli.check_serve_args(["--model=/mnt/models"])


@pytest.mark.parametrize("words", LISTS, ids=LISTS.values())
def test_the_runtime_takes_the_arguments(words: tuple[str, ...], tmp_path: Path) -> None:
    # The parser looks for the file, which a ConfigMap puts there on a cluster.
    template = tmp_path / "template.jinja"
    template.write_text("{{ messages }}")
    mounted = "--chat-template=/etc/kserve-vllm/chat-template/"
    cli.check_serve_args([f"--chat-template={template}" if w.startswith(mounted) else w for w in words])


@pytest.mark.parametrize("where", OTHERS)
def test_another_engine_gets_only_flags_of_its_parser(where: str) -> None:
    isvc, runtime = OTHERS[where]
    engine = other_engine(isvc)
    words = kserve_merge.expanded(kserve_merge.pod(isvc, runtime)["spec"]["containers"][0])
    given = {word.split("=", 1)[0] for word in words if word.startswith("-")}
    assert given
    assert given <= set(KNOWN[engine]) | SCRIPTS.get(engine, set())


def test_every_other_engine_is_in_a_scenario() -> None:
    assert {other_engine(isvc) for isvc, _ in OTHERS.values()} == set(KNOWN)


def test_the_runtime_refuses_a_flag_that_it_does_not_know() -> None:
    words = next(iter(LISTS))
    with pytest.raises(errors.ConfigError):
        cli.check_serve_args([*words, "--max-sequences=3"])


def test_the_chart_and_the_runtime_agree_on_the_profiles() -> None:
    table = load(CHART / "files" / "profiles.yaml")["maxNumSeqs"]
    assert table == {name: profile.flags["max-num-seqs"] for name, profile in PROFILES.items()}
    schema = load(CHART / "values.schema.json")
    enum = schema["definitions"]["inferenceServiceDefaults"]["properties"]["profile"]["enum"]
    assert set(enum) - {None} == set(table), "null is the default everywhere"
