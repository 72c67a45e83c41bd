"""Pack what vLLM needs to run on a machine without network into one archive of about 50 MiB.

    python scripts/pack_vllm.py --output FOLDER [--verify-python PYTHON]

The machine has Python 3.12 on x86-64, a GPU of compute capability 9.0, torch 2.11 or later (CUDA 13), Triton,
transformers, numpy, psutil and the like. The archive has vLLM's CUDA wheel without everything a dense Llama does not
run, its two libraries cut to machine code for that card, and the distributions that such a machine usually lacks.
There:

    mkdir -p /tmp/site && tar xJf FOLDER/vllm.tar.xz -C /tmp/site
    PYTHONPATH=/tmp/site:. python3 scripts/gpu_vllm.py --output FOLDER

The archive also names this project's plugin, whose package is found on PYTHONPATH. Everything in it keeps its
licence files; it is for carrying, not for publishing.
"""

import argparse
import lzma
import os
import shutil
import struct
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

VLLM = "vllm==0.32.0"
# What vLLM imports when it starts a text model, beyond what the machine has; versions that it was tried with.
DISTRIBUTIONS = """
    annotated-types==0.8.0 apache-tvm-ffi==0.1.15.post2 cachetools==8.0.2 cbor2==6.3.0 compressed-tensors==0.17.0
    distro==1.9.0 email-validator==2.4.0 fastapi==0.136.3 googleapis-common-protos==1.76.0 httpcore2==2.16.2
    httpx2==2.16.2 jiter==0.19.0 llguidance==1.7.6 loguru==0.7.3 msgspec==0.22.0 openai==3.57.0
    opentelemetry-api==1.45.2 opentelemetry-exporter-http-transport==0.66b2 opentelemetry-exporter-otlp==1.45.2
    opentelemetry-exporter-otlp-common==0.66b2 opentelemetry-exporter-otlp-proto-common==1.45.2
    opentelemetry-exporter-otlp-proto-grpc==1.45.2 opentelemetry-exporter-otlp-proto-http==1.45.2
    opentelemetry-proto==1.45.2 opentelemetry-sdk==1.45.2 opentelemetry-semantic-conventions==0.66b2
    opentelemetry-semantic-conventions-ai==0.5.1 oss-harmony==0.0.11 partial-json-parser==0.2.1.1.post7
    pybase64==1.5.1 pydantic==2.14.4 pydantic-core==2.50.5 pydantic-extra-types==2.11.1 python-multipart==0.0.34
    pyzmq==27.3.0 sniffio==1.3.1 starlette==1.10.0 truststore==0.10.5 typing-inspection==0.4.5 xgrammar==0.2.8
""".split()
GLIBC = (5, 12, 17, 24, 27, 28, 31, 34, 35)  # pip matches each exactly
PLATFORMS = [
    *(f"manylinux_2_{minor}_x86_64" for minor in GLIBC),
    "manylinux2014_x86_64",
    "manylinux2010_x86_64",
    "manylinux1_x86_64",
    "any",
]
PRUNED = ("vllm/_C_stable_libtorch.abi3.so", "vllm/vllm_flash_attn/_vllm_fa3_C.abi3.so")
KEPT_LIBRARIES = ("vllm/cumem_allocator.abi3.so", "vllm/fs_io_C.abi3.so", "vllm/spinloop.abi3.so")
LEFT_OUT_FOLDERS = (
    "vllm/model_executor/layers/fused_moe/configs",
    "vllm/model_executor/layers/quantization/utils/configs",
    "vllm/third_party/deep_gemm",
    "vllm/third_party/fmha_sm100",
    "vllm/third_party/tml_fa4",
)
CAPABILITY = 90
ENTRY_POINTS = "[vllm.general_plugins]\nlrqk = vllm_lrqk.plugin:register\n"
IMPORTS = """
import importlib, sys, torch
if not torch.cuda.is_available():  # take the CUDA platform without a card, so that its modules import too
    import types
    import triton.backends
    driver = types.SimpleNamespace(is_active=lambda: True)  # vLLM replaces Triton where no driver is active
    triton.backends.backends["none"] = types.SimpleNamespace(driver=driver, compiler=None)
    import vllm.platforms
    from vllm.platforms import cuda
    from vllm.platforms.interface import DeviceCapability
    class Absent(cuda.NonNvmlCudaPlatform):
        get_device_capability = classmethod(lambda cls, device_id=0: DeviceCapability(9, 0))
        get_device_name = classmethod(lambda cls, device_id=0: "none")
        get_device_total_memory = classmethod(lambda cls, device_id=0: 80 << 30)
        num_compute_units = classmethod(lambda cls, device_id=0: 132)
    vllm.platforms._current_platform = Absent()
import vllm
from vllm import LLM, SamplingParams
print("vllm", vllm.__version__, "torch", torch.__version__, "python", sys.version.split()[0])
for library in ("vllm._C_stable_libtorch", "vllm.vllm_flash_attn._vllm_fa3_C"):
    importlib.import_module(library)
for name in ("rms_norm", "fused_add_rms_norm", "silu_and_mul", "rotary_embedding", "reshape_and_cache_flash"):
    print(name, any(hasattr(getattr(torch.ops, space), name) for space in ("_C", "_C_cache_ops")))
for module in sys.argv[1:]:
    importlib.import_module(module)
from importlib.metadata import entry_points
print([point.value for point in entry_points(group="vllm.general_plugins") if point.name == "lrqk"])
"""
MODULES = """
    vllm.platforms.cuda vllm.v1.worker.gpu_worker vllm.v1.worker.gpu.model_runner vllm.v1.worker.gpu_model_runner
    vllm.v1.worker.gpu.warmup vllm.model_executor.models.llama vllm.v1.attention.backends.flash_attn
    vllm.v1.attention.backends.triton_attn vllm.v1.engine.core vllm.v1.sample.sampler vllm.compilation.backends
""".split()


def download(requirements: list[str], folder: Path) -> list[Path]:
    """Wheels of exactly these requirements for CPython 3.12 on x86-64 Linux."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary=:all:", "--python-version=3.12", "--implementation=cp", f"--dest={folder}"]
    command += [f"--abi={abi}" for abi in ("cp312", "abi3", "none")] + [f"--platform={name}" for name in PLATFORMS]
    subprocess.run([*command, *requirements], check=True)
    return sorted(folder.glob("*.whl"))


def wanted_of_vllm(name: str) -> bool:
    """Whether a file of vLLM's wheel goes into the archive."""
    if name.startswith(LEFT_OUT_FOLDERS) or name.startswith("vllm/vllm-rs") or name.endswith("/RECORD"):
        return False
    if ".so" in Path(name).suffixes:
        return name in PRUNED + KEPT_LIBRARIES
    return True


def wanted(name: str) -> bool:
    """Whether a file of any other wheel goes into the archive: no tests, headers, static libraries, stubs."""
    parts = Path(name).parts
    return not ({"tests", "include", "docs"} & set(parts) or Path(name).suffix in {".a", ".pyi", ".pyx", ".cc", ".h"})


def unpack(wheel: Path, site: Path, choose=wanted) -> None:
    """Unpack the chosen files of a wheel as pip's `--target` would place them."""
    with zipfile.ZipFile(wheel) as archive:
        for member in archive.infolist():
            if member.is_dir() or not choose(member.filename):
                continue
            parts = Path(member.filename).parts
            if parts[0].endswith(".data"):
                if parts[1] not in {"purelib", "platlib"}:
                    continue
                parts = parts[2:]
            target = site.joinpath(*parts)
            target.parent.mkdir(parents=True, exist_ok=True)
            with archive.open(member) as source, target.open("wb") as sink:
                shutil.copyfileobj(source, sink)


def prune_machine_code(library: Path, capability: int) -> str:
    """Keep one capability's machine code of a library's CUDA fatbins, in place; the rest becomes zeros.

    A fatbin is a header (magic, version, header size, size) and entries (kind, version, header size, payload size,
    ..., capability at byte 28); kind 2 is machine code. Entries are moved, never changed, so their compression stays.

    Raises:
        ValueError: an entry reaches beyond its fatbin, or nothing was kept.
    """
    data = bytearray(library.read_bytes())
    magic, at, fatbins, kept, dropped = struct.pack("<I", 0xBA55ED50), 0, 0, 0, 0
    while (at := data.find(magic, at)) >= 0:
        _, version, header, size = struct.unpack_from("<IHHQ", data, at)
        if version != 1 or header != 16 or at + header + size > len(data):
            at += 4  # these four bytes are something else
            continue
        start = position = at + header
        end, entries = start + size, []
        while position < end:
            kind, _, entry_header, payload = struct.unpack_from("<HHIQ", data, position)
            length = entry_header + payload
            if kind not in (1, 2, 4, 8) or position + length > end:
                raise ValueError(f"{library.name}: no fatbin entry at byte {position}.")
            if kind == 2 and struct.unpack_from("<I", data, position + 28)[0] == capability:
                entries.append(bytes(data[position : position + length]))
                kept += length
            else:
                dropped += length
            position += length
        code = b"".join(entries)
        data[start:end] = code + bytes(end - start - len(code))
        struct.pack_into("<Q", data, at + 8, len(code))
        fatbins, at = fatbins + 1, end
    if not kept:
        raise ValueError(f"{library.name}: no machine code for capability {capability}.")
    library.write_bytes(data)
    return f"{library.name}: {fatbins} fatbins, {kept / 1e6:.1f} MB kept, {dropped / 1e6:.1f} MB dropped"


def write_plugin(site: Path) -> None:
    """Metadata by which vLLM finds this project's plugin without an installation."""
    folder = site / "vllm_lrqk-0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm-lrqk\nVersion: 0\n")
    (folder / "entry_points.txt").write_text(ENTRY_POINTS)


def compress(site: Path, archive: Path) -> None:
    """A .tar.xz of the folder's contents: sorted by suffix and name, so that similar files are neighbours."""
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": 128 << 20}]
    files = sorted((path for path in site.rglob("*") if path.is_file()), key=lambda path: (path.suffix, str(path)))
    with lzma.open(archive, "wb", filters=filters) as stream, tarfile.open(fileobj=stream, mode="w|") as tar:
        for path in files:
            tar.add(path, path.relative_to(site).as_posix())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for vllm.tar.xz")
    parser.add_argument("--cache", type=Path, help="folder that keeps the wheels for the next time")
    parser.add_argument("--site", type=Path, help="folder to lay the files out in (default: a temporary one)")
    parser.add_argument(
        "--verify-python",
        help="a Python 3.12 with the torch of that machine, which imports the result before it is packed "
        "(without a driver, LD_LIBRARY_PATH must name a folder with some libcuda.so.1)",
    )
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        cache = arguments.cache or Path(scratch) / "wheels"
        site = arguments.site or Path(scratch) / "site"
        shutil.rmtree(site, ignore_errors=True)
        site.mkdir(parents=True)
        for wheel in download([VLLM], cache / "vllm"):
            unpack(wheel, site, wanted_of_vllm)
        for wheel in download(DISTRIBUTIONS, cache / "others"):
            unpack(wheel, site)
        for name in PRUNED:
            print(prune_machine_code(site / name, CAPABILITY), flush=True)
        write_plugin(site)
        if arguments.verify_python:
            project = Path(__file__).resolve().parent.parent
            environment = os.environ | {
                "PYTHONPATH": f"{site}:{project}",
                "HOME": scratch,
                "PYTHONDONTWRITEBYTECODE": "1",
            }
            subprocess.run([arguments.verify_python, "-c", IMPORTS, *MODULES], env=environment, check=True)
        archive = arguments.output / "vllm.tar.xz"
        compress(site, archive)
        for path in sorted(site.iterdir(), key=lambda path: path.name.lower()):
            size = sum(file.stat().st_size for file in path.rglob("*")) if path.is_dir() else path.stat().st_size
            if size > 1 << 20:
                print(f"{size / 2**20:8.1f} MiB unpacked  {path.name}")
        print(f"{archive}: {archive.stat().st_size / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
