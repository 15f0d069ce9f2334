# Everything is in dev.py; `make test ARGS="-k gpt"` hands arguments on.
PYTHON ?= python3
ARGS ?=

.PHONY: example test lint env
example test lint env:
	$(PYTHON) dev.py $@ $(ARGS)
