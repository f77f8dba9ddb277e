"""Builds the C++ kernels: one shared object for every Python and every torch from 2.10 on. See pyproject.toml too."""

import os
import platform
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

SOURCES = Path("src/batchnorm/ops/csrc")
X86 = platform.machine() in ("x86_64", "AMD64")
FLAGS = {  # the leaf loops, once per instruction set
    "leaves_avx2.cpp": ["-mavx2", "-mfma", "-mf16c"],
    "leaves_avx512.cpp": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c"],
    "leaves_avx512_bf16.cpp": [
        "-mavx512f",
        "-mavx512bw",
        "-mavx512dq",
        "-mavx512vl",
        "-mfma",
        "-mf16c",
        "-mavx512bf16",
    ],
}
OPTIMIZE = ["-O3", "-g0"]
if os.environ.get("BATCHNORM_SANITIZE"):  # make sanitize
    OPTIMIZE = ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
FILES = ["ops.cpp", "leaves_generic.cpp", *(FLAGS if X86 else [])]


class BuildKernels(build_ext):
    """Per-file flags, files side by side; a file name of no Python version, as no Python symbol is used."""

    def build_extension(self, extension: Extension) -> None:
        from torch.utils.cpp_extension import include_paths, library_paths

        extension.include_dirs += include_paths()
        extension.library_dirs += library_paths()
        compile_one, compile_all = self.compiler._compile, self.compiler.compile
        pool, running = ThreadPoolExecutor(os.cpu_count()), []

        def start(obj, source, suffix, common, extra, macros):  # type: ignore[no-untyped-def]
            flags = [*extra, *FLAGS.get(Path(source).name, [])]
            running.append(pool.submit(compile_one, obj, source, suffix, common, flags, macros))

        def all_at_once(*args, **kwargs):  # type: ignore[no-untyped-def]
            objects = compile_all(*args, **kwargs)
            for one in running:
                one.result()
            return objects

        self.compiler._compile, self.compiler.compile = start, all_at_once
        super().build_extension(extension)

    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join(*fullname.split(".")) + ".so"


class AnyPythonWheel(bdist_wheel):
    """Tagged with the platform alone, for the same reason."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(
    ext_modules=[
        Extension(
            "batchnorm.ops._kernels",
            [str(SOURCES / file) for file in FILES],
            depends=[str(path) for path in SOURCES.glob("*.h")],
            define_macros=[("TORCH_TARGET_VERSION", "0x020a000000000000")],  # the interface of torch 2.10
            extra_compile_args=["-std=c++20", "-fvisibility=hidden", "-Wno-psabi", *OPTIMIZE],
            extra_link_args=[flag for flag in OPTIMIZE if "sanitize" in flag],
            libraries=["torch_cpu", "torch"],
            optional=True,  # without a compiler the package runs on torch's kernels, and says so
        )
    ],
    cmdclass={"build_ext": BuildKernels, "bdist_wheel": AnyPythonWheel},
)
