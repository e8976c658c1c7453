"""fogzo bench: measures, writes results.json and bench.svg, and prints a table per section."""

from collections.abc import Sequence

from fogzo_lab.bench import views
from fogzo_lab.bench.config import BenchConfig
from fogzo_lab.bench.plot import plot
from fogzo_lab.bench.suite import run_suite
from fogzo_lab.cli import display
from fogzo_lab.cli.parsing import parse
from fogzo_lab.system.devices import find_device
from fogzo_lab.system.json_files import dumps, write_text


def run(arguments: Sequence[str]) -> None:
    """Run the command with these options."""
    config = parse(BenchConfig, arguments, "fogzo bench", BenchConfig.__doc__)
    find_device(config.device)  # before anything is written
    folder = config.output_dir
    folder.mkdir(parents=True, exist_ok=True)  # what cannot be written should fail at once
    if "export" in config.sections:
        from transformers.utils.logging import disable_progress_bar  # here, as it takes a second

        disable_progress_bar()  # of saving; it would go between the lines here
    with display.progress(len(config.sections), "measuring") as advance:
        results = run_suite(config, advance)
    write_text(folder / "results.json", dumps(results, indent=1) + "\n")
    plot(results, folder / "bench.svg")
    for table in views.tables(results):
        if not table.rows:  # the quick suite compiles nothing
            continue
        display.print_table(table, table.title)
        print(table.caption)
    print(f"results: {folder / 'results.json'}\nplot: {folder / 'bench.svg'}")
