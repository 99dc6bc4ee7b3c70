"""Fill a directory of a volume with a model: resumable, checked file by file, and idle when all is there.

The one argument is JSON: {directory, files: [{url, sha256, path}], repository, revision, endpoint, exclude}.
A file is written as NAME.part, goes on with a Range request where it was cut off, and takes its name only
after its checksum was right. What was checked is remembered with size and time of change, so that a second
run reads no data.
"""

import fnmatch
import hashlib
import json
import os
import sys
import time
import urllib.error
import urllib.parse
import urllib.request

ROOT = os.environ.get("KSERVE_VLLM_CACHE_ROOT", "/models")
CHUNK = 4 * 1024 * 1024


def fetch(url, headers=None, first=0):
    """Open `url` from byte `first` on; the token goes to the hub alone, never along a redirect."""
    request = urllib.request.Request(url, headers=dict(headers or {}))
    if first:
        request.add_header("Range", f"bytes={first}-")
    token = os.environ.get("HF_TOKEN")
    if token and SOURCE["repository"]:
        request.add_unredirected_header("Authorization", f"Bearer {token}")
    return urllib.request.urlopen(request, timeout=60)


def wanted():
    """List (path, url, algorithm, checksum) of every file of the model."""
    if SOURCE["files"]:
        return [(f["path"], f["url"], "sha256", f["sha256"]) for f in SOURCE["files"]]
    hub = SOURCE["endpoint"].rstrip("/")
    revision = urllib.parse.quote(SOURCE["revision"], safe="")
    with fetch(f"{hub}/api/models/{SOURCE['repository']}/revision/{revision}?blobs=true") as answer:
        listing = json.load(answer)
    commit = listing["sha"]
    files = []
    for entry in listing["siblings"]:
        path = entry["rfilename"]
        if any(fnmatch.fnmatch(path, pattern) for pattern in SOURCE["exclude"]):
            continue
        url = f"{hub}/{SOURCE['repository']}/resolve/{commit}/{urllib.parse.quote(path)}"
        # Large files carry a SHA-256, small ones git's own: SHA-1 over a header and the content.
        if entry.get("lfs"):
            files.append((path, url, "sha256", entry["lfs"]["sha256"]))
        else:
            files.append((path, url, "git", entry["blobId"]))
    print(f"{SOURCE['repository']} at {commit}: {len(files)} files", flush=True)
    return files


def checksum(path, algorithm):
    """Checksum of a file, read in pieces."""
    if algorithm == "git":
        digest = hashlib.sha1(f"blob {os.path.getsize(path)}\0".encode())
    else:
        digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while piece := stream.read(CHUNK):
            digest.update(piece)
    return digest.hexdigest()


def place(path):
    """Where a file belongs; a listing must not lead outside the directory."""
    target = os.path.normpath(os.path.join(TARGET, path))
    if not target.startswith(TARGET + os.sep):
        sys.exit(f"{path} leads outside {TARGET}")
    return target


def bring(path, url, algorithm, expected):
    """Download one file; raises OSError when it is cut off or its checksum is wrong."""
    target = place(path)
    part = target + ".part"
    os.makedirs(os.path.dirname(target), exist_ok=True)
    have = os.path.getsize(part) if os.path.exists(part) else 0
    try:
        with fetch(url, first=have) as answer:
            # A server that knows no Range sends all of it again.
            mode = "ab" if have and answer.status == 206 else "wb"
            length = int(answer.headers.get("Content-Length") or -1)
            got = 0
            with open(part, mode) as out:
                while piece := answer.read(CHUNK):
                    out.write(piece)
                    got += len(piece)
                out.flush()
                os.fsync(out.fileno())
        if 0 <= got < length:
            raise OSError(f"{path}: cut off after {got} of {length} bytes")
    except urllib.error.HTTPError as error:
        # Nothing is left to send: the part is whole, or too long, which the checksum tells.
        if error.code != 416:
            raise
    found = checksum(part, algorithm)
    if found != expected:
        os.remove(part)
        raise OSError(f"{path}: checksum is {found}, not {expected}")
    os.replace(part, target)


def remember(path, ledger):
    """Write the ledger whole or not at all."""
    with open(path + ".part", "w") as stream:
        json.dump(ledger, stream)
    os.replace(path + ".part", path)


def main():
    ledger_path = os.path.join(TARGET, ".kserve-vllm-cache.json")
    os.makedirs(TARGET, exist_ok=True)
    ledger = {}
    if os.path.exists(ledger_path):
        with open(ledger_path) as stream:
            ledger = json.load(stream)
    fetched = 0
    files = wanted()
    for path, url, algorithm, expected in files:
        target = place(path)
        if os.path.exists(target):
            state = os.stat(target)
            mark = [expected, state.st_size, state.st_mtime_ns]
            if ledger.get(path) == mark or checksum(target, algorithm) == expected:
                ledger[path] = mark
                continue
        for attempt in range(5):
            try:
                bring(path, url, algorithm, expected)
                break
            except OSError as error:
                print(f"attempt {attempt + 1}: {error}", flush=True)
                if attempt == 4 or (isinstance(error, urllib.error.HTTPError) and error.code in (401, 403, 404)):
                    sys.exit(f"could not fetch {path}")
                time.sleep(min(2**attempt, 30))
        state = os.stat(target)
        ledger[path] = [expected, state.st_size, state.st_mtime_ns]
        fetched += 1
        print(f"{path}: {state.st_size} bytes", flush=True)
        # Written after each file: a run that is killed keeps what it has checked.
        remember(ledger_path, ledger)
    remember(ledger_path, ledger)
    print(f"{fetched} files fetched, {len(files) - fetched} were there", flush=True)


SOURCE = json.loads(sys.argv[1])
TARGET = os.path.normpath(os.path.join(ROOT, SOURCE["directory"]))
if not TARGET.startswith(os.path.normpath(ROOT) + os.sep):
    sys.exit(f"{SOURCE['directory']} leads outside {ROOT}")
main()
