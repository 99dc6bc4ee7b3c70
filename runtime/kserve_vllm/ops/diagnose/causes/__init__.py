"""The table of causes: one row for each thing that goes wrong, over recorded facts alone.

A row looks for itself in a snapshot and says what is wrong, why, and the command that mends it. Rows do not know each
other; where several apply, the one nearest to the root has the higher rank.
"""

from __future__ import annotations

from kserve_vllm.ops.diagnose.causes import access, config, knative, load, placement, standard, start
from kserve_vllm.ops.diagnose.causes.table import FAULT, RISK, Cause, Finding
from kserve_vllm.ops.diagnose.facts import Facts
from kserve_vllm.ops.diagnose.snapshot import Snapshot

CAUSES: tuple[Cause, ...] = (
    *access.CAUSES,
    *config.CAUSES,
    *placement.CAUSES,
    *start.CAUSES,
    *knative.CAUSES,
    *standard.CAUSES,
    *load.CAUSES,
)


def judge(snapshot: Snapshot, broken: list[str] | None = None) -> list[Finding]:
    """What is wrong, most likely first. One finding for each cause; empty for a service that is well.

    Args:
        snapshot: of the service.
        broken: gets a line for each row that could not be judged, where objects have a shape that the row does not
            know: one odd object must not hide all other causes. Without it such a row raises.
    """
    facts = Facts(snapshot)
    found = []
    for cause in CAUSES:
        try:
            finding = cause.look(facts)
        except Exception as error:
            if broken is None:
                raise
            broken.append(f"{cause.id}: {type(error).__name__}: {error}")
            continue
        if finding:
            found.append(finding)
    hidden = {gone for finding in found for gone in finding.cause.explains}
    told = [finding for finding in found if finding.cause.id not in hidden]
    if any(f.cause.severity == FAULT and not f.cause.last_resort for f in told):
        told = [f for f in told if not f.cause.last_resort]
    return sorted(told, key=lambda f: (f.cause.severity == RISK, -f.cause.rank))


__all__ = ["CAUSES", "Cause", "Finding", "judge"]
