"""`kserve-vllm rollout`: flags in, a rollout and its exit code out."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from kserve_vllm.core.errors import ConfigError
from kserve_vllm.ops import argument_types
from kserve_vllm.ops.cluster import ApiError, Cluster, Json
from kserve_vllm.ops.diagnose.facts import condition, dig
from kserve_vllm.ops.operations import CommandFailed, add_cluster_arguments
from kserve_vllm.ops.rollout.answers import REFUSAL, Allowed, VersionAnswer, ask_all, compare, read_prompts
from kserve_vllm.ops.rollout.judge import Check, Thresholds
from kserve_vllm.ops.rollout.modes import Driver, driver_of, inverse, merged
from kserve_vllm.ops.rollout.prometheus import Prometheus, PrometheusError
from kserve_vllm.ops.rollout.run import NOT_RESTORED, PAUSED, PROMOTED, ROLLED_BACK, STOPPED, Options, Rollout, Stop
from kserve_vllm.ops.rollout.state import OPEN, RolloutState, StateStore, Superseded

_HTTP_PORT = 8080
_EPILOG = """
Examples:
  kserve-vllm rollout chat --model hf://Qwen/Qwen3-0.6B --prometheus http://localhost:9090 --dry-run
  kserve-vllm rollout chat --model hf://Qwen/Qwen3-0.6B --prometheus http://localhost:9090
  kserve-vllm rollout chat --arg=--max-num-seqs=128 --steps 5,50,100 --interval 120
  kserve-vllm rollout chat                     go on with one that was stopped or killed
  kserve-vllm rollout chat --abort             all traffic back to the stable version, now
  kserve-vllm rollout chat --status            where it is, and its history (also --json)

At each step the canary gets its weight, and every --interval it is looked at: share of errors and of refusals (Fisher's
exact test), and the quantile of first token and gap (bootstrap over the histograms' buckets), each against the stable
version over the same time. Failed: worse than allowed, and noise is ruled out; then all traffic goes back. Successful:
enough samples, and all within what is allowed; then the next step. Inconclusive: too few samples, or a difference
that may be noise; it is looked at again, up to --count times, and then --on-inconclusive decides. The chance that
an equal canary is judged Failed is at most 1 - --confidence for the whole rollout, if requests fail independently of
each other.

Prometheus needs the labels of the chart's PodMonitor: namespace, inferenceservice, revision, pod.
The state is kept in the ConfigMap NAME-rollout, which the InferenceService owns.

Rights: get and patch on inferenceservices; get on revisions, deployments and httproutes; get, create and update on
configmaps; for --answers also list on pods and create on pods/proxy.

Exit codes: 0 promoted, 1 rolled back, 2 an argument can't be used, 3 stopped, on the way back for longer than its
deadline, or the cluster was away (run it again to go on), 4 paused, or taken over by another process (look at it
first).
"""
_FLAG_DEFAULTS = Options()
_T = Thresholds()


def main(arguments: Sequence[str]) -> int:
    """Run `kserve-vllm rollout ...`; returns the exit code.

    Raises:
        ConfigError: an argument can't be used.
        CommandFailed: the cluster refuses, or another process has taken over.
    """
    args = rollout_parser().parse_args(list(arguments))
    if not args.status:  # a slip is named where there is no cluster, too
        rollout_options(args, len(parse_steps(args.steps)))
    cluster = Cluster(args.context, args.kubeconfig)
    namespace = args.namespace or cluster.default_namespace
    try:
        return _main(args, cluster, namespace)
    except Superseded as error:
        raise CommandFailed(f"{error}; this one ends", PAUSED) from None
    except ApiError as error:
        raise CommandFailed(
            f"the cluster refuses: {error}. What was done is kept; run the same command again, or "
            f"kserve-vllm diagnose {args.name} -n {namespace}",
            STOPPED,
        ) from None


def rollout_parser() -> argparse.ArgumentParser:
    """The flags of `kserve-vllm rollout`, which the chart's Job is held against too."""
    parser = argparse.ArgumentParser(
        prog="kserve-vllm rollout",
        usage="kserve-vllm rollout NAME [--model MODEL | --arg=--FLAG=VALUE] [options]",
        description="Give a new version of a service its traffic step by step, judged by Prometheus, and take it back "
        "where it is worse.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("name", metavar="NAME", help="of the InferenceService")
    what = parser.add_argument_group("what is new (one or more)")
    what.add_argument("--model", help="a storage address (hf://OWNER/NAME), or what --model is in its arguments")
    what.add_argument("--image", help="of the serving container")
    what.add_argument(
        "--arg",
        action="append",
        default=[],
        metavar="FLAG",
        help="--arg=--max-num-seqs=128: in place of the same flag, or added",
    )
    how = parser.add_argument_group("how")
    how.add_argument(
        "--steps", "--step-weights", default="1,10,50,100", metavar="PERCENTS", help="default: 1,10,50,100"
    )
    how.add_argument(
        "--interval",
        type=float,
        default=_FLAG_DEFAULTS.interval_s,
        metavar="SECONDS",
        help="between two looks (default: %(default)g)",
    )
    how.add_argument(
        "--initial-delay",
        type=float,
        default=_FLAG_DEFAULTS.initial_delay_s,
        metavar="SECONDS",
        help="of a step that is not judged, for cold caches (default: %(default)g)",
    )
    how.add_argument(
        "--count", type=int, default=_FLAG_DEFAULTS.count, help="most looks at a step (default: %(default)s)"
    )
    how.add_argument(
        "--threshold",
        type=int,
        default=_FLAG_DEFAULTS.threshold,
        help="failed looks of a step that roll back (default: %(default)s)",
    )
    how.add_argument(
        "--on-inconclusive",
        choices=("rollback", "pause", "promote"),
        default="rollback",
        help="where a step has no verdict after --count looks (default: %(default)s)",
    )
    how.add_argument(
        "--progress-deadline",
        type=float,
        default=_FLAG_DEFAULTS.progress_deadline_s,
        metavar="SECONDS",
        help="for the canary to get ready (default: %(default)g)",
    )
    how.add_argument(
        "--wait",
        type=float,
        default=0.0,
        metavar="SECONDS",
        help="for the service to be there and ready before it begins (default: %(default)g)",
    )
    how.add_argument(
        "--id",
        default="",
        metavar="TEXT",
        help="for a Job that may be run again: what was begun with an id goes on, is not begun twice, and where it was "
        "paused it stays so",
    )
    how.add_argument("--dry-run", action="store_true", help="say what would be done, and whether the cluster takes it")
    how.add_argument("--abort", action="store_true", help="roll back a rollout that is under way")
    how.add_argument("--status", action="store_true", help="print where it is")
    how.add_argument("--json", action="store_true", help="print JSON: the state, at the end or with --status")
    judged = parser.add_argument_group("judged by")
    judged.add_argument(
        "--prometheus",
        metavar="URL",
        default=os.environ.get("KSERVE_VLLM_PROMETHEUS", ""),
        help="default: $KSERVE_VLLM_PROMETHEUS",
    )
    judged.add_argument("--prometheus-token-file", type=Path, metavar="FILE", help="with a bearer token")
    judged.add_argument(
        "--min-samples", type=int, default=_T.min_samples, help="requests of each (default: %(default)s)"
    )
    judged.add_argument("--confidence", type=float, default=_T.confidence, help="of the whole (default: %(default)s)")
    judged.add_argument(
        "--max-error-rate",
        type=argument_types.number,
        default=_T.error_rate,
        metavar="SHARE",
        help="above stable's (default: %(default)s, a percentage point)",
    )
    judged.add_argument(
        "--max-refusal-rate",
        type=argument_types.number,
        default=_T.refusal_rate,
        metavar="SHARE",
        help="above stable's (default: %(default)s)",
    )
    judged.add_argument(
        "--max-first-token",
        type=argument_types.number,
        default=_T.first_token,
        metavar="TIMES",
        help="stable's quantile (default: %(default)s)",
    )
    judged.add_argument(
        "--max-gap",
        type=argument_types.number,
        default=_T.gap,
        metavar="TIMES",
        help="stable's quantile (default: %(default)s)",
    )
    judged.add_argument("--quantile", type=float, default=_T.quantile, help="default: %(default)s")
    answers = parser.add_argument_group("answers, compared before there is traffic")
    answers.add_argument(
        "--answers",
        type=Path,
        metavar="FILE",
        help="prompts, a line each: text, or JSON with prompt or messages; sent to a pod of each version "
        "at temperature 0",
    )
    answers.add_argument("--max-tokens", type=int, default=128, help="of an answer (default: %(default)s)")
    answers.add_argument(
        "--min-equal",
        type=argument_types.number,
        default=Allowed.min_equal,
        metavar="SHARE",
        help="of equal answers (default: %(default)g: a new model is meant to answer otherwise)",
    )
    answers.add_argument(
        "--max-length-drift",
        type=argument_types.number,
        default=Allowed.length_drift,
        metavar="SHARE",
        help="of the mean length (default: %(default)s)",
    )
    answers.add_argument(
        "--max-refusal-drift",
        type=argument_types.number,
        default=Allowed.refusal_drift,
        metavar="SHARE",
        help="default: %(default)s",
    )
    answers.add_argument("--refusal-pattern", default=REFUSAL, metavar="REGEX", help="how refusals begin")
    answers.add_argument("--answers-key-env", metavar="VARIABLE", help="variable with an API key for the prompts")
    add_cluster_arguments(parser)
    return parser


def _main(args: argparse.Namespace, cluster: Cluster, namespace: str) -> int:
    store = StateStore(cluster, namespace, args.name)
    state = store.load()
    if args.status:
        print(_status(state, args.name, args.json))
        return 0
    steps = parse_steps(args.steps)
    options = rollout_options(args, len(steps))
    prometheus = Prometheus(args.prometheus, _token(args.prometheus_token_file))
    wanted = bool(args.model or args.image or args.arg)

    def say(line: str) -> None:
        print(line, file=sys.stderr if args.json else sys.stdout, flush=True)

    if args.id and state is not None and (code := _seen(args, state, say)) is not None:
        return _told(args, state, code)
    driver = _driver(args, cluster, namespace, say)
    if args.abort:
        if state is None or state.phase not in OPEN:
            raise ConfigError(f"there is no rollout of {args.name} under way")
        rollout = Rollout(driver, store, prometheus, namespace, args.name, options, None, say)
        return _told(args, state, rollout.abort(state))
    if not args.prometheus:
        raise ConfigError("a rollout is judged by Prometheus: give --prometheus URL or KSERVE_VLLM_PROMETHEUS")
    if state is not None and state.phase in OPEN:
        if wanted and _words(args) != state.words:
            raise ConfigError(
                f"a rollout of {args.name} is under way ({state.words}, {state.phase} at {state.weight} %). Go on with "
                f"it: kserve-vllm rollout {args.name}; or roll it back: kserve-vllm rollout {args.name} --abort"
            )
        if args.dry_run:
            raise ConfigError(f"a rollout of {args.name} is under way already; --status shows it")
        say(f"going on: {state.words}, {state.phase}, step {state.step + 1} of {len(state.steps)} ({state.weight} %)")
    elif not wanted:
        raise ConfigError(f"there is no rollout of {args.name} under way; give --model, --image or --arg to begin one")
    else:
        state = _begin(args, driver, steps, state.endings() if state else {})
        if args.dry_run:
            return _told(args, state, _dry_run(args, driver, state, prometheus, namespace, say))
    compare_answers = _answers(args, cluster, namespace) if args.answers else None
    rollout = Rollout(driver, store, prometheus, namespace, args.name, options, compare_answers, say)

    def stop(*_: Any) -> None:
        # Once: what follows (the last line, the state) is not to be interrupted by an impatient second one.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        raise Stop

    before = signal.signal(signal.SIGTERM, stop), signal.signal(signal.SIGINT, stop)
    try:
        code = rollout.run(state)
    except Stop:
        say("stopped before anything was decided. Run the same command again to go on.")
        code = STOPPED
    finally:
        signal.signal(signal.SIGTERM, before[0])
        signal.signal(signal.SIGINT, before[1])
    if not args.json:
        _epilogue(state, args.name, namespace, say)
    return _told(args, state, code)


def _told(args: argparse.Namespace, state: RolloutState, code: int) -> int:
    """The exit code, once a machine was told the state."""
    if args.json:
        print(json.dumps(asdict(state), indent=2))
    return code


def parse_steps(text: str) -> list[int]:
    """Percents out of `1,10,50,100`; raises `ConfigError` where they do not rise from 1 to 100."""
    try:
        steps = [int(part) for part in text.split(",")]
    except ValueError as error:
        raise ConfigError(f"--steps {text}: whole percents with commas between, such as 1,10,50,100") from error
    if sorted(set(steps)) != steps or steps[0] < 1 or steps[-1] > 100:
        raise ConfigError(f"--steps {text}: percents have to rise, from 1 to 100")
    return steps


def rollout_options(args: argparse.Namespace, steps: int) -> Options:
    """What the flags say for a rollout of so many steps; raises `ConfigError` for a number out of its range."""
    for name, low, high in (
        ("interval", 1, 86400),
        ("initial_delay", 0, 86400),
        ("count", 1, 1000),
        ("threshold", 1, 1000),
        ("progress_deadline", 1, 86400),
        ("wait", 0, 86400),
        ("min_samples", 1, 10**9),
    ):
        if not low <= getattr(args, name) <= high:
            raise ConfigError(f"--{name.replace('_', '-')} has to be between {low} and {high}")
    for name in ("confidence", "quantile"):
        if not 0 < getattr(args, name) < 1:
            raise ConfigError(f"--{name} has to be between 0 and 1")
    for name in ("max_first_token", "max_gap"):
        if getattr(args, name) < 1:
            raise ConfigError(f"--{name.replace('_', '-')} is how many times stable's: 1 or more")
    if args.threshold > args.count:
        raise ConfigError(f"--threshold {args.threshold} can't be reached with --count {args.count}")
    thresholds = Thresholds(
        args.max_error_rate,
        args.max_refusal_rate,
        args.max_first_token,
        args.max_gap,
        args.quantile,
        args.min_samples,
        args.confidence,
        steps * args.count,
    )
    return Options(
        args.interval,
        args.initial_delay,
        args.count,
        args.threshold,
        args.progress_deadline,
        args.on_inconclusive,
        thresholds,
    )


def _token(path: Path | None) -> str:
    try:
        return path.read_text("utf-8").strip() if path else ""
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--prometheus-token-file can't be read: {error}") from error


def _words(args: argparse.Namespace) -> str:
    parts = [f"model {args.model}"] if args.model else []
    parts += [f"image {args.image}"] if args.image else []
    return ", ".join([*parts, *args.arg])


def change_of(predictor: Json, model: str | None, image: str | None, arguments: Sequence[str]) -> Json:
    """What the canary has in place of the predictor's fields, as a JSON merge patch.

    Args:
        predictor: `spec.predictor`, with a `model`.
        model: a storage address where the service has one, else the value of `--model` in its arguments.
        image: of the serving container.
        arguments: flags; each takes the place of one of the same name.

    Raises:
        ConfigError: the predictor has no model, or nothing would change.
    """
    inner = predictor.get("model")
    if not isinstance(inner, dict):
        raise ConfigError("spec.predictor.model is not there: only services with a model can be rolled out")
    change: Json = {}
    words = [str(word) for word in inner.get("args") or []]
    if model:
        if "://" in model:
            change["storageUri"] = model
        elif str(inner.get("storageUri") or "").startswith("hf://") and not model.startswith((".", "/")):
            change["storageUri"] = f"hf://{model}"
        elif inner.get("storageUri"):
            raise ConfigError(
                f"the model of this service is a storage address ({inner['storageUri']}): --model has to "
                "be one, with its scheme"
            )
        else:
            arguments = [f"--model={model}", *arguments]
    if image:
        change["image"] = image
    for flag in arguments:
        words = _replaced(words, flag)
    if arguments:
        change["args"] = words
    if merged(inner, change) == inner:
        raise ConfigError("nothing would change: the service is so already")
    return {"model": change}


def _replaced(words: list[str], flag: str) -> list[str]:
    name = flag.partition("=")[0].replace("_", "-")
    if not name.startswith("--"):
        raise ConfigError(f"--arg={flag}: a flag begins with two dashes, as in --arg=--max-num-seqs=128")
    out: list[str] = []
    at, done = 0, False
    while at < len(words):
        if words[at].partition("=")[0].replace("_", "-") == name:
            # A value in a word of its own goes with its flag.
            if "=" not in words[at] and at + 1 < len(words) and not words[at + 1].startswith("-"):
                at += 1
            if not done:
                out.append(flag)
            done = True
        else:
            out.append(words[at])
        at += 1
    return out if done else [*out, flag]


def _seen(args: argparse.Namespace, state: RolloutState, say: Callable[[str], None]) -> int | None:
    """The exit code where the rollout with this id is over or paused; None where there is something to do.

    Raises:
        ConfigError: one that was begun otherwise is under way.
    """
    if (how := state.endings().get(args.id)) is not None:
        say(f"the rollout {args.id} is over: {how}. Another --id begins it again")
        return PROMOTED if how == "Succeeded" else ROLLED_BACK
    if state.phase not in OPEN:
        return None
    if state.id != args.id:
        raise ConfigError(
            f"another rollout of {args.name} is under way ({state.words}, {state.phase} at {state.weight} %); "
            f"kserve-vllm rollout {args.name} --status"
        )
    if state.phase != "Paused":
        return None
    say(
        f"the rollout {args.id} is paused: {state.reason}. Go on with it: kserve-vllm rollout {args.name}; or roll it "
        f"back: kserve-vllm rollout {args.name} --abort"
    )
    return PAUSED


def _driver(args: argparse.Namespace, cluster: Cluster, namespace: str, say: Callable[[str], None]) -> Driver:
    """The service's driver, once the service is ready or `--wait` is over.

    Raises:
        ConfigError: there is no such service.
    """
    deadline = time.monotonic() + args.wait
    said = False
    while True:
        left = deadline - time.monotonic()
        try:
            driver = driver_of(cluster, namespace, args.name)
            if left <= 0 or condition(driver.isvc(), "Ready").get("status") == "True":
                return driver
        except ConfigError:
            if left <= 0:
                raise
        if not said:
            say(f"waiting for {args.name} to be ready")
            said = True
        time.sleep(min(left, _FLAG_DEFAULTS.poll_s))


def _begin(args: argparse.Namespace, driver: Driver, steps: list[int], ended: dict[str, str]) -> RolloutState:
    isvc = driver.isvc()
    if condition(isvc, "Ready").get("status") != "True":
        raise ConfigError(
            f"{args.name} is not ready, so there is nothing to compare with. kserve-vllm diagnose {args.name}"
        )
    predictor = dig(isvc, "spec", "predictor") or {}
    if dig(isvc, "spec", "canary") or (
        driver.mode == "Knative"
        and predictor.get("canaryTrafficPercent") is not None
        and predictor["canaryTrafficPercent"] not in (0, 100)
    ):
        raise ConfigError(f"{args.name} is in the middle of a canary that this command did not begin")
    change = change_of(predictor, args.model, args.image, args.arg)
    before = inverse(predictor, change)
    return RolloutState(
        driver.mode,
        change,
        _words(args),
        driver.stable(),
        before,
        steps,
        id=args.id,
        ended=ended,
        newest=driver.newest(),
    )


def _dry_run(
    args: argparse.Namespace,
    driver: Driver,
    state: RolloutState,
    prometheus: Prometheus,
    namespace: str,
    say: Callable[[str], None],
) -> int:
    driver.start(state, dry_run=True)
    now = time.time()
    say(f"{state.mode} mode: the API server would take it")
    say(f"  stable   {state.stable}")
    say(f"  canary   {json.dumps(state.change)}")
    say(f"  steps    {', '.join(f'{step} %' for step in state.steps)}")
    try:
        sample = prometheus.sample(namespace, args.name, state.stable, now - 600, now)
    except PrometheusError as error:
        raise ConfigError(str(error)) from error
    say(f"  the last ten minutes of {state.stable}: {sample.requests} requests, {sample.errors} errors")
    if not sample.pods:
        raise ConfigError(
            f"Prometheus knows no pod with namespace={namespace!r}, inferenceservice={args.name!r}, "
            f"revision={state.stable!r}: nothing could be judged. Is the chart's PodMonitor there?"
        )
    first = state.steps[0]
    rate = sample.requests / 600
    if rate:
        needed = args.min_samples / (rate * first / 100)
        say(
            f"  at this rate {first} % brings {args.min_samples} requests in {needed / 60:.0f} min; a step has "
            f"{(args.initial_delay + args.count * args.interval) / 60:.0f} min"
        )
    say("nothing was written")
    return 0


def _answers(args: argparse.Namespace, cluster: Cluster, namespace: str) -> Callable[[RolloutState], list[Check]]:
    prompts = read_prompts(args.answers)
    allowed = Allowed(args.min_equal, args.max_length_drift, args.max_refusal_drift)
    key = os.environ.get(args.answers_key_env or "", "")
    headers = {"Authorization": f"Bearer {key}"} if key else {}

    def of_version(version: str) -> list[VersionAnswer]:
        pod = _pod_of(cluster, namespace, args.name, version)

        def ask(path: str, body: dict[str, Any]) -> tuple[int, str]:
            return cluster.through_pod(namespace, pod, _HTTP_PORT, path, body, headers, timeout_s=120)

        return ask_all(ask, args.name, prompts, args.max_tokens, args.refusal_pattern)

    return lambda state: compare(of_version(state.canary), of_version(state.stable), allowed)


def _pod_of(cluster: Cluster, namespace: str, name: str, version: str) -> str:
    """A ready pod of a version, by the labels that make it one in metrics.

    Raises:
        ConfigError: there is none.
    """
    for pod in cluster.list("Pod", namespace, labelSelector=f"serving.kserve.io/inferenceservice={name}"):
        labels = pod["metadata"].get("labels") or {}
        of = labels.get("serving.knative.dev/revision") or str(labels.get("app", "")).removeprefix("isvc.")
        if of == version and condition(pod, "Ready").get("status") == "True":
            return str(pod["metadata"]["name"])
    raise ConfigError(f"{version} has no ready pod to put the prompts to")


def _status(state: RolloutState | None, name: str, as_json: bool) -> str:
    if as_json:
        return json.dumps(asdict(state) if state else {}, indent=2)
    if state is None:
        return f"there was no rollout of {name}"
    lines = [f"{state.words}: {state.phase}, step {state.step + 1} of {len(state.steps)} ({state.weight} %)"]
    if state.reason:
        lines.append(f"because: {state.reason}")
    for entry in state.history:
        lines.append(
            f"  {entry['at']}  {entry['weight']:>3} %  {entry['event']}"
            + (f": {entry['phase']}" if "phase" in entry else "")
        )
    return "\n".join(lines)


def _epilogue(state: RolloutState, name: str, namespace: str, say: Callable[[str], None]) -> None:
    if state.phase == "Failed" and any(entry["event"] == NOT_RESTORED for entry in state.history):
        fields = json.dumps({"spec": {"predictor": state.before}})
        say(f"The spec of {namespace}/{name} may still name the new version, at 0 %. Before it was, as a merge patch:")
        say(f"  {fields}")
        say("Make the next change from that. Without canaryTrafficPercent the newest revision gets all traffic.")
    if state.phase == "Succeeded":
        say("If helm or GitOps manages this service, put the new version into its values too.")
