"""Metadata and dependencies of semseg-automl; settings of ruff, mypy and pytest are in pyproject.toml."""

from __future__ import annotations

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent


def read_version() -> str:
    """Return the version that semseg_automl/version.py states, read as text: importing needs torch.

    Raises:
        RuntimeError: the file has no line of the form ``__version__ = "1.2.3"``.
    """
    path = ROOT / "semseg_automl" / "version.py"
    match = re.search(r'^__version__ = "([^"]+)"$', path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    if match is None:
        raise RuntimeError(f'{path} has no line of the form __version__ = "1.2.3"; add one')
    return match.group(1)


# Each bound with its reason. "NumPy 2": the first release built for NumPy 2, which OpenCV 5 asks for.
# "Tried": the oldest release with which the tests were run. An upper bound without a word is the next major
# version, unseen as yet.
INSTALL_REQUIRES = [
    # Below 2.10: torch.load(weights_only=True) has known holes. The upper bound keeps pip from swapping an
    # installed CPU build for the newest CUDA one.
    "torch>=2.10,<2.14",
    # Asked for by timm, lightning and segment-anything, not by us. Each release pins one torch exactly
    # (0.25 has 2.10, 0.28 has 2.13), so the two ranges move together: they resolve to a CPU torch where only
    # that is offered.
    "torchvision>=0.25,<0.29",
    # 2.6.2 and 2.6.3 were malicious uploads (GHSA-w37p-236h-pfx3); 2.6.6 is tried.
    "lightning>=2.6.6,<3",
    # Tried.
    "timm>=1.0.9,<2",
    # timm fetches weights by it; we import its errors by name. 2.4 is tried, 0.25 documents them.
    "huggingface_hub>=0.25,<3",
    # The only release there is.
    "segment-anything>=1.0,<2",
    # 1.6 brought Metric.merge_state, with which scores of two halves are joined.
    "torchmetrics>=1.6,<2",
    # NumPy 2.
    "numpy>=2.0,<3",
    # NumPy 2.
    "scipy>=1.13,<2",
    # NumPy 2.
    "pandas>=2.2.2,<4",
    # NumPy 2.
    "scikit-learn>=1.4.2,<2",
    # 4.11 brought IMREAD_COLOR_RGB. Headless: the other build brings the libraries of windows, which a server does
    # not need (CONTRIBUTING.md).
    "opencv-python-headless>=4.11,<6",
    # 11.0 counts the reduced copy inside a TIFF as a second page; with 11.3 all tests pass but the one of Pillow's own
    # size limit for WebP and TIFF, which came with 13. No upper bound: a major comes every year, for a dropped Python.
    "pillow>=11.3",
    # Keeps the race of a search, and draws configurations. 5.0 is tried.
    "optuna>=5,<6",
    # Optuna keeps its files by it; we import its errors by name. 2.0 is what Optuna's documentation uses.
    "sqlalchemy>=2,<3",
    # Fills in the page of the report; torch asks for it, too. Tried.
    "jinja2>=3.1,<4",
    # Writes TensorBoard's files in a hundredth of the space that TensorBoard itself takes; 2.6.2 goes with NumPy 2.
    "tensorboardX>=2.6.2,<3",
    # 6.0 does not build from source with today's Cython.
    "pyyaml>=6.0.1,<7",
    # Tried.
    "safetensors>=0.4.3,<1",
    # Tried.
    "pydantic>=2.7,<3",
    # Up to 0.25 it imports names that click 8.5 calls deprecated; 0.26 needs no click.
    "typer>=0.26,<1",
    # What typer 0.26 asks for. No upper bound: majors come often, and change little of tables and progress bars.
    "rich>=13.8",
]

# Its SAM is the reference for the second naming of SAM's weights, and one to compare with; nothing in the package
# imports it. 5.23 is tried.
TRANSFORMERS = "transformers>=5.23,<6"

# Tools: the versions in use, the exact ones stand in .ci/constraints.txt.
EXTRAS_REQUIRE = {
    "test": [
        "pytest>=9,<10",
        # A stuck data loader fails with a stack instead of hanging the run.
        "pytest-timeout>=2.4,<3",
        # Property tests.
        "hypothesis>=6.100,<7",
        "ruff>=0.17,<1",
        "mypy>=2,<3",
        # What mypy --strict knows of yaml and of pandas 3, the pandas in the constraints.
        "types-PyYAML>=6.0.12,<7",
        "pandas-stubs>=3,<4",
        # test_packaging builds a wheel without the network; before 70.1 that needed the package `wheel`, too.
        "setuptools>=70.1",
        TRANSFORMERS,
    ],
    # The U-Net that benchmarks compare with; nothing in the package imports it.
    "bench": ["segmentation-models-pytorch>=0.6,<1", TRANSFORMERS],
}

setup(
    name="semseg-automl",
    version=read_version(),
    description="Semantic segmentation from a table of images: few-parameter fine-tuning in one command",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    # 3.11: the oldest Python the tests run on.
    python_requires=">=3.11",
    # presets/ lies at the top of the repository, where people look for it, and travels inside the package.
    packages=[*find_packages(include=["semseg_automl", "semseg_automl.*"]), "semseg_automl.presets"],
    package_dir={"semseg_automl.presets": "presets"},
    package_data={"semseg_automl": ["py.typed", "report_page.html"], "semseg_automl.presets": ["*.yaml"]},
    install_requires=INSTALL_REQUIRES,
    extras_require=EXTRAS_REQUIRE,
    entry_points={"console_scripts": ["semseg-automl = semseg_automl.cli:main"]},
    classifiers=[
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3 :: Only",
        "Programming Language :: Python :: 3.11",
        "Topic :: Scientific/Engineering :: Image Recognition",
        "Typing :: Typed",
    ],
)
