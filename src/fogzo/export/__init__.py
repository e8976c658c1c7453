"""Files for the programs that serve low-bit networks, holding exactly what was trained.

`check` says what stands in the way of a format, `export` writes a model and reads it back, and
`load_` brings a folder in the packed format back into any torch model::

    import fogzo.export

    problems = fogzo.export.check(model, "packed")        # [], before training starts
    report = fogzo.export.export(model, "out", "packed")
    served = fogzo.export.load_(plain_model, "out")

A format is a line of `exporting.MODULES`, an entry of `format_table.FORMATS` that says which layers
it holds and as what, and a module of this package with two functions:

- ``write(source: Source, folder: Path) -> None`` writes its files into an empty folder. It finds
  ``source.layers[name].weight`` (an `IntegerWeight`, with steps rounded if that was asked for),
  ``.input`` (an `InputForm` or None), ``source.other_tensors()``, ``source.baked()`` and
  ``source.options``. What `holds` refuses never comes here, and ``holds.stored(source, name,
  format)`` is the type to write. `folder` writes config.json and model.safetensors.
- ``read_back(source: Source, folder: Path) -> ReadBack | None`` gives what the format's own reader
  makes of them. It lets the ImportError through where that reader is not installed, and gives None
  where it does not know the stored type yet.
"""

from fogzo.export.exporting import ExportReport, LayerReport, check, export, formats
from fogzo.export.packed import load_, unpack_

__all__ = ["ExportReport", "LayerReport", "check", "export", "formats", "load_", "unpack_"]
