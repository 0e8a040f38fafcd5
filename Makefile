# The README's commands, for habit.
.PHONY: demo test test-firecracker lint bench bench-slots fuzz crash-cycles soak install uninstall test-packaging

export PREFIX ?= /usr/local
export DESTDIR ?=

demo: ; ./scripts/demo
test: ; ./scripts/test
test-firecracker: ; ./scripts/test-firecracker
lint: ; ./scripts/lint.sh
bench: ; ./scripts/bench
# Network slots alone, in namespaces of their own; a minute. As root.
bench-slots: ; cargo build --release -p clawpot-net --example slots && target/release/examples/slots 1000 bench/results-slots.json
fuzz: ; ./scripts/fuzz
crash-cycles: ; ./scripts/crash-cycles $(N)
# More of the simulator than scripts/test has: make soak N=5000000 FROM=1000
soak: ; cargo run --profile sim -p clawpot-simulator -- --operations $(or $(N),5000000) --from $(or $(FROM),0) --all-failpoints
# ARGS=--enable starts the server too.
install: ; @BIN_DIR='$(BIN_DIR)' ./packaging/install.sh install $(ARGS)
uninstall: ; @./packaging/install.sh uninstall
# In a VM of its own, with systemd as PID 1 (utils/devvm); minutes.
test-packaging: ; ./packaging/test-in-vm
