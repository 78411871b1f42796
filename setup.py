"""Builds fastmae._C through CMake; everything else about the package is in pyproject.toml."""

import os
import subprocess
import sys
from pathlib import Path

import pybind11
from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        build = Path(self.build_temp).resolve()
        build.mkdir(parents=True, exist_ok=True)
        configure = [
            "cmake",
            "-S", str(ROOT),
            "-B", str(build),
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target.parent}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        ]  # fmt: skip
        subprocess.run(configure, check=True)
        subprocess.run(["cmake", "--build", str(build), "--parallel", str(os.cpu_count() or 1)], check=True)


# `kernels/` and `benchmarks/` stand beside the package in the repository and are installed inside it; top-level ones
# would collide with other distributions' of those names.
BESIDE = [f"fastmae.{name}" for name in find_packages(include=["kernels*", "benchmarks*"])]

setup(
    ext_modules=[Extension("fastmae._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
    packages=find_packages(include=["fastmae*"]) + BESIDE,
    package_dir={"fastmae.kernels": "kernels", "fastmae.benchmarks": "benchmarks"},
    package_data={
        "fastmae": [
            "py.typed",
            "_C.pyi",
            "ops/attention_table.json",
            "commands/verify_report.html.jinja",
            "report/page.*",
            "export/card.md.jinja",
            "serve/page.html",
        ],
        "fastmae.benchmarks": ["report.html.jinja"],
    },
    include_package_data=False,  # what MANIFEST.in adds to the sdist, such as measured results, is not for the wheel
)
