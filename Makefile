PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin

.PHONY: proto
proto: ## regenerate services/lathe/v1 from proto/
	PATH=$(CURDIR)/$(BIN):$$PATH $(BIN)/python -m grpc_tools.protoc -I proto --python_out=services --grpc_python_out=services \
		--mypy_out=readable_stubs:services --mypy_grpc_out=services proto/lathe/v1/*.proto
