# The README's commands, for habit.
.PHONY: demo test lint bench crash-cycles

demo: ; ./scripts/demo
test: ; ./scripts/test
lint: ; ./scripts/lint.sh
bench: ; ./scripts/bench
crash-cycles: ; ./scripts/crash-cycles $(N)
