"""llama.cpp's server in this process, as xllamacpp offers it: loaded, silent, and reachable by nobody else.

Its HTTP listener can't be switched off, and rendering and tokenising are offered there alone. It is bound to the loopback address on
a random port and asks for a random key. llama.cpp's own log is off, so no prompt reaches stdout, stderr or a file.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import logging
import os
import queue
import secrets
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pipeline.errors import EngineError
from pipeline.rating_tree import Ids
from pipeline.records import Message

# Threads that wait for one another by spinning lose whole time slices as soon as anything else wants a core. OpenMP reads this once,
# when it is loaded; it is taken back so that other libraries keep their own way.
_WAIT = os.environ.get("OMP_WAIT_POLICY")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
import xllamacpp  # noqa: E402

if _WAIT is None:
    del os.environ["OMP_WAIT_POLICY"]

SEED = 42
_LOAD = "import sys, xllamacpp as x; p = x.CommonParams(); p.model.path = sys.argv[1]; p.verbosity = 1; p.n_ctx = 256; p.fit_params = False"
_SHARED, _WORTH_SHARING = "shared.bin", 16  # file name; tokens

logger = logging.getLogger(__name__)
_In = TypeVar("_In")
_Out = TypeVar("_Out")


class Server:
    """One model in memory, `parallel` slots of `row_tokens` tokens each."""

    def __init__(self, model: Path, adapter: Path | None, row_tokens: int, parallel: int, threads: int) -> None:
        self.row_tokens, self.parallel = row_tokens, parallel
        self._key = secrets.token_hex(16)
        self._ran = False  # whether the loop that does the work has answered once
        params = xllamacpp.CommonParams()
        params.model.path = str(model)
        params.n_ctx, params.n_parallel = row_tokens * parallel, parallel
        for cpu in (params.cpuparams, params.cpuparams_batch):
            cpu.n_threads, cpu.poll = threads, 0
        params.verbosity = -1  # nothing on stdout or stderr
        params.hostnames, params.port, params.api_keys = ["127.0.0.1"], 0, [self._key]
        params.n_threads_http = 2
        params.ui = params.endpoint_slots = params.endpoint_props = params.endpoint_metrics = False
        params.fit_params = params.warmup = False
        params.cache_ram_mib, params.cache_idle_slots = 0, False  # a slot's own cache holds the shared beginning; copies only cost memory
        self._folder = tempfile.TemporaryDirectory(prefix="pipeline-cache-")
        params.slot_save_path = self._folder.name + os.sep
        if adapter is not None:
            params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(adapter), 1.0)]
        try:
            self._server: Any = xllamacpp.Server(params)
        except RuntimeError as error:
            self._folder.cleanup()
            raise EngineError(
                f"{model}: llama.cpp can't load it: {_why_not_loaded(model, adapter) or error}",
                hint="choose another GGUF, or one of an architecture that this version of llama.cpp knows",
            ) from error
        logger.debug("loaded %s: %d rows of %d tokens, %d threads", model.name, parallel, row_tokens, threads)

    def generate(self, ids: Sequence[int], max_tokens: int, *, slot: int = 0, **options: Any) -> Any:
        """llama.cpp's reply as it is; `{"error": …}` when it refused."""
        self._ran = True
        request = {"prompt": list(ids), "n_predict": max_tokens, "id_slot": slot, "seed": SEED, "cache_prompt": True, **options}
        try:
            return self._server.handle_completions(request)
        except (RuntimeError, ValueError) as error:
            raise EngineError(f"llama.cpp failed: {error}") from error

    def share(self, beginning: Ids, slots: int) -> None:
        """Reads the tokens that all coming prompts begin with once, in slot 0, and copies what that gave to the other slots."""
        if slots < 2 or len(beginning) < _WORTH_SHARING:
            return
        self.generate(beginning, 1, temperature=0.0)
        kept = Path(self._folder.name) / _SHARED
        try:
            self._post("/slots/0?action=save", {"filename": _SHARED})
            for slot in range(1, slots):
                self._post(f"/slots/{slot}?action=restore", {"filename": _SHARED})
        except EngineError as error:
            logger.warning("every slot reads the shared beginning by itself, which takes longer: %s", error)
        finally:
            kept.unlink(missing_ok=True)

    def render(self, messages: Sequence[Message]) -> str:
        asked = [{"role": message.role, "content": message.content} for message in messages]
        return str(self._post("/apply-template", {"messages": asked, "add_generation_prompt": True})["prompt"])

    def tokenize(self, text: str, *, special: bool, add_special: bool = False) -> Ids:
        return tuple(self._post("/tokenize", {"content": text, "add_special": add_special, "parse_special": special})["tokens"])

    def detokenize(self, ids: Sequence[int]) -> str:
        return str(self._post("/detokenize", {"tokens": list(ids)})["content"])

    def _post(self, path: str, body: Mapping[str, Any]) -> Any:
        """What only the listener offers. http.client, since it heeds no proxy settings."""
        connection = http.client.HTTPConnection(self._server.listening_address.removeprefix("http://"), timeout=60)
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {self._key}"}
        try:
            connection.request("POST", path, json.dumps(body), headers)
            reply = json.loads(connection.getresponse().read())
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise EngineError(f"llama.cpp's {path} failed: {error}") from error
        finally:
            connection.close()
        if "error" in reply:
            raise EngineError(f"llama.cpp's {path} failed: {reply['error'].get('message', 'no reason given')}")
        return reply

    def close(self) -> None:
        if not self._ran and self._server is not None:
            # a loop that is told to end before it has begun never ends: one token shows that it has
            with contextlib.suppress(EngineError):
                self.generate((0,), 1)
        self._server = None  # its destructor ends the threads and frees the memory
        self._folder.cleanup()


def _why_not_loaded(model: Path, adapter: Path | None) -> str:
    """llama.cpp's own reason, which only its log holds: the load is tried once more where its log can be read."""
    tried = _LOAD + "\nif len(sys.argv) > 2: p.lora_adapters = [x.CommonAdapterLoraInfo(sys.argv[2], 1.0)]\nx.Server(p)"
    command = [sys.executable, "-c", tried, str(model), *([str(adapter)] if adapter else [])]
    try:
        log = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=120, check=False).stderr
    except (OSError, subprocess.TimeoutExpired):
        return ""
    reasons = [line.split(": ", 1)[-1].strip() for line in log.splitlines() if " E " in line[:24]]
    return reasons[0] if reasons else ""


def side_by_side(work: Callable[[_In, int], _Out], items: Sequence[_In], slots: int) -> Iterator[_Out]:
    """What `work(item, slot)` gives, in the order done, with one thread a slot; the first exception ends it all."""
    todo: queue.SimpleQueue[_In] = queue.SimpleQueue()
    done: queue.SimpleQueue[_Out | BaseException] = queue.SimpleQueue()
    stopped = threading.Event()
    for item in items:
        todo.put(item)

    def run(slot: int) -> None:
        try:
            while not stopped.is_set():
                done.put(work(todo.get_nowait(), slot))
        except queue.Empty:
            return
        except BaseException as error:  # noqa: BLE001  handed over to the caller's thread
            done.put(error)

    threads = [threading.Thread(target=run, args=(slot,), name=f"row-{slot}") for slot in range(min(slots, len(items)))]
    for thread in threads:
        thread.start()
    try:
        for _ in items:
            result = done.get()
            if isinstance(result, BaseException):
                raise result
            yield result
    finally:
        stopped.set()
        for thread in threads:
            thread.join()
