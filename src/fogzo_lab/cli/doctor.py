"""fogzo doctor: what is wrong with runs, by layer, and which option answers it."""

from collections.abc import Sequence

from fogzo.inspection.records import percent
from fogzo_lab.cli import display
from fogzo_lab.cli.parsing import parse
from fogzo_lab.system.json_files import dumps
from fogzo_lab.table import Table
from fogzo_lab.training.examine import DoctorConfig, Examination, examine


def run(arguments: Sequence[str]) -> None:
    """Run the command with these options."""
    config = parse(DoctorConfig, arguments, "fogzo doctor", DoctorConfig.__doc__)
    found = [examine(run, config.agreement, config.device) for run in config.runs]
    if config.json:
        print(dumps([examination.to_dict() for examination in found]))
        return
    table = layers_table(found[0]) if len(found) == 1 else runs_table(found)
    display.print_table(table, table.title)
    for examination in found:
        print("\n".join(advice(examination, named=len(found) > 1)))
    if len(found) == 1:
        print(table.caption)


def layers_table(examination: Examination) -> Table:
    """The numbers of one run by layer."""
    heading, *rows = examination.inspection.cells()
    inspection = examination.inspection
    left = ", ".join(f"{item.name} ({item.weights:,})" for item in inspection.in_float[:3])
    more = f" and {len(inspection.in_float) - 3} more" if len(inspection.in_float) > 3 else ""
    caption = f"In float: {left}{more}. " if left else ""
    caption += (
        f"Changes were counted over {inspection.counted} steps up to step {inspection.step}."
        if inspection.counted
        else "Flips, movement and frozen weights are counted while training: --inspect-every 50."
    )
    return Table(f"{examination.run} at step {examination.step}", heading, rows, caption)


def runs_table(found: Sequence[Examination]) -> Table:
    """A line for each run: means over all weights, and the kinds of findings."""
    shares = {
        "bits used": "bits_used",
        "masked": "masked",
        "frozen": "frozen",
        "dead": "dead",
        "flips per step": "flips",
    }
    rows = []
    for examination in found:
        values = [examination.inspection.mean(key) for key in shares.values()]
        kinds = [f.kind for f in examination.findings if f.severity != "note"]
        rows.append(
            [
                str(examination.run),
                f"{examination.step}",
                *("" if value is None else percent(value) for value in values),
                ", ".join(dict.fromkeys(kinds)) or "none",
            ]
        )
    return Table("", ["run", "step", *shares, "findings"], rows)


def advice(examination: Examination, named: bool = False) -> list[str]:
    """The findings, each with the options that answer it."""
    lines = [
        f"[{finding.severity}] {finding.message}. Try: {finding.options or finding.code}"
        for finding in examination.findings
    ]
    if not any(finding.severity != "note" for finding in examination.findings):
        lines.insert(0, "nothing is wrong with what was looked at")
    return [f"{examination.run}: {line}" if named else line for line in lines]
