"""What a router of disaggregated serving tells an engine about the cache of another one, and who may say it.

`kv_transfer_params` and `ec_transfer_params` name hosts, blocks of a cache and token ids. Whoever sets them chooses
whom the engine connects to, whose blocks it reads, how many tokens count as cached, and, by `prompt_token_ids`, another
prompt than the one that was looked at. vLLM takes them from any client, in fields of their own and among `vllm_xargs`,
the token ids also where there is no connector. Here they are taken where the operator says that a router sets them.

Written against vLLM 0.32.
"""

from __future__ import annotations

from collections.abc import Mapping

from kserve_vllm.core.errors import InvalidRequest

TRANSFERS = ("kv_transfer_params", "ec_transfer_params")


def check_transfers(fields: Mapping[str, object], allowed: bool) -> None:
    """Refuse what only a router may say. Empty values say nothing.

    Args:
        fields: of a body, or a request's extra arguments.
        allowed: whether the clients of this server are such routers.

    Raises:
        InvalidRequest: names the field.
    """
    for name in TRANSFERS:
        value = fields.get(name)
        if not value:
            continue
        if not allowed:
            raise InvalidRequest(
                f"{name} is taken from routers of disaggregated serving alone (--allow-transfer-params)", field=name
            )
        if not isinstance(value, dict):
            raise InvalidRequest(f"{name} must be an object", field=name)
