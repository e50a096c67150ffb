"""Package description of csm_fast. Tool settings live in pyproject.toml."""

import os
import re
from pathlib import Path
from typing import Any

from setuptools import find_packages, setup
from setuptools.command.editable_wheel import editable_wheel

ROOT = Path(__file__).parent.resolve()
PACKAGES = {"csm_fast": "csm_fast", "csm_kernels": "kernels/csm_kernels"}
VERSION = re.search(r'__version__ = "(.+?)"', (ROOT / "csm_fast/system/version.py").read_text(encoding="utf-8")).group(
    1
)


def find_all(top: str, folder: str) -> list[str]:
    """A package and the packages in it, by dotted name."""
    return [top, *(f"{top}.{name}" for name in find_packages(str(ROOT / folder)))]


class EditableWheel(editable_wheel):
    """``pip install -e``: puts a folder with a link to each package on the path.

    setuptools' own way, for packages in several folders, is a finder that comes after the path. A script beside the
    clone has a folder ``csm_fast`` on its path, the clone, which Python then takes for a package without code.
    """

    def _select_strategy(self, name: str, tag: str, build_lib: Any) -> Any:
        try:
            from setuptools.command.editable_wheel import _StaticPth

            links = ROOT / ".links"
            links.mkdir(exist_ok=True)
            for package, folder in PACKAGES.items():
                link = links / package
                if not link.is_symlink():
                    link.symlink_to(os.path.relpath(ROOT / folder, links), target_is_directory=True)
            return _StaticPth(self.distribution, name, [links])
        except (ImportError, OSError):  # another setuptools, or a file system without links
            return super()._select_strategy(name, tag, build_lib)


setup(
    name="csm_fast",
    version=VERSION,
    description="Fast fine-tuning of Sesame's CSM (Conversational Speech Model)",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=[name for top, folder in PACKAGES.items() for name in find_all(top, folder)],
    # No top-level package named `kernels`: it would shadow Hugging Face's.
    package_dir=PACKAGES,
    cmdclass={"editable_wheel": EditableWheel},
    package_data={"csm_fast": ["py.typed"], "csm_kernels.cpu": ["src/*.cpp", "src/*.h"]},
    install_requires=[
        "torch>=2.11",
        "numpy>=1.26",
        "safetensors>=0.4.5",
        "huggingface_hub>=0.30",
        "transformers>=4.52.1",  # Mimi; CSM, the oracle of the tests, since 4.52
        "tokenizers>=0.21",
        "tiktoken>=0.7",
        "soundfile>=0.12",
        "soxr>=0.5",
        "pyarrow>=15",
        "pyyaml>=6",
        "tqdm>=4.66",
        "matplotlib>=3.8",
    ],
    extras_require={
        "gpu": ["liger-kernel>=0.6", "torchaudio>=2.11"],
        "flash": ["flash-attn>=2.8"],  # a source build: alone, so that it breaks nothing
        "qlora": ["bitsandbytes>=0.48", "peft>=0.17"],
        "dev": [
            "triton>=3.4; sys_platform == 'linux'",
            "pytest>=8",
            "pytest-benchmark>=5",
            "pytest-timeout>=2.3",
            "pytest-xdist>=3.6",
            "ruff>=0.14",
            "mypy>=1.18",
            "import-linter>=2.1",
            "types-PyYAML",
        ],
    },
    entry_points={
        "console_scripts": [
            "csm-fast = csm_fast.cli:main",
            "csm-fast-train = csm_fast.cli:train_main",
        ]
    },
    classifiers=[
        "Programming Language :: Python :: 3",
        "Topic :: Multimedia :: Sound/Audio :: Speech",
    ],
)
