"""`kserve-vllm diagnose`: flags in, a table or JSON out."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

import yaml

from kserve_vllm.core.errors import ConfigError
from kserve_vllm.ops.cluster import Cluster, Json
from kserve_vllm.ops.diagnose import snapshot as snapshots
from kserve_vllm.ops.diagnose.causes import CAUSES, Finding, judge
from kserve_vllm.ops.diagnose.causes.table import RISK
from kserve_vllm.ops.diagnose.collect import collect, collect_url
from kserve_vllm.ops.diagnose.facts import Facts
from kserve_vllm.ops.diagnose.snapshot import Snapshot
from kserve_vllm.ops.operations import add_cluster_arguments, split_url

_EPILOG = """
Examples:
  kserve-vllm diagnose chat -n team-a              what is wrong with the InferenceService chat
  kserve-vllm diagnose chat --file chat.yaml       nothing there yet: what would the API server say (kept: nothing)
  kserve-vllm diagnose --url http://localhost:8080 a server on this machine, or behind a port-forward
  kserve-vllm diagnose chat --json | jq -r '.findings[0].mend[]'
  kserve-vllm diagnose chat --save chat.json       keep what was read, secrets hidden; judge it elsewhere:
  kserve-vllm diagnose --from chat.json
  kserve-vllm diagnose --causes                    the table of all causes

It reads and writes nothing: the commands it prints are for you to run. Rights: get and list on what it reads (the
ClusterRole `view`, and KServe's and Knative's own), get on pods/log, and get on pods/proxy for health and metrics; what
may not be read is left out and named.

Exit codes: 0 nothing is wrong (there may be risks), 1 something is wrong, 2 an argument can't be used, 3 nothing could
be read.
"""
_UNREADABLE = {"cluster-unreachable", "signed-out", "rights-missing"}


def main(arguments: Sequence[str]) -> int:
    """Run `kserve-vllm diagnose ...`; returns the exit code.

    Raises:
        ConfigError: an argument can't be used.
    """
    parser = argparse.ArgumentParser(
        prog="kserve-vllm diagnose",
        usage="kserve-vllm diagnose (NAME | --url URL | --from FILE | --causes) [options]",
        description="Say what is wrong with a service, why, and the command that mends it, most likely first.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("name", nargs="?", metavar="NAME", help="of the InferenceService")
    parser.add_argument("--url", help="of one server, without a cluster")
    parser.add_argument("--from", dest="source", type=Path, metavar="FILE", help="a snapshot that --save kept")
    parser.add_argument("--causes", action="store_true", help="print the table of causes")
    parser.add_argument(
        "--file", type=Path, metavar="FILE", help="a manifest of the InferenceService to try with dryRun=All"
    )
    parser.add_argument("--save", type=Path, metavar="FILE", help="keep what was read as JSON")
    parser.add_argument(
        "--api-key-env", metavar="VARIABLE", help="variable with a key for --url, where metrics want one"
    )
    parser.add_argument("--kserve-namespace", default="kserve", help="of KServe's controller (default: kserve)")
    parser.add_argument(
        "--knative-namespace", default="knative-serving", help="of Knative's settings (default: knative-serving)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("-q", "--quiet", action="store_true", help="no progress on standard error")
    add_cluster_arguments(parser)
    args = parser.parse_args(list(arguments))
    if args.causes:
        print(_causes_as_json() if args.json else _causes_as_text())
        return 0
    if sum(bool(given) for given in (args.name, args.url, args.source)) != 1:
        raise ConfigError(
            "diagnose takes one of: the NAME of an InferenceService, --url URL, --from FILE. "
            "See kserve-vllm diagnose --help"
        )
    taken = _take(args)
    if args.save:
        taken.save(args.save)
    broken: list[str] = []
    findings = judge(taken, broken)
    for line in broken:
        print(f"kserve-vllm: a cause could not be judged: {line}", file=sys.stderr)
    print(as_json(taken, findings) if args.json else as_text(taken, findings))
    if any(finding.cause.id in _UNREADABLE for finding in findings):
        return 3
    return int(any(finding.cause.severity != RISK for finding in findings))


def _take(args: argparse.Namespace) -> Snapshot:
    if args.source:
        return snapshots.read(args.source)
    if args.url:
        if args.url.startswith(("http://", "https://")):  # of another one the findings speak
            split_url(args.url)
        return collect_url(args.url, os.environ.get(args.api_key_env or "", ""))
    cluster = Cluster(args.context, args.kubeconfig)
    manifest = _manifest(args.file, args.name) if args.file else None
    told = sys.stderr.isatty() and not args.quiet

    def progress(step: str) -> None:
        if told:
            print(f"\r\033[Kreading {step} ...", end="", file=sys.stderr, flush=True)

    try:
        return collect(
            cluster,
            args.namespace or cluster.default_namespace,
            args.name,
            args.kserve_namespace,
            args.knative_namespace,
            manifest,
            progress,
        )
    finally:
        if told:
            print("\r\033[K", end="", file=sys.stderr, flush=True)


def _manifest(path: Path, name: str) -> Json:
    """The InferenceService of a file.

    Raises:
        ConfigError: there is none of this name.
    """
    try:
        documents = [d for d in yaml.safe_load_all(path.read_text("utf-8")) if isinstance(d, dict)]
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} can't be read: {error}") from error
    for document in documents:
        if document.get("kind") == "InferenceService" and (document.get("metadata") or {}).get("name") == name:
            return document
    raise ConfigError(f"{path} has no InferenceService named {name}")


def as_json(taken: Snapshot, findings: Sequence[Finding]) -> str:
    """The diagnosis for programs."""
    facts = Facts(taken)
    body: dict[str, object] = {
        "name": taken.name,
        "namespace": taken.namespace,
        "takenAt": taken.taken_at,
        "mode": facts.mode,
        "ready": facts.ready,
        "unreadable": taken.refused,
        "findings": [
            {
                "cause": f.cause.id,
                "title": f.cause.title,
                "severity": f.cause.severity,
                "rank": f.cause.rank,
                "why": f.why,
                "mend": list(f.mend),
                "evidence": f.evidence,
            }
            for f in findings
        ],
    }
    return json.dumps(body, indent=2)


def as_text(taken: Snapshot, findings: Sequence[Finding]) -> str:
    """The diagnosis for people."""
    width = min(110, shutil.get_terminal_size((100, 24)).columns)
    facts = Facts(taken)
    lines = [_headline(facts)]
    for number, finding in enumerate(findings, 1):
        lines += ["", f"{number}. {finding.cause.title}   [{finding.cause.severity}: {finding.cause.id}]"]
        lines += textwrap.wrap(finding.why, width, initial_indent="   ", subsequent_indent="   ")
        if finding.evidence:
            seen = " ".join(finding.evidence.split())
            lines += textwrap.wrap(f"seen: {seen}", width, initial_indent="   ", subsequent_indent="         ")
        # Never wrapped: they are there to be copied.
        lines += [f"   {'' if line.startswith('#') else '$ '}{line}" for line in finding.mend]
    closed = sorted(what for what, error in taken.refused.items() if error.get("status") == 403)
    if closed:
        lines += ["", f"Not read, for want of rights: {', '.join(closed)}."]
    return "\n".join(lines)


def _headline(facts: Facts) -> str:
    if facts.about_a_server:
        states = [
            f"{body['state']} for {body.get('seconds', 0)} s" for body in facts.health.values() if "state" in body
        ]
        return f"{facts.name}: {', '.join(states) or 'no health'}"
    if not facts.isvc:
        return f"InferenceService {facts.namespace}/{facts.name}: not seen"
    ready = len(facts.pods) - len(facts.unready)
    return (
        f"InferenceService {facts.namespace}/{facts.name}: {'ready' if facts.ready else 'not ready'}, "
        f"{facts.mode} mode, {ready} of {len(facts.pods)} pods ready"
    )


def _causes_as_text() -> str:
    widest = max(len(cause.id) for cause in CAUSES)
    return "\n".join(
        f"{cause.id:<{widest}}  {cause.severity:<8}  {cause.title}" for cause in sorted(CAUSES, key=lambda c: -c.rank)
    )


def _causes_as_json() -> str:
    return json.dumps(
        [{"cause": c.id, "severity": c.severity, "rank": c.rank, "title": c.title} for c in CAUSES], indent=2
    )
