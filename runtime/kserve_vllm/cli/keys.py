"""`kserve-vllm keys`: makes, hashes and lists the API keys of a key file, which holds only their SHA-256."""

from __future__ import annotations

import argparse
import getpass
import json
import os
import re
import sys
import tempfile
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

import yaml

from kserve_vllm.core.errors import ConfigError
from kserve_vllm.policy import tenants

_EPILOG = """
Start with an administrator and a tenant:
  kserve-vllm keys new --file keys.yaml --tenant ops --admin
  kserve-vllm keys new --file keys.yaml --tenant team-a --expires 90d
  kserve-vllm serve --demo --keys-file keys.yaml
Each `new` prints the key once; it can't be had again. To rotate, make a second key for the tenant, hand it out, and
take the first entry out of the file. A running server reads the file again within two seconds.

In Kubernetes the file is a Secret:
  kubectl create secret generic kserve-vllm-keys --from-file=keys.yaml
"""


def main(arguments: Sequence[str]) -> int:
    """Run `kserve-vllm keys ...`; returns the exit code.

    Raises:
        ConfigError: the file or an argument can't be used.
    """
    parser = argparse.ArgumentParser(
        prog="kserve-vllm keys",
        description="Make, hash and list the API keys of a key file (--keys-file).",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    new = commands.add_parser("new", help="make a key, print it once, and add its hash to the file", allow_abbrev=False)
    new.add_argument("--file", type=Path, help="key file to add to; made if it is not there. Default: only print")
    new.add_argument("--tenant", required=True, help="tenant that the key belongs to")
    new.add_argument("--id", help="name of the key in logs; default: the tenant and today's date")
    new.add_argument("--expires", help="when it ends: 90d, 12h, or a date such as 2027-06-30")
    new.add_argument("--admin", action="store_true", help="let it load adapters and see the queue")
    commands.add_parser("hash", help="read a key from the terminal or standard input and print its SHA-256")
    listing = commands.add_parser("list", help="show the keys of a file", allow_abbrev=False)
    listing.add_argument("--file", type=Path, required=True, help="key file")
    args = parser.parse_args(list(arguments))
    if args.command == "hash":
        print(tenants.digest(_read_key()))
    elif args.command == "list":
        print(table(tenants.parse(_text(args.file), str(args.file))))
    else:
        _new(args)
    return 0


def _read_key() -> str:
    key = getpass.getpass("API key: ") if sys.stdin.isatty() else sys.stdin.read()
    key = key.strip()
    if not key:
        raise ConfigError("no key was given; type it at the prompt, or pipe it in")
    return key


def _new(args: argparse.Namespace) -> None:
    now = datetime.now(UTC)
    text = _text(args.file) if args.file is not None and args.file.exists() else ""
    taken = {key.id for key in tenants.parse(text, str(args.file)).keys}
    key = tenants.new_key()
    entry: dict[str, object] = {
        "id": args.id or _free_id(f"{args.tenant}-{now:%Y-%m-%d}", taken),
        "tenant": args.tenant,
        "sha256": tenants.digest(key),
    }
    if args.expires:
        entry["expires"] = _when(args.expires, now).isoformat().replace("+00:00", "Z")
    if args.admin:
        entry["admin"] = True
    changed = add_entry(text, entry)
    tenants.parse(changed, str(args.file or "the new entry"))
    if args.file is not None:
        _write(args.file, changed)
        print(f"added {entry['id']!r} to {args.file}; the key below is shown only now:", file=sys.stderr)
    else:
        print("add this to the list `keys` of your key file; the key itself is shown only now:", file=sys.stderr)
        print(f"  - {json.dumps(entry)}", file=sys.stderr)
    print(key)


def _free_id(wanted: str, taken: set[str]) -> str:
    number, name = 1, wanted
    while name in taken:
        number += 1
        name = f"{wanted}-{number}"
    return name


def _when(text: str, now: datetime) -> datetime:
    if match := re.fullmatch(r"(\d+)([dh])", text):
        return (now + timedelta(**{"days" if match[2] == "d" else "hours": int(match[1])})).replace(microsecond=0)
    try:
        when = datetime.fromisoformat(text)
    except ValueError:
        raise ConfigError(f"--expires {text!r} is neither 90d, 12h nor a date such as 2027-06-30") from None
    return (when if when.tzinfo else when.replace(tzinfo=UTC)).astimezone(UTC)


def add_entry(text: str, entry: dict[str, object]) -> str:
    """A key file with one more key. Comments survive where `keys` is the last part of a YAML file in block style."""
    line = f"  - {json.dumps(entry)}\n"
    if not text.strip():
        return f"keys:\n{line}"
    if text.lstrip().startswith("{"):
        tree = json.loads(text)
        tree.setdefault("keys", []).append(entry)
        return json.dumps(tree, indent=2) + "\n"
    parts = re.findall(r"^([A-Za-z_]+):(.*)$", text, flags=re.MULTILINE)
    if "keys" not in [name for name, _ in parts]:
        return text.rstrip("\n") + f"\nkeys:\n{line}"
    name, rest = parts[-1]
    indents = {
        match[1]
        for match in re.finditer(
            r"^( *)- ", text[text.rindex("\nkeys:") if "\nkeys:" in text else 0 :], flags=re.MULTILINE
        )
    }
    if name == "keys" and not rest.split("#")[0].strip() and len(indents) <= 1:
        return text.rstrip("\n") + f"\n{indents.pop() if indents else '  '}- {json.dumps(entry)}\n"
    tree = yaml.safe_load(text)
    tree["keys"] = [*(tree.get("keys") or []), entry]
    return yaml.safe_dump(tree, sort_keys=False)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--file {path} can't be read: {error}") from None


def _write(path: Path, text: str) -> None:
    """Replace a file at once, readable by its owner alone."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(name, path)
    except OSError as error:
        raise ConfigError(f"--file {path} can't be written: {error}") from None


def table(file: tenants.KeyFile) -> str:
    """The keys of a file for people: never a key, and only the beginning of each hash."""
    rows = [("ID", "TENANT", "TIER", "ADMIN", "EXPIRES", "LIMITS", "SHA-256")]
    now = datetime.now(UTC)
    for key in file.keys:
        tenant = file.tenants.get(key.tenant, tenants.Tenant())
        expires = key.expires if key.expires is None or key.expires.tzinfo else key.expires.replace(tzinfo=UTC)
        ended = " (ended)" if expires is not None and expires <= now else ""
        tier = file.tiers.get(tenant.tier or "", tenants.Tier())
        limits = key.limits.over(tenant.limits.over(tier.limits)).model_dump(exclude_none=True)
        rows.append(
            (
                key.id,
                key.tenant,
                tenant.tier or "-",
                "yes" if key.admin else "-",
                f"{expires:%Y-%m-%d %H:%M}Z{ended}" if expires is not None else "never",
                ", ".join(f"{name}={value}" for name, value in limits.items()) or "-",
                key.sha256[:12],
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )
