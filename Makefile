# Every target works from a fresh clone: what it needs is installed into .venv first.
PYTHON ?= python3
BIN := .venv/bin
.DEFAULT_GOAL := help

# What `make fast` runs: every loss on both backends against the oracle, alignment, collator,
# configuration, and training steps against eager float64 ones, in one family and across two.
FAST := \
	tests/packaging/test_layout.py \
	tests/jsd/test_reference.py \
	tests/jsd/test_linear_jsd.py::test_bfloat16_inputs_meet_the_absolute_precision_targets \
	tests/jsd/test_linear_jsd.py::test_near_convergence_the_loss_and_gradient_are_still_right \
	tests/jsd/test_linear_jsd.py::test_any_chunk_size_gives_the_same_answer \
	tests/jsd/test_linear_jsd.py::test_metrics_are_those_of_the_oracle_and_carry_no_graph \
	tests/jsd/test_linear_jsd.py::test_float64_passes_gradcheck \
	tests/losses/test_formula_losses.py::test_loss_and_gradients_are_within_the_budget_of_eager \
	tests/uld/test_reference_uld.py \
	tests/uld/test_linear_uld.py::test_the_torch_backend_is_the_oracle \
	tests/uld/test_linear_uld.py::test_16_bit_inputs_lose_what_their_gemms_lose \
	tests/uld/test_linear_uld.py::test_metrics_are_those_of_the_oracle \
	tests/tokens/test_alignment.py \
	tests/tokens/test_completion_aligner.py::test_any_text_is_aligned_to_its_last_byte \
	tests/trainer/test_collator.py \
	tests/trainer/test_trainer_config.py \
	tests/trainer/test_gold_trainer.py::test_accumulation_changes_neither_loss_nor_gradient \
	tests/trainer/test_cross_family.py::test_off_policy_step_equals_the_eager_float64_step

# files side by side, in the order of tests/conftest.py: xdist's own begins with those of many tests
SIDE_BY_SIDE := -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

.PHONY: help demo test fast fuzz soak sweep matrix lint types served-teacher coverage bench docs clean

help:  ## the targets
	@sed -n 's/^\([a-z-]*\):[^#]*## /make \1\t/p' $(MAKEFILE_LIST) | expand -t 22

demo: .venv/installed-demo  ## handwritten digits: a teacher learns, a student learns from it; no download
	$(BIN)/python -m gold_trainer demo

test:  ## linter, types and all tests: what CI runs
	$(MAKE) -j2 lint types .venv-vllm/installed  # two environments are installed side by side
	$(BIN)/python -m pytest $(SIDE_BY_SIDE)

fast: .venv/installed-dev  ## the tests to run after every change
	$(BIN)/python -m pytest -q $(FAST)

fuzz: .venv/installed-dev  ## random calls of the losses against the oracle, chat templates against inference
	cd tests && ../$(BIN)/python -m support.fuzz --backend torch --seconds 60
	cd tests && ../$(BIN)/python -m support.fuzz --backend triton --seconds 60
	GOLD_TEMPLATE_EXAMPLES=1000 $(BIN)/python -m pytest -q tests/trainer/test_real_templates.py \
		tests/trainer/test_pairs_of_real_templates.py

lint: .venv/installed-dev  ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/installed-dev .venv/typing/gold_trainer  ## mypy on both packages
	$(BIN)/mypy

soak: .venv/installed-dev  ## a run that is killed 20 times ends with the weights of one that was not
	cd tests && OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 ../$(BIN)/python -m support.soak 20

sweep: .venv/installed-dev  ## every architecture of transformers, tiny, against eager steps; writes docs/models.md
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python benchmarks/sweep_models.py

matrix: .venv/installed-dev  ## every student, loss, rows and run under every engine; writes docs/hardware.md's table
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python benchmarks/engine_matrix.py

served-teacher: .venv/installed-dev .venv-vllm/installed  ## a teacher behind vLLM's own server, on a CPU
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest tests/vllm_environment/served_teacher.py

coverage: .venv/installed-dev .venv-vllm/installed  ## all tests with a report; see CONTRIBUTING for what it cannot see
	$(BIN)/python -m pytest $(SIDE_BY_SIDE) \
		--cov --cov-report=term:skip-covered --cov-report=html:build/coverage

bench: .venv/installed-dev  ## small benchmarks, on any machine; records nothing
	$(BIN)/python -m pytest benchmarks/test_speed_of_jsd.py \
		--benchmark-only --benchmark-group-by=param:head,param:n
	$(BIN)/python -m pytest benchmarks/test_speed_of_uld.py \
		--benchmark-only --benchmark-group-by=param:sizes,param:n
	$(BIN)/python benchmarks/bench_jsd.py --tiny --only gold_kernels eager
	$(BIN)/python benchmarks/bench_uld.py --tiny

docs: .venv/installed-docs  ## the site, into build/site
	$(BIN)/mkdocs build --strict

clean:  ## remove what the other targets made
	rm -rf .venv .venv-vllm runs build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .benchmarks .coverage*

# installed-NAME: the extra NAME of setup.py is installed
.venv/installed-%: setup.py
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -e '.[$*]'
	touch $@

# a vLLM server for its tests; it pins a torch of its own, and does without audio
VLLM_FILES := $(addprefix tests/vllm_environment/,requirements.txt torchvision_operators.py torchvision_operators.pth)
.venv-vllm/installed: $(VLLM_FILES)
	$(PYTHON) -m venv --clear .venv-vllm
	.venv-vllm/bin/python -m pip install --quiet -r tests/vllm_environment/requirements.txt
	.venv-vllm/bin/python -m pip uninstall --quiet -y torchaudio torchcodec
	cp tests/vllm_environment/torchvision_operators.* .venv-vllm/lib/python*/site-packages/
	touch $@

# the folder is trainer/, the import name gold_trainer: mypy finds it by this link
.venv/typing/gold_trainer: | .venv/installed-dev
	mkdir -p $(@D)
	ln -sfn ../../trainer $@
