# Each target is one command a person may want; nothing here is needed to build.
.PHONY: demo test test-fast test-browser screenshots test-faults test-compose fault-report check proto docs model-check bug-gate leak-check sanitized fuzz bench bench-handoff bench-batching bench-idle bench-gap bench-memory bench-arrivals bench-quality bench-transfer bench-scheduler bench-engine bench-simulate bench-router bench-http-load test-gpu bench-gpu bench-opponents kernels-report checkpoint pico clean

demo:            ## the main job once, on the built-in model
	scripts/demo

test:            ## the tests; those marked long are in test-faults
	scripts/test

test-fast:       ## without the end-to-end tests
	scripts/test --ignore=tests/e2e

test-browser:    ## the playground in a browser, at real fleets; installs Chromium (Debian's package) and Playwright
	scripts/browser
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest tests/browser

screenshots:     ## docs/images/playground*.png and top.png, of real fleets
	scripts/browser
	OMP_NUM_THREADS=1 .venv/bin/python -m tests.browser.screenshots

test-faults:     ## real processes killed, frozen, drained and flooded: those that take minutes
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest tests/faults/proc tests/faults/proc/long
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest -m long tests --ignore=tests/faults/proc

test-compose:    ## compose.yaml brought up in a Docker engine, hurt, and asked; about a quarter of an hour
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest -s tests/compose

fault-report:    ## eight clients while workers are killed and frozen: wrong tokens, lost requests, recovery (ten minutes)
	.venv/bin/python -m tests.faults.report

check:           ## format, lint, types, protos
	scripts/check

proto:           ## splitfire/v1 from proto/
	scripts/genproto

model-check:     ## every order of events of a hand-off, every crash of the simulator (minutes)
	.venv/bin/python -m tests.model.explore
	.venv/bin/python -m tests.model.crashes

bug-gate:        ## twelve bugs planted, each caught
	.venv/bin/python -m tests.model.bugs

leak-check:      ## 10 000 transfers over each transport, three in ten aborted: nothing may stay behind (a minute)
	.venv/bin/python -m tests.kvtransfer.leaks 10000

sanitized:       ## the compiled code under AddressSanitizer and UBSan (four minutes)
	scripts/sanitized

fuzz:            ## a minute of hostile frames and messages, other ones each time
	.venv/bin/python -m tests.kvtransfer.fuzz 60

docs:            ## the pages that are printed from code
	.venv/bin/python -m kvtransfer.protocol > docs/protocol.md
	.venv/bin/python -m splitfire.core.flags > docs/settings.md
	.venv/bin/python -m tests.faults.matrix > docs/faults.md
	.venv/bin/python -m tests.api_page > docs/api.md

bench: bench-handoff bench-batching bench-idle bench-gap bench-memory bench-arrivals bench-quality bench-transfer bench-scheduler bench-engine   ## all benchmarks, into benchmarks/results/

kernels-report:  ## every Triton kernel compiled ahead for sm_90, sm_80 and gfx942: registers, spills, shared memory
	TRITON_DEFAULT_FP_FUSION=1 .venv/bin/python -m benchmarks.kernels

test-gpu:        ## the tests that want a GPU, with kernels compiled, not interpreted
	TRITON_INTERPRET=0 .venv/bin/python -m pytest -m gpu

# On a machine with a GPU: nine minutes. GPU=--dry only shows that it all runs, on a CPU.
bench-gpu:       ## every kernel against fp32 and beside its opponents and floors, the step, the hand-off; needs a GPU
	.venv/bin/python -m benchmarks.gpu $(GPU)

bench-quality:
	.venv/bin/python -m benchmarks.quality

bench-arrivals: checkpoint
bench-handoff bench-batching bench-idle bench-gap bench-memory bench-arrivals: bench-%:  ## one of those that serve
	.venv/bin/python -m benchmarks.serve $*

bench-transfer:  ## the hand-off between two processes; against NIXL where bench-opponents was made
	.venv/bin/python -m benchmarks.transfer

bench-simulate:  ## what placement reaches in simulation; ten minutes
	.venv/bin/python -m benchmarks.simulate

# Every bound of the router; about twenty minutes, on a quiet machine; QUICK=--quick only shows that it all runs, nothing is kept.
bench-router: checkpoint  ## the router with fake workers, beside sglang-router, vllm-router and Dynamo; installs them (200 MB)
	benchmarks/router/setup
	.venv/bin/python -m benchmarks.router $(QUICK)

bench-http-load: ## guidellm, a load tool that nobody here wrote, against `splitfire up pico`; installs it (1.5 GB); QUICK=--quick as above
	benchmarks/http_load/setup
	.venv/bin/python -m benchmarks.http_load $(QUICK)

bench-scheduler: ## what a step costs beside the model
	.venv/bin/python -m benchmarks.scheduler

# Every bound of the engine; one to two hours; QUICK=--quick only shows that it all runs, nothing is kept.
TURNS ?= 3
bench-engine: checkpoint  ## the engine beside its floors, and beside vLLM and OpenVINO GenAI; installs them (5 GB)
	benchmarks/setup_opponents vllm openvino
	.venv/bin/python -m benchmarks.engine $(QUICK)
	.venv/bin/python -m benchmarks.scheduler $(QUICK)
	.venv/bin/python -m benchmarks.serve both-cores --turns=$(TURNS) $(QUICK)
	.venv/bin/python -m benchmarks.serve one-core-each --turns=$(TURNS) $(QUICK)
	.venv/bin/python -m benchmarks.serve interference --turns=1 --warmup=0 $(QUICK)
	.venv/bin/python -m benchmarks.serve prefix --turns=$(TURNS) $(QUICK)
	.venv/bin/python -m benchmarks.serve memory $(QUICK)
	.venv/bin/python -m benchmarks.speculation --no-widths $(QUICK)
	.venv/bin/python -m benchmarks.speculation --model build/checkpoints/smol135 --no-widths --turns=3 --output=128 $(QUICK)

checkpoint:      ## random weights in the shape of SmolLM2-135M, under build/
	.venv/bin/python -m benchmarks.make_checkpoint smol135

bench-opponents: ## what the benchmarks compare with, in environments of their own under build/
	benchmarks/setup_opponents

pico:            ## train the built-in models again (hours)
	.venv/bin/python models/train_pico.py data
	.venv/bin/python models/train_pico.py train --compile --tokens 20e6
	.venv/bin/python models/train_pico.py draft --compile --tokens 5e6
	.venv/bin/python models/train_pico.py eval

clean:
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache build *.egg-info
