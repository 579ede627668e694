"""megatron_prime's packaging: the plain install runs on a CPU, `[gpu]` adds the GPU stack."""

from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = (HERE / "megatron_prime" / "__init__.py").read_text().split('__version__ = "')[1]

setup(
    name="megatron_prime",
    version=VERSION.partition('"')[0],
    description="PRIME: reinforcement learning with implicit process rewards, on Megatron-core",
    long_description=(HERE / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["megatron_prime*"]),
    package_data={"megatron_prime": ["py.typed", "rollout/sglang_cpu/**"]},
    python_requires=">=3.11,<3.13",
    install_requires=[
        "torch>=2.11,<2.14",  # GPU builds of SGLang pin 2.11
        "megatron-core==0.16.1",  # runtime/compat.py is checked against this version
        "numpy",
        "aiohttp",  # to SGLang's servers
        "transformers>=5,<6",
        "tokenizers",
        "safetensors",
        "pydantic>=2.7",
        "jinja2",  # chat templates
        "math-verify[antlr4_9_3]==0.9.0",
        "mpmath",  # numbers of many digits
        "pyarrow",  # parquet
        "psutil",  # Megatron's dist_checkpointing hangs without it
        "tensorboard",
        "matplotlib",
        "rich",
    ],
    extras_require={
        "gpu": [
            "transformer-engine[pytorch]",
            "sglang==0.5.17",
        ],  # apex: from NVIDIA's source, optional
        "bench": ["trl==1.16.0"],  # what tests/bench measures against; nothing imports it here
        "dev": [
            "pytest",
            "pytest-timeout",
            "pytest-xdist",
            "ruff==0.17.5",
            "mypy==2.4.1",
            "import-linter==2.16",
        ],
    },
)
