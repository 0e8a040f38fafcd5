# The README's commands, for habit.
.PHONY: demo test lint bench

demo: ; ./scripts/demo
test: ; ./scripts/test
lint: ; ./scripts/lint.sh
bench: ; ./scripts/bench
