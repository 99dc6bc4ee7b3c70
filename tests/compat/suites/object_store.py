"""Files and batches in a bucket of a real S3 server: the tests that CI runs against a fake, once more."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path

from tests.compat.base import ROOT, RUN_WITHIN_S, Case, Folder, NotInstalled, Suite, Target, one_line
from tests.support import end, free_port
from tests.support_s3 import BUCKET, REAL, SECRET

_GATEWAY = ("github.com/versity/versitygw/cmd/versitygw", "v1.8.0")
_FILES = ("tests/unit/protocols/test_batch_store.py", "tests/unit/protocols/test_batch_api.py")


@contextlib.contextmanager
def _store(program: Path) -> Iterator[dict[str, str]]:
    """A server with a bucket; the variables by which boto3 and the tests find it."""
    import boto3
    from botocore.exceptions import BotoCoreError

    with tempfile.TemporaryDirectory(prefix="compat-s3-") as scratch:
        folders = [Path(scratch) / name for name in ("objects", "attributes")]
        for each in folders:
            each.mkdir()
        address = f"127.0.0.1:{free_port()}"
        known = {"ROOT_ACCESS_KEY": "known", "ROOT_SECRET_KEY": SECRET}
        command = [str(program), "--port", address, "--quiet", "posix", "--sidecar", str(folders[1]), str(folders[0])]
        with (Path(scratch) / "log").open("wb") as log:
            process = subprocess.Popen(command, env={**os.environ, **known}, stdout=log, stderr=subprocess.STDOUT)
        try:
            client = boto3.client(
                "s3",
                endpoint_url=f"http://{address}",
                region_name="us-east-1",
                aws_access_key_id="known",
                aws_secret_access_key=SECRET,
            )
            deadline = time.monotonic() + 30
            while True:
                try:
                    client.create_bucket(Bucket=BUCKET)
                    break
                except BotoCoreError as error:
                    if time.monotonic() > deadline or process.poll() is not None:
                        raise NotInstalled(f"versitygw does not answer: {error}") from error
                    time.sleep(0.2)
            yield {
                REAL: f"s3://{BUCKET}",
                "AWS_ENDPOINT_URL": f"http://{address}",
                "AWS_ACCESS_KEY_ID": "known",
                "AWS_SECRET_ACCESS_KEY": SECRET,
            }
        finally:
            end(process, 10)


def _run(_: Target, folder: Path) -> list[Case]:
    program = Folder(folder / "versitygw").go(*_GATEWAY)
    report = folder / "object-store.xml"
    report.unlink(missing_ok=True)
    with _store(program) as variables:
        options = ["-q", "-p", "no:cacheprovider", "-k", "bucket", f"--junitxml={report}"]
        done = subprocess.run(
            [sys.executable, "-m", "pytest", *options, *_FILES],
            cwd=ROOT,
            env={**os.environ, **variables},
            capture_output=True,
            text=True,
            timeout=RUN_WITHIN_S,
            check=False,
        )
    if not report.is_file():
        raise RuntimeError(f"the tests do not start: {one_line(done.stdout[-300:])}")
    cases = []
    for element in ET.parse(report).iter("testcase"):
        problem = element.find("failure") if element.find("error") is None else element.find("error")
        name = element.get("name", "").removeprefix("test_").partition("[")[0].replace("_", " ")
        if problem is not None:
            cases.append(Case(name, "failed", one_line(problem.get("message") or "")))
        elif element.find("skipped") is None:  # what breaks a store runs against the fake alone
            cases.append(Case(name, "passed"))
    return cases


SUITES = [
    Suite(
        "object-store",
        "files and batches in a bucket: the project's own tests against a real S3 server",
        f"Go {'@'.join(_GATEWAY)}",
        _run,
    )
]
