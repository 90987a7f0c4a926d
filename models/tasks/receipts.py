"""What a generate job's answer cost, from rows as they ran."""

from __future__ import annotations

from collections.abc import Sequence

from models.api import GeneratedRow, GenerateWork


def receipt(work: GenerateWork, rows: Sequence[GeneratedRow], depth: int) -> dict[str, object]:
    """The receipt of finished rows (keys: docs/api.md); `depth` blocks in the full network."""
    ran, whole = sum(r.layer_evals for r in rows), sum(r.layer_evals_full for r in rows)
    exits = sorted({r.exit_depths for r in rows})
    made: dict[str, object] = {
        "gear": work.gear,
        "solver": work.solver,
        "steps": work.steps,
        "guidance": work.guidance,
        "overrides": list(work.overrides),
        "depth": depth,
        "exit_depths": list(exits[0]) if len(exits) == 1 else [list(r.exit_depths) for r in rows],
        "layer_evals": ran,
        "layer_evals_full": whole,
        "compute_saved": (whole - ran) / whole,
    }
    if options := work.solver_options.given():
        made["solver_options"] = options
    if work.guidance_interval != (0.0, 1.0):
        made["guidance_interval"] = list(work.guidance_interval)
    if whole_macs := sum(r.macs_full for r in rows):
        made["macs_saved"] = 1 - sum(r.macs for r in rows) / whole_macs
    return made
