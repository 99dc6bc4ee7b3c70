"""Builds every object by hand, in one place, and runs the process from the first open port to the exit code."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import signal
import sys
import time
from importlib.metadata import version
from typing import NoReturn

from kserve_vllm.app.compose import Composition
from kserve_vllm.config.settings import Settings
from kserve_vllm.core import termination
from kserve_vllm.core.errors import ConfigError, EngineGone
from kserve_vllm.core.lifecycle import Lifecycle, State
from kserve_vllm.core.request_context import RequestContext
from kserve_vllm.core.start_phases import StartPhases
from kserve_vllm.core.supervisor_channel import SupervisorChannel
from kserve_vllm.engine import fork_server
from kserve_vllm.engine.arguments import parse_engine_args, prepare_environment
from kserve_vllm.engine.compat import BEFORE_THE_ENGINE, TABLE, Shortcuts
from kserve_vllm.engine.start_watchdog import Movement, stall
from kserve_vllm.engine.vllm import VLLMEngine
from kserve_vllm.engine.warmup import Warmup
from kserve_vllm.policy.enforcement import Enforcement, SequencePolicy
from kserve_vllm.protocols.batch.runner import Runner
from kserve_vllm.protocols.batch.store import BatchStore, Bounds, place_of
from kserve_vllm.protocols.http import page
from kserve_vllm.protocols.http.cors import Browsers
from kserve_vllm.protocols.http.middleware import RequestMiddleware
from kserve_vllm.protocols.oip.grpc_servicer import Servicer
from kserve_vllm.protocols.oip.statistics import Statistics
from kserve_vllm.protocols.text_engine import TextEngine
from kserve_vllm.servers.certificates import Certificates
from kserve_vllm.servers.listeners import GRPCServer, HTTPServer
from kserve_vllm.telemetry import logs
from kserve_vllm.telemetry.metrics import Metrics
from kserve_vllm.telemetry.requests import RequestRecorder
from kserve_vllm.telemetry.tracing import Tracing, tracing_of
from kserve_vllm.telemetry.watchdog import watch_loop

log = logging.getLogger(__name__)

_PROGRESS_EVERY_S = 10.0
_CLOSE_GRACE_S = 2.0
_USAGE_GRACE_S = 10.0
_TELL_EVERY_S = 1.0
_OF_SEVERAL_NODES = frozenset(
    "nnodes n data-parallel-size-local dpl data-parallel-address dpa data-parallel-rank dpn data-parallel-start-rank "
    "dpr data-parallel-hybrid-lb dph data-parallel-external-lb dpe kv-transfer-config".split()
)
"""Engine flags with which a start may have to wait for other machines."""
_GIVE_UP_WITHIN_S = 10.0
"""How long a start that has failed may take to close what it has opened."""


# Between threads that both want to run Python. A thread that renders or looks through a large body keeps the event loop
# from going on for so long after each write to a socket, once for each stream; Python's own 5 ms make that a tenth of a
# second for 32 streams.
_SWITCH_S = 0.0005


def prepare(settings: Settings) -> str:
    """Set up the log and what the engine reads from the environment. Returns the form of the log."""
    if settings.model.demo:
        # The default takes half of the machine's memory for a model of a few MiB.
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    return logs.configure(settings.telemetry.log_format, settings.server.access_log)


def waits_for_others(settings: Settings) -> bool:
    """Whether other nodes take part: until they are there, nothing may move here for as long as that takes."""
    flags = {flag.name: flag.tokens for flag in settings.engine}
    ray = any(
        "ray" in token.split("=")
        for name in ("distributed-executor-backend", "data-parallel-backend")
        for token in flags.get(name, ())
    )
    return ray or not flags.keys().isdisjoint(_OF_SEVERAL_NODES)


def run(settings: Settings, channel: SupervisorChannel | None = None) -> int:
    """Serve until told to stop. Returns the exit code: 0 after a drain, 1 where loading or the engine failed.

    Args:
        settings: the effective settings.
        place: the place among several front ends; None where this process is the only one.

    Raises:
        ConfigError: a setting can't be used.
    """
    chosen = prepare(settings)
    sys.setswitchinterval(_SWITCH_S)
    # Nearly all that is imported stays: looking for what does not takes a fifth of the import (`VLLMEngine.warm_up`).
    gc.disable()
    if channel is None and "forked-start" in settings.server.shortcuts and fork_server.applies():
        prepare_environment()
        fork_server.begin()
    try:
        import uvloop

        runner = asyncio.Runner(loop_factory=uvloop.new_event_loop)
    except ImportError:
        runner = asyncio.Runner()
    with runner:
        try:
            return runner.run(_Process(settings, chosen, channel).main())
        finally:
            if channel is None:
                fork_server.end()
                logs.forget()


class _Process:
    """One run of the server."""

    def __init__(self, settings: Settings, log_form: str, channel: SupervisorChannel | None) -> None:
        self._settings = settings
        self._phases = StartPhases(None if channel is None else channel.started_at)
        self._phases.end("process")
        self._channel = channel
        self._first = channel is None or channel.index == 0
        self._log_form = log_form
        self._version = version("kserve-vllm")
        self._engine_version: str | None = None
        self._lifecycle = Lifecycle()
        self._stop = asyncio.Event()
        self._failed = asyncio.Event()
        self._metrics = Metrics(
            self._lifecycle,
            lambda: self._enforcement.in_flight,
            self._version,
            started_at=None if channel is None else channel.started_at,
        )
        self._assembly = Composition(settings, self._metrics)
        self._enforcement = Enforcement(self._lifecycle, self._assembly.policies)
        self._tracing = _tracing(settings, self._version)
        self._requests = RequestRecorder(self._metrics, self._tracing, self._lifecycle, self._record)
        server = settings.server
        self._shortcuts = Shortcuts(server.shortcuts)
        self._shortcuts.check(BEFORE_THE_ENGINE)
        self._middleware = RequestMiddleware(
            self._lifecycle,
            self._enforcement,
            server.max_body_mib << 20,
            self._metrics.render,
            self._versions,
            self._requests,
            split=bool(server.admin_port),
            body_timeout_s=server.body_timeout,
            page=page.load() if server.ui else None,
            max_json=server.max_json_mib << 20,
            routers=server.allow_transfer_params,
        )
        self._servicer = Servicer(self._lifecycle, self._enforcement, self._requests)
        shared = channel is not None
        self._browsers = Browsers(self._middleware)
        self._certificates = certificates = (
            Certificates(server.ssl_certfile, server.ssl_keyfile, os.environ, self._metrics.count_tls_reload)
            if server.ssl_certfile
            else None
        )
        self._http = HTTPServer(self._browsers, server, server.http_port, shared=shared, certificates=certificates)
        self._admin = (
            HTTPServer(
                self._middleware.admin, server, server.admin_port, "--admin-port", shared, certificates, http2=False
            )
            if server.admin_port
            else None
        )
        self._grpc = (
            GRPCServer(
                self._servicer,
                server,
                self._lifecycle,
                shared,
                self._shortcuts.takes("grpc-server"),
                self._metrics.show_grpc_fallback,
                certificates,
                listen=server.grpc_port > 0,
            )
            if server.grpc_server != "off" and (server.grpc_port or server.http2)
            else None
        )
        self._store, self._batches = self._build_batches()
        self._engine: VLLMEngine | None = None
        self._statistics: Statistics | None = None
        self._warmup: Warmup | None = None

    def _build_batches(self) -> tuple[BatchStore | None, Runner | None]:
        """Files and batches, and who works on them, if they are switched on."""
        policy = self._settings.policy
        if policy.batch_dir is None:
            return None, None
        store = BatchStore(
            place_of(policy.batch_dir),
            Bounds(policy.batch_max_files, policy.batch_max_mib << 20, policy.batch_max_lines),
        )
        runner = Runner(
            store, self._middleware, lambda: self._enforcement.in_flight, policy.batch_concurrency, self._metrics
        )
        self._metrics.watch(lambda _: runner.show())
        return store, runner

    def _record(self, context: RequestContext) -> None:
        """What is kept of a request that is over."""
        self._assembly.record(context)
        if self._statistics is not None:
            self._statistics.count(context)

    def _versions(self) -> dict[str, object]:
        known = {"version": self._engine_version} if self._engine_version else {}
        return {**known, "kserve_vllm": self._version, **self._shortcuts.report()}

    async def main(self) -> int:
        """From the first open port to the exit code."""
        loop = asyncio.get_running_loop()
        if self._channel is None:
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.add_signal_handler(number, self._on_signal)
        else:
            loop.add_signal_handler(signal.SIGTERM, self._stop.set)
            self._channel.attend(self._stop.set, self._on_shared_engine_gone)
            self._telling = asyncio.create_task(self._tell_others(self._channel))
        self._metrics.watch(lambda metrics: metrics.show_connections(self._http.connections.open))
        self._http.start()
        if self._admin is not None:
            self._admin.start()
        self._assembly.start()
        if self._grpc is not None:
            await self._grpc.start()
        await self._http.join(self._grpc)
        if self._certificates is not None and self._settings.server.enable_ssl_refresh:
            self._renewing = asyncio.create_task(self._certificates.watch())
        log.info("listening on HTTP port %d%s; loading %s", self._http.port, self._grpc_words(" and"), self._model)
        loading = asyncio.create_task(self._load())
        progress = asyncio.create_task(self._report_progress())
        stopping = asyncio.create_task(self._stop.wait())
        failing = asyncio.create_task(self._failed.wait())
        watchdog = asyncio.create_task(self._watch_start())
        await asyncio.wait({loading, stopping, failing, watchdog}, return_when=asyncio.FIRST_COMPLETED)
        progress.cancel()
        try:
            if loading.done():
                watchdog.cancel()
                loading.result()
                return await self._serve(stopping, failing)
            if watchdog.done() and not stopping.done() and not failing.done():
                await self._end_failed_start(watchdog.result())
            watchdog.cancel()
            return await self._give_up_loading(loading)
        except ConfigError:
            self._lifecycle.to(State.FAILED, "a setting can't be used")
            raise
        except Exception as error:
            log.exception("loading failed", exc_info=error)
            await self._end_failed_start(logs.cause() or termination.describe(error))
        finally:
            stopping.cancel()
            failing.cancel()
            await self._close()

    async def _watch_start(self) -> str:
        """Wait until the start counts as failed, and say why. Front ends that share an engine leave that to their
        supervisor."""
        if self._channel is not None:
            await asyncio.Event().wait()
        timeout_s = self._settings.lifecycle.start_stall_timeout
        return await stall(Movement(), logs.failures, 0.0 if waits_for_others(self._settings) else timeout_s)

    async def _end_failed_start(self, reason: str) -> NoReturn:
        """Close what can be closed, kill what is left, and exit with code 1; the reason is the last line."""
        self._lifecycle.to(State.FAILED, "loading failed")
        reason = f"the start failed: {reason}"
        self._leave_word(reason)
        with contextlib.suppress(Exception):
            await asyncio.wait_for(self._close(), _GIVE_UP_WITHIN_S)
        self._kill_children()
        if self._channel is None:
            logs.forget()
        log.critical("%s; exiting with code 1", reason)
        sys.stderr.flush()
        # A thread that waits for the engine can't be interrupted; the process ends without it.
        os._exit(1)

    def _leave_word(self, sentence: str) -> None:
        termination.write(self._settings.lifecycle.termination_message_path, sentence)

    @property
    def _model(self) -> str:
        return next(flag.tokens[1] for flag in self._settings.engine if flag.key == "model")

    async def _load(self) -> None:
        self._lifecycle.to(State.LOADING)
        settings = self._settings
        own = settings.model.compact_json, settings.model.strict_openai, settings.server.allow_transfer_params
        args = await asyncio.to_thread(parse_engine_args, settings.engine_argv(), *own)
        # Reads some sixty files; in front of the engine, which may not be one that this can work with.
        await asyncio.to_thread(self._shortcuts.check, {row.package for row in TABLE})
        self._phases.end("imports")
        if self._channel is not None or not fork_server.applies():
            self._shortcuts.does_not_apply("forked-start")
        if self._shortcuts.takes("forked-start"):
            await asyncio.to_thread(fork_server.use_to_inspect_models)
            await asyncio.to_thread(fork_server.use_for_the_engine)
        self._engine = engine = VLLMEngine(args, self._channel)
        # kserve takes seconds to import; let that pass while the engine process starts.
        await asyncio.gather(engine.start(), asyncio.to_thread(_import_heavy))
        from kserve_vllm.engine.arguments import version
        from kserve_vllm.engine.patches.openai_answer import AnswerHandler
        from kserve_vllm.engine.patches.openai_stream import StreamHandler
        from kserve_vllm.kserve_sdk.model import EngineDataPlane, EngineModels
        from kserve_vllm.protocols.batch.routes import BatchRoutes
        from kserve_vllm.protocols.http.routes import Routes, build_app
        from kserve_vllm.protocols.moderation import ModeratedEngine
        from kserve_vllm.protocols.oip.grpc_backend import Backend
        from kserve_vllm.protocols.oip.text import V2Text
        from kserve_vllm.protocols.openai.fast_path import fast_paths
        from kserve_vllm.protocols.openai.vllm_app import MendedApp
        from kserve_vllm.protocols.v1 import V1Text

        moderation = self._assembly.policies.moderation
        if engine.answers_from_token_ids and moderation is not None and moderation.reads("answer"):
            raise ConfigError(
                "--moderation-file has a hook that looks at answers, but vLLM makes those of this model (gpt-oss) from "
                "token ids, past every hook. Take `answer` out of the hooks' `on`, or serve another model"
            )
        self._engine_version = version()
        self._metrics.attach(self._engine_version, engine.models.serves, engine.adapters.by_state)
        self._lifecycle.to(State.WARMING)
        policies = self._assembly.policies
        if self._assembly.decides:
            assert engine.accounting is not None
            cache = self._assembly.build_cache(engine.accounting.hand_over)
            engine.stand_before(SequencePolicy(policies, engine.models), cache)
        server = self._settings.server
        shortcuts = self._shortcuts
        engine.shorten(shortcuts)
        worker: TextEngine = engine.text
        if policies.moderation is not None:
            policies.moderation.media = engine.media
            worker = ModeratedEngine(engine.text, policies.moderation)
        text = V2Text(worker, server.max_batch)
        models = EngineModels(engine, self._lifecycle, text, V1Text(worker, server.max_batch))
        plane = EngineDataPlane(models, engine, self._lifecycle, self._version)
        self._statistics = Statistics(lambda name: engine.models.find(name) is not None)
        routes = Routes(plane, models, engine, text, self._enforcement, self._assembly.queue_stats, self._statistics)
        streams = StreamHandler(engine) if engine.text.generates else None
        answers = AnswerHandler(engine) if engine.text.generates else None
        # What is moderated has to be seen on its way in.
        for name, applies in (
            ("streams", streams is not None and (streams.serves("chat") or streams.serves("completion"))),
            ("answers", answers is not None and (answers.serves("chat") or answers.serves("completion"))),
            ("grpc-streams", streams is not None and policies.moderation is None and self._grpc is not None),
            ("grpc-server", self._grpc is not None),
        ):
            if not applies:
                shortcuts.does_not_apply(name)
        self._browsers.allow(*engine.take_browser_rules())
        mended = MendedApp(engine.app, engine.mender, engine.always_usage)
        fast = await fast_paths(
            engine,
            streams if shortcuts.takes("streams") else None,
            answers if shortcuts.takes("answers") else None,
            mended,
            self._metrics.count_path,
        )
        batches = BatchRoutes(self._store, self._batches, self._middleware.works)
        self._middleware.attach(build_app(routes, engine, self._version, batches.router()), mended, fast or None)
        grpc_streams = streams if shortcuts.takes("grpc-streams") else None
        self._servicer.attach(Backend(plane, models, text, self._statistics, grpc_streams))
        self._metrics.show_shortcuts(shortcuts.reasons)
        await engine.warm_up()
        # What every front end does to the same engine is done, or counted, by the first one.
        if self._first:
            engine.adapters.on_load = self._metrics.count_adapter
        await engine.adapters.start(self._settings.model.adapters_file)
        if self._first and (path := self._settings.model.warmup_file) is not None:
            self._warmup = Warmup(path, engine.text, engine.adapters.serving, self._metrics.count_warmup)
            await self._warmup.start()
        if self._channel is not None:
            await self._channel.others()

    async def _serve(self, stopping: asyncio.Task[bool], failing: asyncio.Task[bool]) -> int:
        """Be ready until a signal comes or the engine is gone; then drain or fail."""
        engine = self._engine
        assert engine is not None
        life = self._settings.lifecycle
        watching = asyncio.create_task(
            engine.watch(life.engine_probe_interval, life.engine_stall_timeout, self._on_engine_gone)
        )
        # Not before: loading holds the loop as it likes, and nobody is served.
        watching_loop = asyncio.create_task(watch_loop(self._metrics.observe_lag))
        self._lifecycle.to(State.READY)
        if self._batches is not None:
            self._batches.start()
        self._note_start()
        if self._first:
            self._say_ready(engine.models.names[0])
        try:
            await asyncio.wait({stopping, failing}, return_when=asyncio.FIRST_COMPLETED)
            if not self._failed.is_set():
                await self._drain(failing)
            return await self._fail() if self._failed.is_set() else 0
        finally:
            watching.cancel()
            watching_loop.cancel()

    def _note_start(self) -> None:
        """Ready: show where the time went, and again when the first readiness probe has been answered."""
        phases = self._phases
        for phase, at in logs.milestones().items():
            phases.end(phase, at)
        phases.end("warm_up")
        self._metrics.show_start(phases.seconds())
        if self._first:
            log.info("%s", phases.sentence())

        def note_probe() -> None:
            phases.end("first_probe")
            self._metrics.show_start(phases.seconds())

        self._lifecycle.on_first_probe(note_probe)

    def _say_ready(self, model: str) -> None:
        http, grpc = self._http.port, self._grpc.port if self._grpc else 0
        ui = (self._admin or self._http).port if self._settings.server.ui else 0
        if self._log_form == "json":
            also = self._grpc_words(",") + (f", /ui on port {ui}" if ui else "")
            log.info("ready: %s on port %d%s", model, http, also)
        else:
            _announce(self._settings, http, grpc or (http if self._http.answers_grpc else 0), ui, model)

    def _grpc_words(self, joint: str) -> str:
        """Where gRPC is answered, as the rest of a sentence."""
        if self._grpc is None:
            return ""
        ports = [self._grpc.port, self._http.port if self._http.answers_grpc else 0]
        named = " and ".join(str(port) for port in ports if port)
        return f"{joint} gRPC on port {named}" if named else ""

    async def _drain(self, failing: asyncio.Task[bool]) -> None:
        life = self._settings.lifecycle
        self._lifecycle.to(State.DRAINING)
        if self._batches is not None:
            self._batches.stop()
        self._metrics.begin_drain(life.drain_delay + life.drain_timeout)
        log.info("draining: %d requests in flight, up to %g s", self._enforcement.in_flight, life.drain_timeout)
        if life.drain_delay:
            await asyncio.wait({failing}, timeout=life.drain_delay)
        self._enforcement.close()
        self._http.leave()
        if self._grpc is not None:
            self._grpc.leave()
        until = time.monotonic() + life.drain_timeout
        idle = asyncio.create_task(self._enforcement.wait_idle(life.drain_timeout))
        await asyncio.wait({idle, failing}, return_when=asyncio.FIRST_COMPLETED)
        if idle.done() and not idle.result():
            log.warning("drain timeout: %d requests are cut off", self._enforcement.in_flight)
            self._leave_word(
                f"drain timeout: {self._enforcement.in_flight} requests were cut off after {life.drain_timeout:g} s"
            )
        elif idle.done():
            # Over HTTP/1.1 a request is in flight until its client has the answer; what runs on a stream of HTTP/2 ends
            # before that.
            settled = asyncio.create_task(self._settle(until - time.monotonic()))
            await asyncio.wait({settled, failing}, return_when=asyncio.FIRST_COMPLETED)
            settled.cancel()
        idle.cancel()

    async def _settle(self, timeout_s: float) -> None:
        """Wait until clients have taken what was answered, up to `timeout_s` seconds."""
        ports = [port for port in (self._http, self._grpc) if port is not None]
        await asyncio.gather(*(port.settle(timeout_s) for port in ports))

    async def _fail(self) -> int:
        """Let what was in flight get its error, then exit with 1."""
        log.critical("%s; exiting with code 1", self._lifecycle.reason)
        cause = logs.cause(last=True)
        self._leave_word(f"{self._lifecycle.reason}" + (f": {cause}" if cause else ""))
        limit = self._settings.lifecycle.engine_dead_exit_after
        grace = min(limit, _CLOSE_GRACE_S)
        # Probes should see the state before the port closes.
        await asyncio.sleep(grace)
        await self._enforcement.wait_idle(max(0.0, limit - 2 * grace))
        return 1

    async def _give_up_loading(self, loading: asyncio.Task[None]) -> int:
        """A signal came before the model was loaded, or the engine that is shared died: nothing to drain."""
        log.info("stopped while loading")
        if self._failed.is_set():
            self._leave_word(f"{self._lifecycle.reason} while loading")
        self._lifecycle.to(State.DRAINING, "stopped while loading")
        loading.cancel()
        self._kill_children()
        # The thread that waits for the engine can't be interrupted; the process ends without it.
        await self._close()
        sys.stderr.flush()
        os._exit(int(self._failed.is_set()))

    def _kill_children(self) -> None:
        import psutil

        for child in psutil.Process().children(recursive=True):
            child.kill()

    async def _close(self) -> None:
        """Close the ports and end the engine."""
        self._lifecycle.to(State.STOPPED)
        self._enforcement.close()
        # All at once: what is left had the time of the drain.
        ports = [port for port in (self._http, self._admin, self._grpc) if port is not None]
        await asyncio.gather(*(port.stop(_CLOSE_GRACE_S) for port in ports))
        if self._batches is not None:
            await self._batches.close()
        if self._warmup is not None:
            await self._warmup.stop()
        engine, self._engine = self._engine, None
        if engine is not None:
            await engine.stop()
        self._requests.flush()
        await self._assembly.close(_USAGE_GRACE_S)
        await asyncio.to_thread(self._tracing.shutdown)

    def _on_signal(self) -> None:
        if self._stop.is_set():
            log.warning("second signal: exiting at once")
            self._leave_word(f"a second signal came while {self._lifecycle.state.value}")
            self._kill_children()
            os._exit(1)
        self._stop.set()

    def _on_engine_gone(self, reason: str) -> None:
        self._lifecycle.to(State.FAILED, reason)
        if self._assembly.admission is not None:
            self._assembly.admission.fail(EngineGone(self._lifecycle.sentence(), retry_after_s=5, close=True))
        self._failed.set()

    def _on_shared_engine_gone(self, reason: str) -> None:
        self._on_engine_gone(reason)
        if self._engine is not None:
            self._engine.lose()

    async def _tell_others(self, channel: SupervisorChannel) -> None:
        """Let the supervisor see that this process is alive, and the other front ends what its gauges are."""
        while True:
            channel.report_life()
            self._metrics.refresh()
            await asyncio.sleep(_TELL_EVERY_S)

    async def _report_progress(self) -> None:
        while True:
            await asyncio.sleep(_PROGRESS_EVERY_S)
            log.info("%s for %.0f s", self._lifecycle.state.value, self._lifecycle.seconds)


def _tracing(settings: Settings, own_version: str) -> Tracing:
    """Tracing as the settings and OpenTelemetry's own variables want it."""
    telemetry = settings.telemetry
    given = settings.sources.get("telemetry.trace_sample_ratio", "default") != "default"
    ratio = telemetry.trace_sample_ratio if given or telemetry.trace_sample_ratio != 1.0 else None
    return tracing_of(telemetry.otlp_endpoint, ratio, own_version, os.environ)


def _import_heavy() -> None:
    import kserve_vllm.kserve_sdk.model
    import kserve_vllm.protocols.oip.grpc_backend  # noqa: F401


def _announce(settings: Settings, http_port: int, grpc_port: int, ui_port: int, model: str) -> None:
    """Say that the server is ready, and what to type next."""
    scheme = f"http{'s' if settings.server.ssl_certfile else ''}"
    host = f"{scheme}://localhost:{http_port}"
    chat = f'{{"model": "{model}", "messages": [{{"role": "user", "content": "What is 17 + 25?"}}]}}'
    infer = '{"inputs": [{"name": "text_input", "datatype": "BYTES", "shape": [1], "data": ["17 + 25 ="]}]}'
    lines = [
        "",
        f"Ready: {model} on {host}" + (f", gRPC on localhost:{grpc_port}" if grpc_port else ""),
        "Try, in another terminal:",
        f"  curl {host}/v1/chat/completions -H 'content-type: application/json' -d '{chat}'",
        f"  curl {host}/v2/models/{model}/infer -d '{infer}'",
        f"  {host}/docs shows everything that is served.",
        *([f"  {scheme}://localhost:{ui_port}/ui is a page to look at, with a chat."] if ui_port else []),
        "",
    ]
    print("\n".join(lines), flush=True)
