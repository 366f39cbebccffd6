"""The command that compiles the tokenizer's machine code ahead of time, such as when an image is built."""

from ..errors import UserError


def tokenizer_warm() -> None:
    """Compile the tokenizer's loops for this machine, so that later processes load them."""
    import time

    from ..tokenizer.compiled import jit, store

    folder = store.writable_folder()
    if folder is None:
        raise UserError("cannot store machine code: no cache folder is writable; set NUMBA_CACHE_DIR")
    start = time.perf_counter()
    num_compiled = jit.load(jit.ALL)
    seconds = time.perf_counter() - start
    num_copied = store.collect(folder)
    copied = f"; {num_copied} copied from other folders" if num_copied else ""
    if num_compiled:
        print(f"compiled {num_compiled} functions in {seconds:.1f} s, stored in {folder}{copied}")
    else:
        print(f"all {len(jit.ALL)} functions are in {folder}; loaded in {seconds:.1f} s{copied}")
