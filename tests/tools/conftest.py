"""What all tests of the tools need."""

import signal

# A shell's background job has SIGINT ignored, and what it starts inherits that; these tests press Ctrl-C.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
