"""Exported networks as their readers serve them, each in a process of its own."""

import multiprocessing
import os
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from fogzo_lab.bench.cases import NotHereError, reason

Serve = Callable[[Tensor], Tensor]
"""From token ids of shape (batch, length) to logits."""

# What readers import goes into a process that the others are copies of: then it is imported once,
# and is no part of what a network takes.
_IMPORTS = [
    "fogzo.export.transformers",
    "transformers.models.llama.modeling_llama",
    "accelerate",
    "compressed_tensors",
    "gguf",
    "onnxruntime",
    "fogzo_lab.bench.serving",
]

_PATIENCE = 10.0  # seconds


class Server:
    """A process that has loaded an exported LLaMA, and answers.

    Args:
        reader: One of `READERS`.
        folder: What was exported.
        tokens: Its first question, of shape (1, length).
        threads: Threads of the process.

    Attributes:
        load_seconds: From the files to a network. As all times here they are the process's own CPU
            time on one thread, so that other programs do not count, and those of a clock on more.
        resident_bytes: By how much the process's memory has grown with the network and its first
            answer; None where the system does not tell.
        logits: The first answer.

    Raises:
        NotHereError: If the reader cannot load or run it.
    """

    load_seconds: float
    resident_bytes: int | None
    logits: Tensor

    def __init__(self, reader: str, folder: Path, tokens: Tensor, threads: int) -> None:
        methods = multiprocessing.get_all_start_methods()
        method = "forkserver" if "forkserver" in methods else "spawn"
        context: Any = multiprocessing.get_context(method)
        if method == "forkserver":
            context.set_forkserver_preload(_IMPORTS)
        self._connection, theirs = context.Pipe()
        arguments = (theirs, reader, folder, tokens.tolist(), threads)
        self._process = context.Process(target=_serve, args=arguments, daemon=True)
        self._process.start()
        theirs.close()
        try:
            self.load_seconds, self.resident_bytes, logits = self._receive()
        except NotHereError:
            self.close()
            raise
        self.logits = torch.tensor(logits)

    def answer(self, length: int, calls: int) -> float:
        """The seconds of so many answers to so many of the first question's tokens."""
        self._connection.send((length, calls))
        seconds: float = self._receive()
        return seconds

    def close(self) -> None:
        """End the process."""
        with suppress(OSError):  # it may have ended
            self._connection.send(None)
        self._process.join(_PATIENCE)
        self._process.kill()
        self._process.join()
        self._connection.close()

    def __enter__(self) -> "Server":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _receive(self) -> Any:
        try:
            answer = self._connection.recv()
        except (EOFError, ConnectionResetError):
            raise NotHereError("its process ended") from None
        if isinstance(answer, str):
            raise NotHereError(answer)
        return answer


def _serve(
    connection: Connection, reader: str, folder: Path, tokens: list[list[int]], threads: int
) -> None:
    """Load, answer, say what that took, and answer until the process is ended."""
    torch.set_num_threads(threads)
    question = torch.tensor(tokens)
    clock = time.process_time if threads == 1 else time.perf_counter
    try:
        with warnings.catch_warnings(), torch.inference_mode():
            warnings.simplefilter("ignore")  # of readers
            before = _resident_bytes()
            began = clock()
            serve = READERS[reader](folder, threads)
            load_seconds = clock() - began
            logits = serve(question)
            after = _resident_bytes()
            grown = None if before is None or after is None else after - before
            connection.send((load_seconds, grown, logits.tolist()))
            while (request := connection.recv()) is not None:
                length, calls = request
                began = clock()
                for _ in range(calls):
                    serve(question[:, :length])
                connection.send(clock() - began)
    except Exception as error:
        connection.send(reason(error))


def _resident_bytes() -> int | None:
    """The memory of this process, what it shares with others included."""
    try:
        pages = Path("/proc/self/statm").read_text(encoding="ascii").split()[1]
    except OSError:
        return None
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def _transformers(folder: Path, threads: int) -> Serve:
    import fogzo.export.transformers  # noqa: F401  # registers the packed format

    return _of_transformers(folder)


def _gguf(folder: Path, threads: int) -> Serve:
    from fogzo.export.gguf import FILE

    return _of_transformers(folder, gguf_file=FILE, dtype=torch.float32)


def _of_transformers(folder: Path, **options: Any) -> Serve:
    from transformers import LlamaForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    torch.compiler.set_stance("force_eager")  # layers of bitnet compile themselves
    model: Any = LlamaForCausalLM.from_pretrained(folder, **options).eval()
    return lambda tokens: model(tokens, use_cache=False).logits


def _onnxruntime(folder: Path, threads: int) -> Serve:
    import onnxruntime

    from fogzo.export.onnx import FILE

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    providers = ["CPUExecutionProvider"]
    session = onnxruntime.InferenceSession(str(folder / FILE), options, providers=providers)
    (declared,) = session.get_inputs()
    return lambda tokens: torch.from_numpy(session.run(None, {declared.name: tokens.numpy()})[0])


READERS: dict[str, Callable[[Path, int], Serve]] = {
    "transformers": _transformers,
    "gguf in transformers": _gguf,
    "onnxruntime": _onnxruntime,
}
"""By name, what loads a folder."""
